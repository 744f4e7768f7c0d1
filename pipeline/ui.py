"""MLflow's UI on a local store: `python -m pipeline.ui`."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from pipeline.compose import Terminated, run_cli
from pipeline.config import UIConfig, without_password
from pipeline.console import open_console
from pipeline.database import analyze, sqlite_path
from pipeline.pages import RUNS, RUNS_KEY, run_page, runs_page

console = open_console()

HOST = "127.0.0.1"
LATEST = 5  # runs whose addresses are printed
PATIENCE = 120  # seconds for MLflow's server to start
_LINK = re.compile(r"\[([^]]+)\]\((#[^)]+)\)")  # in the Markdown that describes a run
# A server and what it starts, until its input is closed: as ours is, however we end.
_UNTIL_CLOSED = '("$@"; kill -KILL 0) & cat >/dev/null; kill -KILL 0'


def _pages(run_id: str | None) -> Iterator[tuple[str, str]]:
    """What is worth opening: a title and its page."""
    from pipeline.store import NOTE, experiments, read_run, save_view, search

    if run_id:
        run = read_run(run_id)
        yield run.name, run_page(run.experiment_id, run.run_id)
        yield from _LINK.findall(run.tags.get(NOTE, ""))
        return
    names = experiments()
    latest = list(search("tags.`mlflow.parentRunId` IS NULL", limit=LATEST))
    for experiment_id in dict.fromkeys(run.experiment_id for run in latest):
        save_view(experiment_id, RUNS_KEY, RUNS)
        yield f"experiment {names[experiment_id]}", runs_page(experiment_id, RUNS_KEY)
    yield from ((run.name, run_page(run.experiment_id, run.run_id)) for run in latest)


@contextmanager
def serve(uri: str, port: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Inside, MLflow's UI listens on this machine alone.

    Args:
        uri: Address of the tracking store's database.
        port: Of which the next free one is taken.

    Yields:
        Its address, and its process.

    Raises:
        ConnectionError: It did not start; the message is its own.
    """
    while _is_taken(port):
        port += 1
    options = ["--host", HOST, "--port", str(port), "--workers", "1"]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            ["sh", "-c", _UNTIL_CLOSED, "sh", sys.executable, "-m", "mlflow", "ui", *options],
            env={
                **os.environ,
                "MLFLOW_BACKEND_STORE_URI": uri,  # where other users do not see its password
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 15 processes, 2 GiB otherwise
            },
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
        try:
            if not _is_healthy(f"http://{HOST}:{port}/health", process):
                said.seek(0)
                lines = said.read().decode(errors="replace").split("\n")
                last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
                raise ConnectionError(f"MLflow's UI did not start: {without_password(last)}")
            yield f"http://{HOST}:{port}", process
        finally:
            with suppress(ProcessLookupError):  # at once: a download under way would hold it up
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_taken(port: int) -> bool:
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just closed
        try:
            free.bind((HOST, port))
        except OSError:
            return True
    return False


def _is_healthy(address: str, process: subprocess.Popen[bytes]) -> bool:
    """Waits until the server answers, or has ended."""
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        with suppress(OSError), urllib.request.urlopen(address, timeout=2):
            return True
        time.sleep(0.2)
    return False


def main(config: UIConfig, overrides: list[str]) -> None:
    with ExitStack() as stack:
        with console.status("starting MLflow's UI"):
            from pipeline.store import connect, is_server

            uri = connect(config.tracking)
            pages = list(_pages(config.run))
            if is_server(uri):
                _print(without_password(uri).rstrip("/"), pages)
                return
            if database := sqlite_path(uri):
                analyze(database)
            address, process = stack.enter_context(serve(uri, config.port))
        try:
            if not address.endswith(f":{config.port}"):
                console.print(f"Port {config.port} is taken.")
            _print(address, pages)
            console.print("Ctrl-C ends it.")
            process.wait()
        except Terminated:
            raise Terminated("MLflow's UI has ended.") from None
        except KeyboardInterrupt:
            return
        raise ConnectionError("MLflow's UI has ended by itself.")


def _print(address: str, pages: list[tuple[str, str]]) -> None:
    width = max((len(title) for title, _ in pages), default=0)
    for title, page in [*pages, ("home", "")]:
        console.print(f"{title:{width}}  {address}/{page}")


if __name__ == "__main__":
    run_cli("ui", UIConfig, main, interrupted="MLflow's UI was not started.")
