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
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

_PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent ends

LIBRARIES = ("sweeps.libraries",)

_FORK = multiprocessing.get_context("forkserver")


class WorkerDiedError(RuntimeError):
    """The worker ended before its job was done."""


class WorkerLostError(WorkerDiedError):
    """Its machine was lost, or it was before it had a job: not of that job's doing."""


class Process:
    """A worker on this machine, which starts with its first job.

    It is forked from a server, of which this process has one, and which begins with its imports
    here and now.

    Args:
        warm_up: Called in it before its first job.
        environment: Variables of its environment.
        imports: Modules that the server imports, where it is not running yet.
    """

    def __init__(
        self,
        warm_up: Callable[[], None],
        environment: Mapping[str, str],
        imports: Sequence[str] = LIBRARIES,
    ) -> None:
        self._arguments = warm_up, environment
        self._process: multiprocessing.process.BaseProcess | None = None
        self._is_warm = self._is_told = False
        _FORK.set_forkserver_preload(["sweeps.fork_server", *imports])
        with _sigint_blocked():
            forkserver.ensure_running()

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
            if self._process is None:
                self._start()
            self._pipe.send_bytes(request)
            return self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._how_it_died() from error

    def _start(self) -> None:
        """Raises EOFError or OSError where it died before it was warm, or was not to begin."""
        if self._is_told:
            raise EOFError
        self._pipe, theirs = _FORK.Pipe()
        process = _FORK.Process(target=_work, args=(theirs, *self._arguments), daemon=True)
        with _sigint_blocked():  # also of another server, where the first has died
            process.start()
        theirs.close()
        self._process = process
        if self._is_told:  # meanwhile
            process.kill()
        self._pipe.recv_bytes()
        self._is_warm = True

    def _how_it_died(self) -> WorkerDiedError:
        if self._process is None:
            return WorkerLostError("worker process could not be started.")
        self._process.join(1)
        which = f"worker process {self._process.pid} died (exit code {self._process.exitcode})"
        if self._is_warm:
            return WorkerDiedError(f"{which}.")
        return WorkerLostError(f"{which} before it had a job.")

    @property
    def is_alive(self) -> bool:
        """Or will be, with its first job."""
        return self._process is None or self._process.is_alive()

    def interrupt(self) -> None:
        """Has a job end itself, and the worker after it."""
        self._is_told = True
        if self._process is not None:
            if self._is_warm:
                self._process.terminate()
            else:
                self._process.kill()

    def end(self, deadline: float) -> None:
        """Waits until the worker has ended, then kills it.

        Args:
            deadline: As of `time.monotonic`.
        """
        if self._process is None:
            return
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Inside, a process that is started inherits that it has SIGINT blocked, and its forks too.

    Ctrl-C in a terminal reaches every process there; the launcher alone answers it.
    """
    # Python's own, which comes with the first process, would unblock it again.
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _work(pipe: Connection, warm_up: Callable[[], None], environment: Mapping[str, str]) -> None:
    """The life of a worker: one job after another, until the pipe ends."""
    die_with_parent()
    threading.Thread(target=_die_with_launcher, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    warm_up()  # until here, SIGTERM is ignored
    signal.signal(signal.SIGTERM, _stop)
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        pipe.send_bytes(b"warm")
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


def die_with_parent() -> None:
    """Has the kernel kill this process as its parent ends, also where it is paused then.

    One that is paused would wake up later and go on to write. Of a worker, the parent is the server
    that it was forked from; of that, the thread that started it: the launcher's main one, or one of
    an executor, which outlives its workers.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _die_with_launcher() -> None:
    """It may have ended before."""
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        launcher.join()
        os._exit(1)
