"""The whole state of a training in one file, from which another process goes on with it."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # or TensorFlow is imported
    import keras

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class StoppingState:
    """What early stopping knows, by the names of Keras' `EarlyStopping`.

    Attributes:
        best: Best value so far.
        best_epoch: Its epoch, from 0.
        wait: Epochs since.
        stopped_epoch: The epoch, from 0, after which training was to stop; 0 where it goes on.
    """

    best: float
    best_epoch: int
    wait: int
    stopped_epoch: int


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A training after a whole epoch.

    Attributes:
        epochs: Metrics of each epoch, at least one.
        seconds: Wall time of the training so far.
        model: Variables of the model: weights, running moments, seeds.
        optimizer: Variables of the optimizer.
        best_weights: Of the best epoch; empty where that is the last one, or where they are not
            to be restored.
        stopping: None without early stopping.
    """

    epochs: list[dict[str, float]]
    seconds: float
    model: list[Array]
    optimizer: list[Array]
    best_weights: list[Array]
    stopping: StoppingState | None


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Writes the file whole or not at all, and creates its folder.

    A process killed meanwhile may leave a `NAME.*.tmp` beside it. Nothing waits for the disk: a
    file that a crash of the machine cut short is refused when it is read.

    Raises:
        OSError: The file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **_to_arrays(checkpoint))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads what `save_checkpoint` wrote.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The file is damaged, or something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        with np.load(path, allow_pickle=False) as arrays:
            return _from_arrays(arrays)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged zip file raises nearly everything
        raise ValueError(f"it is no whole checkpoint: {error!r}") from error


def take_checkpoint(
    model: keras.Model,
    stopping: keras.callbacks.EarlyStopping | None,
    *,
    epochs: list[dict[str, float]],
    seconds: float,
) -> Checkpoint:
    """The state of a compiled model and, where it stops early, of its early stopping."""
    names = StoppingState.__dataclass_fields__
    return Checkpoint(
        epochs=epochs,
        seconds=seconds,
        model=[variable.numpy() for variable in model.variables],
        optimizer=[variable.numpy() for variable in model.optimizer.variables],
        best_weights=_earlier_best(stopping, len(epochs) - 1) if stopping else [],
        stopping=stopping and StoppingState(**{name: getattr(stopping, name) for name in names}),
    )


def _earlier_best(stopping: keras.callbacks.EarlyStopping, epoch: int) -> list[Array]:
    return (stopping.best_weights or []) if stopping.best_epoch < epoch else []


def restore_variables(checkpoint: Checkpoint, model: keras.Model) -> None:
    """Gives a compiled model, its optimizer built, the values of the checkpoint."""
    variables = [*model.variables, *model.optimizer.variables]
    for variable, value in zip(variables, [*checkpoint.model, *checkpoint.optimizer], strict=True):
        variable.assign(value)


def restore_stopping(checkpoint: Checkpoint, stopping: keras.callbacks.EarlyStopping) -> None:
    """Gives early stopping its state, which it forgets whenever a training begins.

    The model has that of the checkpoint.
    """
    for name in StoppingState.__dataclass_fields__:
        setattr(stopping, name, getattr(checkpoint.stopping, name))
    if stopping.restore_best_weights:
        stopping.best_weights = checkpoint.best_weights or stopping.model.get_weights()


def check_fit(
    checkpoint: Checkpoint, model: keras.Model, stopping: keras.callbacks.EarlyStopping | None
) -> None:
    """Refuses a checkpoint that cannot be of this training.

    Raises:
        ValueError: It has other variables, or early stopping where the training has none.
    """
    best_weights = model.weights if checkpoint.best_weights else []
    for name, arrays, variables in (
        ("model", checkpoint.model, model.variables),
        ("optimizer", checkpoint.optimizer, model.optimizer.variables),
        ("best weights", checkpoint.best_weights, best_weights),
    ):
        theirs = [(array.shape, array.dtype.name) for array in arrays]
        if theirs != [(tuple(variable.shape), variable.dtype) for variable in variables]:
            raise ValueError(f"it is of another training: the shapes of the {name} differ.")
    if (checkpoint.stopping is None) != (stopping is None):
        raise ValueError("it is of another training: only one of them has validation.")


def _to_arrays(checkpoint: Checkpoint) -> dict[str, Any]:
    lists = {
        "model": checkpoint.model,
        "optimizer": checkpoint.optimizer,
        "best_weights": checkpoint.best_weights,
    }
    record = {
        "epochs": checkpoint.epochs,
        "seconds": checkpoint.seconds,
        "stopping": asdict(checkpoint.stopping) if checkpoint.stopping else None,
        "counts": {name: len(arrays) for name, arrays in lists.items()},  # damage may hide some
    }
    named = {f"{name}.{i}": array for name in lists for i, array in enumerate(lists[name])}
    return {"record": np.array(json.dumps(record)), **named}


def _from_arrays(arrays: Any) -> Checkpoint:
    record = json.loads(str(arrays["record"]))
    lists = {
        name: [arrays[f"{name}.{i}"] for i in range(count)]
        for name, count in record["counts"].items()
    }
    return Checkpoint(
        epochs=record["epochs"],
        seconds=record["seconds"],
        model=lists["model"],
        optimizer=lists["optimizer"],
        best_weights=lists["best_weights"],
        stopping=StoppingState(**record["stopping"]) if record["stopping"] else None,
    )
