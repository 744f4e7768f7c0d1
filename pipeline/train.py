"""Training through Keras' `fit`, with many steps to one compiled call.

`fit` calls `model.train_function`, and keeps one that is already there. Ours trains on a chunk of
many batches in one program, so the weights stay where they are between steps. Callbacks, early
stopping and all else stay those of Keras.
"""

import logging
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self

import keras
import numpy as np
import tensorflow as tf

from pipeline.augmentation import Distortion
from pipeline.checkpoint import (
    Checkpoint,
    check_fit,
    load_checkpoint,
    restore_stopping,
    restore_variables,
    save_checkpoint,
    take_checkpoint,
)
from pipeline.config import AugmentationConfig, TrainingConfig
from pipeline.data import Data, Split
from pipeline.dropout import SeedDropout
from pipeline.endings import DivergedError
from pipeline.program import LOSS, Program, accuracy, averages_of, program_for

log = logging.getLogger(__name__)

Metrics = dict[str, float]
EpochHook = Callable[[int, Metrics], None]

# An interruption waits for the end of a call: 0.2 s at 784-512-512-10. More steps gain nothing.
STEPS_PER_CALL = 50


@dataclass(frozen=True, kw_only=True)
class History:
    """What a training came to.

    Attributes:
        epochs: Metrics of each epoch, by their Keras names.
        restored: Whether the model has the weights of the best epoch, not of the last.
        fit_seconds: Wall time of the whole training, validation included, and of what went
            before an interruption.
        images: Training images an epoch.
    """

    epochs: list[Metrics]
    restored: bool
    fit_seconds: float
    images: int

    @property
    def summary(self) -> Metrics:
        """The best epoch, from 1, the one whose weights the model has (`saved_*`), and the pace."""
        summary: Metrics = {
            "saved_epoch": len(self.epochs),
            "fit_seconds": self.fit_seconds,
            "samples_per_second": self.images * len(self.epochs) / self.fit_seconds,
        }
        if "val_accuracy" in self.epochs[0]:
            values = [metrics["val_accuracy"] for metrics in self.epochs]
            summary["best_val_accuracy"] = max(values)
            summary["best_epoch"] = values.index(max(values)) + 1
            if self.restored:
                summary["saved_epoch"] = summary["best_epoch"]
        saved = self.epochs[int(summary["saved_epoch"]) - 1]
        validation = {name: value for name, value in saved.items() if name.startswith("val_")}
        return summary | {f"saved_{name}": value for name, value in validation.items()}


