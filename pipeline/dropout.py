"""Dropout masks from an integer hash while a model trains.

Keras draws masks with the Philox generator, which XLA computes slowly on a CPU: it took a third of
a training step of 784-512-512-10. A counter-based hash needs a tenth of that. Only the training
draws differently: the layer, what is saved of it and what it does at inference stay Keras' own.
"""

import keras
import numpy as np
import tensorflow as tf


class HashedDropout(keras.layers.Dropout):  # type: ignore[misc]
    """Keras' `Dropout` but for its masks, and with a rate that may change after it was traced.

    Its seed state is Keras' own: a stream, and a counter of the calls.
    """

    def __init__(self, rate: float, **settings: object) -> None:
        super().__init__(rate, **settings)
        self.open_rate = tf.Variable(rate, dtype=tf.float64, trainable=False)

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        if not training:
            return inputs
        stream, count = tf.unstack(tf.cast(self.seed_generator.next(), tf.uint32))
        shape = tf.shape(inputs)
        index = tf.cast(tf.reshape(tf.range(tf.reduce_prod(shape)), shape), tf.uint32)
        dropped = tf.minimum(tf.round(self.open_rate * 2.0**32), 2.0**32 - 1)
        keep = _hash(_hash(index + stream) + count) >= tf.cast(dropped, tf.uint32)
        kept = inputs / tf.cast(1.0 - self.open_rate, inputs.dtype)
        return tf.where(keep, kept, tf.zeros_like(inputs))


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
    return [layer for layer in model.layers if isinstance(layer, keras.layers.Dropout)]


def _hash(x: tf.Tensor) -> tf.Tensor:
    """`lowbias32` of Wellons, "Prospecting for Hash Functions" (2018): a bijection on uint32."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, tf.constant(shift, tf.uint32)))
        x = x * tf.constant(factor, tf.uint32)
    return x
