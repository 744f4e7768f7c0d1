"""Ctrl-C and SIGTERM of a command that has workers: it stops at a good moment, or at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from pipeline.compose import Terminated


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


def interruption(number: int, message: str) -> KeyboardInterrupt:
    """What a signal ends the command with."""
    kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
    return kind(message)
