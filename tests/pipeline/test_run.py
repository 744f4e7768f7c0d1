"""One run in process, and what it leaves in the store."""

import functools
import gc
import json
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import mlflow
import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from mlflow.utils import requirements_utils

from pipeline.arrays import Array
from pipeline.compose import CONF
from pipeline.config import RunConfig
from pipeline.data import Data, Split, load
from pipeline.endings import DivergedError, StopRun
from pipeline.run import RunResult, execute_run
from pipeline.store import open_store
from pipeline.tracking import create_run, find_run

pytestmark = pytest.mark.usefixtures("tensorflow")

Configure = Callable[..., RunConfig]

COMMAND = "python -m pipeline.run data=digits training=quick"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@dataclass(frozen=True)
class Recorded:
    """A run that ended well, as the store has it."""

    config: RunConfig
    result: RunResult
    run: Run
    data: Data
    folder: Path

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")


@pytest.fixture(scope="module")
def empty_database(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: it takes MLflow two seconds."""
    folder = tmp_path_factory.mktemp("empty")
    open_store(configure("data=npz", f"tracking.directory={folder}", "data.path=none").tracking)
    return folder / "mlflow.db"


@pytest.fixture(scope="module")
def recorded(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder = tmp_path_factory.mktemp("mlruns")
    config = configure("data=digits", "training=quick", f"tracking.directory={folder}", "seed=3")
    result = execute_run(config, COMMAND)
    run = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").get_run(result.run_id)
    return Recorded(config, result, run, load(config.data), folder)


@pytest.fixture
def stored(configure: Configure, tmp_path: Path, empty_database: Path) -> Configure:
    """Configurations of runs in a store of the test's own."""
    (tmp_path / "mlruns").mkdir()
    shutil.copy(empty_database, tmp_path / "mlruns" / "mlflow.db")
    return functools.partial(configure, f"tracking.directory={tmp_path / 'mlruns'}")


@pytest.fixture
def quick(stored: Configure) -> Configure:
    """Likewise, of short runs."""
    return functools.partial(stored, "data=digits", "training=quick", "model.hidden_units=32")


def only_run(folder: Path) -> Run:
    client = MlflowClient(f"sqlite:///{folder / 'mlruns' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def test_a_run_ends_finished_with_the_metrics_it_returned(recorded: Recorded) -> None:
    assert recorded.run.info.status == "FINISHED"
    last = recorded.run.data.metrics
    assert {name: last[name] for name in recorded.result.metrics} == recorded.result.metrics
    assert recorded.result.metrics.keys() == {
        "best_val_accuracy",
        "best_epoch",
        "saved_epoch",
        "saved_val_accuracy",
        "saved_val_loss",
        "fit_seconds",
        "samples_per_second",
        "parameters",
        "test_loss",
        "test_accuracy",
        "test_look",
    }


@pytest.mark.parametrize("name", ["loss", "accuracy", "val_loss", "val_accuracy"])
def test_every_epoch_is_recorded_under_the_names_of_keras(recorded: Recorded, name: str) -> None:
    history = recorded.client.get_metric_history(recorded.result.run_id, name)

    assert [metric.step for metric in history] == [1, 2, 3]


def test_parameters_have_their_dotted_names_and_the_spelling_of_the_command_line(
    recorded: Recorded,
) -> None:
    parameters = recorded.run.data.params

    assert parameters["model.hidden_units"] == "512"
    assert parameters["optimizer.learning_rate"] == "0.001"
    assert parameters["training.early_stopping_patience"] == "null"
    assert parameters["evaluate_test"] == "true"
    assert parameters["seed"] == "3"
    assert not [name for name in parameters if name.startswith("tracking.")]


def test_the_composed_configuration_is_an_artifact(recorded: Recorded, tmp_path: Path) -> None:
    path = recorded.client.download_artifacts(recorded.result.run_id, "config.yaml", str(tmp_path))

    config = yaml.safe_load(Path(path).read_text())
    assert config["data"]["validation_size"] == recorded.config.data.validation_size
    assert config["optimizer"]["rho"] == 0.9


def test_tags_hold_what_the_figures_depend_on(recorded: Recorded) -> None:
    tags = recorded.run.data.tags

    assert tags["command"] == COMMAND
    assert tags["data.sha256"] == recorded.data.digest
    assert tags["seed"] == "3"
    assert tags["threads"] == "1"
    assert tags["version.keras"] == keras.__version__
    assert tags["host"]
    assert COMMAND in tags["mlflow.note.content"]
    assert "test accuracy" in tags["mlflow.note.content"]


def test_the_inputs_are_the_three_splits_with_digest_and_size(recorded: Recorded) -> None:
    assert recorded.run.inputs is not None
    inputs = {
        given.tags[0].value: (
            given.dataset.digest,
            json.loads(given.dataset.profile or "{}")["num_rows"],
        )
        for given in recorded.run.inputs.dataset_inputs
    }

    splits = recorded.data.splits.items()
    assert inputs == {name: (split.digest[:16], len(split)) for name, split in splits}


def test_the_figures_are_artifacts(recorded: Recorded) -> None:
    files = recorded.client.list_artifacts(recorded.result.run_id, "figures")

    assert {file.path for file in files} == {
        "figures/digits.png",
        "figures/learning_curves.png",
        "figures/confusion_matrix.png",
        "figures/mistakes.png",
    }
    assert all((file.file_size or 0) > 5_000 for file in files)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_on_other_digits_without_change(
    stored: Configure, tmp_path: Path, name: str
) -> None:
    short = ("training.epochs=1", "tracking.figures=false", "evaluate_test=false")

    result = execute_run(stored(f"+experiment={name}", "data=digits", *short), COMMAND)

    run = only_run(tmp_path)
    assert (run.info.run_id, run.info.status) == (result.run_id, "FINISHED")
    assert result.metrics["best_val_accuracy"] > 0.2  # of ten classes, by chance 0.1


def test_an_experiment_learns_images_of_fashion_mnist_s_form(
    stored: Configure, tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    arrays: dict[str, Array] = {}
    for split, count in (("train", 4000), ("test", 400)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = draw.integers(0, 128, (count, 28, 28), dtype=np.uint8)
        images[np.arange(count), 2 * labels] += 127  # a bright row for each class
        arrays |= {f"x_{split}": images, f"y_{split}": labels}
    np.savez(tmp_path / "clothes.npz", allow_pickle=True, **arrays)
    config = stored(
        "+experiment=distorted",
        "data=fashion_mnist",
        f"data.path={tmp_path / 'clothes.npz'}",
        "data.sha256=null",
        "data.validation_size=100",
        "training.epochs=10",
        "tracking.figures=false",
    )

    result = execute_run(config, COMMAND)

    assert result.metrics["test_accuracy"] > 0.5  # of ten classes, by chance 0.1
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}")
    run = client.get_run(result.run_id)
    assert (run.info.status, run.data.params["data.name"]) == ("FINISHED", "fashion_mnist")


def test_a_run_that_distorts_its_images_shows_how(
    quick: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = quick("training.epochs=1", "augmentation=affine", "evaluate_test=false")

    result = execute_run(config, COMMAND)

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}")
    figures = client.list_artifacts(result.run_id, "figures")
    run = only_run(tmp_path)
    assert "figures/augmentation.png" in {file.path for file in figures}
    assert "images of digits, distorted." in run.data.tags["mlflow.note.content"]
    assert run.data.params["augmentation.rotation"] == "10.0"


def test_the_model_predicts_through_pyfunc_what_it_was_tested_with(recorded: Recorded) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{recorded.folder / 'mlflow.db'}")
    test = recorded.data.splits["test"]

    model = mlflow.pyfunc.load_model(f"runs:/{recorded.result.run_id}/model")
    probabilities = model.predict(test.images)

    accuracy = float((probabilities.argmax(axis=1) == test.labels).mean())
    assert accuracy == recorded.result.metrics["test_accuracy"]
    of_label = probabilities[np.arange(len(test)), test.labels]
    assert -np.log(of_label).mean() == pytest.approx(recorded.result.metrics["test_loss"], rel=1e-5)
    assert model.metadata.signature.inputs.inputs[0].shape == (-1, 8, 8)
    assert model.metadata.signature.outputs.inputs[0].shape == (-1, 10)
    assert model.input_example.shape == (5, 8, 8)


def test_the_requirements_of_the_model_are_pinned(recorded: Recorded) -> None:
    path = mlflow.artifacts.download_artifacts(
        f"runs:/{recorded.result.run_id}/model/requirements.txt"
    )

    requirements = Path(path).read_text().split()
    assert f"keras=={keras.__version__}" in requirements
    assert all("==" in requirement for requirement in requirements)


def test_recording_a_model_does_not_list_the_files_of_all_packages(
    quick: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    listings: list[str] = []

    def list_packages() -> dict[str, list[str]]:
        listings.append("of all packages")
        return {}

    monkeypatch.setattr(requirements_utils, "_MODULES_TO_PACKAGES", None)
    monkeypatch.setattr("importlib_metadata.packages_distributions", list_packages)

    execute_run(quick("training.epochs=1"), COMMAND)

    assert listings == []
    assert requirements_utils._MODULES_TO_PACKAGES is None  # as it was, for other models


def test_a_model_file_that_carries_code_is_refused(recorded: Recorded, tmp_path: Path) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{recorded.folder / 'mlflow.db'}")
    uri = f"runs:/{recorded.result.run_id}/model"
    model = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path)))
    code = keras.layers.Lambda(lambda images: images)
    evil = keras.Sequential([keras.Input((8, 8), dtype="uint8"), code])
    evil.save(model / "data" / "model.keras")

    with pytest.raises(ValueError, match="safe_mode"):
        mlflow.pyfunc.load_model(str(model))


def test_a_second_look_at_the_test_split_is_counted(quick: Configure) -> None:
    first = execute_run(quick("seed=1"), COMMAND)
    blind = execute_run(quick("evaluate_test=false"), COMMAND)
    second = execute_run(quick("seed=2", "data.validation_size=100"), COMMAND)

    looks = [result.metrics.get("test_look") for result in (first, blind, second)]
    assert looks == [1, None, 2]
    assert "test_accuracy" not in blind.metrics


def test_a_run_without_validation_is_judged_on_the_test_split_alone(
    quick: Configure, tmp_path: Path
) -> None:
    result = execute_run(quick("data.validation_size=0"), COMMAND)

    metrics = only_run(tmp_path).data.metrics
    assert "val_accuracy" not in metrics
    assert "best_val_accuracy" not in metrics
    assert metrics["test_accuracy"] == result.metrics["test_accuracy"]


def test_a_run_can_be_nested_under_another(quick: Configure, tmp_path: Path) -> None:
    config = quick("evaluate_test=false")
    store = open_store(config.tracking)
    parent = create_run(store, "parent", {})
    child = create_run(store, "child", {"trial": 3}, parent=parent)

    execute_run(config, COMMAND, into=child)

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}")
    recorded = client.get_run(child.run_id)
    assert recorded.data.tags["mlflow.parentRunId"] == parent.run_id
    assert recorded.info.status == "FINISHED"
    assert find_run(store, {"trial": 3}, parent=parent) == child


