"""The store: first use by several processes at once, a full disk, a server."""

import multiprocessing
import sqlite3
import subprocess
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import sqlalchemy

from pipeline.config import RunConfig, TrackingConfig

Configure = Callable[..., RunConfig]

PROCESSES = 4
ROUNDS = 20
POSTGRESQL_ROUNDS = 5


def open_stores(configs: list[TrackingConfig], start: Barrier) -> None:
    """In a process of its own: opens each store at the same time as the others do."""
    from pipeline.store import open_store

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


def test_a_postgresql_store_is_first_used_by_several_processes_at_once(
    configure: Configure, tmp_path: Path, new_database: Callable[[], str]
) -> None:
    config = replace(configure("data=digits").tracking, directory=str(tmp_path))
    configs = [replace(config, uri=new_database()) for _ in range(POSTGRESQL_ROUNDS)]

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


@pytest.mark.parametrize(
    ("path", "dirty"),
    [("notes.md", "false"), ("images/seven.png", "false"), ("pipeline/a.py", "true")],
)
def test_the_code_has_changes_where_a_file_of_the_product_has(
    configure: Configure,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    dirty: str,
) -> None:
    from pipeline import tracking
    from pipeline.data import load

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    git("init")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "first")
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text("changed", encoding="utf-8")
    monkeypatch.setattr(tracking, "ROOT", tmp_path)
    monkeypatch.setattr(tracking, "_git", tracking._git.__wrapped__)
    config = configure("data=digits")

    tags = tracking.environment(config, load(config.data))

    assert tags["git.dirty"] == dirty
