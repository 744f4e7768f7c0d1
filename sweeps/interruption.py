"""Ctrl-C and SIGTERM of a command that has workers: it stops at a good moment, or at once."""

import signal
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from rich.console import Console

from pipeline.compose import Terminated
from sweeps.executors import GRACE

T = TypeVar("T")

_STEP = 0.2  # seconds


@contextmanager
def held_signals(console: Console, command: str) -> Iterator[list[int]]:
    """Collects the first Ctrl-C or SIGTERM; a second one interrupts at once.

    Args:
        console: Told that it stops.
        command: Command line that goes on.
    """
    received: list[int] = []

    def hold_back(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise interruption(number, f"Stopped at once. Go on with: {command}")
        console.print("Stopping at the end of the batch; once more to stop at once.")

    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, hold_back) for number in handled}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_for_ends(
    futures: Collection[Future[T]], received: Sequence[int]
) -> tuple[set[Future[T]], set[Future[T]]]:
    """Waits for jobs that were told to stop: some seconds, or until a second signal.

    In steps: one that comes right before a wait is handled after it only.

    Args:
        futures: Of the jobs.
        received: Signals; grows meanwhile.

    Returns:
        Those that are done, and those that are not.
    """
    deadline = time.monotonic() + GRACE
    done, running = wait(futures, timeout=0)
    while running and len(received) < 2 and time.monotonic() < deadline:
        done, running = wait(futures, timeout=_STEP)
    return done, running


def interruption(number: int, message: str) -> KeyboardInterrupt:
    """What a signal ends the command with."""
    kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
    return kind(message)
