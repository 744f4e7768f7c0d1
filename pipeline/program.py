"""Programs that train and evaluate networks of any hidden width.

For each Keras model, TensorFlow traces a program of its own and XLA compiles it, which takes longer
than a short training. But for the width of its hidden layers, its dropout rate and its learning
rate, most models of a sweep are alike: that is their outline. A program has a network of that
outline, whose variables take arrays of any width, and serves one model after another: a call takes
the model's values, does many steps of Keras' own `train_step` in one loop, and gives them back. So
TensorFlow traces once an outline, and XLA compiles once a width. Where XLA does not compile, an
update of a weight is one operation (`pipeline.fused`). Other numbers of a model or its optimizer,
such as a momentum or a penalty, are constants of a program: a model with others has its own. How
smooth the labels are, and how slow an average of the weights, is no constant.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from pipeline.dropout import HashedDropout
from pipeline.fused import FUSED

LOSS = "sparse_categorical_crossentropy"  # categorical cross-entropy of one-hot labels
_EVALUATED = 2_000  # images at once: bounds the memory of the activations
_MOST = 16  # programs that a process remembers
_SCHEDULE = ("initial_learning_rate", "decay_steps", "warmup_target", "warmup_steps")


def accuracy() -> keras.metrics.Metric:
    return keras.metrics.SparseCategoricalAccuracy("accuracy")  # by name, traced twice


def program_for(model: keras.Sequential, *, batch_size: int, steps: int, smooths: bool) -> Program:
    """The program of this process that trains such a model.

    Args:
        model: Compiled, its optimizer built: dense layers, the last one for the classes, and what
            else has no width of its own.
        batch_size: Images a step.
        steps: Most steps a call.
        smooths: Whether labels are smoothed.
    """
    return _program(_outline(model), batch_size, steps, smooths)


def averages_of(
    model: keras.Model, optimizer: keras.Optimizer
) -> list[tuple[keras.Variable, keras.Variable]]:
    """The optimizer's average of each weight, and that weight; none where it has no averages."""
    if not optimizer.use_ema:
        return []
    averages = [each for each in optimizer.variables if each.name.endswith("_average")]
    return list(zip(averages, model.trainable_variables, strict=True))


def _outline(model: keras.Sequential) -> str:
    """What a program depends on."""
    *layers, last = [keras.layers.serialize(layer) for layer in model.layers]
    for layer in layers:
        if layer["class_name"] == "Dense":
            layer["config"]["units"] = None
        if layer["class_name"] == "Dropout":
            layer["config"]["rate"] = None
    for layer in (*layers, last):
        layer["config"]["name"] = layer["build_config"] = None
        if "kernel_initializer" in layer["config"]:
            layer["config"]["kernel_initializer"] = "zeros"
    optimizer = keras.optimizers.serialize(model.optimizer)
    optimizer["config"]["name"] = optimizer["config"]["ema_momentum"] = None
    if isinstance(optimizer["config"]["learning_rate"], float):
        optimizer["config"]["learning_rate"] = 0.0
    else:
        settings = optimizer["config"]["learning_rate"]["config"]
        settings |= dict.fromkeys(_schedule(settings), 1.0)
    (inputs,) = model.inputs
    return json.dumps([inputs.shape[1:], inputs.dtype, [*layers, last], optimizer])


def _schedule(settings: dict[str, Any]) -> dict[str, float]:
    """The numbers of a cosine schedule; without a warm-up it has two."""
    return {name: settings[name] for name in _SCHEDULE if settings[name] not in (None, 0)}


