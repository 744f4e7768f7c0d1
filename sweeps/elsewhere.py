"""A trial on a machine whose files the launcher may not see.

There a worker keeps checkpoints and the spool for itself, leaves nothing untold, and trusts nothing
that an earlier try left untold: the launcher may have had another node go on with that trial.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline.database import patiently

if TYPE_CHECKING:
    from sweeps.trial import Training

T = TypeVar("T", bound="Training")


def settle_in(job: T) -> T:
    """The job with folders of this machine: those of a file system that is shared, if there is."""
    folder = job.run.store.directory
    folder = folder if folder.is_dir() else _scratch()
    run = replace(job.run, store=replace(job.run.store, directory=folder))
    checkpoint = folder / "checkpoints" / run.run_id / job.checkpoint.name
    if not run.spool.is_empty:  # a launcher that saw it would have told the store
        with run.spool.lock():
            run.spool.keep([])
        shutil.rmtree(checkpoint.parent, ignore_errors=True)  # which is ahead of the store
    return replace(job, run=run, checkpoint=checkpoint)


def tell_all(job: Training) -> None:
    """Waits until the store knows all of a run that has ended, and clears up after it.

    Raises:
        pipeline.database.AwayError: The store is away, for longer than there is patience.
        Exception: It refuses something.
    """
    from pipeline.store import is_away
    from pipeline.tracking import replay

    uri = job.run.store.uri
    tell, away = partial(replay, job.run.spool, uri), partial(is_away, uri=uri)
    patiently(tell, away, uri, seconds=job.patience)
    shutil.rmtree(job.checkpoint.parent, ignore_errors=True)


def _scratch() -> Path:
    """A folder of this user alone.

    Raises:
        PermissionError: It is another user's.
    """
    folder = Path(tempfile.gettempdir()) / f"digit-sweeps-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user.")
    return folder
