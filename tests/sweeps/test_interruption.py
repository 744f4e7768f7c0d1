"""The wait for jobs that were told to stop."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import pytest

from sweeps.executors import GRACE
from sweeps.interruption import wait_for_ends


@contextmanager
def done_after(seconds: float) -> Iterator[Future[int]]:
    future: Future[int] = Future()
    timer = threading.Timer(seconds, future.set_result, [1])
    timer.start()
    yield future
    timer.cancel()


@pytest.mark.parametrize("received", [[], [2]])
def test_jobs_that_are_told_to_stop_get_the_time_for_it(received: list[int]) -> None:
    with done_after(0.5) as future:
        assert wait_for_ends({future}, received) == ({future}, set())


def test_a_second_signal_ends_the_wait_though_it_interrupts_nothing() -> None:
    received = [2]
    second = threading.Timer(0.5, received.append, [2])
    second.start()
    with done_after(GRACE - 1) as future:
        assert wait_for_ends({future}, received) == (set(), {future})


def test_there_is_no_wait_for_what_is_done() -> None:
    done: Future[int] = Future()
    done.set_result(1)
    with done_after(GRACE - 1) as future:
        assert wait_for_ends({done, future}, [2, 2]) == ({done}, {future})
