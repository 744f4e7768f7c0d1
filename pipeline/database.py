"""Databases that any number of processes may be the first to use."""

import logging
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import sqlalchemy
import tenacity
from filelock import FileLock

from pipeline.config import without_password

log = logging.getLogger(__name__)

T = TypeVar("T")


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite address, absolute; None for another database or a server."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()


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


def lost_connection(error: BaseException) -> bool:
    """Whether a database server is the reason: it is away, restarts, or ended the connection."""
    lost = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError)
    return any(
        isinstance(each, lost)
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
