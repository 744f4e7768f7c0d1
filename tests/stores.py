"""What a sweep left in its stores."""

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import optuna
import psutil
import sqlalchemy
from optuna.trial import FrozenTrial

from tests.launching import seconds_until_none


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run, as MLflow's database has it.

    Attributes:
        run_id: In MLflow.
        status: RUNNING, FINISHED, KILLED or FAILED.
        tags: All of them.
        metrics: The last value of each.
        models: Status of each that it has logged.
        accuracies: Epoch and `val_accuracy`, as often as they are recorded, in order.
    """

    run_id: str
    status: str
    tags: dict[str, str]
    metrics: dict[str, float]
    models: list[int]
    accuracies: list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Stores:
    """Where the trials and runs of a sweep are.

    Attributes:
        folder: From where it is run.
        study: Address of Optuna's database.
        runs: Address of MLflow's; where a server has them, of the server's own.
    """

    folder: Path
    study: str
    runs: str

    @classmethod
    def local(cls, folder: Path) -> Self:
        """Those of a sweep that was given no others."""
        study, runs = (f"sqlite:///{folder / 'mlruns' / name}.db" for name in ("optuna", "mlflow"))
        return cls(folder=folder, study=study, runs=runs)


def query(database: Path | str, sql: str) -> list[tuple[Any, ...]]:
    """Rows of a database; a file of SQLite, or any by its address."""
    if isinstance(database, str):
        engine = sqlalchemy.create_engine(database, poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sqlalchemy.text(sql))]
    with contextlib.closing(sqlite3.connect(database, timeout=30)) as file:
        return file.execute(sql).fetchall()


@contextlib.contextmanager
def locked(database: Path | None) -> Iterator[None]:
    """Inside, nobody else can write."""
    assert database is not None
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.rollback()


def dump(folder: Path) -> list[str]:
    """All that both databases hold."""
    lines: list[str] = []
    for name in ("mlflow.db", "optuna.db"):
        with contextlib.closing(sqlite3.connect(folder / "mlruns" / name)) as database:
            lines += database.iterdump()
    return lines


def told(folder: Path) -> int:
    """Trials that ended so far; may be asked while a sweep starts."""
    database = folder / "mlruns" / "optuna.db"
    if not database.exists():
        return 0
    states = "('COMPLETE', 'PRUNED', 'FAIL')"
    return int(query(database, f"SELECT count(*) FROM trials WHERE state IN {states}")[0][0])


def epochs(folder: Path, trial: int) -> int:
    """Epochs recorded so far of the run of a trial."""
    database = folder / "mlruns" / "mlflow.db"
    if not database.exists():
        return 0
    sql = (
        "SELECT max(latest_metrics.value) FROM latest_metrics JOIN tags USING (run_uuid) "
        f"WHERE latest_metrics.key = 'epoch' AND tags.key = 'trial' AND tags.value = '{trial}'"
    )
    return int(query(database, sql)[0][0] or 0)


def epochs_in_all(folder: Path) -> int:
    """Epochs recorded so far, of all runs."""
    database = folder / "mlruns" / "mlflow.db"
    if not database.exists():
        return 0
    return int(query(database, "SELECT count(*) FROM metrics WHERE key = 'val_loss'")[0][0])


def trials_of(stores: Stores | Path, name: str) -> list[FrozenTrial]:
    """Every trial of a sweep. Nothing stays open: the disk may have to be unmounted."""
    stores = Stores.local(stores) if isinstance(stores, Path) else stores
    storage = optuna.storages.RDBStorage(stores.study)
    trials = storage.get_all_trials(storage.get_study_id_from_name(name))
    storage.remove_session()
    storage.engine.dispose()
    return trials


def runs_of(stores: Stores | Path, name: str) -> list[StoredRun]:
    """Every run of a sweep; its own is the one with the tag `kind`."""
    database = (Stores.local(stores) if isinstance(stores, Path) else stores).runs
    tags: dict[str, dict[str, str]] = {}
    for run_id, key, value in query(database, "SELECT run_uuid, key, value FROM tags"):
        tags.setdefault(run_id, {})[key] = value
    metrics: dict[str, dict[str, float]] = {}
    for run_id, key, value in query(database, "SELECT run_uuid, key, value FROM latest_metrics"):
        metrics.setdefault(run_id, {})[key] = float(value)
    models: dict[str, list[int]] = {}
    sql = "SELECT source_run_id, status FROM logged_models WHERE lifecycle_stage = 'active'"
    for run_id, status in query(database, sql):
        models.setdefault(run_id, []).append(int(status))
    accuracies: dict[str, list[tuple[int, float]]] = {}
    sql = "SELECT run_uuid, step, value FROM metrics WHERE key = 'val_accuracy' ORDER BY step"
    for run_id, step, value in query(database, sql):
        accuracies.setdefault(run_id, []).append((int(step), float(value)))
    return [
        StoredRun(
            run_id=run_id,
            status=status,
            tags=tags.get(run_id, {}),
            metrics=metrics.get(run_id, {}),
            models=models.get(run_id, []),
            accuracies=accuracies.get(run_id, []),
        )
        for run_id, status in query(database, "SELECT run_uuid, status FROM runs")
        if tags.get(run_id, {}).get("sweep") == name
    ]


def parent_of(folder: Path, name: str) -> StoredRun:
    """The sweep's own run."""
    (parent,) = [run for run in runs_of(folder, name) if run.tags.get("kind") == "sweep"]
    return parent


def processes_in(folder: Path) -> list[psutil.Process]:
    """Processes at work in a folder: a launcher, its workers, and what these started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(folder):
                found.append(process)
    return found


def seconds_until_quiet(folder: Path, *, limit: float) -> float:
    """Waits until no process is left in a folder; the limit when some remain."""
    return seconds_until_none(lambda: processes_in(folder), limit=limit)
