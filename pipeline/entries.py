"""What a tracking store is told of a run, as data: at once, or later, in the same order.

Telling an entry twice is telling it once: whoever tells it may be killed meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

if TYPE_CHECKING:
    from pipeline.spool import Entry

# What a model takes over of its run.
SOURCE_TAGS = {
    "mlflow.user",
    "mlflow.source.name",
    "mlflow.source.type",
    "mlflow.source.git.commit",
}
_BATCH = 1_000  # metrics at once: what MLflow takes


def tell(run_id: str, entry: Entry, path: Path | None = None) -> None:
    """Tells the store one entry.

    Args:
        run_id: Of the run.
        entry: Its `kind` is one of the names below.
        path: File or folder that belongs to it.

    Raises:
        MlflowException: The store is away, or refuses it.
    """
    client = mlflow.MlflowClient()
    match entry["kind"]:
        case "tags":
            tags = [RunTag(name, text) for name, text in entry["tags"].items()]
            client.log_batch(run_id, tags=tags, synchronous=True)
        case "metrics":
            metrics = _news(run_id, entry["metrics"]) if entry.get("once") else entry["metrics"]
            for start in range(0, len(metrics), _BATCH):
                batch = [Metric(*each) for each in metrics[start : start + _BATCH]]
                client.log_batch(run_id, metrics=batch, synchronous=True)
        case "params":
            _tell_params(run_id, entry["params"])
        case "datasets":
            _tell_datasets(run_id, entry["datasets"])
        case "file":
            folder = entry["folder"] or None
            client.log_artifact(run_id, str(path), folder)
        case "model":
            assert path is not None
            _tell_model(run_id, path, entry["metrics"])
        case "name":
            client.update_run(run_id, name=entry["name"])
        case "end":
            client.set_terminated(run_id, entry["status"], entry["time"])


def merged(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Neighbours that can be told at once: metrics of many epochs."""
    groups: list[list[Entry]] = []
    for entry in entries:
        last = groups[-1][0] if groups else {"kind": ""}
        if entry["kind"] == last["kind"] == "metrics" and entry.get("once") == last.get("once"):
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return groups


def merge(group: Sequence[Entry]) -> Entry:
    if len(group) == 1:
        return group[0]
    return {**group[0], "metrics": [each for entry in group for each in entry["metrics"]]}


def _news(run_id: str, metrics: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """Metrics that the store has not of their steps."""
    client = mlflow.MlflowClient()
    known = {
        (name, each.step)
        for name in {each[0] for each in metrics}
        for each in client.get_metric_history(run_id, name)
    }
    return [each for each in metrics if (each[0], each[3]) not in known]


def _tell_params(run_id: str, params: Mapping[str, str]) -> None:
    client = mlflow.MlflowClient()
    known = client.get_run(run_id).data.params
    # The data of a run that is gone on with may have moved; MLflow lets no parameter change.
    new = [
        Param(name, text)
        for name, text in params.items()
        if name != "data.path" or name not in known
    ]
    client.log_batch(run_id, params=new)


def _tell_datasets(run_id: str, datasets: Sequence[Mapping[str, Any]], tries: int = 3) -> None:
    inputs = [
        DatasetInput(Dataset(**each["dataset"]), [InputTag(MLFLOW_DATASET_CONTEXT, each["split"])])
        for each in datasets
    ]
    try:
        mlflow.MlflowClient().log_inputs(run_id, inputs)
    except MlflowException as error:
        if tries == 1 or error.error_code != "BAD_REQUEST":
            raise
        # MLflow looks for a dataset, then inserts it: another run was faster.
        _tell_datasets(run_id, datasets, tries - 1)


def _tell_model(run_id: str, folder: Path, metrics: Mapping[str, Any]) -> None:
    """Registers a saved model as the run's only one, and uploads it."""
    client = mlflow.MlflowClient()
    recorded = client.get_run(run_id)
    experiment_id = recorded.info.experiment_id
    mine = f"source_run_id = '{run_id}'"
    for model in client.search_logged_models([experiment_id], mine):
        client.delete_logged_model(model.model_id)  # of an earlier try, whole or in part
    tags = recorded.data.tags
    logged = client.create_logged_model(
        experiment_id,
        "model",
        run_id,
        params=recorded.data.params,
        tags={name: tags[name] for name in tags.keys() & SOURCE_TAGS},
    )
    status = LoggedModelStatus.FAILED
    try:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        batch = [
            Metric(name, value, time, 0, model_id=logged.model_id, run_id=run_id)
            for name, (value, time) in metrics.items()
        ]
        client.log_batch(run_id, metrics=batch, synchronous=True)
        about = Model.load(str(folder))
        about.model_id = about.model_uuid = logged.model_id
        about.artifact_path = logged.artifact_location
        about.save(str(folder / "MLmodel"))
        client.log_model_artifacts(logged.model_id, str(folder))
        status = LoggedModelStatus.READY
    finally:
        client.finalize_logged_model(logged.model_id, status)