class Program:
    """Trains models of one outline, one at a time.

    Args:
        outline: Of a model and its optimizer.
        batch_size: Images a step.
        steps: Most steps a call.
        smooths: Whether labels are smoothed.

    Where the optimizer averages the weights, a model has the average, which is what callbacks
    validate and save, and its optimizer the weights that are trained: a program trains these. It
    averages them itself, after each step: Keras does before it bounds them.
    """

    def __init__(self, outline: str, batch_size: int, steps: int, smooths: bool) -> None:
        self.batch_size, self.steps = batch_size, steps
        shape, dtype, layers, optimizer = json.loads(outline)
        fixed = {2, *shape, tf.TensorShape(shape).num_elements(), layers[-1]["config"]["units"]}
        width = next(size for size in itertools.count(2) if size not in fixed)
        with tf.variable_creator_scope(functools.partial(_create_open, width)):
            self.model = keras.Sequential(
                [keras.Input(shape, dtype=dtype), *(_layer(each, width) for each in layers)]
            )
            rate = optimizer["config"]["learning_rate"]
            optimizer["config"]["ema_momentum"] = 0.0
            fused = FUSED[optimizer["class_name"]]
            self.optimizer = fused.from_config(copy.deepcopy(optimizer["config"]))  # it changes it
            self._rates: dict[str, tf.Variable] = {}
            if isinstance(rate, dict):
                schedule = keras.optimizers.schedules.deserialize(rate)
                self._rates = {name: tf.Variable(1.0) for name in _schedule(rate["config"])}
                vars(schedule).update(self._rates)
                self.optimizer.learning_rate = schedule
            self.optimizer.build(self.model.trainable_variables)
        self._averages = averages_of(self.model, self.optimizer)
        self.optimizer.use_ema = False
        self._ema_momentum, self._smoothing = tf.Variable(0.0), tf.Variable(0.0)
        loss = self._smooth_loss if smooths else LOSS
        self.model.compile(self.optimizer, loss=loss, metrics=[accuracy()], jit_compile=False)
        self._dropouts = [layer for layer in self.model.layers if isinstance(layer, HashedDropout)]
        self._variables = [*self.model.variables, *self.optimizer.variables]
        swap = {id(a): b for pair in self._averages for a, b in (pair, pair[::-1])}
        self._swapped = [swap.get(id(variable), variable) for variable in self._variables]
        self._lending = threading.Lock()
        self._initial = [tf.identity(variable.value) for variable in self._variables]

        def traced(function: Callable[..., None], rows: int | None, *more: Any, **how: Any) -> Any:
            images, labels = tf.TensorSpec([rows, *shape], dtype), tf.TensorSpec([rows], tf.int32)
            signature = [images, labels, *more]
            return tf.function(function, input_signature=signature, autograph=False, **how)

        rows, count = steps * batch_size, tf.TensorSpec([], tf.int32)
        self._train_full = traced(self._full_batches, rows, count, jit_compile=True)
        self._train_any = traced(self._any_rows, None)
        self._evaluate = traced(self._evaluate_rows, None)

    def train(
        self,
        model: keras.Model,
        images: tf.Tensor,
        labels: tf.Tensor,
        *,
        compiled: bool,
        smoothing: float,
    ) -> None:
        """Trains on each image once, batch by batch.

        Args:
            model: Of the outline.
            images: `[rows, height, width]`, of at most `steps` batches.
            labels: `[rows]`, int32.
            compiled: By XLA, but for a last batch that is not full.
            smoothing: Part of each label that is spread over all classes, where it smooths.
        """
        with self._lent_to(model, self._swapped, smoothing):
            if not compiled:
                self._train_any(images, labels)
                return
            full, rest = divmod(len(labels), self.batch_size)
            if full:  # XLA compiles one shape
                missing = self.steps * self.batch_size - len(labels)
                rows = [pad(array, missing) for array in (images, labels)]
                self._train_full(*rows, tf.constant(full))
            if rest:
                self._train_any(images[-rest:], labels[-rest:])

    def evaluate(
        self, model: keras.Model, images: tf.Tensor, labels: tf.Tensor
    ) -> dict[str, float]:
        """Loss and accuracy on each image once, without dropout and smoothing."""
        self.reset_metrics()
        with self._lent_to(model, self._variables):
            self._evaluate(images, labels)
        return self.metrics

    @property
    def metrics(self) -> dict[str, float]:
        """Loss and accuracy of what was trained on since `reset_metrics`."""
        return {name: float(value) for name, value in self.model.get_metrics_result().items()}

    def reset_metrics(self) -> None:
        self.model.reset_metrics()

    def release(self) -> None:
        """Frees the memory of the last model's values."""
        if not self._lending.acquire(blocking=False):
            return  # another thread trains by it
        try:
            for variable, value in zip(self._variables, self._initial, strict=True):
                variable.value.assign(value)
            self.optimizer.reset()
        finally:
            self._lending.release()

    @contextmanager
    def _lent_to(
        self, model: keras.Model, variables: Sequence[keras.Variable], smoothing: float = 0.0
    ) -> Iterator[None]:
        """Inside, the program has the values of the model, which has those of the program then.

        Args:
            model: Of the outline.
            variables: Of the program, in the order of those of the model and its optimizer.
            smoothing: Of the labels.

        Raises:
            RuntimeError: Another thread trains by it.
        """
        if not self._lending.acquire(blocking=False):
            raise RuntimeError("another thread of this process trains such a model.")
        try:
            dropouts = [each for each in model.layers if isinstance(each, keras.layers.Dropout)]
            for layer, other in zip(self._dropouts, dropouts, strict=True):
                layer.open_rate.assign(other.rate)
            if self._rates:
                rates = _schedule(model.optimizer.get_config()["learning_rate"]["config"])
                for name, variable in self._rates.items():
                    variable.assign(rates[name])
            self._smoothing.assign(smoothing)
            self._ema_momentum.assign(model.optimizer.ema_momentum)
            theirs = [*model.variables, *model.optimizer.variables]
            for own, other in zip(variables, theirs, strict=True):
                own.value.assign(other.value)
            yield
            for own, other in zip(variables, theirs, strict=True):
                other.value.assign(own.value)
        finally:
            self._lending.release()

    # --- what is traced ------------------------------------------------------------------

    def _smooth_loss(self, labels: tf.Tensor, probabilities: tf.Tensor) -> tf.Tensor:
        """As `keras.losses.CategoricalCrossentropy`, of an amount that may change."""
        classes = probabilities.shape[-1]
        labels = tf.reshape(tf.cast(labels, tf.int32), [-1])  # Keras has made them floats
        targets = tf.one_hot(labels, classes, dtype=probabilities.dtype)
        targets = targets * (1.0 - self._smoothing) + self._smoothing / classes
        return keras.losses.categorical_crossentropy(targets, probabilities)

    def _train_step(self, images: tf.Tensor, labels: tf.Tensor) -> None:
        self.model.train_step((images, labels))
        is_first = tf.equal(self.optimizer.iterations, 1)
        momentum = tf.where(is_first, 0.0, self._ema_momentum)
        for average, weight in self._averages:
            average.value.assign(momentum * average.value + (1.0 - momentum) * weight.value)

    def _any_rows(self, images: tf.Tensor, labels: tf.Tensor) -> None:
        size = self.batch_size
        self.optimizer.fused = True
        self.optimizer.reset()

        def step(i: tf.Tensor) -> None:
            batch = slice(i * size, (i + 1) * size)
            self._train_step(images[batch], labels[batch])

        _repeat(step, (tf.shape(labels)[0] + size - 1) // size)

    def _full_batches(self, images: tf.Tensor, labels: tf.Tensor, count: tf.Tensor) -> None:
        shape = (self.steps, self.batch_size)
        images = tf.reshape(images, (*shape, *images.shape[1:]))
        labels = tf.reshape(labels, shape)
        self.optimizer.fused = False  # XLA does that itself
        _repeat(lambda i: self._train_step(images[i], labels[i]), count)

    def _evaluate_rows(self, images: tf.Tensor, labels: tf.Tensor) -> None:
        def step(i: tf.Tensor) -> None:
            batch = slice(i * _EVALUATED, (i + 1) * _EVALUATED)
            self.model.test_step((images[batch], labels[batch]))

        _repeat(step, (tf.shape(labels)[0] + _EVALUATED - 1) // _EVALUATED)


_program = functools.lru_cache(maxsize=_MOST)(Program)


def _repeat(step: Callable[[tf.Tensor], Any], count: tf.Tensor) -> None:
    def body(i: tf.Tensor) -> tuple[tf.Tensor]:
        step(i)
        return (i + 1,)

    tf.while_loop(lambda i: i < count, body, (tf.constant(0),), parallel_iterations=1)


class _OpenDense(keras.layers.Dense):  # type: ignore[misc]
    """Adds the bias by the operation that Keras takes where it knows the width."""

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        outputs = keras.ops.matmul(inputs, self.kernel)
        return self.activation(tf.nn.bias_add(outputs, self.bias) if self.use_bias else outputs)


def _layer(serialized: dict[str, Any], width: int) -> keras.Layer:
    settings = serialized["config"]
    if settings.get("rate", 0.5) is None:
        return HashedDropout.from_config({**settings, "rate": 0.5})
    if settings.get("units", width) is None:
        return _OpenDense.from_config({**settings, "units": width})
    return keras.layers.deserialize(serialized)


def _create_open(width: int, create: Callable[..., tf.Variable], **settings: Any) -> tf.Variable:
    """Creates a variable that takes any size where the initial value has `width`."""
    value = settings["initial_value"]
    value = tf.convert_to_tensor(value() if callable(value) else value, settings.get("dtype"))
    shape = [None if size == width else size for size in value.shape]
    return create(**{**settings, "initial_value": value, "shape": tf.TensorShape(shape)})


def pad(array: tf.Tensor, rows: int) -> tf.Tensor:
    """An array with so many more rows of zeros."""
    return tf.pad(array, [(0, rows)] + [(0, 0)] * (array.ndim - 1)) if rows else array