def test_what_is_known_beforehand_is_told_once_of_the_whole_run(
    quick: Configure, tmp_path: Path
) -> None:
    config = quick("evaluate_test=false")
    run = create_run(open_store(config.tracking), "pruned", {})

    def stop(epoch: int, metrics: dict[str, float]) -> None:
        raise StopRun

    for _ in range(2):
        with pytest.raises(StopRun):
            execute_run(config, COMMAND, on_epoch_end=stop, into=run, constants={"log10/x": 2.0})

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}")
    told = client.get_metric_history(run.run_id, "log10/x")
    assert [(metric.step, metric.value) for metric in told] == [(0, 2.0)]


def test_a_diverged_run_is_failed_with_its_epoch_and_has_no_figures_of_it(
    quick: Configure, tmp_path: Path
) -> None:
    with pytest.raises(DivergedError):
        execute_run(quick("optimizer=sgd", "optimizer.learning_rate=1e30"), COMMAND)

    run = only_run(tmp_path)
    assert run.info.status == "FAILED"
    assert run.data.tags["diverged"] == "true"
    assert run.data.tags["diverged.epoch"] == "1"
    assert run.data.metrics == {}


@pytest.mark.parametrize("reason", [StopRun("pruned"), KeyboardInterrupt()], ids=repr)
def test_a_run_that_is_stopped_is_killed_and_keeps_its_epochs(
    quick: Configure, tmp_path: Path, reason: BaseException
) -> None:
    def stop(epoch: int, metrics: dict[str, float]) -> None:
        raise reason

    with pytest.raises(type(reason)):
        execute_run(quick(), COMMAND, on_epoch_end=stop)

    run = only_run(tmp_path)
    assert run.info.status == "KILLED"
    assert "val_accuracy" in run.data.metrics


