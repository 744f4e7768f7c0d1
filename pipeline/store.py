"""Where runs are kept: MLflow's tracking store, opened, searched and read."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import mlflow
import numpy as np
import numpy.typing as npt
import requests
import yaml
from mlflow.exceptions import MlflowException, RestException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID
from sqlalchemy.exc import SQLAlchemyError

from pipeline.config import TrackingConfig, complete, printable, without_password
from pipeline.database import (
    alone,
    analyze,
    causes,
    create_sqlite,
    lost_connection,
    sqlite_path,
    sqlite_uri,
)
from pipeline.pages import RUNS, RUNS_KEY, View

log = logging.getLogger(__name__)

RESERVE_BYTES = 256 * 1024  # many times what the end of a run writes to the database
PAGE = 500  # runs read at once
NOTE = "mlflow.note.content"  # Markdown that the UI shows on top of a run
PREDICTIONS = "predictions/validation.npz"
SETTINGS = "config.yaml"  # of a run, whole

# What goes wrong with a store, not with a run: a full disk, a locked database, no server.
STORE_ERRORS = (OSError, MlflowException, SQLAlchemyError)
# What NumPy raises of a file that is cut short, damaged or something else.
_DAMAGED = (EOFError, KeyError, ValueError, BadZipFile, zlib.error)

_VIEW = "mlflow.sharedViewState."  # what the UI calls the tags that hold views
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    f"{_VIEW}{RUNS_KEY}": RUNS.text,
}

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("mlflow.store.db").setLevel(logging.CRITICAL)  # it raises what it logs


@dataclass(frozen=True, kw_only=True)
class Store:
    """An open tracking store.

    Attributes:
        uri: Of MLflow's tracking store; a local file as an absolute path.
        experiment_id: Of the configured experiment.
        database: File of a SQLite store, else None.
        directory: Folder of what is kept beside it on this machine.
    """

    uri: str
    experiment_id: str
    database: Path | None
    directory: Path

    def use(self) -> None:
        """Makes it the store of this process."""
        mlflow.set_tracking_uri(self.uri)

    @property
    def spools(self) -> Path:
        """Has a folder a run of which the store, while it was away, was not told all."""
        return self.directory / "spool"

    @property
    def reserve(self) -> Path | None:
        """A file of a SQLite store that gives its room to a run that ends on a full disk."""
        return self.database.with_name(".reserve") if self.database else None

    def address(self, page: str) -> str:
        """Address of a page of the UI on a server; empty where `pipeline.ui` has to start one."""
        return f"{without_password(self.uri).rstrip('/')}/{page}" if is_server(self.uri) else ""

    def save_view(self, key: str, view: View) -> None:
        """Keeps a view of the experiment's runs, for `pipeline.pages.runs_page`."""
        save_view(self.experiment_id, key, view)

    def analyze(self) -> None:
        """Tells the database how large its tables are: it then finds runs several times faster."""
        if self.database:
            analyze(self.database)


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def open_store(config: TrackingConfig) -> Store:
    """Opens the tracking store and its experiment, creating what is missing.

    Any number of processes may do so at once.

    Raises:
        ValueError: The experiment was deleted.
        ConnectionError: No server answers.
    """
    directory = Path(config.directory).absolute()
    uri = config.uri or sqlite_uri(directory / "mlflow.db")
    database = sqlite_path(uri)
    artifacts = (directory / "artifacts").as_uri()
    if database:
        uri = f"sqlite:///{database}"
        create_sqlite(database, lambda new: SqlAlchemyStore(new, artifacts).engine.dispose())  # type: ignore[no-untyped-call]
    mlflow.set_tracking_uri(uri)
    with _connecting(uri), alone(uri):
        experiment_id = _experiment(config.experiment, None if is_server(uri) else artifacts)
    store = Store(uri=uri, experiment_id=experiment_id, database=database, directory=directory)
    if store.reserve:
        with suppress(OSError):  # the disk is full already
            _fill(store.reserve)
    return store


@contextmanager
def _connecting(uri: str) -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        shown = without_password(uri)
        if error.error_code in ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
            raise PermissionError(
                f"tracking.uri: {shown} asks for a user and a password it knows: set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
            ) from error
        if "Invalid Host header" in str(error):
            raise PermissionError(
                f"tracking.uri: the server does not know itself by the name in {shown}: add that "
                "to its --allowed-hosts."
            ) from error
        if error.error_code == "PERMISSION_DENIED":
            raise PermissionError(
                f"tracking.experiment: the user at {shown} may not read it: ask whoever made it, "
                "or choose another name."
            ) from error
        if not (is_server(uri) and is_away(error, uri)):
            raise
        raise ConnectionError(f"tracking.uri: no server answers at {shown}.") from error


