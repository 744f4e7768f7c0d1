"""Real servers on 127.0.0.1, which tests start, take away and bring back."""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

POSTGRESQL = Path("/usr/lib/postgresql/15/bin")
GUARDED = "guarded"  # role whose members PostgreSQL asks for their password


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Postgresql:
    """A server of its own, which is removed in the end. Needs its programs, and root to be it.

    Args:
        connections: At once, at most.

    Attributes:
        folder: Of all that it has.
        port: Where it answers.
    """

    def __init__(self, *, connections: int = 100) -> None:
        self.connections = connections
        self.folder = Path(tempfile.mkdtemp())  # not pytest's own, which is root's alone
        shutil.chown(self.folder, "postgres")
        self.port = free_port()
        self._numbers = itertools.count()
        self.program("initdb", "-D", f"{self.folder}/data", "--auth=trust")
        # Of these rules the first that fits is the one that holds.
        rules = self.folder / "data" / "pg_hba.conf"
        asked = f"host all +{GUARDED} 127.0.0.1/32 scram-sha-256\n"
        rules.write_text(asked + rules.read_text(encoding="utf-8"), encoding="utf-8")
        self.control("start")
        self.program("createuser", *self.here, GUARDED)

    @property
    def here(self) -> list[str]:
        """Arguments of its programs that lead to it."""
        return ["-h", "127.0.0.1", "-p", str(self.port)]

    @property
    def process(self) -> int:
        """Of the server: the parent of all of its others."""
        return int((self.folder / "data" / "postmaster.pid").read_text().split()[0])

    def program(self, name: str, *arguments: str) -> None:
        command = ["runuser", "-u", "postgres", "--", str(POSTGRESQL / name), *arguments]
        subprocess.run(command, check=True, cwd=self.folder, stdout=subprocess.DEVNULL)

    def control(self, *arguments: str) -> None:
        data, log = str(self.folder / "data"), str(self.folder / "log")
        options = f"-p {self.port} -h 127.0.0.1 -k {self.folder} -N {self.connections}"
        self.program("pg_ctl", "-D", data, "-w", "-l", log, "-o", options, *arguments)

    def new_database(self) -> str:
        """Creates an empty database and gives its address."""
        name = f"store{next(self._numbers)}"
        self.program("createdb", *self.here, name)
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{name}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if (self.folder / "data" / "postmaster.pid").exists():
            self.control("-m", "immediate", "stop")
        shutil.rmtree(self.folder)


class MLflowServer:
    """`mlflow server`, with its files in a folder.

    Args:
        folder: Is created.
        backend: Address of its database; SQLite in the folder unless given.
        names: Of hosts that it answers as, beyond its own.
    """

    def __init__(self, folder: Path, backend: str | None = None, *, names: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.names = folder, names
        self.backend = backend or f"sqlite:///{self.database}"
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def database(self) -> Path:
        """Its file in SQLite."""
        return self.folder / "mlflow.db"

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it; it answers some ten seconds later."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                    *("--host", "127.0.0.1", "--port", str(self.port)),
                    *("--backend-store-uri", self.backend),
                    *("--artifacts-destination", str(self.folder / "artifacts")),
                    *(("--allowed-hosts", f"127.0.0.1:*,{self.names}") if self.names else ()),
                ],
                cwd=self.folder,
                env={
                    **os.environ,
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 15 processes otherwise
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as response:
                return bool(response.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def wait(self, *, limit: float = 120) -> None:
        """Waits until it answers."""
        deadline = time.monotonic() + limit
        while not self.answers:
            assert time.monotonic() < deadline, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.1)

    def kill(self) -> None:
        """With all its processes."""
        if self.process is not None:
            self.send(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def send(self, number: int) -> None:
        """Sends a signal to all its processes."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def __enter__(self) -> Self:
        self.start()
        self.wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
