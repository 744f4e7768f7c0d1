"""Databases that any number of processes may be the first to use."""

import logging
import re
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import sqlalchemy
import tenacity
from filelock import FileLock
from sqlalchemy import Connection, Engine, ExceptionContext, event

from pipeline.config import without_password

LOCK_TIMEOUT = 60  # seconds that a writer of SQLite waits for another one

log = logging.getLogger(__name__)

T = TypeVar("T")


class LockedError(OSError):
    """Another process writes to a SQLite database, and does not end."""


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite address, absolute; None for another database or a server."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()


def sqlite_uri(path: Path) -> str:
    """The address of a SQLite file.

    Raises:
        ValueError: No address holds its name: SQLAlchemy reads ? and %41, Optuna {}, otherwise.
    """
    name = str(path)
    if re.search(r"[?%{}]", name) or not name.isprintable():
        rule = "must lead to a printable path without ? % { or }"
        raise ValueError(f"tracking.directory {rule}, got {name!r}.")
    return f"sqlite:///{name}"


def create_sqlite(path: Path, fill: Callable[[str], None]) -> None:
    """Creates a SQLite database all at once: elsewhere, then renamed.

    The libraries' own first use is neither safe against other processes nor against a kill
    half-way. WAL is a lasting property of the file; readers then never block the writer.

    Args:
        path: Of the file; nothing is done when it is there.
        fill: Receives the address of the new database and creates its tables.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(path.with_name(".create.lock")),
        tempfile.TemporaryDirectory(dir=path.parent) as folder,
    ):
        if path.exists():
            return
        log.info("creating %s", path)
        new = Path(folder) / path.name
        fill(f"sqlite:///{new}")
        database = sqlite3.connect(new)
        database.execute("PRAGMA journal_mode=WAL")
        database.close()
        new.replace(path)


def analyze(path: Path) -> None:
    """Has SQLite count what its tables hold, from a sample, for its choice of indices.

    MLflow's queries of a store of 10,000 runs take a fifth of the time then. A database that is
    locked or read-only is left as it is.
    """
    database = sqlite3.connect(path, timeout=1.0)
    try:
        database.execute("PRAGMA analysis_limit=1000")
        database.execute("ANALYZE")
        database.commit()
    except sqlite3.OperationalError as error:
        log.debug("%s: %s", path, error)
    finally:
        database.close()


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what caused it, what caused that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# What PostgreSQL refuses while it is there: no room, no memory, a statement that took too long.
_REFUSED = {"53100", "53200", "57014"}


def lost_connection(error: BaseException) -> bool:
    """Whether a database server is the reason: it is away, restarts, or ended the connection."""
    return any(
        (
            isinstance(each, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError)
            and getattr(each.orig, "sqlstate", None) not in _REFUSED
        )
        or (isinstance(each, sqlalchemy.exc.DBAPIError) and each.connection_invalidated)
        for each in causes(error)
    )


class AwayError(ConnectionError):
    """A server is still away after all the time that was to be waited for it."""


def patiently(
    call: Callable[[], T],
    is_away: Callable[[BaseException], bool],
    uri: str,
    *,
    seconds: float,
    stop: Callable[[], bool] = lambda: False,
) -> T:
    """Calls until the server is there.

    Args:
        call: That needs the server; repeating it does no harm.
        is_away: Whether an error that it raises means that the server is away.
        uri: Of the server.
        seconds: To wait for it, at most.
        stop: Asked every second whether to give up.

    Raises:
        AwayError: It is still away.
        Exception: Anything else that the call raises.
    """
    shown = without_password(uri)

    def say(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1:
            log.warning("no answer from %s: waiting for it, %.0f s at most", shown, seconds)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_away),
        wait=tenacity.wait_fixed(1),
        stop=lambda state: stop() or (state.seconds_since_start or 0.0) >= seconds,
        before_sleep=say,
    )
    try:
        return retrying(call)
    except tenacity.RetryError as error:
        raise AwayError(f"no answer from {shown}.") from error.last_attempt.exception()


@contextmanager
def alone(uri: str, key: str = "digit-sweeps") -> Iterator[None]:
    """Inside, no other process is inside for the same PostgreSQL database; others wait.

    The lock is the database's own, and ends with its connection.

    Args:
        uri: Of any database; only of one on PostgreSQL anything is locked.
        key: What is locked; unless given, the database's first use.
    """
    if not uri.startswith("postgresql"):
        yield
        return
    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        lock = sqlalchemy.text("SELECT pg_advisory_lock(hashtext(:key))")
        connection.execute(lock, {"key": key})
        yield


# --- waiting for another writer of SQLite ------------------------------------------------

# MLflow begins each of its sessions with this, whatever the address or the connection says.
_TIMEOUT = "PRAGMA busy_timeout ="

_refused: WeakKeyDictionary[Engine, float] = WeakKeyDictionary()  # when a wait was first in vain


def _patience(engine: Engine) -> float:
    """Seconds that a writer waits; after a wait in vain, all that follow have as much together."""
    return max(1.0, _refused.get(engine, time.monotonic()) + LOCK_TIMEOUT - time.monotonic())


@event.listens_for(Engine, "before_cursor_execute", retval=True)
def _wait_longer(
    connection: Connection, cursor: Any, statement: str, parameters: Any, *_: Any
) -> tuple[str, Any]:
    if statement.startswith(_TIMEOUT):
        statement = f"{_TIMEOUT} {1000 * _patience(connection.engine):.0f}"
    return statement, parameters


@event.listens_for(Engine, "handle_error")
def _note_refusal(context: ExceptionContext) -> None:
    """Raises in plain words, and what Optuna does not take for a reason to wait four times more."""
    if context.engine and "database is locked" in str(context.original_exception):
        _refused.setdefault(context.engine, time.monotonic())
        raise LockedError(
            f"{context.engine.url.database} was locked by another process "
            f"for more than {LOCK_TIMEOUT} seconds."
        )


@event.listens_for(Engine, "after_cursor_execute")
def _forget_refusal(
    connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, *_: Any
) -> None:
    if context.isinsert or context.isupdate or context.isdelete:
        _refused.pop(connection.engine, None)
