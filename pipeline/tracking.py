"""Runs in MLflow: where they are kept, what is recorded, how they end."""

import getpass
import json
import logging
import platform
import shlex
import sqlite3
import subprocess
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import mlflow
import mlflow.pyfunc
import mlflow.tensorflow
import numpy as np
import sqlalchemy
import yaml
from filelock import FileLock
from matplotlib.figure import Figure
from mlflow.data.schema import TensorDatasetSchema
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    Param,
    RunStatus,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.types import Schema, TensorSpec
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from pipeline.config import RunConfig, TrackingConfig, without_password
from pipeline.data import Array, Data, Split
from pipeline.endings import DivergedError, StopRun

log = logging.getLogger(__name__)

LIBRARIES = ("tensorflow", "keras", "numpy", "mlflow")
ROOT = Path(__file__).resolve().parents[1]
RESERVE_BYTES = 256 * 1024  # many times what the end of a run writes to the database

EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)  # it raises what it logs


@dataclass(frozen=True, kw_only=True)
class Store:
    """An open tracking store.

    Attributes:
        uri: Of MLflow's tracking store; a local file as an absolute path.
        experiment_id: Of the configured experiment.
        database: File of a SQLite store, else None.
    """

    uri: str
    experiment_id: str
    database: Path | None

    @property
    def reserve(self) -> Path | None:
        """A file of a SQLite store that gives its room to a run that ends on a full disk."""
        return self.database.with_name(".reserve") if self.database else None


def open_store(config: TrackingConfig) -> Store:
    """Opens the tracking store and its experiment, creating what is missing.

    Any number of processes may do so at once.

    Raises:
        ValueError: The experiment was deleted.
        ConnectionError: No server answers.
    """
    directory = Path(config.directory).absolute()
    uri = config.uri or f"sqlite:///{directory / 'mlflow.db'}"
    database = None
    if uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///")).absolute()
        uri = f"sqlite:///{database}"
        _create_database(database)
    mlflow.set_tracking_uri(uri)
    on_server = uri.startswith(("http://", "https://"))
    artifacts = None if on_server else (directory / "artifacts").as_uri()
    try:
        with _alone(uri):
            experiment_id = _experiment(config.experiment, artifacts)
    except MlflowException as error:
        if "Max retries exceeded" not in str(error):
            raise
        shown = without_password(uri)
        raise ConnectionError(f"tracking.uri: no server answers at {shown}.") from error
    store = Store(uri=uri, experiment_id=experiment_id, database=database)
    if store.reserve:
        with suppress(OSError):  # the disk is full already
            _fill(store.reserve)
    return store


def _fill(reserve: Path) -> None:
    if not reserve.exists() or reserve.stat().st_size < RESERVE_BYTES:
        reserve.write_bytes(bytes(RESERVE_BYTES))


def _create_database(path: Path) -> None:
    """Creates MLflow's SQLite database all at once: elsewhere, then renamed.

    MLflow's own first use is neither safe against other processes nor against a kill half-way.
    WAL is a lasting property of the file; readers then never block the writer.
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
        artifacts = (path.parent / "artifacts").as_uri()
        store = SqlAlchemyStore(f"sqlite:///{new}", artifacts)  # type: ignore[no-untyped-call]
        store.engine.dispose()
        database = sqlite3.connect(new)
        database.execute("PRAGMA journal_mode=WAL")
        database.close()
        new.replace(path)


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Inside, no other process opens the PostgreSQL store, which MLflow creates on first use.

    The lock is the database's own, and ends with its connection.
    """
    if not uri.startswith("postgresql"):
        yield
        return
    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(hashtext('digit-sweeps'))"))
        yield


