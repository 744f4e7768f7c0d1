"""One trial in process, with real stores: how it ends, and what they have of it."""

import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import TrialState

from pipeline import program, train
from pipeline.config import RunConfig
from pipeline.owner import machine
from pipeline.store import open_store
from pipeline.tracking import create_run
from sweeps.config import OBJECTIVES, MedianConfig, NoPrunerConfig
from sweeps.storage import open_storage
from sweeps.study import open_study
from sweeps.trial import Job, Outcome, rehearse, run_trial, warm_up
from tests.pipeline.test_program import tracings

pytestmark = pytest.mark.usefixtures("tensorflow")

Configure = Callable[..., RunConfig]

COMMAND = "python -m pipeline.run data=digits training=quick"
LONG = 60  # epochs, of 10 ms at least
ENDLESS = ["training.epochs=100000", "training.early_stopping_patience=null"]
MEDIAN = MedianConfig(name="median", n_startup_trials=1, n_warmup_steps=2, interval_steps=1)


@dataclass(frozen=True)
class Trying:
    """A trial that a launcher has asked for, and the stores that it is recorded in."""

    job: Job
    study: optuna.Study

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(open_store(self.job.config.tracking).uri)

    @property
    def run(self) -> Run:
        return self.client.get_run(self.job.run.run_id)

    def steps(self, metric: str) -> list[int]:
        return [each.step for each in self.client.get_metric_history(self.job.run.run_id, metric)]

    @property
    def reported(self) -> dict[int, float]:
        return self.study.get_trials()[-1].intermediate_values

    @property
    def models(self) -> int:
        return len(self.client.search_logged_models([self.run.info.experiment_id]))


Try = Callable[..., Trying]


