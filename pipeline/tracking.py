"""Runs in MLflow: what is recorded of them, how they end.

Imports no TensorFlow: the launcher of a sweep records runs too, and trains none.
"""

from __future__ import annotations

import functools
import getpass
import json
import logging
import platform
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import yaml
from mlflow.data.schema import TensorDatasetSchema
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    RunStatus,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID

from pipeline.config import RunConfig, flatten, without_password
from pipeline.endings import DivergedError, StopRun
from pipeline.pages import run_page
from pipeline.store import NOTE, PREDICTIONS, SETTINGS, Store, open_store

if TYPE_CHECKING:  # or TensorFlow is imported, or what takes a second
    import keras
    from matplotlib.figure import Figure

    from pipeline.data import Array, Data, Split
    from pipeline.evaluate import Evaluation

log = logging.getLogger(__name__)

LIBRARIES = ("tensorflow", "keras", "numpy", "mlflow")
ROOT = Path(__file__).resolve().parents[1]

# What a model takes over of its run.
SOURCE_TAGS = {
    "mlflow.user",
    "mlflow.source.name",
    "mlflow.source.type",
    "mlflow.source.git.commit",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is being recorded."""

    run_id: str
    name: str
    store: Store

    @property
    def address(self) -> str:
        """Of its page on a server; empty where `pipeline.ui` has to start one."""
        return self.store.address(run_page(self.store.experiment_id, self.run_id))

    def describe(self, text: str) -> None:
        """Sets the Markdown text that the UI shows on top of the run."""
        self.set_tags({NOTE: text})

    def rename(self, name: str) -> None:
        mlflow.MlflowClient().update_run(self.run_id, name=name)

    def end(self, status: str, *, error: str = "") -> None:
        """Ends the run as FINISHED, KILLED or FAILED; one that ended before ends anew."""
        if error:
            self.set_tags({"error": error})
        mlflow.MlflowClient().set_terminated(self.run_id, status)

    def reopen(self) -> None:
        """Goes on with a run that had ended, and forgets why it had."""
        client = mlflow.MlflowClient()
        tags = client.get_run(self.run_id).data.tags
        for name in tags.keys() & {"error", "diverged", "diverged.epoch"}:
            client.delete_tag(self.run_id, name)
        client.update_run(self.run_id, status="RUNNING")

    @property
    def status(self) -> str:
        """RUNNING, FINISHED, KILLED or FAILED; DELETED when somebody deleted it."""
        info = mlflow.MlflowClient().get_run(self.run_id).info
        return "DELETED" if info.lifecycle_stage == "deleted" else str(info.status)

    @property
    def tags(self) -> dict[str, str]:
        return dict(mlflow.MlflowClient().get_run(self.run_id).data.tags)

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Records metrics of an epoch, or with step 0 of the whole run, in one synchronous call."""
        now = int(time.time() * 1000)
        batch = [Metric(name, value, now, step) for name, value in metrics.items()]
        mlflow.MlflowClient().log_batch(self.run_id, metrics=batch, synchronous=True)

    def adopt(self, run_ids: Iterable[str]) -> None:
        """Nests runs under this one; of those that were deleted it does nothing."""
        for run_id in filter(None, run_ids):
            with suppress(MlflowException):
                mlflow.MlflowClient().set_tag(run_id, MLFLOW_PARENT_RUN_ID, self.run_id)

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each metric so far."""
        return dict(mlflow.MlflowClient().get_run(self.run_id).data.metrics)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        batch = [RunTag(name, without_password(str(value))) for name, value in tags.items()]
        mlflow.MlflowClient().log_batch(self.run_id, tags=batch, synchronous=True)

    def log_figure(self, figure: Figure, name: str) -> None:
        """Saves a figure as `figures/<name>.png`, which the UI shows."""
        fast = {"dpi": 110, "pil_kwargs": {"compress_level": 1}}
        client = mlflow.MlflowClient()
        client.log_figure(self.run_id, figure, f"figures/{name}.png", save_kwargs=fast)

    def log_text(self, text: str, name: str) -> None:
        """Saves a file; the UI shows text, Markdown and HTML."""
        mlflow.MlflowClient().log_text(self.run_id, text, name)

    def log_predictions(self, judged: Evaluation) -> None:
        """Saves what the model says of each validation image, for paired comparisons of runs.

        Args:
            judged: On the validation split.
        """
        labels = judged.split.labels
        of_label = judged.probabilities[np.arange(len(labels)), labels]
        whole = np.min_scalar_type(judged.probabilities.shape[1] - 1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(PREDICTIONS).name
            np.savez_compressed(
                path,
                label=labels.astype(whole),
                prediction=judged.probabilities.argmax(axis=1).astype(whole),
                loss=-np.log(np.maximum(of_label, np.finfo(np.float32).tiny)).astype(np.float16),
            )
            client = mlflow.MlflowClient()
            client.log_artifact(self.run_id, str(path), str(Path(PREDICTIONS).parent))

    def log_model(self, model: keras.Model, data: Data, metrics: Mapping[str, float]) -> None:
        """Saves the model in MLflow's own flavour, with signature, example and requirements.

        These are the steps of `mlflow.tensorflow.log_model` but for its trial, which loads what
        it saved and predicts the example, in two thirds of its time.

        Args:
            model: Raw pixels `[batch, height, width]` to probabilities `[batch, num_classes]`.
            data: Its first training images are the example.
            metrics: Of the whole run, recorded for the run and the model with step 0.
        """
        import mlflow.tensorflow

        client, example = mlflow.MlflowClient(), data.train.images[:5]
        probabilities = TensorSpec(np.dtype("float32"), (-1, len(data.class_names)))
        signature = ModelSignature(inputs=_tensor(example), outputs=Schema([probabilities]))
        recorded = client.get_run(self.run_id).data
        logged = client.create_logged_model(
            self.store.experiment_id,
            "model",
            self.run_id,
            params=recorded.params,
            tags={name: text for name, text in recorded.tags.items() if name in SOURCE_TAGS},
        )
        about = Model(
            artifact_path=logged.artifact_location,
            run_id=self.run_id,
            model_uuid=logged.model_id,
            model_id=logged.model_id,
        )
        status = LoggedModelStatus.FAILED
        try:
            client.log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, step=0)])
            now = int(time.time() * 1000)
            batch = [
                Metric(name, value, now, 0, model_id=logged.model_id, run_id=self.run_id)
                for name, value in metrics.items()
            ]
            client.log_batch(self.run_id, metrics=batch, synchronous=True)
            with tempfile.TemporaryDirectory() as folder:
                mlflow.tensorflow.save_model(
                    model,
                    f"{folder}/model",
                    mlflow_model=about,
                    signature=signature,
                    input_example=example,
                    pip_requirements=[f"{name}=={version(name)}" for name in LIBRARIES],
                )
                client.log_model_artifacts(logged.model_id, f"{folder}/model")
            status = LoggedModelStatus.READY
        finally:
            client.finalize_logged_model(logged.model_id, status)

    def delete_models(self) -> None:
        """Deletes models that an earlier try of this run has logged, whole or in part."""
        client = mlflow.MlflowClient()
        mine = f"source_run_id = '{self.run_id}'"
        for model in client.search_logged_models([self.store.experiment_id], mine):
            client.delete_logged_model(model.model_id)

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


def create_run(
    store: Store, name: str, tags: Mapping[str, object], *, parent: Run | None = None
) -> Run:
    """Creates a run, RUNNING from now on; under a parent, the UI nests it there."""
    shown = {key: without_password(str(value)) for key, value in tags.items()}
    if parent:
        shown[MLFLOW_PARENT_RUN_ID] = parent.run_id
    created = mlflow.MlflowClient().create_run(store.experiment_id, tags=shown, run_name=name)
    return Run(run_id=created.info.run_id, name=name, store=store)


def find_run(store: Store, tags: Mapping[str, object], *, parent: Run | None = None) -> Run | None:
    """The run of the experiment with these tags, if there is one; one that was deleted is not."""
    wanted = dict(tags) | ({MLFLOW_PARENT_RUN_ID: parent.run_id} if parent else {})
    condition = " and ".join(f"tags.`{name}` = '{value}'" for name, value in wanted.items())
    found = mlflow.MlflowClient().search_runs([store.experiment_id], condition, max_results=1)
    if not found:
        return None
    return Run(run_id=found[0].info.run_id, name=found[0].info.run_name, store=store)


@contextmanager
def start_run(
    config: RunConfig, data: Data, command: str, *, run_id: str | None = None
) -> Iterator[Run]:
    """Records a run: FINISHED, KILLED when stopped or interrupted, else FAILED.

    Args:
        config: Logged as parameters by their dotted names, and whole as `config.yaml`.
        data: Logged as the run's inputs.
        command: Command line that repeats the run.
        run_id: Run that `create_run` made, or an unfinished one that is gone on with.

    Raises:
        ValueError: The experiment was deleted.
    """
    store = open_store(config.tracking)
    name = config.tracking.run_name or run_name(config)
    run = Run(run_id=run_id, name=name, store=store) if run_id else create_run(store, name, {})
    status, failure = RunStatus.FAILED, None
    try:
        # Active for what asks for an active run: the model, and the system metrics.
        mlflow.start_run(
            run_id=run.run_id, nested=True, log_system_metrics=config.tracking.system_metrics
        )
        log_inputs(run, config, data, command, note=run_note(config, data, command))
        yield run
        status = RunStatus.FINISHED
    except (KeyboardInterrupt, StopRun):
        status = RunStatus.KILLED
        raise
    except Exception as error:
        failure = error
        raise
    finally:
        _end(run, status, failure, partial(run_note, config, data, command))


def log_inputs(
    run: Run,
    config: RunConfig,
    data: Data,
    command: str,
    *,
    note: str,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Records all that a run is given, so that it can be repeated.

    Args:
        run: To record in.
        config: Of the run.
        data: As it was split.
        command: Command line that repeats the run.
        note: What the UI shows on top of the run, in Markdown.
        settings: Logged as parameters by their dotted names, and whole as `config.yaml`; those
            of `config` unless given.
    """
    settings = settings or asdict(config)
    run.set_tags({"command": command, NOTE: note, **environment(config, data)})
    parameters = [
        Param(name, without_password(value))
        for name, value in flatten(settings)
        if not name.startswith("tracking.")
    ]
    client = mlflow.MlflowClient()
    known = client.get_run(run.run_id).data.params
    # The data of a run that is gone on with may have moved; MLflow lets no parameter change.
    new = [each for each in parameters if each.key != "data.path" or each.key not in known]
    client.log_batch(run.run_id, params=new)
    text = yaml.safe_dump(settings, sort_keys=False, width=1_000)
    client.log_text(run.run_id, without_password(text), SETTINGS)
    datasets = [
        DatasetInput(
            _dataset(config.data.name, split, data.source),
            [InputTag(MLFLOW_DATASET_CONTEXT, context)],
        )
        for context, split in data.splits.items()
    ]
    _log_datasets(run, datasets)


def _log_datasets(run: Run, datasets: list[DatasetInput], tries: int = 3) -> None:
    try:
        mlflow.MlflowClient().log_inputs(run.run_id, datasets)
    except MlflowException as error:
        if tries == 1 or error.error_code != "BAD_REQUEST":
            raise
        # MLflow looks for a dataset, then inserts it: another run was faster.
        _log_datasets(run, datasets, tries - 1)


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


def environment(config: RunConfig, data: Data) -> dict[str, str]:
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


@functools.cache
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


def run_note(config: RunConfig, data: Data, command: str, *outcome: str) -> str:
    """What a run is, what came out, how to repeat it: in Markdown, for the UI.

    Args:
        config: Of the run.
        data: Of the run.
        command: Command line that repeats it.
        outcome: A line each.
    """
    model, training = config.model, config.training
    inputs, classes = data.train.images[0].size, len(data.class_names)
    widths = "-".join(map(str, [inputs, *[model.hidden_units] * model.hidden_layers, classes]))
    what = (
        f"{widths}, {model.activation}, dropout {model.dropout_rate:.3g}; "
        f"{config.optimizer.name} at {config.optimizer.learning_rate:.3g}, batches of "
        f"{training.batch_size}, at most {training.epochs} epochs; "
        f"{len(data.train):,} images of {config.data.name}."
    )
    lines = "\n".join(f"- {line}" for line in outcome)
    return "\n\n".join(filter(None, [what, lines, f"Repeat: `{command}`"]))


def _end(run: Run, status: int, failure: Exception | None, note: Callable[..., str]) -> None:
    """Ends the run with its reason, on a full disk in the room of the reserve.

    Raises:
        Exception: A run that succeeded cannot be recorded as such.
    """
    try:
        _record_end(run, status, failure, note)
    except Exception:
        if run.store.reserve:
            run.store.reserve.unlink(missing_ok=True)
        try:
            _record_end(run, status, failure, note)
        except Exception as error:
            log.error("run %s is left without an end: %s", run.run_id, without_password(str(error)))
            if status == RunStatus.FINISHED:
                raise
    finally:
        with suppress(Exception):  # the end is recorded, or its failure told
            mlflow.end_run(RunStatus.to_string(status))


def _record_end(run: Run, status: int, failure: Exception | None, note: Callable[..., str]) -> None:
    if status == RunStatus.KILLED:
        run.describe(note(_progress(run.metrics)))
    if failure is not None:
        error = f"{type(failure).__name__}: {failure}"[:500]
        tags: dict[str, object] = {"error": error, NOTE: note(f"failed: {error}")}
        if isinstance(failure, DivergedError):
            tags |= {"diverged": "true", "diverged.epoch": failure.epoch}
        run.set_tags(tags)
    client = mlflow.MlflowClient()
    client.set_terminated(run.run_id, RunStatus.to_string(status))
    if failure is not None and not isinstance(failure, DivergedError):
        lines = "".join(traceback.format_exception(failure))
        with suppress(Exception):  # the reason is recorded; the disk may be full
            client.log_text(run.run_id, without_password(lines), "traceback.txt")


def _progress(metrics: Mapping[str, float]) -> str:
    if "epoch" not in metrics:
        return "stopped before the end of its first epoch"
    stopped = f"stopped after epoch {metrics['epoch']:.0f}"
    if "best_val_accuracy" not in metrics:
        return stopped
    return f"{stopped}; best validation accuracy {metrics['best_val_accuracy']:.4f}"