def _experiment(name: str, artifact_location: str | None) -> str:
    found = mlflow.get_experiment_by_name(name)
    if found is None:
        try:
            return mlflow.create_experiment(name, artifact_location, EXPERIMENT_TAGS)
        except MlflowException:  # another process was faster
            found = mlflow.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        raise ValueError(
            f"tracking.experiment={name} was deleted: restore it in MLflow or choose another name."
        )
    return found.experiment_id


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is being recorded."""

    run_id: str
    name: str
    store: Store

    @property
    def ui(self) -> str:
        """The line that opens the UI on this run; on a server, its address."""
        page = (
            f"#/experiments/{self.store.experiment_id}/runs/{self.run_id}"
            "?workflowType=machine_learning"  # or the UI opens on its pages for language models
        )
        uri = without_password(self.store.uri)
        if uri.startswith(("http://", "https://")):
            return f"{uri.rstrip('/')}/{page}"
        if self.store.database and self.store.database.is_relative_to(Path.cwd()):
            uri = f"sqlite:///{self.store.database.relative_to(Path.cwd())}"
        line = f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
        return f"{line}  # then http://127.0.0.1:5000/{page}"

    def describe(self, text: str) -> None:
        """Sets the Markdown text that the UI shows on top of the run."""
        self.set_tags({"mlflow.note.content": text})

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Records metrics of an epoch, or with step 0 of the whole run, in one synchronous call."""
        now = int(time.time() * 1000)
        batch = [Metric(name, value, now, step) for name, value in metrics.items()]
        mlflow.MlflowClient().log_batch(self.run_id, metrics=batch, synchronous=True)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        batch = [RunTag(name, without_password(str(value))) for name, value in tags.items()]
        mlflow.MlflowClient().log_batch(self.run_id, tags=batch, synchronous=True)

    def log_figure(self, figure: Figure, name: str) -> None:
        """Saves a figure as `figures/<name>.png`, which the UI shows."""
        fast = {"dpi": 110, "pil_kwargs": {"compress_level": 1}}
        client = mlflow.MlflowClient()
        client.log_figure(self.run_id, figure, f"figures/{name}.png", save_kwargs=fast)

    def log_model(self, model: keras.Model, data: Data) -> None:
        """Saves the model in MLflow's own flavour, with signature, example and requirements.

        Args:
            model: Raw pixels `[batch, height, width]` to probabilities `[batch, num_classes]`.
            data: Its first training images are the example.
        """
        example = data.train.images[:5]
        outputs = (-1, len(data.class_names))
        signature = ModelSignature(
            inputs=_tensor(example), outputs=Schema([TensorSpec(np.dtype("float32"), outputs)])
        )
        mlflow.tensorflow.log_model(
            model,
            name="model",
            signature=signature,
            input_example=example,
            pip_requirements=[f"{name}=={version(name)}" for name in LIBRARIES],
        )

    def count_test_look(self, data: Data) -> int:
        """Records that this run looks at the test split.

        Returns:
            Looks of all recorded runs so far, this one included.
        """
        digest = data.splits["test"].digest
        self.set_tags({"test_split": digest})
        experiments = mlflow.search_experiments(view_type=ViewType.ALL)
        return len(
            mlflow.search_runs(
                [experiment.experiment_id for experiment in experiments],
                f"tags.test_split = '{digest}'",
                run_view_type=ViewType.ALL,
                output_format="list",
            )
        )


@contextmanager
def start_run(
    config: RunConfig, data: Data, command: str, *, parent_run_id: str | None = None
) -> Iterator[Run]:
    """Records a run: FINISHED, KILLED when stopped or interrupted, else FAILED.

    Args:
        config: Logged as parameters by their dotted names, and whole as `config.yaml`.
        data: Logged as the run's inputs.
        command: Command line that repeats the run.
        parent_run_id: Run under which this one is nested.

    Raises:
        ValueError: The experiment was deleted.
    """
    store = open_store(config.tracking)
    name = config.tracking.run_name or run_name(config)
    tags = {"command": without_password(command), **_environment(config, data)}
    if parent_run_id is not None:
        tags["mlflow.parentRunId"] = parent_run_id
    created = mlflow.MlflowClient().create_run(store.experiment_id, tags=tags, run_name=name)
    run = Run(run_id=created.info.run_id, name=name, store=store)
    status, failure = RunStatus.FAILED, None
    try:
        # Active for what asks for an active run: the model, and the system metrics.
        mlflow.start_run(
            run_id=run.run_id, nested=True, log_system_metrics=config.tracking.system_metrics
        )
        _log_inputs(run, config, data)
        yield run
        status = RunStatus.FINISHED
    except (KeyboardInterrupt, StopRun):
        status = RunStatus.KILLED
        raise
    except Exception as error:
        failure = error
        raise
    finally:
        _end(run, status, failure)


