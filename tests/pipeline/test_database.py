"""Databases that are first used by several processes, some of which are killed."""

import functools
import multiprocessing
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from pipeline.database import alone, create_sqlite, sqlite_path

PROCESSES = 4

spawn = multiprocessing.get_context("spawn")


def fill(uri: str) -> None:
    """Makes a database, and leaves a file beside its folder that says so."""
    path = sqlite_path(uri)
    assert path is not None
    (path.parents[1] / f"filled-by-{os.getpid()}").touch()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE epochs (number INTEGER)")


def fill_for_ever(filling: Event, uri: str) -> None:
    fill(uri)
    filling.set()
    time.sleep(600)


def create_at_once(path: Path, start: Barrier) -> None:
    start.wait(timeout=60)
    create_sqlite(path, fill)
    with closing(sqlite3.connect(path)) as database:
        database.execute("SELECT number FROM epochs")


def create_for_ever(path: Path, filling: Event) -> None:
    create_sqlite(path, functools.partial(fill_for_ever, filling))


def stay_alone(uri: str, inside: Event) -> None:
    with alone(uri):
        inside.set()
        time.sleep(600)


def tables(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as database:
        return [name for (name,) in database.execute("SELECT name FROM sqlite_master")]


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:////folder/optuna.db", "/folder/optuna.db"),
        ("sqlite:///optuna.db", "optuna.db"),
        ("sqlite:///sub/optuna.db?timeout=60", "sub/optuna.db"),
    ],
)
def test_a_sqlite_address_has_an_absolute_path(uri: str, path: str) -> None:
    assert sqlite_path(uri) == Path.cwd() / path


@pytest.mark.parametrize(
    "uri", ["postgresql+psycopg://host/db", "http://127.0.0.1:5000", "sqlite://", "mlruns"]
)
def test_another_address_is_no_file(uri: str) -> None:
    assert sqlite_path(uri) is None


def test_a_new_database_is_in_wal_mode_and_alone_in_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "store.db"

    create_sqlite(path, lambda uri: sqlite3.connect(uri.removeprefix("sqlite:///")).close())

    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert {each.name for each in path.parent.iterdir()} == {"store.db", ".create.lock"}


def test_a_database_that_is_there_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    path.write_bytes(b"mine")

    create_sqlite(path, fill)

    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


def test_of_several_processes_at_once_one_creates_the_database_for_all(tmp_path: Path) -> None:
    path, start = tmp_path / "store.db", spawn.Barrier(PROCESSES)
    processes = [spawn.Process(target=create_at_once, args=(path, start)) for _ in range(PROCESSES)]

    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)

    assert [process.exitcode for process in processes] == [0] * PROCESSES
    assert len(list(tmp_path.glob("filled-by-*"))) == 1


def test_a_database_that_cannot_be_filled_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "store.db"

    with pytest.raises(ZeroDivisionError):
        create_sqlite(path, lambda uri: print(1 / 0))

    assert [each.name for each in tmp_path.iterdir()] == [".create.lock"]


def test_a_creation_that_is_killed_leaves_no_database_and_does_not_block_the_next(
    tmp_path: Path,
) -> None:
    path, filling = tmp_path / "store.db", spawn.Event()
    process = spawn.Process(target=create_for_ever, args=(path, filling))
    process.start()
    assert filling.wait(timeout=60)

    process.kill()
    process.join()

    assert not path.exists()
    create_sqlite(path, fill)
    assert tables(path) == ["epochs"]


@pytest.mark.parametrize("uri", ["sqlite:///store.db", "http://127.0.0.1:9"])
def test_what_is_no_postgresql_needs_nobody_to_be_alone(uri: str) -> None:
    with alone(uri), alone(uri):
        pass


def test_a_postgresql_database_is_for_one_at_a_time_and_freed_by_a_kill(
    new_database: Callable[[], str],
) -> None:
    uri, other = new_database(), new_database()
    first, second = spawn.Event(), spawn.Event()
    holder = spawn.Process(target=stay_alone, args=(uri, first))
    waiter = spawn.Process(target=stay_alone, args=(uri, second))
    holder.start()
    assert first.wait(timeout=60)
    waiter.start()

    with alone(other):
        assert not second.wait(timeout=3)
    holder.kill()

    assert second.wait(timeout=10)
    waiter.kill()
    for process in (holder, waiter):
        process.join()


def test_a_postgresql_server_that_is_not_there_is_an_error_of_the_database() -> None:
    with (
        pytest.raises(OperationalError, match="port 9"),
        alone("postgresql+psycopg://postgres@127.0.0.1:9/none"),
    ):
        pass