def initialize(*, threads: int, seed: int) -> None:
    """Gives TensorFlow its threads, before its first use in the process, and seeds the weights.

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
    tf.get_logger().setLevel(logging.ERROR)  # or it warns that each run traces its own functions
    keras.utils.disable_interactive_logging()
    # Keras draws the seeds of all weights from it. `keras.utils.set_random_seed` would also empty
    # TensorFlow's cache of kernels, as it seeds operations that nothing here uses: 0.2 s.
    random.seed(seed)


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
    augmentation: AugmentationConfig,
    on_epoch_end: EpochHook,
    checkpoint: Path | None = None,
) -> History:
    """Fits the model to the training split; the test split is not read.

    With equal seed, threads and versions the result is the same bit for bit. Ctrl-C and SIGTERM
    stop it at the end of a compiled call, of at most 50 steps or a validation; a second one at
    once.

    With a checkpoint, a training whose process was killed goes on after its last whole epoch and
    ends bit for bit as if it had not been. A file that is damaged, or of another model, is
    ignored with a warning.

    Args:
        model: Raw pixels to class probabilities; trained in place. Never compiled before.
        optimizer: Fresh.
        data: Of it, `train` and `validation`.
        config: Length and speed.
        seed: Of the order of the images, their distortions and the dropout, together with the
            epoch.
        augmentation: How the training images are distorted.
        on_epoch_end: Called with the epoch, from 1, and its metrics; may raise `StopRun`. A
            training that goes on calls it again with the epoch of the checkpoint, of which the
            killed process may not have told: a second call with an epoch must change nothing.
        checkpoint: File written after every epoch, before `on_epoch_end`, and read at the start.
            It belongs to these arguments alone; the caller deletes it.

    Raises:
        ValueError: The model was compiled before: Keras would show the metrics of then. Or its
            optimizer was not built for `config.ema_momentum`.
        DivergedError: The loss or a weight is not finite; the metrics of an epoch with such a
            loss are not handed on.
        StopRun: The hook raised it.
        KeyboardInterrupt: Ctrl-C, at the end of a compiled call.
        OSError: The checkpoint cannot be written.
    """
    if model.compiled:
        raise ValueError("a model that was compiled before is not trained: build another one.")
    if optimizer.use_ema != (config.ema_momentum > 0):
        raise ValueError(f"the optimizer is not one for ema_momentum={config.ema_momentum}.")
    steps = steps_per_epoch(len(data.train), config)
    model.compile(optimizer)  # and no metrics: `fit` takes those of the program
    optimizer.build(model.trainable_variables)
    averages = averages_of(model, optimizer)
    for slot, weight in averages:
        slot.assign(weight)  # of what is trained, see `Program`
    stopping = _stopping(config, data)
    end = _EpochEnd(on_epoch_end, stopping, checkpoint)
    first = end.resume(model, config)
    compiled = _pays_to_compile(model, config, steps * config.epochs)
    if config.compile != "auto":
        compiled = config.compile == "always"
    program = program_for(
        model,
        batch_size=config.batch_size,
        steps=min(STEPS_PER_CALL, steps),
        smooths=config.label_smoothing > 0,
    )
    distort = None
    if augmentation.distorts:
        distort = Distortion(augmentation, data.train.images.shape[1:])
    chunks = _Chunks(program, data, config, seed=seed, compiled=compiled, distort=distort)
    optimizer.use_ema = False  # or `fit` overwrites the average
    model.train_function = chunks.train_function
    try:
        with _Interruption() as interruption:
            model.fit(
                chunks.starts,
                initial_epoch=first,
                epochs=config.epochs,
                shuffle=False,  # the chunks are
                callbacks=[
                    *(SeedDropout(seed), chunks, interruption),
                    *filter(None, [stopping]),
                    end,
                ],
                verbose=0,
            )
    finally:
        program.release()
        optimizer.use_ema = config.ema_momentum > 0
        for slot, weight in averages:
            slot.assign(weight)  # as after a training by Keras
        model.train_function = None
        model.compile(optimizer, loss=LOSS, metrics=[accuracy()], jit_compile=False)
    if not all(np.isfinite(weights).all() for weights in model.get_weights()):
        raise DivergedError(len(end.epochs), math.nan)  # in the last step: no loss has shown it
    return History(
        epochs=end.epochs,
        restored=config.restore_best_weights and data.validation is not None,
        fit_seconds=end.seconds,
        images=len(data.train),
    )


def _pays_to_compile(model: keras.Model, config: TrainingConfig, steps: int) -> bool:
    """Whether XLA saves more than its compilation costs, where no model of that width was before.

    A fit by hand, on one thread: 1 s of the processor once, against 0.4 ms each step, the more so
    the narrower the network; and 2 ns a parameter where the weights are averaged.
    """
    averaging = 2e-9 * model.count_params() if config.ema_momentum else 0.0
    return bool(steps * (0.4e-3 + averaging) > 1.0)


class _Chunks(keras.callbacks.Callback):  # type: ignore[misc]
    """Trains for `fit`: each epoch in an order of its own, a chunk of many batches a call."""

    def __init__(
        self,
        program: Program,
        data: Data,
        config: TrainingConfig,
        *,
        seed: int,
        compiled: bool,
        distort: Distortion | None,
    ) -> None:
        super().__init__()
        self.program, self.seed, self.compiled = program, seed, compiled
        self.smoothing, self.distort = config.label_smoothing, distort
        self.rows = program.steps * program.batch_size
        self.train = _tensors(data.train)
        self.validation = _tensors(data.validation) if data.validation else None

    @property
    def starts(self) -> tf.data.Dataset:
        """The first row of each chunk of an epoch; the last is shorter."""
        options = tf.data.Options()
        # Its thread sleeps 10 ms, 20 ms, ... up to a minute, and the end may have to wait for it.
        options.autotune.enabled = False
        return tf.data.Dataset.range(0, len(self.train[1]), self.rows).with_options(options)

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.epoch, self.order = epoch, order_of(len(self.train[1]), seed=self.seed, epoch=epoch)
        self.program.reset_metrics()

    def train_function(self, starts: Iterator[tf.Tensor]) -> Metrics:
        """What `fit` calls; returns the metrics of the epoch so far."""
        start = int(next(starts))
        rows = self.order[start : start + self.rows]
        images, labels = (tf.gather(array, rows) for array in self.train)
        if self.distort:
            images = self.distort(images, (self.seed, self.epoch, start))
        self.program.train(
            self.model, images, labels, compiled=self.compiled, smoothing=self.smoothing
        )
        return self.program.metrics

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Adds the metrics of the validation split, which the other callbacks find there."""
        if self.validation is None or logs is None:
            return
        metrics = self.program.evaluate(self.model, *self.validation)
        logs.update({f"val_{name}": value for name, value in metrics.items()})


