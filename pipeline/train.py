"""Training through Keras' `fit`, with many steps to one compiled call.

`fit` hands its iterator to `model.train_function`, and keeps one that is already there. Ours takes
a chunk of many batches from it and runs Keras' own `train_step` on each in a loop inside one
program, so the weights stay where they are between steps. Losses, metrics, callbacks and validation
stay those of Keras.
"""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import keras
import numpy as np
import tensorflow as tf

from pipeline.checkpoint import (
    Checkpoint,
    check_fit,
    load_checkpoint,
    restore_stopping,
    restore_variables,
    save_checkpoint,
    take_checkpoint,
)
from pipeline.config import TrainingConfig
from pipeline.data import Data, Split
from pipeline.dropout import SeedDropout, hashed_dropout
from pipeline.endings import DivergedError

log = logging.getLogger(__name__)

Metrics = dict[str, float]
EpochHook = Callable[[int, Metrics], None]
TrainFunction = Callable[[Iterator[Any]], dict[str, tf.Tensor]]

# An interruption waits for the end of a call: 0.2 s at 784-512-512-10. More steps gain nothing.
_STEPS_PER_CALL = 50
_VALIDATION_BATCH = 2_000


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
    tf.get_logger().setLevel(logging.ERROR)  # or it warns that each run traces its own functions
    keras.utils.disable_interactive_logging()
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
    checkpoint: Path | None = None,
) -> History:
    """Fits the model to the training split; the test split is not read.

    With equal seed, threads and versions the result is the same bit for bit. Ctrl-C and SIGTERM
    stop it at the end of a compiled call, of at most 50 steps; a second one at once.

    With a checkpoint, a training whose process was killed goes on after its last whole epoch and
    ends bit for bit as if it had not been. A file that is damaged, or of another model, is
    ignored with a warning.

    Args:
        model: Raw pixels to class probabilities; trained in place.
        optimizer: Fresh.
        data: Of it, `train` and `validation`.
        config: Length and speed.
        seed: Of the order of the images and the dropout, together with the epoch.
        on_epoch_end: Called with the epoch, from 1, and its metrics; may raise `StopRun`. A
            training that goes on calls it again with the epoch of the checkpoint, of which the
            killed process may not have told: a second call with an epoch must change nothing.
        checkpoint: File written after every epoch, before `on_epoch_end`, and read at the start.
            It belongs to these arguments alone; the caller deletes it.

    Raises:
        DivergedError: The loss or a weight is not finite; the metrics of an epoch with such a
            loss are not handed on.
        StopRun: The hook raised it.
        KeyboardInterrupt: Ctrl-C, at the end of a compiled call.
        OSError: The checkpoint cannot be written.
    """
    steps = steps_per_epoch(len(data.train), config)
    model.compile(
        optimizer,
        loss="sparse_categorical_crossentropy",  # categorical cross-entropy of one-hot labels
        metrics=[keras.metrics.SparseCategoricalAccuracy("accuracy")],  # by name, traced twice
        jit_compile=False,
    )
    model.steps_per_execution = min(_STEPS_PER_CALL, steps)  # not compiled in: it would be saved
    optimizer.build(model.trainable_variables)
    stopping = _stopping(config, data)
    end = _EpochEnd(on_epoch_end, stopping, checkpoint)
    first = end.resume(model, config)
    compiled = _pays_to_compile(model, steps * config.epochs)
    if config.compile != "auto":
        compiled = config.compile == "always"
    rows = model.steps_per_execution * config.batch_size
    chunks = _chunks(data.train, rows, config, seed, first)
    model.train_function = _train_function(model, chunks, config.batch_size, compiled)
    try:
        with hashed_dropout(model), _Interruption() as interruption:
            model.fit(
                chunks,
                initial_epoch=first,
                epochs=config.epochs,
                steps_per_epoch=steps,
                shuffle=False,  # the chunks are
                validation_data=_validation(data.validation),
                callbacks=[SeedDropout(seed), interruption, *filter(None, [stopping]), end],
                verbose=0,
            )
    finally:
        model.train_function, model.steps_per_execution = None, 1
    if not all(np.isfinite(weights).all() for weights in model.get_weights()):
        raise DivergedError(len(end.epochs), math.nan)  # in the last step: no loss has shown it
    return History(
        epochs=end.epochs,
        restored=config.restore_best_weights and data.validation is not None,
        fit_seconds=end.seconds,
        images=len(data.train),
    )


