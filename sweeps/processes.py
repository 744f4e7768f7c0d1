"""A worker: a process of its own, with a pipe of its own.

Pools share more: one worker killed at the wrong moment breaks all of a `ProcessPoolExecutor`, and
holds the lock of `pebble`'s common pipe for ever.
"""

import contextlib
import ctypes
import functools
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver, popen_forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent ends

LIBRARIES = ("sweeps.libraries",)  # modules that the server of this process imports

_SPAWN = multiprocessing.get_context("spawn")
_FORK = multiprocessing.get_context("forkserver")
_SERVER_GONE = 256  # as exit code, which none is: there is no server that could tell it
_SOON = 1.0  # seconds that what takes milliseconds may take on a busy machine
_serving: set[int] = set()  # servers that have imported all, by their process numbers


class WorkerDiedError(RuntimeError):
    """The worker ended before its job was done."""


class WorkerLostError(WorkerDiedError):
    """Lost with its machine or its server, or before it had a job: not of that job's doing."""


class _Popen(popen_forkserver.Popen):
    """Python's own, which two threads may ask at once, and which tells a lost server from a 255."""

    def __init__(self, process: multiprocessing.process.BaseProcess) -> None:
        self._asking = threading.Lock()
        super().__init__(process)

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        timeout = 0 if flag == os.WNOHANG else None
        with self._asking:
            if self.returncode is None and multiprocessing.connection.wait(
                [self.sentinel], timeout
            ):
                try:
                    self.returncode = forkserver.read_signed(self.sentinel)
                except (OSError, EOFError):
                    self.returncode = _SERVER_GONE
        return self.returncode


class _Forked(ForkServerProcess):
    @staticmethod
    def _Popen(process: multiprocessing.process.BaseProcess) -> _Popen:  # noqa: N802 (Python's)
        return _Popen(process)


class Process:
    """A worker on this machine.

    Args:
        warm_up: Called in it before its first job.
        environment: Variables of its environment.
        imports: Modules that it has from the server that it is forked from, as its first job comes.
            A process has one server, which begins to import with the first worker. None: the
            worker starts here and now, from nothing.
    """

    def __init__(
        self,
        warm_up: Callable[[], None],
        environment: Mapping[str, str],
        imports: Sequence[str] | None,
    ) -> None:
        self._warm_up, self._environment = warm_up, dict(environment)
        self._process: multiprocessing.process.BaseProcess | None = None
        self._starting = threading.Lock()
        self._is_warm = self._is_interrupted = False
        self._is_forked = imports is not None and _has_server(imports)
        if not self._is_forked:
            self._start()

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
            if not self._is_warm:
                self._wait_until_warm()
            self._pipe.send_bytes(request)
            return self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._how_it_died(error) from error

    def _start(self) -> None:
        if self._is_interrupted:
            raise WorkerLostError("no worker starts any more: they were interrupted.")
        context, kind = (_FORK, _Forked) if self._is_forked else (_SPAWN, _SPAWN.Process)
        self._pipe, theirs = context.Pipe()
        arguments = theirs, self._warm_up, self._environment
        process = kind(target=_work, args=arguments, daemon=True)
        with self._starting, _sigint_blocked():
            try:
                process.start()  # which waits until the server has imported all
            except (EOFError, ConnectionError):  # of one that is just ending
                time.sleep(0 if self._is_interrupted else 1)
                if self._is_interrupted:
                    raise
                process.start()
            if self._is_forked:
                _serving.add(_server())
        theirs.close()
        self._process = process
        if self._is_interrupted:  # meanwhile
            process.kill()

    def _wait_until_warm(self) -> None:
        if failure := self._pipe.recv():
            raise WorkerLostError(f"a worker could not start: {failure}")
        self._is_warm = True

    def _how_it_died(self, error: Exception) -> WorkerDiedError:
        if self._process is None:
            reason = str(error) or "the server that it is forked from has ended"
            return WorkerLostError(f"a worker could not start: {reason}.")
        self._process.join(1)
        number, code = self._process.pid, self._process.exitcode
        if self._is_forked and code == _SERVER_GONE:
            return WorkerLostError(
                f"worker process {number} ended with the server that it was forked from."
            )
        told = f"worker process {number} died (exit code {code})"
        if not self._is_warm:
            return WorkerLostError(f"{told} before it had a job.")
        return WorkerDiedError(f"{told}.")

    @property
    def is_alive(self) -> bool:
        """Or will be, as its first job comes; asked of a worker that has none.

        As it ends its pipe does, before its server may have told.
        """
        if self._process is None:
            return True
        has_ended = self._is_warm and self._pipe.poll()  # until then, it says that it is warm
        return self._process.is_alive() and not has_ended

    def interrupt(self) -> None:
        """Has a job end itself, and the worker after it."""
        self._is_interrupted = True
        if self._process is None:
            if self._starting.locked() and _server() not in _serving:
                _kill_server()  # which has seconds of imports to go, and no worker yet
        elif self._process.is_alive():
            if self._is_warm:
                self._process.terminate()
            else:
                self._process.kill()

    def end(self, deadline: float) -> None:
        """Waits until the worker has ended, then kills it. It was interrupted before.

        Args:
            deadline: As of `time.monotonic`.
        """
        while not self._starting.acquire(timeout=max(_SOON, deadline - time.monotonic())):
            _kill_server()
        self._starting.release()
        if self._process is None:
            return
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self._process.is_alive():
            self._process.kill()
            self._process.join(_SOON)
        if self._is_forked and self._process.is_alive():  # as far as a server knows that is paused
            _kill_server()
            self._process.join(_SOON)


