"""The command line of a sweep: `python -m sweeps.run`."""

import sys

if __name__ == "__main__":
    from sweeps.processes import LIBRARIES, start_server

    given = sys.argv[1:]
    if not any(word.startswith("-") or word == "executor=ray" for word in given):  # - as in --help
        start_server(LIBRARIES)  # of the workers: its imports take longest, so they begin first

    from pipeline import fast_imports

    with fast_imports():
        from sweeps.sweep import command
    command(given)
