"""Where workers live: processes of this machine, or the nodes of a Ray cluster.

An executor has `submit(function, *arguments) -> Future`, with the death of a worker as
`WorkerDiedError` in the future, and `stop()`. What differs is the kind of its workers.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from typing import Protocol, Self, TypeVar

from sweeps.config import ExecutorConfig, RayConfig
from sweeps.processes import LIBRARIES, Process, WorkerDiedError, WorkerLostError

__all__ = [
    "GRACE",
    "Executor",
    "LocalExecutor",
    "WorkerDiedError",
    "WorkerLostError",
    "open_executor",
]

T = TypeVar("T")

TRIES = 3  # workers that a job meets dead, before it fails itself
GRACE = 6.0  # seconds to end a trial that is told to stop, before its worker is killed


class Worker(Protocol):
    """Does one job at a time; as `sweeps.processes.Process`, which says more."""

    def when_placed(self, tell: Callable[[], None]) -> None:
        """Calls, once the worker has room on a machine or never will have."""

    def exchange(self, request: bytes) -> bytes: ...

    @property
    def is_alive(self) -> bool: ...

    def interrupt(self) -> None: ...

    def end(self, deadline: float) -> None: ...


class Executor:
    """Warm workers, one job at a time each; one that dies is replaced.

    Args:
        workers: How many.
        start: Makes one.
    """

    def __init__(self, workers: int, start: Callable[[], Worker]) -> None:
        self._start, self._stopped = start, False
        self._replacing = threading.Lock()
        self._workers: dict[int, Worker] = {}
        self._idle: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="worker")
        for number in range(workers):
            self._begin(number)

    @property
    def workers(self) -> int:
        return len(self._workers)

    def _begin(self, number: int) -> None:
        worker = self._workers[number] = self._start()
        worker.when_placed(lambda: self._idle.put(number))

    def submit(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        """Executes a module's function in a worker, as soon as one is idle."""
        return self._threads.submit(self._execute, function, *arguments)

    def _execute(self, function: Callable[..., T], *arguments: object) -> T:
        number = self._take()
        try:
            request = ForkingPickler.dumps((function, arguments))
            reply = self._workers[number].exchange(bytes(request))
        except WorkerDiedError:
            self._replace(number)
            raise
        except BaseException:
            self._idle.put(number)
            raise
        self._idle.put(number)
        succeeded, result = ForkingPickler.loads(reply)
        if succeeded:
            return result  # type: ignore[no-any-return]
        raise result

    def _take(self) -> int:
        """A worker that is idle; one that died so is replaced.

        Raises:
            WorkerLostError: Those that replace one another die too: perhaps none can start.
        """
        for _ in range(TRIES):
            number = self._idle.get()
            if self._stopped or self._workers[number].is_alive:
                return number
            self._replace(number)
        raise WorkerLostError(f"{TRIES} workers, one after another, died before they had a job.")

    def _replace(self, number: int) -> None:
        with self._replacing:
            try:
                if not self._stopped:
                    self._begin(number)
                    return
            except BaseException:
                self._idle.put(number)  # for the next job to replace it
                raise
            self._idle.put(number)  # for the next job to fail

    def interrupt(self) -> None:
        """Tells every job to stop; its future says how it did. No worker is replaced any more."""
        with self._replacing:  # or a worker that is just being made would be missed
            self._stopped = True
        for worker in self._workers.values():
            worker.interrupt()

    def stop(self, grace: float = GRACE) -> None:
        """Ends the workers; those with a job under way are killed after some seconds of grace."""
        self.interrupt()
        deadline = time.monotonic() + grace
        for worker in self._workers.values():
            worker.end(deadline)
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop(grace=0)  # all jobs are done, or not worth the wait


class LocalExecutor(Executor):
    """Warm processes on this machine.

    Args:
        workers: Number of processes.
        warm_up: Called in each before its first job.
        imports: As of `sweeps.processes.Process`.
    """

    def __init__(
        self, workers: int, warm_up: Callable[[], None], imports: Sequence[str] | None = LIBRARIES
    ) -> None:
        environment = dict(os.environ)  # as it is now, not while a request changes it for itself
        super().__init__(workers, lambda: Process(warm_up, environment, imports))


def open_executor(
    config: ExecutorConfig,
    warm_up: Callable[[], None],
    *,
    name: str,
    threads: int,
    most: int,
    addresses: Mapping[str, str | None],
) -> Executor:
    """Starts the workers of a sweep or a promotion.

    Args:
        config: Which executor.
        warm_up: Called in each worker before its first job.
        name: Of the sweep or the promotion, which this process holds.
        threads: Of a job.
        most: Jobs to do: more workers are not started.
        addresses: Of the stores that the workers write to, by their keys; None: a local one.

    Raises:
        ValueError: The cluster has no room for such a worker, or its nodes could not reach a store.
        OSError: There is no such cluster.
    """
    if isinstance(config, RayConfig) and most:
        from sweeps.ray_executor import RayExecutor

        return RayExecutor(
            config, warm_up, name=name, threads=threads, most=most, addresses=addresses
        )
    return LocalExecutor(min(config.count(threads) or 1, most), warm_up)
