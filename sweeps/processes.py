"""A worker: a process of its own, with a pipe of its own.

Pools share more: one worker killed at the wrong moment breaks all of a `ProcessPoolExecutor`, and
holds the lock of `pebble`'s common pipe for ever.
"""

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

_PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent ends

_SPAWN = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork


class WorkerDiedError(RuntimeError):
    """The worker ended before its job was done."""


class WorkerLostError(WorkerDiedError):
    """Its machine was lost, or it was before it had a job: not of that job's doing."""


class Process:
    """A worker on this machine.

    Args:
        warm_up: Called in it before its first job.
    """

    def __init__(self, warm_up: Callable[[], None]) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_work, args=(theirs, warm_up), daemon=True)
        # Ctrl-C in a terminal reaches every process there; the launcher alone answers it. A
        # process inherits what its starting thread has blocked. Python's own tracker, which comes
        # with the first process, would unblock it again, so it is started before.
        resource_tracker.ensure_running()
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()

    def when_placed(self, tell: Callable[[], None]) -> None:
        tell()  # there is always room on this machine

    def exchange(self, request: bytes) -> bytes:
        """Has it do a job.

        Args:
            request: The pickled function, and its arguments.

        Returns:
            Whether it returned, and what it returned or raised, pickled.

        Raises:
            WorkerDiedError: It ended before.
        """
        try:
            self._pipe.send_bytes(request)
            return self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            self._process.join(1)
            process, code = self._process.pid, self._process.exitcode
            raise WorkerDiedError(f"worker process {process} died (exit code {code}).") from error

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def interrupt(self) -> None:
        """Has a job end itself, and the worker after it."""
        self._process.terminate()

    def end(self, deadline: float) -> None:
        """Waits until the worker has ended, then kills it.

        Args:
            deadline: As of `time.monotonic`.
        """
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _work(pipe: Connection, warm_up: Callable[[], None]) -> None:
    """The life of a worker: one job after another, until the pipe ends."""
    # One that is paused would wake up later and go on to write. (The parent is the thread that
    # started this process: the main one, or one of the executor's, which outlive their workers.)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_die_with_parent, daemon=True).start()  # it may have ended before
    warm_up()  # until here, SIGTERM ends the process at once
    signal.signal(signal.SIGTERM, _stop)
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        while not _stopping:
            function, arguments = pipe.recv()
            pipe.send(_outcome(function, arguments))


def _outcome(function: Callable[..., Any], arguments: tuple[object, ...]) -> tuple[bool, Any]:
    try:
        return True, function(*arguments)
    except Exception as error:
        return False, error


_stopping: list[int] = []  # signals received, in a worker


def _stop(signum: int, frame: FrameType | None) -> None:
    """Interrupts the job once: what follows is its clean end."""
    _stopping.append(signum)
    if len(_stopping) == 1:
        raise KeyboardInterrupt


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
