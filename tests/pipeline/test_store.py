"""The store as it is read: runs found, predictions, views, and what the UI shows of a run."""

import base64
import json
import shutil
import socket
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline import database as database_module
from pipeline import store as store_module
from pipeline.config import LATER, RunConfig, flatten
from pipeline.data import Data, Split, load
from pipeline.database import analyze
from pipeline.endings import DivergedError, StopRun
from pipeline.evaluate import Evaluation
from pipeline.pages import RUNS, RUNS_KEY, View, metric
from pipeline.run import RunResult, execute_run
from pipeline.store import (
    NOTE,
    PREDICTIONS,
    Predictions,
    Store,
    connect,
    experiments,
    open_store,
    read_predictions,
    read_run,
    save_view,
    search,
)
from pipeline.tracking import Run, create_run, log_inputs, start_run
from tests.stores import locked, query

pytestmark = pytest.mark.usefixtures("tensorflow")

Configure = Callable[..., RunConfig]

COMMAND = "python -m pipeline.run data=digits training=quick"


@pytest.fixture(scope="module")
def empty_database(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: it takes MLflow seconds."""
    folder = tmp_path_factory.mktemp("empty")
    open_store(configure("data=npz", f"tracking.directory={folder}", "data.path=none").tracking)
    return folder / "mlflow.db"


def make_config(configure: Configure, empty_database: Path, folder: Path) -> RunConfig:
    """Of a short run, in a store of its own that is there already."""
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    return configure(
        "data=digits", "training=quick", "model.hidden_units=32", f"tracking.directory={folder}"
    )


@pytest.fixture
def config(configure: Configure, empty_database: Path, tmp_path: Path) -> RunConfig:
    return make_config(configure, empty_database, tmp_path / "mlruns")


@pytest.fixture
def opened(config: RunConfig) -> Store:
    return open_store(config.tracking)


@dataclass(frozen=True)
class Finished:
    """A run that ended well, with its images."""

    config: RunConfig
    result: RunResult
    data: Data


@pytest.fixture(scope="module")
def executed(
    configure: Configure, empty_database: Path, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    folder = tmp_path_factory.mktemp("executed") / "mlruns"
    config = make_config(configure, empty_database, folder)
    return Finished(config, execute_run(config, COMMAND), load(config.data))


@pytest.fixture
def finished(executed: Finished) -> Finished:
    """The one run of its store, which is the current one."""
    connect(executed.config.tracking)
    return executed


def add_runs(experiment_id: str, number: int) -> list[str]:
    """Bare runs, a second apart; the first is the oldest."""
    client = MlflowClient()
    return [
        client.create_run(
            experiment_id, start_time=1_000 * second, run_name=str(second)
        ).info.run_id
        for second in range(1, number + 1)
    ]


def names(condition: str = "", limit: int | None = None, order_by: str = "") -> list[str]:
    found = search(condition, limit=limit, order_by=[order_by] if order_by else [])
    return [run.name for run in found]


# --- finding runs ------------------------------------------------------------------------


def test_the_newest_run_is_found_first(opened: Store) -> None:
    add_runs(opened.experiment_id, 4)

    assert names() == ["4", "3", "2", "1"]


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 5, 6, 100, None])
def test_a_limit_holds_across_pages(
    opened: Store, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    monkeypatch.setattr(store_module, "PAGE", 2)
    add_runs(opened.experiment_id, 5)

    assert names(limit=limit) == ["5", "4", "3", "2", "1"][:limit]


def test_runs_are_found_in_the_order_asked_for_across_pages(
    opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PAGE", 2)
    for run_id, loss in zip(
        add_runs(opened.experiment_id, 5), [0.3, 0.1, 0.5, 0.2, 0.4], strict=True
    ):
        MlflowClient().log_metric(run_id, "val_loss", loss)

    assert names(order_by="metrics.val_loss ASC", limit=3) == ["2", "4", "1"]
    assert names("metrics.val_loss < 0.45", order_by="metrics.val_loss DESC") == [
        "5",
        "1",
        "4",
        "2",
    ]


def test_runs_of_all_experiments_are_found(opened: Store) -> None:
    add_runs(opened.experiment_id, 1)
    other = MlflowClient().create_experiment("other")
    MlflowClient().create_run(other, start_time=9_000, run_name="of the other")

    assert names() == ["of the other", "1"]
    assert experiments()[other] == "other"


def test_a_deleted_run_is_left_out(opened: Store) -> None:
    run_ids = add_runs(opened.experiment_id, 3)
    MlflowClient().delete_run(run_ids[1])

    assert names() == ["3", "1"]


def test_the_runs_of_a_deleted_experiment_are_left_out(opened: Store) -> None:
    add_runs(opened.experiment_id, 2)
    kept = MlflowClient().create_experiment("kept")
    MlflowClient().create_run(kept, run_name="kept")
    MlflowClient().delete_experiment(opened.experiment_id)

    assert names() == ["kept"]
    assert opened.experiment_id not in experiments()


def test_nothing_is_found_where_every_experiment_is_deleted(opened: Store) -> None:
    add_runs(opened.experiment_id, 2)
    for experiment_id in experiments():
        MlflowClient().delete_experiment(experiment_id)

    assert experiments() == {}
    assert names() == []


def test_an_unknown_run_is_named(opened: Store) -> None:
    with pytest.raises(ValueError, match=r"^no run has the id 0123abcd\.$"):
        read_run("0123abcd")


# --- connecting --------------------------------------------------------------------------


def test_a_store_that_is_missing_is_named_and_not_created(
    configure: Configure, tmp_path: Path
) -> None:
    tracking = configure("data=digits", f"tracking.directory={tmp_path / 'mlruns'}").tracking

    with pytest.raises(FileNotFoundError) as refusal:
        connect(tracking)

    assert str(tmp_path / "mlruns" / "mlflow.db") in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_a_sqlite_address_that_is_missing_is_named_and_not_created(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracking = replace(configure("data=digits").tracking, uri="sqlite:///mine.db")

    with pytest.raises(FileNotFoundError) as refusal:
        connect(tracking)

    assert str(tmp_path / "mine.db") in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_read_from_another_folder_and_leaves_nothing_there(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    uri = connect(finished.config.tracking)

    assert uri == f"sqlite:///{finished.config.tracking.directory}/mlflow.db"
    assert [run.run_id for run in search("")] == [finished.result.run_id]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def closed_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Nobody listens there; MLflow tries but once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_a_server_that_does_not_answer_is_named_without_its_password(
    configure: Configure, closed_port: int
) -> None:
    uri = f"http://me:hush-7f3a@127.0.0.1:{closed_port}"
    tracking = replace(configure("data=digits").tracking, uri=uri)

    with pytest.raises(ConnectionError) as refusal:
        connect(tracking)

    assert str(refusal.value) == (
        f"tracking.uri: no server answers at http://me:***@127.0.0.1:{closed_port}."
    )


# --- what is recorded of a run -----------------------------------------------------------


def test_a_run_is_read_as_it_was_recorded(opened: Store) -> None:
    client = MlflowClient()
    parent = create_run(opened, "parent", {})
    run_id = client.create_run(
        opened.experiment_id,
        start_time=1_700_000_000_500,
        run_name="child",
        tags={"mlflow.parentRunId": parent.run_id, "trial": "3"},
    ).info.run_id
    client.log_param(run_id, "model.l2", "0.5")
    for step, loss in enumerate([0.9, 0.7]):
        client.log_metric(run_id, "val_loss", loss, step=step)
    client.set_terminated(run_id, "KILLED", end_time=1_700_000_003_000)

    run = read_run(run_id)

    assert (run.run_id, run.name, run.experiment_id) == (run_id, "child", opened.experiment_id)
    assert (run.parent, run.status) == (parent.run_id, "KILLED")
    assert run.started == datetime(2023, 11, 14, 22, 13, 20, 500_000, tzinfo=UTC)
    assert run.seconds == 2.5
    assert (run.params, run.metrics) == ({"model.l2": "0.5"}, {"val_loss": 0.7})
    assert run.tags["trial"] == "3"
    assert run.validation is None
    assert next(search("tags.trial = '3'")) == run


TRAINED = {"training.epochs": "4", "training.ema_momentum": "0.5"}


@pytest.mark.parametrize(
    ("tags", "params", "read"),
    [
        ({}, TRAINED, {**dict(flatten(LATER)), **TRAINED}),
        ({"kind": "sweep"}, TRAINED, TRAINED),  # what it searches it has no value of
        ({}, {"lr": "0.1"}, {"lr": "0.1"}),  # of another program
    ],
)
def test_the_settings_of_a_run_are_completed_by_those_its_version_did_not_have(
    opened: Store, tags: dict[str, str], params: dict[str, str], read: dict[str, str]
) -> None:
    client = MlflowClient()
    run = client.create_run(opened.experiment_id, tags=tags).info.run_id
    for name, value in params.items():
        client.log_param(run, name, value)

    assert read_run(run).params == read


def test_a_run_that_goes_on_has_no_duration_and_may_have_no_parent(opened: Store) -> None:
    run = read_run(create_run(opened, "alone", {}).run_id)

    assert (run.status, run.seconds, run.parent) == ("RUNNING", None, None)


def test_a_run_knows_the_validation_images_it_was_judged_on(finished: Finished) -> None:
    validation = finished.data.splits["validation"]

    run = read_run(finished.result.run_id)

    assert run.validation == (validation.digest[:16], len(validation))
    assert run.seconds is not None
    assert run.seconds > finished.result.training_seconds


def test_a_run_without_validation_images_was_judged_on_none(
    config: RunConfig, opened: Store
) -> None:
    data = replace(load(config.data), validation=None)
    run = create_run(opened, "blind", {})

    log_inputs(run, config, data, COMMAND, note="")

    assert read_run(run.run_id).validation is None


# --- predictions -------------------------------------------------------------------------


def predictions_of(run_id: str) -> Predictions:
    found = read_predictions(read_run(run_id))
    assert found is not None
    return found


def predictions_file(opened: Store, run: Run) -> Path:
    """Where MLflow keeps those of a run."""
    assert opened.database is not None
    folder = MlflowClient().get_run(run.run_id).info.artifact_uri
    assert folder is not None
    return Path(folder.removeprefix("file://")) / PREDICTIONS


def test_the_predictions_of_a_run_are_those_its_metrics_were_measured_on(
    finished: Finished,
) -> None:
    predictions = predictions_of(finished.result.run_id)

    metrics = finished.result.metrics
    np.testing.assert_array_equal(predictions.labels, finished.data.splits["validation"].labels)
    assert predictions.correct.mean() == pytest.approx(metrics["saved_val_accuracy"], abs=1e-6)
    assert predictions.losses.astype(float).mean() == pytest.approx(
        metrics["saved_val_loss"], rel=1e-3
    )
    assert predictions.labels.dtype == predictions.classes.dtype == np.uint8


def judged(labels: npt.NDArray[np.int32], probabilities: npt.NDArray[np.float32]) -> Evaluation:
    images = np.zeros((len(labels), 2, 2), np.uint8)
    split = Split(name="validation", images=images, labels=labels, digest="0" * 64)
    return Evaluation(split=split, loss=0.0, accuracy=0.0, probabilities=probabilities)


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(2, np.uint8), (256, np.uint8), (257, np.uint16), (1_000, np.uint16), (70_000, np.uint32)],
)
def test_predictions_hold_any_number_of_classes(
    opened: Store, classes: int, dtype: type[np.integer[npt.NBitBase]]
) -> None:
    labels = np.array([0, classes - 1, classes - 2], np.int32)
    probabilities = np.full((3, classes), 0.25 / classes, np.float32)
    probabilities[np.arange(3), [0, classes - 1, 0]] += 0.75
    run = create_run(opened, "judged", {})

    run.log_predictions(judged(labels, probabilities))

    predictions = predictions_of(run.run_id)
    assert predictions.labels.tolist() == [0, classes - 1, classes - 2]
    assert predictions.classes.tolist() == [0, classes - 1, 0]
    assert predictions.labels.dtype == predictions.classes.dtype == dtype
    assert predictions.correct.tolist() == [True, True, classes == 2]


def test_a_class_that_was_held_impossible_has_a_finite_loss(opened: Store) -> None:
    labels = np.array([0, 1], np.int32)
    run = create_run(opened, "sure", {})

    run.log_predictions(judged(labels, np.array([[1, 0], [1, 0]], np.float32)))

    losses = predictions_of(run.run_id).losses
    assert losses.tolist() == pytest.approx([0.0, 87.3], abs=0.1)


def test_a_run_that_recorded_no_predictions_has_none(opened: Store) -> None:
    assert read_predictions(read_run(create_run(opened, "bare", {}).run_id)) is None


@pytest.mark.parametrize("artifacts", ["file:///nowhere", "mlflow-artifacts:/0/1/artifacts"])
def test_a_run_whose_files_are_out_of_reach_has_no_predictions(
    opened: Store, artifacts: str
) -> None:
    run = read_run(create_run(opened, "bare", {}).run_id)

    assert read_predictions(replace(run, artifacts=artifacts)) is None


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def spoil(path: Path) -> None:
    """Within the compressed numbers."""
    whole = bytearray(path.read_bytes())
    whole[60:70] = bytes(10)
    path.write_bytes(whole)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def overwrite(path: Path) -> None:
    path.write_text("not an array")


def leave_out(path: Path) -> None:
    np.savez(path, label=np.zeros(3))


@pytest.mark.parametrize("harm", [Path.unlink, cut_short, spoil, empty, overwrite, leave_out])
def test_predictions_that_were_deleted_or_damaged_are_none(
    opened: Store, harm: Callable[[Path], object]
) -> None:
    run = create_run(opened, "harmed", {})
    labels = np.arange(10, dtype=np.int32)
    run.log_predictions(judged(labels, np.eye(10, dtype=np.float32)))
    path = predictions_file(opened, run)
    assert path.exists()

    harm(path)

    assert read_predictions(read_run(run.run_id)) is None


# --- views -------------------------------------------------------------------------------


def saved_columns(experiment_id: str, key: str) -> list[str]:
    """As the UI reads them of the tag that its address names."""
    tag = MlflowClient().get_experiment(experiment_id).tags[f"mlflow.sharedViewState.{key}"]
    kind, _, packed = tag.partition(";")
    assert kind == "deflate"
    return list(json.loads(zlib.decompress(base64.b64decode(packed)))["selectedColumns"])


def test_a_view_that_is_saved_decodes_to_its_columns(opened: Store) -> None:
    view = View(columns=[metric("val_loss"), metric("epoch")])

    opened.save_view("mine", view)

    assert saved_columns(opened.experiment_id, "mine") == ["metrics.`val_loss`", "metrics.`epoch`"]


def test_a_view_that_is_saved_again_replaces_the_first(opened: Store) -> None:
    save_view(opened.experiment_id, "mine", View(columns=[metric("val_loss")]))

    save_view(opened.experiment_id, "mine", View(columns=[metric("loss")]))

    assert saved_columns(opened.experiment_id, "mine") == ["metrics.`loss`"]


def test_an_experiment_has_a_view_of_all_its_runs_from_the_first(opened: Store) -> None:
    assert saved_columns(opened.experiment_id, RUNS_KEY) == list(RUNS.columns)


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("sqlite:////tmp/mlflow.db", ""),
        ("postgresql+psycopg://me@host/db", ""),
        ("http://host:5000", "http://host:5000/#/page"),
        ("https://me:hush@host/mlflow/", "https://me:***@host/mlflow/#/page"),
    ],
)
def test_a_page_has_an_address_on_a_server_alone(uri: str, address: str) -> None:
    assert (
        Store(uri=uri, experiment_id="1", database=None, directory=Path()).address("#/page")
        == address
    )


# --- statistics of the database ----------------------------------------------------------


def test_a_database_is_told_how_large_its_tables_are(opened: Store) -> None:
    add_runs(opened.experiment_id, 3)
    assert opened.database is not None

    opened.analyze()

    tables = {table for (table,) in query(opened.database, "SELECT tbl FROM sqlite_stat1")}
    assert {"runs", "experiments"} <= tables
    assert query(opened.database, "PRAGMA integrity_check") == [("ok",)]
    assert names() == ["3", "2", "1"]


def test_a_database_that_another_writes_to_is_left_as_it_is(
    opened: Store, caplog: pytest.LogCaptureFixture
) -> None:
    assert opened.database is not None
    began = time.monotonic()

    with closing(sqlite3.connect(opened.database)) as other:
        other.execute("BEGIN IMMEDIATE")
        analyze(opened.database)

    assert time.monotonic() - began < 10
    assert (
        query(opened.database, "SELECT name FROM sqlite_master WHERE name = 'sqlite_stat1'") == []
    )
    assert [record for record in caplog.records if record.name == "pipeline.database"] == []


def test_a_store_without_a_file_has_nothing_to_analyze(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    Store(uri="http://host", experiment_id="1", database=None, directory=Path()).analyze()

    assert list(tmp_path.iterdir()) == []


# --- waiting for another writer ----------------------------------------------------------


def seconds_of_a_refusal(run: Run) -> float:
    began = time.monotonic()
    told = f"^{run.store.database} was locked by another process for more than 3 seconds.$"
    with pytest.raises(MlflowException, match=told):
        run.log_metrics({"loss": 1.0})
    return time.monotonic() - began


def test_a_run_is_recorded_once_a_lock_is_gone_that_mlflow_would_not_have_waited_for(
    opened: Store,
) -> None:
    run = create_run(opened, "patient", {})
    writer = threading.Thread(target=run.log_metrics, args=({"loss": 0.5},), daemon=True)

    with locked(opened.database):
        writer.start()
        writer.join(23)  # MLflow's own patience ends after 20 seconds
        waits = writer.is_alive()
    writer.join(30)

    assert waits
    assert run.metrics == {"loss": 0.5}


def test_after_a_wait_in_vain_all_that_follow_are_as_long_together_until_one_is_not(
    opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a run that cannot be recorded ends in its time."""
    monkeypatch.setattr(database_module, "LOCK_TIMEOUT", 3)
    run = create_run(opened, "refused", {})

    with locked(opened.database):
        first, _, third = (seconds_of_a_refusal(run) for _ in range(3))
    run.log_metrics({"loss": 0.5})
    with locked(opened.database):
        fresh = seconds_of_a_refusal(run)

    assert min(first, fresh) > 2.9
    assert 0.9 < third < 2.9
    assert run.metrics == {"loss": 0.5}


# --- what the UI shows on top of a run ---------------------------------------------------


def note_of(run_id: str) -> str:
    return read_run(run_id).tags[NOTE]


def only_note() -> str:
    (run,) = search("")
    return run.tags[NOTE]


def test_a_finished_run_says_what_it_is_what_came_out_and_how_to_repeat_it(
    finished: Finished,
) -> None:
    what, outcome, repeat = note_of(finished.result.run_id).split("\n\n")

    metrics = finished.result.metrics
    assert what.startswith("64-32-32-10, relu, dropout 0.2; rmsprop at 0.001, batches of ")
    assert what.endswith(f"{len(finished.data.train):,} images of digits.")
    best, test, size = outcome.splitlines()
    assert best.startswith(f"- best validation accuracy: {metrics['best_val_accuracy']:.4f}")
    assert test == f"- test accuracy: **{metrics['test_accuracy']:.4f}** (look 1)"
    assert size.startswith(f"- {metrics['parameters']:,.0f} parameters, ")
    assert repeat == f"Repeat: `{COMMAND}`"


def test_a_diverged_run_says_so(config: RunConfig) -> None:
    sgd = replace(config.optimizer, learning_rate=1e30)

    with pytest.raises(DivergedError) as failure:
        execute_run(replace(config, optimizer=sgd), COMMAND)

    what, outcome, repeat = only_note().split("\n\n")
    assert what.startswith("64-32-32-10, relu, ")
    assert outcome == f"- failed: DivergedError: {failure.value}"
    assert repeat == f"Repeat: `{COMMAND}`"


@pytest.mark.parametrize("reason", [StopRun("pruned"), KeyboardInterrupt()], ids=repr)
def test_a_stopped_run_says_after_which_epoch_and_how_good_it_was(
    config: RunConfig, reason: BaseException
) -> None:
    def stop(epoch: int, metrics: dict[str, float]) -> None:
        raise reason

    with pytest.raises(type(reason)):
        execute_run(config, COMMAND, on_epoch_end=stop)

    (run,) = search("")
    what, outcome, repeat = only_note().split("\n\n")
    assert what.startswith("64-32-32-10, relu, ")
    accuracy = run.metrics["val_accuracy"]
    assert outcome == f"- stopped after epoch 1; best validation accuracy {accuracy:.4f}"
    assert repeat == f"Repeat: `{COMMAND}`"


@pytest.mark.parametrize(
    ("metrics", "outcome"),
    [
        ({}, "- stopped before the end of its first epoch"),
        ({"epoch": 2.0}, "- stopped after epoch 2"),
        (
            {"epoch": 12.0, "best_val_accuracy": 0.5},
            "- stopped after epoch 12; best validation accuracy 0.5000",
        ),
    ],
)
def test_a_stopped_run_says_how_far_it_came(
    config: RunConfig, metrics: dict[str, float], outcome: str
) -> None:
    with pytest.raises(KeyboardInterrupt), start_run(config, load(config.data), COMMAND) as run:
        run.log_metrics(metrics, step=int(metrics.get("epoch", 0)))
        raise KeyboardInterrupt

    assert only_note().split("\n\n")[1:] == [outcome, f"Repeat: `{COMMAND}`"]


def test_a_note_of_a_run_holds_no_password(config: RunConfig) -> None:
    with (
        pytest.raises(RuntimeError),
        start_run(config, load(config.data), f"{COMMAND} tracking.uri=https://me:hush@host"),
    ):
        raise RuntimeError("no https://me:hush@host")

    assert "hush" not in only_note()
    assert "failed: RuntimeError: no https://me:***@host" in only_note()