def _tensors(split: Split) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.constant(split.images), tf.constant(split.labels, tf.int32)


def order_of(images: int, *, seed: int, epoch: int) -> tf.Tensor:
    """Rows of the training images, `[images]`, int32, as an epoch (from 0) takes them."""
    key = tf.constant([seed, epoch], tf.int64)
    return tf.random.experimental.stateless_shuffle(tf.range(images), key)


def _stopping(config: TrainingConfig, data: Data) -> keras.callbacks.EarlyStopping | None:
    """Early stopping, or, with a patience that never ends, the best weights alone."""
    if data.validation is None:
        return None
    return keras.callbacks.EarlyStopping(
        "val_accuracy",
        mode="max",
        patience=config.early_stopping_patience or config.epochs,
        restore_best_weights=config.restore_best_weights,
    )


def _load_fitting(
    path: Path, model: keras.Model, stopping: keras.callbacks.EarlyStopping | None
) -> Checkpoint | None:
    """The checkpoint of this training, where there is one."""
    try:
        checkpoint = load_checkpoint(path)
        check_fit(checkpoint, model, stopping)
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("training starts anew, without %s: %s", path, error)
        return None
    log.info("training goes on after epoch %d of %s", len(checkpoint.epochs), path)
    return checkpoint


class _EpochEnd(keras.callbacks.Callback):  # type: ignore[misc]
    """Writes the checkpoint and calls the hook, unless the loss diverged.

    Comes after early stopping, so that a checkpoint has what that made of its epoch.
    """

    def __init__(
        self, hook: EpochHook, stopping: keras.callbacks.EarlyStopping | None, path: Path | None
    ) -> None:
        super().__init__()
        self.hook, self.stopping, self.path = hook, stopping, path
        self.epochs: list[Metrics] = []
        self.resumed: Checkpoint | None = None
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def resume(self, model: keras.Model, config: TrainingConfig) -> int:
        """Gives model and optimizer the state of the checkpoint, where there is one.

        Returns:
            The epoch to go on with, from 0; past the last one where there is none to train.
        """
        if self.path is not None:
            self.resumed = _load_fitting(self.path, model, self.stopping)
        if self.resumed is None:
            return 0
        restore_variables(self.resumed, model)
        self.epochs = self.resumed.epochs
        self.start -= self.resumed.seconds
        stopping = self.resumed.stopping
        return config.epochs if stopping and stopping.stopped_epoch else len(self.epochs)

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        resumed, self.resumed = self.resumed, None  # or its arrays would be kept
        if resumed is None:
            return
        if self.stopping is not None:
            restore_stopping(resumed, self.stopping)
        self.hook(len(self.epochs), self.epochs[-1])

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        metrics = {name: float(value) for name, value in (logs or {}).items()}
        for name in ("loss", "val_loss"):
            if not math.isfinite(metrics.get(name, 0.0)):
                raise DivergedError(epoch + 1, metrics[name])
        self.epochs.append(metrics)
        if self.path is not None:
            self._save(self.path)
        self.hook(epoch + 1, metrics)

    def _save(self, path: Path) -> None:
        checkpoint = take_checkpoint(
            self.model, self.stopping, epochs=self.epochs, seconds=self.seconds
        )
        save_checkpoint(checkpoint, path)


class _Interruption(keras.callbacks.Callback):  # type: ignore[misc]
    """Holds SIGINT and SIGTERM back to the end of a compiled call.

    An exception raised inside TensorFlow's own Python code can be swallowed there. A second signal
    is not held back.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        super().__init__()
        self.received: int | None = None

    def __enter__(self) -> Self:
        self.outer = {}
        if threading.current_thread() is threading.main_thread():
            self.outer = {number: signal.signal(number, self._hold) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.outer.items():
            signal.signal(number, handler)
        if self.received is not None:  # in the last hook, or in one that ended the run
            self._pass_on(self.received)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self._pass_on(number)
        else:
            self.received = number

    def _pass_on(self, number: int) -> None:
        self.received = None
        signal.signal(number, self.outer[signal.Signals(number)])
        signal.raise_signal(number)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if self.received is not None:
            self._pass_on(self.received)

    on_epoch_end = on_train_batch_end
