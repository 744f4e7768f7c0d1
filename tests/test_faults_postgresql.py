"""PostgreSQL that restarts in the middle of a sweep, as after a crash: FAULTS.md 24."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from pipeline.config import RunConfig
from pipeline.endings import StopRun
from pipeline.run import execute_run
from pipeline.store import open_store
from pipeline.tracking import create_run, replay
from tests.launching import SWEEP, Started, wait_until
from tests.servers import Postgresql
from tests.stores import seconds_until_quiet

EPOCHS = 40
TRIALS = 3
PATIENCE = 600  # seconds
COMMAND = [
    "data=digits",
    "model.hidden_units=16",
    "training.early_stopping_patience=null",
    f"training.epochs={EPOCHS}",
    "sampler=random",
    "pruner=none",
    "sweep.first=[]",
    f"sweep.trials={TRIALS}",
    "executor.workers=1",
    "sweep.name=restarted",
]


@dataclass(frozen=True, kw_only=True)
class Story:
    """A sweep whose runs and study are on a server that restarts twice.

    Attributes:
        folder: Of the command.
        runs: Address of their database.
        studies: Likewise.
        status: Of its exit.
        text: All that it wrote.
    """

    folder: Path
    runs: str
    studies: str
    status: int
    text: str

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        return query(self.runs, sql)

    @property
    def trials(self) -> list[FrozenTrial]:
        storage = RDBStorage(self.studies)
        trials = storage.get_all_trials(storage.get_study_id_from_name("restarted"))
        storage.remove_session()
        storage.engine.dispose()
        return trials


def query(uri: str, sql: str) -> list[tuple[Any, ...]]:
    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sqlalchemy.text(sql))]


def has_epochs(uri: str, number: int) -> bool:
    """Whether so many are recorded; may be asked before there is a table."""
    if query(uri, "SELECT to_regclass('metrics')") == [(None,)]:
        return False
    return query(uri, "SELECT count(*) FROM metrics WHERE key = 'val_loss'") >= [(number,)]


@pytest.fixture(scope="module")
def story(postgresql: Postgresql, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("restarted")
    runs, studies = postgresql.new_database(), postgresql.new_database()
    addresses = [f"tracking.uri={runs}", f"study.storage={studies}"]
    with Started(*SWEEP, *COMMAND, *addresses, folder=folder) as started:
        for number in (3, EPOCHS + 3):
            wait_until(partial(has_epochs, runs, number), limit=PATIENCE)
            postgresql.control("-m", "immediate", "restart")
        status = started.end(limit=PATIENCE)
    yield Story(folder=folder, runs=runs, studies=studies, status=status, text=started.text)


def test_a_sweep_goes_on_when_postgresql_restarts(story: Story) -> None:
    assert story.status == 0, story.text
    assert "Traceback" not in story.text
    assert seconds_until_quiet(story.folder, limit=5.0) < 5


def test_every_trial_has_one_finished_run_of_its_value(story: Story) -> None:
    trials = story.trials
    values = story.query(
        "SELECT run_uuid, value FROM latest_metrics WHERE key = 'saved_val_accuracy'"
    )
    runs = story.query("SELECT DISTINCT status FROM runs")

    assert runs == [("FINISHED",)]
    assert [trial.number for trial in trials] == list(range(len(trials)))
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    assert len(complete) == TRIALS
    assert dict(values) == {trial.user_attrs["run_id"]: trial.values[0] for trial in complete}


def test_every_epoch_is_recorded_and_reported_once(story: Story) -> None:
    steps = story.query(
        "SELECT count(step), count(DISTINCT step), max(step) FROM metrics "
        "WHERE key = 'val_loss' GROUP BY run_uuid"
    )

    assert steps == [(EPOCHS, EPOCHS, EPOCHS)] * TRIALS
    for trial in story.trials:
        assert list(trial.intermediate_values) == list(range(1, EPOCHS + 1))


def test_a_run_that_is_gone_on_with_while_the_server_is_away_records_each_epoch_once(
    postgresql: Postgresql,
    configure: Callable[..., RunConfig],
    tensorflow: None,
    tmp_path: Path,
) -> None:
    uri, checkpoint = postgresql.new_database(), tmp_path / "training.npz"
    where = [f"tracking.directory={tmp_path}", f"tracking.uri={uri}", "tracking.figures=false"]
    settings = ["training.epochs=4", "model.hidden_units=64", "evaluate_test=false"]
    still = ["optimizer=sgd", "optimizer.learning_rate=1e-12"]  # so the first epoch is the best
    config = configure("data=digits", *settings, *still, *where)
    run = create_run(open_store(config.tracking), "interrupted", {})

    def stop(epoch: int, metrics: dict[str, float]) -> None:
        if epoch == 2:
            raise StopRun

    with pytest.raises(StopRun):
        execute_run(config, "", on_epoch_end=stop, into=run, checkpoint=checkpoint)
    postgresql.control("-m", "immediate", "stop")
    try:
        result = execute_run(config, "", into=run, checkpoint=checkpoint)
    finally:
        postgresql.control("start")
    replay(run.spool, run.store.uri)

    told = "SELECT step FROM metrics WHERE key = 'val_accuracy' ORDER BY step"
    assert query(uri, told) == [(1,), (2,), (3,), (4,)]
    assert query(uri, "SELECT status FROM runs") == [("FINISHED",)]
    best = "SELECT value FROM latest_metrics WHERE key IN ('best_epoch', 'best_val_accuracy') "
    recorded = query(uri, f"{best} ORDER BY key")
    assert recorded == [(1,), (result.metrics["best_val_accuracy"],)]
