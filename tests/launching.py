"""Sweeps as a user starts them: real processes, with or without a terminal."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

ROOT = Path(__file__).resolve().parents[1]
SWEEP = [sys.executable, "-m", "sweeps.run"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160", "TERM": "xterm"}
STEP = 0.01  # seconds between two looks


def run(
    *arguments: str,
    folder: Path,
    command: Sequence[str] = SWEEP,
    timeout: float = 180,
    environment: Mapping[str, str] = ENVIRONMENT,
) -> subprocess.CompletedProcess[str]:
    """Runs a command of this repository to its end."""
    return subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def wait_until(holds: Callable[[], object], *, limit: float = 120) -> None:
    deadline = time.monotonic() + limit
    while not holds():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(STEP)


def seconds_until_none(alive: Callable[[], Sequence[psutil.Process]], *, limit: float) -> float:
    """Waits until there are no such processes; the limit when some remain.

    The time for which they were ready to run and had no core does not count: others had it.
    """
    start, lost = time.monotonic(), 0.0
    before: dict[int, float] = {}
    while processes := alive():
        for process in processes:
            waited = seconds_without_core(process.pid)
            lost = max(lost, waited - before.setdefault(process.pid, waited))
        if time.monotonic() - start - lost > limit:
            return limit
        time.sleep(STEP)
    return time.monotonic() - start - lost


def seconds_without_core(process: int) -> float:
    """For which a thread of a process was ready to run, and others had the cores: the longest."""
    waited = [0]
    for thread in Path(f"/proc/{process}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            waited.append(int(thread.read_text().split()[1]))
    return max(waited) / 1e9


def workers_of(launcher: psutil.Process) -> list[psutil.Process]:
    """Worker processes of a launcher: the forks of its server, or without one its children."""
    workers = []
    for child in launcher.children():
        if "forkserver" in " ".join(child.cmdline()):
            workers += child.children()
        elif "spawn_main" in " ".join(child.cmdline()):
            workers.append(child)
    return workers


def open_to_others(processes: Sequence[psutil.Process]) -> list[object]:
    """Addresses at which they listen, but for files that their user alone can reach."""
    addresses = [
        connection.laddr
        for process in processes
        for connection in process.net_connections("all")
        if connection.laddr and not connection.raddr
    ]
    return [each for each in addresses if not (isinstance(each, str) and _is_private(Path(each)))]


def _is_private(path: Path) -> bool:
    folder = path.parent.stat()
    return folder.st_uid == os.getuid() and not folder.st_mode & 0o077


class Started:
    """A command under way; what it writes is collected. Killed when a test fails meanwhile."""

    def __init__(
        self, *command: str, folder: Path, environment: Mapping[str, str] = ENVIRONMENT
    ) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self.process.stdout is not None
        self._collect(self.process.stdout.fileno())

    def _collect(self, source: int) -> None:
        self._pieces: list[bytes] = []
        self._reader = threading.Thread(target=self._read, args=(source,), daemon=True)
        self._reader.start()

    def _read(self, source: int) -> None:
        try:
            while piece := os.read(source, 65536):
                self._pieces.append(piece)
        except OSError:  # how a terminal says that the last process has left it
            return

    @property
    def text(self) -> str:
        """Written so far."""
        return b"".join(self._pieces).decode().replace("\r\n", "\n")

    @property
    def workers(self) -> list[psutil.Process]:
        return workers_of(psutil.Process(self.process.pid))

    def says(self, pattern: str, *, limit: float = 120) -> None:
        """Waits until the output has a line."""
        wait_until(lambda: re.search(pattern, self.text, re.M), limit=limit)

    def end(self, *, limit: float = 120) -> int:
        """Waits for the end; returns the exit status."""
        status = self.process.wait(timeout=limit)
        self._reader.join(5)
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.end()
        self._close()

    def _close(self) -> None:
        if self.process.stdout is not None:
            self.process.stdout.close()


class OnTerminal(Started):
    """A command that has a terminal of its own, of 160 columns."""

    def __init__(self, *command: str, folder: Path) -> None:
        self._master, terminal = os.openpty()
        # It becomes the session's own terminal, so that Ctrl-C reaches all that run there.
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command],
            cwd=folder,
            env=ENVIRONMENT,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
        )
        os.close(terminal)
        self._collect(self._master)

    def press_ctrl_c(self) -> None:
        os.write(self._master, b"\x03")

    def _close(self) -> None:
        os.close(self._master)


def without_escapes(text: str) -> str:
    """As it reads on the screen."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
