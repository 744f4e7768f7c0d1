"""Workers and launchers that are killed at exact moments: FAULTS.md 11, 12, 17, 25."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.dying import Moment, happened, prepare
from tests.invariants import check_invariants
from tests.launching import SWEEP, Started
from tests.stores import (
    processes_in,
    query,
    seconds_until_quiet,
    trials_of,
)

EPOCHS = 3
TRAIN, SAVED = "pipeline.train:train", "pipeline.checkpoint:save_checkpoint"
LOG_FILES = "mlflow.tracking.client:MlflowClient.log_model_artifacts"
LOG_MODEL, SAVE_MODEL = "pipeline.tracking:Run.log_model", "mlflow.tensorflow:save_model"
WORKERS_DIE = [
    Moment(trial=0, function=TRAIN),
    Moment(trial=1, function=SAVED, call=2),  # trained, not kept
    Moment(trial=2, function=LOG_MODEL),
    Moment(trial=3, function=LOG_FILES),  # the model is there without them
    Moment(trial=4, function="pipeline.tracking:_end"),
]
DONE = Moment(trial=5, function="sweeps.trial:run_trial", end=True)  # FINISHED, not told
POISON = Moment(trial=6, function=TRAIN, fate="exit", times=2)
LAUNCHERS_DIE = [
    Moment(trial=7, function="pipeline.tracking:create_run", end=True),  # unknown to the study
    Moment(trial=8, function=SAVE_MODEL, fate="orphaned"),
    Moment(trial=9, function=SAVED, call=2, end=True, fate="frozen"),  # kept, not recorded
    Moment(trial=10, function="sweeps.launcher:Launcher.tell"),
]
MOMENTS = [*WORKERS_DIE, DONE, POISON, *LAUNCHERS_DIE]
BUDGET = 10
PATIENCE = 3600  # seconds: of a busy machine
COMMAND = [
    "data=digits",
    "model.hidden_units=16",
    "sampler=random",
    "pruner=none",
    "sweep.first=[]",
    f"training.epochs={EPOCHS}",
    f"sweep.trials={BUDGET}",
    "executor.workers=1",
    "sweep.name=killed",
]


@dataclass(frozen=True, kw_only=True)
class Launched:
    """What one launcher came to.

    Attributes:
        status: Of its exit.
        text: All that it wrote.
        quiet: Seconds from its end to that of its last process.
    """

    status: int
    text: str
    quiet: float


@dataclass(frozen=True, kw_only=True)
class Story:
    """One sweep: workers die, a poison trial ends it, launchers die, the last one is left alone.

    Attributes:
        folder: Of it.
        moments: Folder of what happened.
        poisoned: The launcher that was to give up at the first failure.
        killed: Those that died.
        last: The one that came to the end.
    """

    folder: Path
    moments: Path
    poisoned: Launched
    killed: list[Launched]
    last: Launched


def launch(folder: Path, moments: dict[str, str], max_failures: int) -> Launched:
    command = [*SWEEP, *COMMAND, f"sweep.max_failures={max_failures}"]
    with Started(*command, folder=folder, environment=moments) as started:
        status = started.process.wait(timeout=PATIENCE)
        quiet = seconds_until_quiet(folder, limit=5.0)
        started.end()
        return Launched(status=status, text=started.text, quiet=quiet)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("killed")
    moments = tmp_path_factory.mktemp("moments") / "of"
    environment = prepare(moments, MOMENTS)
    try:
        yield Story(
            folder=folder,
            moments=moments,
            poisoned=launch(folder, environment, 1),
            killed=[launch(folder, environment, 9) for _ in LAUNCHERS_DIE],
            last=launch(folder, environment, 9),
        )
    finally:
        for left in processes_in(folder):
            left.kill()


def test_every_moment_came(story: Story) -> None:
    times = [len(happened(story.moments, number)) for number in range(len(MOMENTS))]

    assert times == [moment.times for moment in MOMENTS]


def test_a_trial_whose_worker_is_killed_at_any_moment_is_tried_again(story: Story) -> None:
    for number, moment in enumerate(WORKERS_DIE):
        (worker,) = happened(story.moments, number)
        told = rf"trial {moment.trial}: worker process {worker} died \(exit code -9\)\. It is tried"
        assert len(re.findall(told, story.poisoned.text)) == 1
    trials = trials_of(story.folder, "killed")[: len(WORKERS_DIE)]
    assert [trial.user_attrs["deaths"] for trial in trials] == [1] * len(trials)
    assert {trial.state.name for trial in trials} == {"COMPLETE"}


def test_a_poison_trial_fails_at_its_second_try(story: Story) -> None:
    workers = happened(story.moments, MOMENTS.index(POISON))
    poison = trials_of(story.folder, "killed")[POISON.trial]

    assert poison.state.name == "FAIL"
    assert poison.user_attrs["reason"] == (
        f"worker process {workers[1]} died (exit code 7). 2 workers died in this trial."
    )


def test_a_sweep_fails_in_one_line_after_too_many_failures_and_goes_on_where_more_are_allowed(
    story: Story,
) -> None:
    last_line = story.poisoned.text.splitlines()[-1]

    assert story.poisoned.status == 1
    assert "1 failed trials reach sweep.max_failures; the last one: worker proc" in last_line
    assert last_line.endswith(" sweep.max_failures=1")
    assert "Traceback" not in story.poisoned.text
    assert story.last.status == 0


def test_no_worker_outlives_its_launcher_whatever_it_does_or_though_it_is_paused(
    story: Story,
) -> None:
    assert [launched.status for launched in story.killed] == [-9] * len(LAUNCHERS_DIE)
    assert max(launched.quiet for launched in story.killed) < 5


def test_a_sweep_killed_at_any_moment_ends_with_its_budget_and_stores_that_agree(
    story: Story,
) -> None:
    check_invariants(story.folder, "killed", BUDGET)
    assert len(trials_of(story.folder, "killed")) == BUDGET + 1


def test_each_epoch_of_a_trial_killed_at_any_moment_is_recorded_and_reported_once(
    story: Story,
) -> None:
    steps = list(range(1, EPOCHS + 1))
    for trial in trials_of(story.folder, "killed"):
        if trial.number != POISON.trial:
            recorded = query(
                story.folder / "mlruns" / "mlflow.db",
                "SELECT step FROM metrics WHERE key = 'val_loss' AND run_uuid = "
                f"'{trial.user_attrs['run_id']}' ORDER BY step",
            )
            assert recorded == [(step,) for step in steps]
            assert list(trial.intermediate_values) == steps