# --- stores that are away ----------------------------------------------------------------

_IMPATIENT = {
    # None: what creates a run or a model, repeated, creates two. The spool repeats it in order.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # seconds: with what cleans up after it, below 15
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # of a proxy that asks for minutes
}
# What MLflow raises of a request that is not answered, or with an error that may pass.
_UNANSWERED = re.compile(
    r"API request to .* failed with (timeout exception|exception|error code (429|5\d\d))", re.S
)


@contextmanager
def impatient() -> Iterator[None]:
    """Inside, a request to an MLflow server takes less than 15 seconds, answered or not."""
    before = {name: os.environ.get(name) for name in _IMPATIENT}
    os.environ.update(_IMPATIENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def is_away(error: BaseException, uri: str) -> bool:
    """Whether an error says that a store cannot be reached now, but perhaps later.

    Args:
        error: That was raised.
        uri: Of the store: a server, or a database on one. A file is never away.
    """
    if sqlite_path(uri):
        return False
    if not is_server(uri):
        return lost_connection(error)
    return any(_is_unanswered(each) for each in causes(error))


def _is_unanswered(error: BaseException) -> bool:
    match error:
        case requests.ConnectionError() | requests.Timeout():
            return True
        case requests.HTTPError(response=requests.Response(status_code=status)):
            return status >= 500
        case RestException():
            # Of an answer without a code (404, 401: not MLflow's own), it says INTERNAL_ERROR.
            return error.json.get("error_code") in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")
        case MlflowException():
            return bool(_UNANSWERED.match(str(error)))
    return False


def _fill(reserve: Path) -> None:
    if not reserve.exists() or reserve.stat().st_size < RESERVE_BYTES:
        reserve.write_bytes(bytes(RESERVE_BYTES))


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


# --- reading -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A run as it is recorded.

    Attributes:
        run_id: In MLflow.
        name: In MLflow.
        experiment_id: In MLflow.
        parent: Run it is nested under, if any.
        status: RUNNING, FINISHED, KILLED or FAILED.
        started: When, in UTC.
        seconds: From its start to its end; None while it runs.
        params: Settings by dotted name, spelt as in YAML; of what a run has trained, all that this
            version has.
        metrics: The last value of each.
        tags: All of them.
        artifacts: Address of the folder of its files.
        validation: Digest and number of the images it was judged on, if any.
    """

    run_id: str
    name: str
    experiment_id: str
    parent: str | None
    status: str
    started: datetime
    seconds: float | None
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    artifacts: str
    validation: tuple[str, int] | None


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What the saved model of a run says of each validation image; `[n]` each.

    Attributes:
        labels: True classes.
        classes: Predicted ones.
        losses: Cross-entropy in nats, rounded to three digits.
    """

    labels: npt.NDArray[np.integer[Any]]
    classes: npt.NDArray[np.integer[Any]]
    losses: npt.NDArray[np.floating[Any]]

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """`[n]`"""
        return np.asarray(self.labels == self.classes)


def connect(config: TrackingConfig) -> str:
    """Opens a store to read all its experiments; creates nothing.

    Returns:
        Its address.

    Raises:
        FileNotFoundError: There is none.
        ConnectionError: No server answers.
    """
    database = Path(config.directory).absolute() / "mlflow.db"
    uri = config.uri or sqlite_uri(database)
    if (path := sqlite_path(uri)) and not path.exists():
        raise FileNotFoundError(
            f"no runs are recorded in {path}: run python -m sweeps.run data=digits, "
            "or set tracking.directory to where there are some."
        )
    mlflow.set_tracking_uri(uri)
    with _connecting(uri):
        mlflow.MlflowClient().search_experiments(max_results=1)
    return uri


def experiments() -> dict[str, str]:
    """Name by id of each experiment that is not deleted."""
    return {found.experiment_id: printable(found.name) for found in mlflow.search_experiments()}


def search(
    condition: str, *, order_by: Sequence[str] = (), limit: int | None = None
) -> Iterator[Recorded]:
    """Runs of all experiments, deleted ones left out; the newest first unless ordered.

    Args:
        condition: In MLflow's grammar, on attributes, metrics, parameters and tags.
        order_by: Likewise, as `metrics.val_loss ASC`.
        limit: Runs at most.
    """
    client, ids, token = mlflow.MlflowClient(), list(experiments()), None
    while limit is None or limit > 0:
        page = client.search_runs(
            ids,
            condition,
            max_results=min(PAGE, limit or PAGE),
            order_by=list(order_by),
            page_token=token,
        )
        yield from map(_recorded, page)
        limit = None if limit is None else limit - len(page)
        token = page.token
        if not token:
            break


def read_run(run_id: str) -> Recorded:
    """One run.

    Raises:
        ValueError: There is none of this id.
    """
    try:
        return _recorded(mlflow.MlflowClient().get_run(run_id))
    except MlflowException as error:
        # Of an id that none can be, MLflow says that it is invalid.
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise ValueError(f"no run has the id {run_id}.") from error


def _recorded(run: mlflow.entities.Run) -> Recorded:
    info, data = run.info, run.data
    tags = _printable(data.tags)
    return Recorded(
        run_id=info.run_id,
        name=printable(info.run_name),
        experiment_id=info.experiment_id,
        parent=tags.get(MLFLOW_PARENT_RUN_ID),
        status=info.status,
        started=datetime.fromtimestamp(info.start_time / 1000, UTC),
        seconds=(info.end_time - info.start_time) / 1000 if info.end_time else None,
        params=_settings(data.params, tags),
        metrics=dict(data.metrics),
        tags=tags,
        artifacts=info.artifact_uri,
        validation=_validation(run),
    )


def _settings(params: Mapping[str, str], tags: Mapping[str, str]) -> dict[str, str]:
    settings = _printable(params)
    is_trained = "training.epochs" in settings and tags.get("kind") != "sweep"
    return complete(settings) if is_trained else settings


def _printable(texts: Mapping[str, str]) -> dict[str, str]:
    return {printable(name): printable(text) for name, text in texts.items()}


def _validation(run: mlflow.entities.Run) -> tuple[str, int] | None:
    for given in run.inputs.dataset_inputs if run.inputs else ():
        contexts = [tag.value for tag in given.tags if tag.key == MLFLOW_DATASET_CONTEXT]
        if contexts == ["validation"] and given.dataset.profile:
            return given.dataset.digest, json.loads(given.dataset.profile).get("num_rows", 0)
    return None


def read_predictions(run: Recorded) -> Predictions | None:
    """What `Run.log_predictions` recorded; None where nothing was, or it was deleted or damaged."""
    with (
        suppress(*STORE_ERRORS, *_DAMAGED),
        _artifact(run, PREDICTIONS) as path,
        path.open("rb") as file,  # NumPy leaves open what it opens and cannot read
        np.load(file) as arrays,
    ):
        return Predictions(
            labels=arrays["label"], classes=arrays["prediction"], losses=arrays["loss"]
        )
    return None


class _Settings(yaml.SafeLoader):
    """Refuses aliases, of which we write none: nested, they make a few lines fill the memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        return super().compose_node(parent, index)


def read_settings(run: Recorded) -> dict[str, Any]:
    """The configuration of a run, as `config.yaml` has it.

    Raises:
        ValueError: It was deleted, or damaged.
    """
    try:
        with _artifact(run, SETTINGS) as path:
            settings = yaml.load(path.read_text(encoding="utf-8"), _Settings)
    except (*STORE_ERRORS, UnicodeError, yaml.YAMLError) as error:
        raise ValueError(f"run {run.run_id} ({run.name}) has no readable {SETTINGS}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"run {run.run_id} ({run.name}): its {SETTINGS} is damaged.")
    return settings


@contextmanager
def _artifact(run: Recorded, name: str) -> Iterator[Path]:
    """A file of a run; from a server, a copy of it."""
    if run.artifacts.startswith("file:"):
        yield Path(local_file_uri_to_path(run.artifacts)) / name  # type: ignore[no-untyped-call]
        return
    with tempfile.TemporaryDirectory() as folder:
        address = f"{run.artifacts}/{name}"
        yield Path(mlflow.artifacts.download_artifacts(artifact_uri=address, dst_path=folder))


def save_view(experiment_id: str, key: str, view: View) -> None:
    """Keeps a view of an experiment's runs, for `pipeline.pages.runs_page`."""
    mlflow.MlflowClient().set_experiment_tag(experiment_id, f"{_VIEW}{key}", view.text)


def read_history(run_id: str, names: Sequence[str]) -> dict[str, dict[int, float]]:
    """Value by step of each of these metrics, in this order."""
    client = mlflow.MlflowClient()
    return {
        name: {metric.step: metric.value for metric in client.get_metric_history(run_id, name)}
        for name in names
    }


def read_splits(run_id: str) -> dict[str, str]:
    """Digest of each split that a run was given, by its name."""
    inputs = mlflow.MlflowClient().get_run(run_id).inputs
    return {
        tag.value: given.dataset.digest
        for given in (inputs.dataset_inputs if inputs else ())
        for tag in given.tags
        if tag.key == MLFLOW_DATASET_CONTEXT
    }
