"""Training through Keras' `fit`, set up for speed."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import keras
import tensorflow as tf

from pipeline.config import TrainingConfig
from pipeline.data import Data

Metrics = dict[str, float]
EpochHook = Callable[[int, Metrics], None]


class StopRun(Exception):
    """Raised by an epoch hook to end a run that is not worth going on with."""


class DivergedError(ArithmeticError):
    """The loss is not a finite number.

    Attributes:
        epoch: In which it happened, from 1.
    """

    def __init__(self, epoch: int, loss: float) -> None:
        super().__init__(f"the training diverged in epoch {epoch}: loss={loss}.")
        self.epoch = epoch


@dataclass(frozen=True, kw_only=True)
class History:
    """What a training came to.

    Attributes:
        epochs: Metrics of each epoch, by their Keras names.
        fit_seconds: Wall time of the whole training, validation included.
        images: Training images an epoch.
    """

    epochs: list[Metrics]
    fit_seconds: float
    images: int

    @property
    def summary(self) -> Metrics:
        """The best epoch, counted from 1, and the pace."""
        pace = {
            "fit_seconds": self.fit_seconds,
            "samples_per_second": self.images * len(self.epochs) / self.fit_seconds,
        }
        values = [metrics.get("val_accuracy", math.nan) for metrics in self.epochs]
        if math.isnan(values[0]):
            return pace
        best = max(values)
        return {"best_val_accuracy": best, "best_epoch": values.index(best) + 1, **pace}


def initialize(*, threads: int, seed: int) -> None:
    """Gives TensorFlow its threads, before its first use in the process, and seeds Keras.

    Raises:
        ValueError: TensorFlow already runs with another number of threads.
    """
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    except RuntimeError:
        running = tf.config.threading.get_intra_op_parallelism_threads()
        if running != threads:
            raise ValueError(
                f"training.threads={threads}: this process already runs with {running}; "
                "start another one."
            ) from None
    keras.utils.set_random_seed(seed)


def steps_per_epoch(images: int, config: TrainingConfig) -> int:
    """Steps an epoch; the last takes what is left."""
    return math.ceil(images / config.batch_size)


def train(
    model: keras.Model,
    optimizer: keras.Optimizer,
    data: Data,
    config: TrainingConfig,
    *,
    seed: int,
    on_epoch_end: EpochHook,
) -> History:
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    epochs = _Epochs(on_epoch_end)
    callbacks = [epochs]
    if config.early_stopping_patience is not None:
        callbacks.append(
            keras.callbacks.EarlyStopping(
                "val_accuracy",
                mode="max",
                patience=config.early_stopping_patience,
                restore_best_weights=True,
            )
        )
    start = time.perf_counter()
    validation = data.validation
    model.fit(
        data.train.images,
        data.train.labels,
        batch_size=config.batch_size,
        epochs=config.epochs,
        validation_data=(validation.images, validation.labels) if validation else None,
        verbose=0,
        callbacks=callbacks,
    )
    return History(
        epochs=epochs.history, fit_seconds=time.perf_counter() - start, images=len(data.train)
    )


class _Epochs(keras.callbacks.Callback):  # type: ignore[misc]
    """Hands each epoch's metrics to the hook, unless the loss diverged."""

    def __init__(self, hook: EpochHook) -> None:
        super().__init__()
        self.hook = hook
        self.history: list[Metrics] = []

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        metrics = {name: float(value) for name, value in (logs or {}).items()}
        for name in ("loss", "val_loss"):
            if not math.isfinite(metrics.get(name, 0.0)):
                raise DivergedError(epoch + 1, metrics[name])
        self.history.append(metrics)
        self.hook(epoch + 1, metrics)