def _log_inputs(run: Run, config: RunConfig, data: Data) -> None:
    client, settings = mlflow.MlflowClient(), asdict(config)
    parameters = [
        Param(name, without_password(value))
        for name, value in _flat(settings)
        if not name.startswith("tracking.")
    ]
    client.log_batch(run.run_id, params=parameters)
    text = yaml.safe_dump(settings, sort_keys=False, width=1_000)
    client.log_text(run.run_id, without_password(text), "config.yaml")
    datasets = [
        DatasetInput(
            _dataset(config.data.name, split, data.source),
            [InputTag(MLFLOW_DATASET_CONTEXT, context)],
        )
        for context, split in data.splits.items()
    ]
    client.log_inputs(run.run_id, datasets)


def _dataset(name: str, split: Split, source: str) -> Dataset:
    schema = TensorDatasetSchema(features=_tensor(split.images), targets=_tensor(split.labels))
    return Dataset(
        name=name,
        digest=split.digest[:16],
        source_type="http" if "://" in source else "local",
        source=json.dumps({"url" if "://" in source else "uri": source}),
        schema=json.dumps(schema.to_dict()),
        profile=json.dumps({"num_rows": len(split), "features_shape": split.images.shape}),
    )


def _tensor(array: Array) -> Schema:
    return Schema([TensorSpec(array.dtype, (-1, *array.shape[1:]))])


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Values by dotted name, spelt as in YAML; lists are left to `config.yaml`."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is None or isinstance(value, bool):
            yield f"{prefix}{name}", {None: "null", True: "true", False: "false"}[value]
        elif not isinstance(value, list):
            yield f"{prefix}{name}", str(value)


def _environment(config: RunConfig, data: Data) -> dict[str, str]:
    """Tags of all that the figures depend on, beyond the parameters."""
    return {
        "data.sha256": data.digest,
        "host": platform.node(),
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": "pipeline.run",
        "mlflow.source.type": "LOCAL",
        "platform": platform.platform(),
        "seed": str(config.seed),
        "threads": str(config.training.threads),
        "version.python": platform.python_version(),
        **{f"version.{name}": version(name) for name in LIBRARIES},
        **_git(),
    }


def _git() -> dict[str, str]:
    """Commit of this code and whether files differ from it; nothing outside a checkout."""
    try:
        top, commit, status = (
            subprocess.run(
                ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (
                ["rev-parse", "--show-toplevel"],
                ["rev-parse", "HEAD"],
                ["status", "--porcelain"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    if Path(top) != ROOT:  # the code is installed inside the checkout of something else
        return {}
    dirty = str(bool(status)).lower()
    return {"git.commit": commit, "git.dirty": dirty, "mlflow.source.git.commit": commit}


def run_name(config: RunConfig) -> str:
    """A name that tells runs apart: widths, dropout, optimizer, rate, seed."""
    model = config.model
    widths = "-".join([str(model.hidden_units)] * model.hidden_layers) or "linear"
    if model.hidden_layers > 3:
        widths = f"{model.hidden_units}x{model.hidden_layers}"
    return (
        f"{widths} dropout={model.dropout_rate:g} {config.optimizer.name} "
        f"lr={config.optimizer.learning_rate:g} seed={config.seed}"
    )


def _end(run: Run, status: int, failure: Exception | None) -> None:
    """Ends the run with its reason, on a full disk in the room of the reserve.

    Raises:
        Exception: A run that succeeded cannot be recorded as such.
    """
    try:
        _record_end(run, status, failure)
    except Exception:
        if run.store.reserve:
            run.store.reserve.unlink(missing_ok=True)
        try:
            _record_end(run, status, failure)
        except Exception as error:
            log.error("run %s is left without an end: %s", run.run_id, without_password(str(error)))
            if status == RunStatus.FINISHED:
                raise
    finally:
        with suppress(Exception):  # the end is recorded, or its failure told
            mlflow.end_run(RunStatus.to_string(status))


def _record_end(run: Run, status: int, failure: Exception | None) -> None:
    if failure is not None:
        tags: dict[str, object] = {"error": f"{type(failure).__name__}: {failure}"[:500]}
        if isinstance(failure, DivergedError):
            tags |= {"diverged": "true", "diverged.epoch": failure.epoch}
        run.set_tags(tags)
    client = mlflow.MlflowClient()
    client.set_terminated(run.run_id, RunStatus.to_string(status))
    if failure is not None and not isinstance(failure, DivergedError):
        lines = "".join(traceback.format_exception(failure))
        with suppress(Exception):  # the reason is recorded; the disk may be full
            client.log_text(run.run_id, without_password(lines), "traceback.txt")
