"""The command line of a sweep: `python -m sweeps.run`."""

import sys
from contextlib import suppress

if __name__ == "__main__":
    from sweeps.processes import LIBRARIES, start_server

    given = sys.argv[1:]
    without = {"executor=ray", "sweep.dry_run=true"}
    if not any(word in without or word.startswith("-") for word in given):  # as --help
        # Of the workers: its imports take longest, so they begin first. Where none can be started,
        # the executor says so.
        with suppress(OSError):
            start_server(LIBRARIES)

    from pipeline import fast_imports

    with fast_imports():
        from sweeps.sweep import main
    main(given)
