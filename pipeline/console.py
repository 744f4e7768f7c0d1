"""Where commands print."""

import sys
from typing import IO

from rich.console import Console

WIDTH = 10_000  # characters of a line of a file: more than any table needs


def open_console(file: IO[str] | None = None) -> Console:
    """Prints on a terminal, or into a file, which has no width at which to cut a table."""
    width = None if (file or sys.stdout).isatty() else WIDTH
    return Console(file=file, highlight=False, soft_wrap=True, markup=False, width=width)
