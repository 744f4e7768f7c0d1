"""Optimizers of Keras that update a weight in one operation of TensorFlow.

Keras writes an update as several operations, a dozen for RMSprop and Adam, each of which reads and
writes arrays as large as the weight. Without XLA that takes a fifth of a training step of
784-512-512-10; XLA makes two passes of them, which is as fast. TensorFlow has the same updates as
one operation, of the same state: they differ by rounding alone, of Adam's `1 - beta` too, which is
a float32 there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf


class _Fused:
    """What a program asks of an optimizer.

    Attributes:
        fused: Whether the updates that are traced next are one operation each.
    """

    fused = True

    def reset(self) -> None:
        """Is called before steps are taken: the weights may have other shapes than before."""


class FusedSGD(_Fused, keras.optimizers.SGD):  # type: ignore[misc]
    """Keras' `SGD`."""

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: Any) -> None:
        rate = tf.cast(learning_rate, variable.dtype)
        if not self.fused:
            super().update_step(gradient, variable, learning_rate)
        elif not self.momentum:
            tf.raw_ops.ResourceApplyGradientDescent(var=variable.handle, alpha=rate, delta=gradient)
        else:
            tf.raw_ops.ResourceApplyKerasMomentum(
                var=variable.handle,
                accum=self.momentums[self._get_variable_index(variable)].value.handle,
                lr=rate,
                grad=gradient,
                momentum=self.momentum,
                use_nesterov=self.nesterov,
            )


class FusedRMSprop(_Fused, keras.optimizers.RMSprop):  # type: ignore[misc]
    """Keras' `RMSprop`.

    TensorFlow's operation keeps a momentum, which is written even where it is zero: a spare array.
    """

    def build(self, var_list: Sequence[keras.Variable]) -> None:
        super().build(var_list)
        self._weights = [variable.value for variable in var_list]
        self._spare: list[tf.Variable] = []
        if not self.momentum:
            self._spare = [tf.Variable(weight, trainable=False) for weight in self._weights]

    def reset(self) -> None:
        """Gives the spare arrays the shapes of the weights; what is not finite in them is gone."""
        if self._spare:
            for spare, weight in zip(self._spare, self._weights, strict=True):
                spare.assign(tf.zeros_like(weight))

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: Any) -> None:
        if not self.fused or self.centered:
            super().update_step(gradient, variable, learning_rate)
            return
        index = self._get_variable_index(variable)
        momentum = self._momentums[index].value if self.momentum else self._spare[index]
        tf.raw_ops.ResourceApplyRMSProp(
            var=variable.handle,
            ms=self._velocities[index].value.handle,
            mom=momentum.handle,
            lr=tf.cast(learning_rate, variable.dtype),
            rho=self.rho,
            momentum=self.momentum,
            epsilon=self.epsilon,
            grad=gradient,
        )


class FusedAdam(_Fused, keras.optimizers.Adam):  # type: ignore[misc]
    """Keras' `Adam`."""

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: Any) -> None:
        if not self.fused or self.amsgrad:
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
    "SGD": FusedSGD,
    "RMSprop": FusedRMSprop,
    "Adam": FusedAdam,
}