def test_a_run_that_fails_says_why(quick: Configure, tmp_path: Path) -> None:
    def fail(epoch: int, metrics: dict[str, float]) -> None:
        raise RuntimeError("the reason, with postgresql://me:secret@host/db")

    with pytest.raises(RuntimeError):
        execute_run(quick(), COMMAND, on_epoch_end=fail)

    run = only_run(tmp_path)
    assert run.info.status == "FAILED"
    assert run.data.tags["error"] == ("RuntimeError: the reason, with postgresql://me:***@host/db")
    text = Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/traceback.txt"))
    assert "RuntimeError" in text.read_text()
    assert "secret" not in text.read_text()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.hidden_units=1000000000", "GiB"),
        ("data.validation_size=5000", "data.validation_size"),
    ],
)
def test_what_is_refused_leaves_no_store(
    configure: Configure, tmp_path: Path, override: str, told: str
) -> None:
    config = configure("data=digits", f"tracking.directory={tmp_path / 'mlruns'}", override)

    with pytest.raises(ValueError, match=told):
        execute_run(config, COMMAND)

    assert list(tmp_path.iterdir()) == []


def test_another_number_of_threads_in_one_process_is_refused(quick: Configure) -> None:
    with pytest.raises(ValueError, match=r"training\.threads=7"):
        execute_run(quick("training.threads=7"), COMMAND)


