"""What the fork server of `sweeps.processes` imports for all workers, as it takes seconds.

It uses none of it: TensorFlow survives a fork until it is first used, which starts its threads.
"""

from contextlib import suppress

from pipeline import fast_imports, import_libraries

with suppress(Exception):  # a worker meets it too, and tells
    import_libraries()
    with fast_imports():
        import pipeline.run  # noqa: F401
        import sweeps.trial  # noqa: F401