def _pays_to_compile(model: keras.Model, steps: int) -> bool:
    """Whether XLA saves more than its compilation costs.

    A fit by hand to the widths 16 to 1024 on one thread, within a factor of 2: 1.05 s once,
    against 0.3 ms and 2.1 ns per parameter each step.
    """
    return bool(steps * (0.3e-3 + 2.1e-9 * model.count_params()) > 1.05)


def _chunks(
    train: Split, rows: int, config: TrainingConfig, seed: int, first: int = 0
) -> tf.data.Dataset:
    """Epochs from `first` on, each in an order of its own, cut into chunks of `rows` images; the
    last of an epoch is shorter.
    """
    images, labels = tf.constant(train.images), tf.constant(train.labels)

    def epoch(number: tf.Tensor) -> tf.data.Dataset:
        order = tf.random.experimental.stateless_shuffle(
            tf.range(len(train)), tf.stack([tf.constant(seed, tf.int64), number])
        )
        starts = tf.data.Dataset.range(0, len(train), rows)
        return starts.map(as_it_is(lambda start: order[start : start + rows]))

    # Or TensorFlow writes each into a file, which stays where a worker is killed.
    as_it_is = tf.autograph.experimental.do_not_convert
    orders = tf.data.Dataset.range(first, config.epochs).flat_map(as_it_is(epoch))
    chunks = orders.map(
        as_it_is(lambda chunk: (tf.gather(images, chunk), tf.gather(labels, chunk)))
    )
    return chunks.with_options(_options())


def _train_function(
    model: keras.Model, chunks: tf.data.Dataset, batch_size: int, compiled: bool
) -> TrainFunction:
    """What `fit` calls with its iterator: takes one chunk and trains on every image of it."""
    steps = model.steps_per_execution

    def loop(step: Callable[[tf.Tensor], Any], count: tf.Tensor) -> dict[str, tf.Tensor]:
        def body(i: tf.Tensor) -> tuple[tf.Tensor]:
            step(i)
            return (i + 1,)

        tf.while_loop(lambda i: i < count, body, (tf.constant(0),), parallel_iterations=1)
        logs: dict[str, tf.Tensor] = model.get_metrics_result()
        return logs

    def any_rows(images: tf.Tensor, labels: tf.Tensor) -> dict[str, tf.Tensor]:
        def step(i: tf.Tensor) -> None:
            batch = slice(i * batch_size, (i + 1) * batch_size)
            model.train_step((images[batch], labels[batch]))

        return loop(step, (tf.shape(labels)[0] + batch_size - 1) // batch_size)

    def full_batches(
        images: tf.Tensor, labels: tf.Tensor, count: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        shape = (steps, batch_size)
        images = tf.reshape(images, (*shape, *images.shape[1:]))
        labels = tf.reshape(labels, shape)
        return loop(lambda i: model.train_step((images[i], labels[i])), count)

    run_any_rows = tf.function(any_rows, input_signature=chunks.element_spec, autograph=False)
    run_full_batches = tf.function(full_batches, jit_compile=True, autograph=False)

    def compiled_function(iterator: Iterator[Any]) -> dict[str, tf.Tensor]:
        """XLA compiles one shape: a short chunk is padded, a partial batch left to `any_rows`."""
        images, labels = next(iterator)
        full, rest = divmod(len(labels), batch_size)
        logs: dict[str, tf.Tensor] = {}
        if full:
            missing = steps * batch_size - len(labels)
            rows = [_pad(array, missing) for array in (images, labels)]
            logs = run_full_batches(*rows, tf.constant(full))
        return run_any_rows(images[-rest:], labels[-rest:]) if rest else logs

    return compiled_function if compiled else lambda iterator: run_any_rows(*next(iterator))


def _pad(array: tf.Tensor, rows: int) -> tf.Tensor:
    return tf.pad(array, [(0, rows)] + [(0, 0)] * (array.ndim - 1)) if rows else array


def _validation(validation: Split | None) -> tf.data.Dataset | None:
    if validation is None:
        return None
    images = tf.data.Dataset.from_tensor_slices((validation.images, validation.labels))
    return images.batch(_VALIDATION_BATCH).cache().with_options(_options())


def _options() -> tf.data.Options:
    """Without autotuning: its thread sleeps 10 ms, 20 ms, ... up to a minute, and the end of a
    training may have to wait for it to wake.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return options


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

    on_test_batch_end = on_train_batch_end
    on_epoch_end = on_train_batch_end