def test_the_database_is_in_wal_mode_and_whole(recorded: Recorded) -> None:
    database = sqlite3.connect(recorded.folder / "mlflow.db")

    mode = database.execute("PRAGMA journal_mode").fetchone()
    integrity = database.execute("PRAGMA integrity_check").fetchone()
    database.close()

    assert (mode, integrity) == (("wal",), ("ok",))


def test_an_experiment_that_was_deleted_is_named(quick: Configure, tmp_path: Path) -> None:
    execute_run(quick(), COMMAND)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}")
    experiments = client.search_experiments(ViewType.ACTIVE_ONLY, filter_string="name = 'digits'")
    client.delete_experiment(experiments[0].experiment_id)

    with pytest.raises(ValueError, match=r"tracking\.experiment=digits was deleted"):
        execute_run(quick(), COMMAND)


def test_a_run_named_in_the_environment_is_left_alone(
    quick: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = execute_run(quick("seed=1"), COMMAND)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}")
    before = client.get_run(other.run_id).to_dictionary()
    monkeypatch.setenv("MLFLOW_RUN_ID", other.run_id)

    result = execute_run(quick("seed=2"), COMMAND)

    assert result.run_id != other.run_id
    assert client.get_run(other.run_id).to_dictionary() == before


def test_a_run_inside_an_active_run_ends_by_itself(quick: Configure, tmp_path: Path) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}")
    with mlflow.start_run() as outer:
        result = execute_run(quick(), COMMAND)
        still_active = mlflow.active_run()

    assert still_active is not None
    assert still_active.info.run_id == outer.info.run_id
    assert mlflow.get_run(result.run_id).info.status == "FINISHED"


def test_weights_that_overflow_in_the_last_step_fail_the_run(
    quick: Configure, tmp_path: Path
) -> None:
    # One step, whose loss is that of the initial weights: nothing but the weights shows it.
    one_step = ["training.batch_size=2000", "training.epochs=1", "data.validation_size=0"]
    config = quick("optimizer=sgd", "optimizer.learning_rate=1e39", *one_step)

    with pytest.raises(DivergedError):
        execute_run(config, COMMAND)

    assert only_run(tmp_path).info.status == "FAILED"


def test_no_password_of_a_configuration_is_recorded(quick: Configure, tmp_path: Path) -> None:
    config = quick()
    sources = [["https://me:hush-7f3a@host/x.npz"], ["https://host/x?user=me&password=hush-7f3a"]]

    execute_run(replace(config, data=replace(config.data, sources=sources)), COMMAND)

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if b"hush-7f3a" in path.read_bytes()] == []
    text = next(path for path in files if path.name == "config.yaml").read_text()
    assert "https://me:***@host/x.npz" in text


def test_system_metrics_are_recorded_when_asked_for(
    quick: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")

    execute_run(quick("tracking.system_metrics=true"), COMMAND)

    assert "system/cpu_utilization_percentage" in only_run(tmp_path).data.metrics


def test_the_images_of_a_run_are_freed_when_it_ends(quick: Configure) -> None:
    """Warm processes execute many runs."""
    gc.collect()
    before = {id(found) for found in gc.get_objects() if isinstance(found, Split)}

    execute_run(quick(), COMMAND)

    gc.collect()
    left = [found for found in gc.get_objects() if isinstance(found, Split)]
    assert [split.name for split in left if id(split) not in before] == []


def test_the_saved_model_is_that_of_the_best_epoch(quick: Configure) -> None:
    result = execute_run(quick("training.epochs=6", "optimizer.learning_rate=0.01"), COMMAND)

    assert result.metrics["saved_epoch"] == result.metrics["best_epoch"]


def test_the_real_mnist_trains_and_its_validation_is_counted_whole(
    configure: Configure, tmp_path: Path, mnist_npz: Path
) -> None:
    """10,000 validation images are several batches of Keras, and of our evaluation."""
    settings = [f"data.path={mnist_npz}", "data.train_size=6000", "training.epochs=2"]
    where = f"tracking.directory={tmp_path / 'mlruns'}"
    config = configure(
        "+experiment=notebook", "training.restore_best_weights=true", where, *settings
    )

    result = execute_run(config, COMMAND)

    validation = load(config.data).splits["validation"]
    model = mlflow.pyfunc.load_model(f"runs:/{result.run_id}/model")
    right = model.predict(validation.images).argmax(axis=1) == validation.labels
    assert len(right) == 10_000
    assert result.metrics["best_val_accuracy"] == pytest.approx(right.mean(), abs=1e-6)
    assert result.metrics["test_accuracy"] > 0.9
