"""A trial on a machine whose files the launcher may not see.

There a worker keeps checkpoints and the spool for itself, leaves nothing untold, and trusts nothing
that an earlier try left untold: the launcher may have had another node go on with that trial.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from sweeps.trial import Training

T = TypeVar("T", bound="Training")

STALE = 7 * 24 * 3600  # seconds


def settle_in(job: T) -> T:
    """The job with folders of this machine: those of a file system that is shared, if there is."""
    is_shared = job.checkpoint.parent.is_dir()  # that of this run, which the launcher has made
    folder = job.run.store.directory if is_shared else _scratch()
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
    from pipeline.tracking import replay_patiently

    replay_patiently(job.run, seconds=job.patience)
    shutil.rmtree(job.checkpoint.parent, ignore_errors=True)


def _scratch() -> Path:
    """A folder of this user alone, without what was left there long ago: nobody comes for it.

    Raises:
        PermissionError: It is another user's.
    """
    folder = Path(tempfile.gettempdir()) / f"digit-sweeps-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user.")
    for left in folder.glob("*/*"):
        with suppress(OSError):  # another worker was faster
            if time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return folder
