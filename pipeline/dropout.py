"""Dropout masks from an integer hash while a model trains.

Keras draws masks with the Philox generator, which XLA computes slowly on a CPU: it took a third of
a training step of 784-512-512-10. A counter-based hash needs a tenth of that. Only the training
draws differently: the layer, what is saved of it and what it does at inference stay Keras' own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import keras
import numpy as np
import tensorflow as tf


@contextmanager
def hashed_dropout(model: keras.Model) -> Iterator[None]:
    """Inside, the `Dropout` layers of the model draw their masks from the hash."""
    layers = _dropout_layers(model)
    for layer in layers:
        layer.call = MethodType(_call, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.call


class SeedDropout(keras.callbacks.Callback):  # type: ignore[misc]
    """Seeds the masks of each epoch by (seed, epoch), so that they do not depend on the past."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        layers = _dropout_layers(self.model)
        keys = np.random.SeedSequence([self.seed, epoch]).generate_state(len(layers)) >> 1
        for layer, key in zip(layers, keys, strict=True):
            layer.seed_generator.state.assign([int(key), 0])


def _dropout_layers(model: keras.Model) -> list[keras.layers.Dropout]:
    return [layer for layer in model.layers if type(layer) is keras.layers.Dropout]


def _call(layer: keras.layers.Dropout, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
    """`Dropout.call` with Keras' own seed state: a stream, and a counter of the calls."""
    if not training:
        return inputs
    stream, count = tf.unstack(tf.cast(layer.seed_generator.next(), tf.uint32))
    shape = tf.shape(inputs)
    index = tf.cast(tf.reshape(tf.range(tf.reduce_prod(shape)), shape), tf.uint32)
    dropped_below = tf.constant(min(round(layer.rate * 2**32), 2**32 - 1), tf.uint32)
    keep = _hash(_hash(index + stream) + count) >= dropped_below
    return tf.where(keep, inputs / (1.0 - layer.rate), tf.zeros_like(inputs))


def _hash(x: tf.Tensor) -> tf.Tensor:
    """`lowbias32` of Wellons, "Prospecting for Hash Functions" (2018): a bijection on uint32."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, tf.constant(shift, tf.uint32)))
        x = x * tf.constant(factor, tf.uint32)
    return x
