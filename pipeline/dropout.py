"""Dropout masks from an integer hash while a model trains.

Keras draws masks with the Philox generator, which XLA computes slowly on a CPU: it took a third of
a training step of 784-512-512-10. A counter-based hash needs less than a tenth of that. Only the
training draws differently: the layer, what is saved of it and what it does at inference stay Keras'
own.
"""

import keras
import numpy as np
import tensorflow as tf

_GOLDEN = 0x9E3779B9  # 2**32 divided by the golden ratio: Knuth, "Sorting and Searching", 6.4


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
        key = _hash(_hash(stream) + count)
        shape = tf.shape(inputs)
        index = tf.bitcast(tf.reshape(tf.range(tf.reduce_prod(shape)), shape), tf.uint32)
        drawn = _hash(index + key, key * tf.constant(_GOLDEN, tf.uint32))
        dropped = tf.minimum(tf.round(self.open_rate * 2.0**32), 2.0**32 - 1)
        keep = tf.cast(drawn >= tf.cast(dropped, tf.uint32), inputs.dtype)  # `tf.where` is slow
        return inputs * (keep / tf.cast(1.0 - self.open_rate, inputs.dtype))


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


def _hash(x: tf.Tensor, key: int | tf.Tensor = 0) -> tf.Tensor:
    """`lowbias32` of Wellons, "Prospecting for Hash Functions" (2018), with a key midway.

    Of indices that follow one another, a key added before alone would give shifted copies. Its last
    step, left out here, changes the lower half of the bits.
    """
    x = _fold(x, 16) * tf.constant(0x7FEB352D, tf.uint32)
    return _fold(x ^ key, 15) * tf.constant(0x846CA68B, tf.uint32)


def _fold(x: tf.Tensor, shift: int) -> tf.Tensor:
    return x ^ tf.bitwise.right_shift(x, tf.constant(shift, tf.uint32))
