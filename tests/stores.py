"""What a sweep left in its stores, and what must hold there whatever happened on the way."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.trial import FrozenTrial, TrialState

# How a run ends whose trial ends so.
RUN_STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
READY = 2  # of a logged model, in MLflow's database


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run, as MLflow's database has it."""

    run_id: str
    status: str
    tags: dict[str, str]
    metrics: dict[str, float]
    models: list[int]


def query(database: Path, sql: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(database, timeout=30)) as connection:
        return connection.execute(sql).fetchall()


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


def trials_of(folder: Path, name: str) -> list[FrozenTrial]:
    """Every trial of a sweep. Nothing stays open: the disk may have to be unmounted."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'mlruns' / 'optuna.db'}")
    trials = storage.get_all_trials(storage.get_study_id_from_name(name))
    storage.remove_session()
    storage.engine.dispose()
    return trials


def runs_of(folder: Path, name: str) -> list[StoredRun]:
    """Every run of a sweep; its own is the one with the tag `kind`."""
    database = folder / "mlruns" / "mlflow.db"
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
    return [
        StoredRun(
            run_id=run_id,
            status=status,
            tags=tags[run_id],
            metrics=metrics.get(run_id, {}),
            models=models.get(run_id, []),
        )
        for run_id, status in query(database, "SELECT run_uuid, status FROM runs")
        if tags[run_id].get("sweep") == name
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
    start = time.monotonic()
    while processes_in(folder):
        if time.monotonic() - start > limit:
            return limit
        time.sleep(0.05)
    return time.monotonic() - start


def check_whole(folder: Path) -> None:
    """Both databases are intact."""
    for name in ("mlflow.db", "optuna.db"):
        assert query(folder / "mlruns" / name, "PRAGMA integrity_check") == [("ok",)]


def check_invariants(folder: Path, name: str, budget: int) -> None:
    """What holds for every sweep that reached its budget.

    Args:
        folder: From where it was run.
        name: Of the sweep.
        budget: Finished trials, complete or pruned, it was to reach.
    """
    trials, parent = trials_of(folder, name), parent_of(folder, name)
    children = [run for run in runs_of(folder, name) if run.run_id != parent.run_id]

    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert {trial.state.name for trial in trials} <= RUN_STATUS.keys()
    assert sum(trial.state != TrialState.FAIL for trial in trials) == budget
    by_trial = {int(run.tags["trial"]): run for run in children}
    assert len(children) == len(by_trial) == len(trials)
    for trial in trials:
        check_pair(trial, by_trial[trial.number], parent)
    check_parent(parent, trials)
    check_whole(folder)
    assert list((folder / "mlruns" / "checkpoints").glob("*")) == []
    assert seconds_until_quiet(folder, limit=5.0) < 5.0


def check_pair(trial: FrozenTrial, run: StoredRun, parent: StoredRun) -> None:
    """A trial and its run are linked both ways and say the same."""
    assert trial.user_attrs["run_id"] == run.run_id
    assert run.tags["mlflow.parentRunId"] == parent.run_id
    assert run.status == RUN_STATUS[trial.state.name]
    assert run.models == ([READY] if run.status == "FINISHED" else [])
    if trial.state == TrialState.COMPLETE:
        accuracy = run.metrics["saved_val_accuracy"]
        assert trial.values[0] == accuracy
    if trial.state == TrialState.FAIL:
        assert run.tags["error"]


def check_parent(parent: StoredRun, trials: list[FrozenTrial]) -> None:
    """The sweep's own run has ended, with the best value of the study."""
    assert parent.status == "FINISHED"
    values = [trial.values[0] for trial in trials if trial.state == TrialState.COMPLETE]
    assert parent.metrics.get("best_val_accuracy") == max(values, default=None)
