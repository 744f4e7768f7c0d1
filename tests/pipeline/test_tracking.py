"""The store: first use by several processes at once, a full disk, a server."""

import multiprocessing
import os
import shutil
import socket
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import sqlalchemy

from pipeline.config import RunConfig, TrackingConfig

Configure = Callable[..., RunConfig]
Need = Callable[[object, str], None]

PROCESSES = 4
ROUNDS = 20
POSTGRESQL_ROUNDS = 5
PROGRAMS = Path("/usr/lib/postgresql/15/bin")


def open_stores(configs: list[TrackingConfig], start: Barrier) -> None:
    """In a process of its own: opens each store at the same time as the others do."""
    from pipeline.tracking import open_store

    for config in configs:
        start.wait(timeout=120)
        open_store(config)


def open_at_once(configs: list[TrackingConfig]) -> list[int | None]:
    """Opens the stores one after another, each in all processes at once; their exit codes."""
    context = multiprocessing.get_context("spawn")
    arguments = (configs, context.Barrier(PROCESSES))
    processes = [context.Process(target=open_stores, args=arguments) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    return [process.exitcode for process in processes]


def test_a_store_is_first_used_by_several_processes_at_once(
    configure: Configure, tmp_path: Path
) -> None:
    config = configure("data=digits").tracking
    folders = [tmp_path / str(number) for number in range(ROUNDS)]

    assert open_at_once([replace(config, directory=str(folder)) for folder in folders]) == (
        [0] * PROCESSES
    )

    for folder in folders:
        database = sqlite3.connect(folder / "mlflow.db")
        names = database.execute("SELECT name FROM experiments ORDER BY name").fetchall()
        (integrity,) = database.execute("PRAGMA integrity_check").fetchone()
        database.close()
        assert (names, integrity) == ([("Default",), ("digits",)], "ok")
        left = {path.name for path in folder.iterdir()} - {"mlflow.db-wal", "mlflow.db-shm"}
        assert left == {"mlflow.db", ".create.lock", ".reserve"}


@pytest.fixture
def postgresql(tmp_path: Path, need: Need) -> Iterator[str]:
    """Address of a real server with empty databases `store0`, `store1`, ..."""
    need(PROGRAMS.exists() and os.geteuid() == 0, "PostgreSQL 15's programs, and root to be it")
    folder = Path(tempfile.mkdtemp())  # not in tmp_path, which is root's alone
    shutil.chown(folder, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def program(*arguments: str) -> None:
        command = ["runuser", "-u", "postgres", "--", *arguments]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)

    program(f"{PROGRAMS}/initdb", "-D", f"{folder}/data", "--auth=trust")
    options = f"-p {port} -h 127.0.0.1 -k {folder}"
    server = [f"{PROGRAMS}/pg_ctl", "-D", f"{folder}/data", "-w"]
    program(*server, "-l", f"{folder}/log", "-o", options, "start")
    try:
        for number in range(POSTGRESQL_ROUNDS):
            program(f"{PROGRAMS}/createdb", "-h", "127.0.0.1", "-p", str(port), f"store{number}")
        yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/store"
    finally:
        program(*server, "-m", "immediate", "stop")
        shutil.rmtree(folder)


def test_a_postgresql_store_is_first_used_by_several_processes_at_once(
    configure: Configure, tmp_path: Path, postgresql: str
) -> None:
    config = replace(configure("data=digits").tracking, directory=str(tmp_path))
    configs = [replace(config, uri=f"{postgresql}{n}") for n in range(POSTGRESQL_ROUNDS)]

    assert open_at_once(configs) == [0] * PROCESSES

    for opened in configs:
        engine = sqlalchemy.create_engine(opened.uri or "", poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:
            names = connection.execute(sqlalchemy.text("SELECT name FROM experiments ORDER BY 1"))
            assert [name for (name,) in names] == ["Default", "digits"]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ([], "512-512 dropout=0.2 rmsprop lr=0.001 seed=0"),
        (["model=wide", "seed=7"], "1000 dropout=0.2 rmsprop lr=0.001 seed=7"),
        (["model.hidden_layers=0"], "linear dropout=0.2 rmsprop lr=0.001 seed=0"),
        (["model.hidden_layers=6", "optimizer=adam"], "512x6 dropout=0.2 adam lr=0.001 seed=0"),
        (["optimizer.learning_rate=8.123e-4"], "512-512 dropout=0.2 rmsprop lr=0.0008123 seed=0"),
    ],
)
def test_the_name_of_a_run_tells_its_settings(
    configure: Configure, settings: list[str], name: str
) -> None:
    from pipeline.tracking import run_name

    assert run_name(configure("data=digits", *settings)) == name
