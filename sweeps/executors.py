"""Where workers live.

An executor has `submit(function, *arguments) -> Future`, with the death of a worker as
`WorkerDiedError` in the future, and `stop()`.

Its processes are our own, one pipe each, because pools share more: one worker killed at the wrong
moment breaks all of a `ProcessPoolExecutor`, and holds the lock of `pebble`'s common pipe for ever.
"""

import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, Self, TypeVar

T = TypeVar("T")

GRACE = 6.0  # seconds to end a trial that is told to stop, before its worker is killed

_PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent ends

_SPAWN = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork


class WorkerDiedError(RuntimeError):
    """The worker ended before its job was done."""


class LocalExecutor:
    """Warm processes on this machine, one job at a time each; one that dies is replaced.

    Args:
        workers: Number of processes.
        warm_up: Called in each before its first job.
    """

    def __init__(self, workers: int, warm_up: Callable[[], None]) -> None:
        self._warm_up = warm_up
        self._stopped = False
        self._replacing = threading.Lock()
        self._workers = [_Worker(warm_up) for _ in range(workers)]
        self._idle: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(workers):
            self._idle.put(number)
        self._threads = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="worker")

    def submit(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        """Executes a module's function in a worker, as soon as one is idle."""
        return self._threads.submit(self._execute, function, *arguments)

    def _execute(self, function: Callable[..., T], *arguments: object) -> T:
        number = self._idle.get()
        try:
            if not self._workers[number].is_alive:  # it died idle: not of this job
                self._replace(number)
            return self._workers[number].execute(function, *arguments)
        except WorkerDiedError:
            self._replace(number)
            raise
        finally:
            self._idle.put(number)

    def _replace(self, number: int) -> None:
        with self._replacing:
            if not self._stopped:
                self._workers[number] = _Worker(self._warm_up)

    def interrupt(self) -> None:
        """Tells every job to stop; its future says how it did. No worker is replaced any more."""
        with self._replacing:  # or a worker that is just being made would be missed
            self._stopped = True
        for worker in self._workers:
            worker.interrupt()

    def stop(self, grace: float = GRACE) -> None:
        """Ends the workers; those with a job under way are killed after some seconds of grace."""
        self.interrupt()
        deadline = time.monotonic() + grace
        for worker in self._workers:
            worker.end(deadline)
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop(grace=0)  # all jobs are done, or not worth the wait


class _Worker:
    """A process and the pipe to it."""

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

    def execute(self, function: Callable[..., T], *arguments: object) -> T:
        try:
            self._pipe.send((function, arguments))
            succeeded, result = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(1)
            process, code = self._process.pid, self._process.exitcode
            raise WorkerDiedError(f"worker process {process} died (exit code {code}).") from error
        if succeeded:
            return result  # type: ignore[no-any-return]
        raise result

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def interrupt(self) -> None:
        self._process.terminate()

    def end(self, deadline: float) -> None:
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
