"""What the doctor finds of databases and disks."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from urllib.parse import quote

import sqlalchemy

from pipeline.config import without_password
from pipeline.database import sqlite_path
from sweeps.finding import (
    Check,
    Finding,
    Stores,
    note,
    reason,
    short_path,
    size,
    wrong,
)

LOCKED = 5.0  # seconds that a healthy writer has done with after
# Room that SQLite needs to rebuild a database: https://www.sqlite.org/lang_vacuum.html says up to
# twice its size. And some for what trains: the notebook's network, its optimizer's state and best
# weights are 8 MB a checkpoint, 3 MB a saved model.
TIMES, SPARE = 2, 100_000_000
_RECOVER = (
    "stop what uses it, keep a copy of {0} with its -wal and -shm, then: "
    "sqlite3 {0} .recover | sqlite3 recovered.db"
)


# --- databases ---------------------------------------------------------------------------


def sqlite_findings(path: Path, table: str) -> Iterator[Finding]:
    """What is wrong with a SQLite database.

    Args:
        path: Of the file, which is there.
        table: That it has.
    """
    address = f"file:{quote(str(path))}?mode=rw"
    try:
        with closing(
            sqlite3.connect(address, uri=True, timeout=LOCKED, isolation_level=None)
        ) as database:
            names = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
            if table not in names:
                shown = short_path(path)
                yield wrong(f"{shown} is empty, or something else: it has no table {table}")
                return
            found = [text for (text,) in database.execute("PRAGMA integrity_check(3)")]
            if found != ["ok"]:
                yield _damaged(path, "; ".join(" ".join(text.split()) for text in found))
                return
            ((mode,),) = database.execute("PRAGMA journal_mode").fetchall()
            if mode != "wal":
                yield wrong(
                    f"{short_path(path)} has journal_mode={mode}: "
                    "readers and writers wait for each other",
                    "fix=true sets WAL",
                    partial(_set_wal, path),
                )
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            yield wrong(
                f"{short_path(path)} has been locked for {LOCKED:.0f} s by another process",
                f"find out which, and end it: fuser -v {short_path(path)}",
            )
        elif "readonly" in str(error):
            yield wrong(
                f"{short_path(path)} cannot be written", "change its rights, or those of its folder"
            )
        else:
            yield _damaged(path, reason(error))
    except sqlite3.DatabaseError as error:
        yield _damaged(path, reason(error))


def _damaged(path: Path, why: str) -> Finding:
    return wrong(f"{short_path(path)} is damaged: {why}", _RECOVER.format(short_path(path)))


def _set_wal(path: Path) -> str:
    with closing(sqlite3.connect(path, timeout=LOCKED)) as database:
        ((mode,),) = database.execute("PRAGMA journal_mode=WAL").fetchall()
    if mode != "wal":
        raise OSError(f"it stays journal_mode={mode}: its file system cannot do otherwise.")
    return "set WAL"


class NoTableError(Exception):
    """A database on a server is there, and nothing was ever kept in it."""


def server_findings(uri: str, table: str) -> Iterator[Finding]:
    """What is wrong with a database on a server.

    Args:
        uri: Of it.
        table: That it has.

    Raises:
        NoTableError: It has no such table.
    """
    shown = without_password(uri)
    waits = {"connect_timeout": int(LOCKED)} if uri.startswith("postgresql") else {}
    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool, connect_args=waits)
    try:
        with engine.connect() as connection:
            if not sqlalchemy.inspect(connection).has_table(table):
                raise NoTableError(shown)
            if waits and not _is_free(connection):
                yield note(f"{shown} is just being used for the first time, by another process")
    except sqlalchemy.exc.OperationalError as error:
        why = reason(error.orig or error)
        yield wrong(f"{shown} does not answer: {why}", "start it, or correct its address")


def _is_free(connection: sqlalchemy.Connection) -> bool:
    """Whether nobody holds the lock of `pipeline.database.alone`."""
    key = {"key": "digit-sweeps"}
    took = connection.scalar(sqlalchemy.text("SELECT pg_try_advisory_lock(hashtext(:key))"), key)
    if took:
        connection.execute(sqlalchemy.text("SELECT pg_advisory_unlock(hashtext(:key))"), key)
    return bool(took)


# --- disks -------------------------------------------------------------------------------


def check_disk(stores: Stores) -> Check:
    """Room where the stores are, and the reserve for the end of a run on a full disk."""
    told = []
    for folders in _by_disk(stores):
        free = shutil.disk_usage(folders[0]).free
        here = [path for path in stores.databases if path.parent in folders]
        needed = TIMES * sum(map(size_of, here)) + SPARE
        if free < needed:
            yield wrong(
                f"{size(free)} left where {short_path(folders[0])} is, less than {size(needed)}: "
                "twice the databases, which they need to be rebuilt, "
                f"and {size(SPARE)} for trainings",
                "make room, or move the folder",
            )
        told.append(f"{size(free)} left where {short_path(folders[0])} is")
    yield from _reserve(stores)
    return "; ".join(told) or "nothing is kept on this machine"


def _by_disk(stores: Stores) -> list[list[Path]]:
    """Folders that are there, those of a disk together."""
    directory = stores.directory
    found: dict[int, list[Path]] = {}
    places = [directory, *(path.parent for path in stores.databases), directory / "artifacts"]
    for folder in dict.fromkeys(places):
        if folder.exists():
            found.setdefault(folder.stat().st_dev, []).append(folder)
    return list(found.values())


def size_of(database: Path) -> int:
    """Bytes, with what SQLite has beside it."""
    return sum(path.stat().st_size for path in database.parent.glob(f"{database.name}*"))


def _reserve(stores: Stores) -> Iterator[Finding]:
    from pipeline.store import RESERVE_BYTES

    database = sqlite_path(stores.uri)
    if database is None:
        return
    reserve = database.with_name(".reserve")
    if not reserve.exists() or reserve.stat().st_size < RESERVE_BYTES:

        def fill() -> str:
            reserve.write_bytes(bytes(RESERVE_BYTES))
            return "filled it"

        yield wrong(
            f"{short_path(reserve)} is not there or not whole: "
            "the room in which a run ends on a full disk",
            "fix=true fills it",
            fill,
        )