@pytest.fixture(scope="module")
def empty(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the databases of both libraries, made once: it takes them seconds."""
    folder = tmp_path_factory.mktemp("empty")
    open_store(configure("data=digits", f"tracking.directory={folder}").tracking)
    open_storage(f"sqlite:///{folder / 'optuna.db'}").engine.dispose()
    return folder


@pytest.fixture
def ask(configure: Configure, tmp_path: Path, empty: Path) -> Try:
    """Asks a study for a trial of a short run, and creates the run."""
    folder = tmp_path / "mlruns"

    def ask(
        *overrides: str, objectives: tuple[str, ...] = ("val_accuracy",), **changes: Any
    ) -> Trying:
        if not (folder / "mlflow.db").exists():
            shutil.copytree(empty, folder, dirs_exist_ok=True)
        config = configure(
            "data=digits",
            "training=quick",
            "model.hidden_units=32",
            "evaluate_test=false",
            "tracking.figures=false",
            f"tracking.directory={folder}",
            *overrides,
        )
        uri = f"sqlite:///{folder / 'optuna.db'}"
        directions = [OBJECTIVES[objective] for objective in objectives]
        study = open_study("sweep", open_storage(uri), directions)
        run = create_run(open_store(config.tracking), "trial-000", {"trial": 0})
        job = Job(
            config=config,
            command=COMMAND,
            run=run,
            checkpoint=folder / "checkpoints" / f"{run.run_id}.npz",
            objectives=objectives,
            storage=uri,
            study="sweep",
            trial_id=study.ask()._trial_id,
            pruner=NoPrunerConfig(name="none"),
            home=machine(),
            patience=0.0,
        )
        return Trying(replace(job, **changes), study)

    return ask


@contextmanager
def interrupted_when(reached: Callable[[], bool]) -> Iterator[None]:
    """Sends this process a Ctrl-C as soon as something is true."""
    ended = threading.Event()

    def watch() -> None:
        while not reached():
            if ended.wait(0.005):
                return
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def interrupt(trying: Trying, *, after: int) -> Outcome:
    """Runs the trial, and interrupts it in its training."""
    with interrupted_when(lambda: len(trying.reported) >= after):
        return run_trial(trying.job)


# --- how a trial ends --------------------------------------------------------------------


def test_a_complete_trial_has_the_value_of_its_saved_model(ask: Try) -> None:
    trying = ask()

    outcome = run_trial(trying.job)

    run = trying.run
    assert outcome.state == "COMPLETE"
    assert outcome.values == (run.data.metrics["saved_val_accuracy"],)
    assert 0 < outcome.seconds <= (run.info.end_time - run.info.start_time) / 1000
    assert (run.info.status, run.data.tags["command"]) == ("FINISHED", COMMAND)
    assert trying.models == 1


def test_each_epoch_is_reported_to_the_study_as_it_is_to_the_run(ask: Try) -> None:
    trying = ask()

    run_trial(trying.job)

    history = trying.client.get_metric_history(trying.job.run.run_id, "val_accuracy")
    assert trying.reported == {each.step: each.value for each in history}
    assert list(trying.reported) == [1, 2, 3]


def test_the_loss_may_be_the_objective(ask: Try) -> None:
    trying = ask(objectives=("val_loss",))

    outcome = run_trial(trying.job)

    assert outcome.values == (trying.run.data.metrics["saved_val_loss"],)
    assert trying.reported[3] == trying.run.data.metrics["val_loss"]


def test_several_objectives_have_a_value_each_and_no_report(ask: Try) -> None:
    trying = ask(objectives=("val_accuracy", "parameters", "fit_seconds", "val_loss"))

    outcome = run_trial(trying.job)

    metrics = trying.run.data.metrics
    names = ("saved_val_accuracy", "parameters", "fit_seconds", "saved_val_loss")
    assert outcome.values == tuple(metrics[name] for name in names)
    assert trying.reported == {}


def test_a_trial_that_is_pruned_ends_early_and_its_run_is_killed(ask: Try) -> None:
    better = ask()
    trial = optuna.trial.Trial(better.study, better.job.trial_id)
    for epoch in (1, 2, 3):
        trial.report(1.0, epoch)
    better.study.tell(trial, 1.0)
    trying = ask(pruner=MEDIAN)

    outcome = run_trial(trying.job)

    assert (outcome.state, outcome.values) == ("PRUNED", ())
    assert list(trying.reported) == [1, 2]
    assert trying.steps("val_accuracy") == [1, 2]
    assert trying.run.info.status == "KILLED"
    assert trying.models == 0


def test_a_trial_that_diverges_fails_and_tells_the_epoch(ask: Try) -> None:
    trying = ask("optimizer=sgd", "optimizer.learning_rate=1e30")

    outcome = run_trial(trying.job)

    run = trying.run
    assert outcome.state == "FAIL"
    assert outcome.reason == "the training diverged in epoch 1: the loss is nan."
    assert run.info.status == "FAILED"
    assert (run.data.tags["diverged"], run.data.tags["diverged.epoch"]) == ("true", "1")
    assert trying.reported == {}


def test_a_network_that_is_too_large_fails_its_trial_in_one_line(ask: Try) -> None:
    trying = ask("model.hidden_units=1000000000")

    outcome = run_trial(trying.job)

    assert outcome.state == "FAIL"
    assert outcome.reason.startswith("model.hidden_units")
    assert "\n" not in outcome.reason
    assert trying.reported == {}


def test_the_trials_after_one_that_failed_are_as_those_of_a_new_process(ask: Try) -> None:
    first = run_trial(ask().job)
    run_trial(ask("optimizer=sgd", "optimizer.learning_rate=1e30").job)
    run_trial(ask("model.hidden_units=1000000000").job)

    again = run_trial(ask().job)

    assert (again.state, again.values) == (first.state, first.values)


def test_a_trial_that_is_interrupted_is_stopped_and_its_run_killed(ask: Try) -> None:
    trying = ask(*ENDLESS)

    outcome = interrupt(trying, after=2)

    assert (outcome.state, outcome.values) == ("STOPPED", ())
    assert trying.run.info.status == "KILLED"
    assert trying.study.get_trials()[0].state == TrialState.RUNNING
    assert trying.job.checkpoint.exists()


def test_a_trial_of_another_data_set_loads_it_anew(ask: Try) -> None:
    run_trial(ask().job)
    larger = ask("data.validation_size=400")

    outcome = run_trial(larger.job)

    (value,) = outcome.values
    assert value * 400 == pytest.approx(round(value * 400), abs=1e-3)


def test_warming_up_a_process_that_is_warm_does_nothing() -> None:
    began = time.monotonic()

    warm_up()

    assert time.monotonic() - began < 5


@pytest.mark.parametrize("compile_", ["always", "never"])
def test_a_trial_traces_nothing_that_was_rehearsed_and_ends_as_without(
    ask: Try, compile_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["optimizer.schedule=cosine", f"training.compile={compile_}"]
    run_trial((trying := ask(*settings)).job)
    alone = trying.reported
    program._program.cache_clear()
    monkeypatch.setattr("sweeps.trial._loaded", {})  # as in a new worker
    used: list[program.Program] = []

    def keep(*arguments: Any, **named: Any) -> program.Program:
        used.append(program.program_for(*arguments, **named))
        return used[-1]

    monkeypatch.setattr(train, "program_for", keep)
    rehearse(trying.job.config)
    rehearsed = tracings(used[0])
    run_trial((again := ask(*settings)).job)

    assert used[0] is used[1]
    assert rehearsed == [0, 1, 1]
    assert tracings(used[0]) == [int(compile_ == "always"), 1, 1]
    assert again.reported == alone


def test_what_is_refused_is_told_by_the_trial_not_by_its_rehearsal(
    ask: Try, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweeps.trial._loaded", {})
    job = ask("data.validation_size=1436").job

    rehearse(job.config)

    assert [record.levelname for record in caplog.records] in ([], ["DEBUG"])
    assert "data.validation_size=1436: cannot draw" in run_trial(job).reason


# --- stores that fail --------------------------------------------------------------------


def test_a_trial_whose_server_is_away_is_whole_and_kept_in_the_spool(ask: Try) -> None:
    trying = ask()
    store = replace(trying.job.run.store, uri="http://user:secret@127.0.0.1:9", database=None)
    run = replace(trying.job.run, store=store)

    outcome = run_trial(replace(trying.job, run=run))

    entries = run.spool.entries
    metrics = [each for entry in entries if entry["kind"] == "metrics" for each in entry["metrics"]]
    (model,) = [run.spool.path_of(entry) for entry in entries if entry["kind"] == "model"]
    assert outcome.state == "COMPLETE"
    assert [step for name, _, _, step in metrics if name == "val_loss"] == [1, 2, 3]
    assert model is not None
    assert (model / "MLmodel").exists()
    assert (entries[-1]["kind"], entries[-1]["status"]) == ("end", "FINISHED")
    kept = [path for path in run.spool.folder.rglob("*") if path.is_file()]
    assert all(b"secret" not in path.read_bytes() for path in kept)
    trying.job.run.store.use()  # as it was


def test_a_study_that_is_gone_breaks_the_trial(ask: Try, tmp_path: Path) -> None:
    trying = ask()
    job = replace(trying.job, storage=f"sqlite:///{tmp_path / 'mlruns'}", study="another")

    outcome = run_trial(job)

    assert outcome.state == "BROKEN"
    assert "unable to open database file" in outcome.reason


@pytest.fixture
def small_disk(tmp_path: Path, need: Callable[[object, str], None]) -> Iterator[None]:
    """The stores have four megabytes."""
    need(os.geteuid() == 0, "root, to mount a small disk")
    folder = tmp_path / "mlruns"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=True)
    yield
    subprocess.run(["umount", "--lazy", folder], check=True)  # the libraries keep files open


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_breaks_the_trial_and_fails_its_run(ask: Try) -> None:
    trying = ask("model.hidden_units=1000")

    outcome = run_trial(trying.job)

    run = trying.run
    assert outcome.state == "BROKEN"
    assert re.search("No space left|disk is full", outcome.reason)
    assert run.info.status == "FAILED"
    assert re.search("No space left|disk is full", run.data.tags["error"])
    assert trying.study.get_trials()[0].state == TrialState.RUNNING


# --- a trial that goes on ----------------------------------------------------------------


@pytest.fixture
def long(ask: Try) -> Trying:
    return ask(f"training.epochs={LONG}", "training.early_stopping_patience=null")


def test_a_trial_that_goes_on_ends_as_one_run_with_each_epoch_once(long: Trying) -> None:
    assert interrupt(long, after=5).state == "STOPPED"
    before = len(long.reported)

    outcome = run_trial(long.job)

    every = list(range(1, LONG + 1))
    assert before < LONG
    assert outcome.state == "COMPLETE"
    assert list(long.reported) == every
    assert [long.steps(name) for name in ("epoch", "loss", "val_accuracy")] == [every] * 3
    assert long.run.info.status == "FINISHED"
    assert long.models == 1


def test_a_trial_that_goes_on_has_the_value_of_one_that_was_not_interrupted(
    long: Trying, ask: Try
) -> None:
    for after in (5, 10, 20):
        interrupt(long, after=after)

    outcome = run_trial(long.job)

    whole = ask(f"training.epochs={LONG}", "training.early_stopping_patience=null")
    assert outcome.values == run_trial(whole.job).values
    assert long.reported == whole.reported


def test_an_epoch_of_which_a_killed_process_had_not_told_is_told(long: Trying) -> None:
    interrupt(long, after=5)
    last = max(long.reported)
    untold = replace(long.job, trial_id=long.study.ask()._trial_id)

    run_trial(untold)

    assert list(long.reported) == list(range(last, LONG + 1))
    assert long.steps("loss") == list(range(1, LONG + 1))


def test_a_trial_whose_worker_died_after_its_last_epoch_trains_no_more(ask: Try) -> None:
    trying = ask()
    first = run_trial(trying.job)

    again = run_trial(trying.job)

    assert again.values == first.values
    assert trying.steps("loss") == [1, 2, 3]
    assert trying.models == 1
    assert trying.run.info.status == "FINISHED"


def test_a_trial_that_was_to_be_pruned_when_its_worker_died_is_pruned_when_it_goes_on(
    ask: Try,
) -> None:
    better = ask()
    trial = optuna.trial.Trial(better.study, better.job.trial_id)
    for epoch in range(1, LONG + 1):
        trial.report(1.0, epoch)
    better.study.tell(trial, 1.0)
    trying = ask(f"training.epochs={LONG}", "training.early_stopping_patience=null")
    interrupt(trying, after=5)
    before = list(trying.reported)

    outcome = run_trial(replace(trying.job, pruner=MEDIAN))

    assert outcome.state == "PRUNED"
    assert list(trying.reported) == before


# --- a machine whose files the launcher does not see --------------------------------------


@pytest.fixture
def elsewhere(ask: Try, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trying]:
    """Has a trial asked for by a launcher of another machine, with no folder in common."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    def elsewhere(*overrides: str, **changes: Any) -> Trying:
        trying = ask(*overrides)
        run = trying.job.run
        run = replace(run, store=replace(run.store, directory=tmp_path / "unknown"))
        job = replace(trying.job, run=run, home="another 0", **changes)
        return replace(trying, job=job)

    return elsewhere


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "tmp" / f"digit-sweeps-{os.getuid()}"


def test_a_trial_elsewhere_goes_on_from_its_checkpoint_there_and_clears_it_up(
    elsewhere: Callable[..., Trying], scratch: Path, tmp_path: Path
) -> None:
    trying = elsewhere(f"training.epochs={LONG}", "training.early_stopping_patience=null")
    assert interrupt(trying, after=5).state == "STOPPED"
    kept = [path.name for path in scratch.glob("checkpoints/*/*")]

    outcome = run_trial(trying.job)

    assert kept == [trying.job.checkpoint.name]
    assert outcome.state == "COMPLETE"
    assert outcome.epochs == LONG
    assert trying.steps("val_loss") == list(range(1, LONG + 1))
    assert list(scratch.glob("*/*")) == []
    assert not (tmp_path / "unknown").exists()
    assert stat.S_IMODE(scratch.stat().st_mode) == 0o700


def test_a_trial_elsewhere_is_trained_anew_where_an_earlier_try_left_something_untold(
    elsewhere: Callable[..., Trying], scratch: Path
) -> None:
    trying = elsewhere(f"training.epochs={LONG}", "training.early_stopping_patience=null")
    assert interrupt(trying, after=5).state == "STOPPED"
    run = trying.job.run
    there = replace(run, store=replace(run.store, directory=scratch))
    there.end_later("KILLED")

    outcome = run_trial(trying.job)

    assert outcome.state == "COMPLETE"
    assert outcome.epochs == LONG
    assert trying.run.info.status == "FINISHED"
    assert trying.steps("val_loss") == list(range(1, LONG + 1))
    assert list(scratch.glob("*/*")) == []


def test_a_trial_elsewhere_breaks_where_the_store_stays_away(
    elsewhere: Callable[..., Trying], scratch: Path
) -> None:
    trying = elsewhere()
    run = trying.job.run
    away = replace(run.store, uri="http://user:secret@127.0.0.1:9", database=None)

    outcome = run_trial(replace(trying.job, run=replace(run, store=away)))

    assert outcome.state == "BROKEN"
    assert outcome.reason == "AwayError: no answer from http://user:***@127.0.0.1:9."
    assert [path.parent.name for path in scratch.glob("spool/*/run.json")] == [run.run_id]
    run.store.use()  # as it was


def test_a_folder_of_another_user_is_not_used(
    elsewhere: Callable[..., Trying], scratch: Path
) -> None:
    scratch.symlink_to(scratch.parent)

    outcome = run_trial(elsewhere().job)

    assert outcome.state == "BROKEN"
    assert outcome.reason == f"PermissionError: {scratch} belongs to another user."