def start_server(imports: Sequence[str]) -> None:
    """Unless there is one. A server that ends takes its workers with it.

    Raises:
        OSError: None can be: Python's own has a socket in the folder of temporary files, whose path
            may be too long.
    """
    _FORK.set_forkserver_preload(["sweeps.fork_server", *imports])
    with _sigint_blocked():
        forkserver.ensure_running()


def _has_server(imports: Sequence[str]) -> bool:
    try:
        start_server(imports)
    except OSError as error:
        _tell_once(str(error))
        return False
    return True


@functools.cache
def _tell_once(reason: str) -> None:
    log.warning("each worker imports TensorFlow for itself, as no server can: %s", reason)


def _server() -> int:
    """Its process number; 0 where there is none."""
    return forkserver._forkserver._forkserver_pid or 0  # type: ignore[attr-defined]


def _kill_server() -> None:
    """With all workers that were forked from it. A next worker starts another one."""
    if number := _server():
        os.kill(number, signal.SIGKILL)


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
    failure = _failure_of(warm_up)  # until here, SIGTERM does what it did in the parent
    signal.signal(signal.SIGTERM, _stop)
    sys.unraisablehook = _stop_again
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        pipe.send(failure)
        while not (failure or _stopping):
            function, arguments = pipe.recv()
            pipe.send(_outcome(function, arguments))


def _failure_of(warm_up: Callable[[], None]) -> str:
    try:
        warm_up()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


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


def _stop_again(dropped: "sys.UnraisableHookArgs") -> None:
    """Repeats an interruption that came where Python drops it, as in a garbage collector's call."""
    if isinstance(dropped.exc_value, KeyboardInterrupt):
        _stopping.clear()
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
        sys.__unraisablehook__(dropped)


def die_with_parent() -> None:
    """Has the kernel kill this process as its parent ends, also where it is paused then.

    One that is paused would wake up later and go on to write. Of a worker, the parent is the server
    that it was forked from; of that, the thread that started it: the launcher's main one, or, after
    the death of a server, one of an executor, which ends with it.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _die_with_launcher() -> None:
    """It may have ended before."""
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        launcher.join()
        os._exit(1)
