"""Databases that are locked for 3, 10, 40 seconds and longer, workers that are paused: 10 and 25.

Three stories at once: what they do most is wait.
"""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.invariants import check_invariants
from tests.launching import SWEEP, Started, wait_until
from tests.stores import (
    epochs,
    epochs_in_all,
    locked,
    query,
    trials_of,
)

RUN = [sys.executable, "-m", "pipeline.run"]
LOCKS = [3.0, 10.0, 40.0]  # seconds; MLflow alone would wait 20, Optuna 5
PAUSE = 65.0  # seconds: more than anything here waits for anything
TOO_LONG = 75.0  # more than the 60 that are waited, less than what the end of a run waits besides
EPOCHS = 150  # of 20 ms at least, so that there is time for all of them
PATIENCE = 600  # seconds: three commands start at once
LONG = [
    "data=digits",
    "model.hidden_units=16",
    "training.early_stopping_patience=null",
    f"training.epochs={EPOCHS}",
]
SWEPT = [*LONG, "sampler=random", "pruner=none", "sweep.first=[]", "sweep.trials=1"]


@dataclass(frozen=True, kw_only=True)
class Story:
    """A command that met all locks, and the same command again where it did not survive the last.

    Attributes:
        folder: Of it.
        database: That is locked.
        progress: Epochs recorded during each of the locks and the pause.
        refused: Exit status and text of the one that met the lock that was too long.
        statuses: Of all runs then.
        whole: Exit status and text of the one that went on.
    """

    folder: Path
    database: Path
    progress: list[int]
    refused: tuple[int, str]
    statuses: list[str]
    whole: tuple[int, str] | None = None

    @property
    def told(self) -> list[str]:
        """Lines on what went wrong."""
        return [line for line in self.refused[1].splitlines() if "locked" in line]


def statuses_in(folder: Path) -> list[str]:
    sql = "SELECT status FROM runs ORDER BY start_time"
    return [status for (status,) in query(folder / "mlruns" / "mlflow.db", sql)]


def lock(database: Path, seconds: float, progress: Callable[[], int], begin: int) -> int:
    """Locks when so many epochs are recorded; returns how many were recorded meanwhile."""
    wait_until(lambda: progress() >= begin, limit=PATIENCE)
    with locked(database):
        before = progress()
        time.sleep(seconds)
        return progress() - before


def pause(started: Started, progress: Callable[[], int], begin: int) -> int:
    """Stops the worker, likewise, and has it go on."""
    wait_until(lambda: progress() >= begin, limit=PATIENCE)
    (worker,) = started.workers
    worker.suspend()
    wait_until(lambda: worker.status() == psutil.STATUS_STOPPED)
    before = progress()
    time.sleep(PAUSE)
    meanwhile = progress() - before
    worker.resume()
    return meanwhile


def swept(folder: Path, name: str) -> Story:
    """A sweep of one trial, of which one database is locked again and again, the worker paused."""
    database = folder / "mlruns" / f"{name}.db"
    command = [*SWEEP, *SWEPT, "executor.workers=1", f"sweep.name={name}"]

    def progress() -> int:
        return epochs(folder, 0)

    with Started(*command, folder=folder) as started:
        met = [
            lock(database, LOCKS[0], progress, 3),
            lock(database, LOCKS[1], progress, 13),
            lock(database, LOCKS[2], progress, 23),
            pause(started, progress, 33),
            lock(database, TOO_LONG, progress, 43),
        ]
        refused = started.end(limit=PATIENCE), started.text
    statuses = statuses_in(folder)
    with Started(*command, folder=folder) as again:
        whole = again.end(limit=PATIENCE), again.text
    return Story(
        folder=folder,
        database=database,
        progress=met,
        refused=refused,
        statuses=statuses,
        whole=whole,
    )


def alone(folder: Path) -> Story:
    """Two single runs: the first meets the locks that end, the second the one that is too long."""
    database = folder / "mlruns" / "mlflow.db"
    with Started(*RUN, "-m", *LONG, "seed=1,2", folder=folder) as started:
        met = [
            lock(database, seconds, lambda: epochs_in_all(folder), begin)
            for begin, seconds in zip((3, 13, 23, EPOCHS + 3), [*LOCKS, TOO_LONG], strict=True)
        ]
        refused = started.end(limit=PATIENCE), started.text
    statuses = statuses_in(folder)
    return Story(folder=folder, database=database, progress=met, refused=refused, statuses=statuses)


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Story]]]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("mlflow", "optuna", "alone")}
    with ThreadPoolExecutor(len(folders)) as threads:
        yield {
            "mlflow": threads.submit(swept, folders["mlflow"], "mlflow"),
            "optuna": threads.submit(swept, folders["optuna"], "optuna"),
            "alone": threads.submit(alone, folders["alone"]),
        }


@pytest.fixture(params=["mlflow", "optuna", "alone"])
def story(stories: dict[str, Future[Story]], request: pytest.FixtureRequest) -> Story:
    return stories[request.param].result()


@pytest.fixture(params=["mlflow", "optuna"])
def sweep(stories: dict[str, Future[Story]], request: pytest.FixtureRequest) -> Story:
    return stories[request.param].result()


def test_nothing_is_recorded_while_a_database_is_locked_and_each_epoch_once_afterwards(
    story: Story,
) -> None:
    """One epoch may be recorded in MLflow before Optuna's database is waited for."""
    assert max(story.progress) <= 1
    sql = (
        "SELECT count(step), count(DISTINCT step), max(step) FROM metrics "
        "JOIN runs USING (run_uuid) WHERE key = 'val_loss' AND status = 'FINISHED'"
    )
    database = story.folder / "mlruns" / "mlflow.db"
    assert query(database, sql) == [(EPOCHS, EPOCHS, EPOCHS)]


def test_after_a_minute_a_locked_database_is_told_in_one_line(story: Story) -> None:
    status, text = story.refused

    assert status == 1
    assert len(story.told) == 1
    told = f"{story.database} was locked by another process for more than 60 seconds."
    assert told in story.told[0]
    assert "Traceback" not in text


def test_nothing_stays_running_after_a_lock_that_was_too_long(story: Story) -> None:
    assert story.statuses[-1] == "FAILED"
    assert "RUNNING" not in story.statuses


def test_a_worker_that_was_paused_counts_once(sweep: Story) -> None:
    (trial,) = trials_of(sweep.folder, sweep.database.stem)

    assert list(trial.intermediate_values) == list(range(1, EPOCHS + 1))
    assert "deaths" not in trial.user_attrs


def test_a_sweep_that_a_lock_ended_goes_on_to_its_budget(sweep: Story) -> None:
    assert sweep.whole is not None
    assert sweep.whole[0] == 0, sweep.whole[1]
    check_invariants(sweep.folder, sweep.database.stem, 1)
