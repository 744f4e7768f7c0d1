"""Optimizers of Keras that update a weight in one operation of TensorFlow.

Keras writes an update as a dozen operations, each of which reads and writes arrays as large as the
weight. XLA makes two passes of them; without XLA they take a fifth of a training step of
784-512-512-10. TensorFlow has the same updates as one operation, as equation and state: only the
last bits differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf


class FusedRMSprop(keras.optimizers.RMSprop):  # type: ignore[misc]
    """Keras' `RMSprop`.

    TensorFlow's operation writes a momentum, even where it has none.

    Attributes:
        fused: Whether the updates that are traced next are one operation each.
    """

    fused = True

    def build(self, var_list: Sequence[keras.Variable]) -> None:
        super().build(var_list)
        self._weights = [variable.value for variable in var_list]
        self._spare = [slot.value for slot in self._momentums]
        if not self.momentum:
            self._spare = [tf.Variable(weight, trainable=False) for weight in self._weights]

    def resize(self) -> None:
        """Is to be called where the weights have other shapes than before."""
        if not self.momentum:
            for spare, weight in zip(self._spare, self._weights, strict=True):
                spare.assign(tf.zeros_like(weight))

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: Any) -> None:
        if not self.fused:
            super().update_step(gradient, variable, learning_rate)
            return
        index = self._get_variable_index(variable)
        tf.raw_ops.ResourceApplyRMSProp(
            var=variable.handle,
            ms=self._velocities[index].value.handle,
            mom=self._spare[index].handle,
            lr=tf.cast(learning_rate, variable.dtype),
            rho=self.rho,
            momentum=self.momentum,
            epsilon=self.epsilon,
            grad=gradient,
        )


class FusedAdam(keras.optimizers.Adam):  # type: ignore[misc]
    """Keras' `Adam`.

    Attributes:
        fused: Whether the updates that are traced next are one operation each.
    """

    fused = True

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: Any) -> None:
        if not self.fused:
            super().update_step(gradient, variable, learning_rate)
            return
        index = self._get_variable_index(variable)
        step = tf.cast(self.iterations + 1, variable.dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=self.beta_1**step,
            beta2_power=self.beta_2**step,
            lr=tf.cast(learning_rate, variable.dtype),
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )


FUSED: dict[str, Any] = {  # by the names of Keras
    "RMSprop": FusedRMSprop,
    "Adam": FusedAdam,
}
