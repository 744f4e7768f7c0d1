"""An update in one operation leaves weights and optimizer as Keras' own does."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline.fused import FUSED, FusedAdam, FusedRMSprop

pytestmark = pytest.mark.usefixtures("tensorflow")

STEPS = 30
SHAPES = ((20, 30), (30,))
COSINE = keras.optimizers.schedules.CosineDecay(0.01, STEPS)


def draw(seed: int) -> list[tf.Tensor]:
    """An array for each weight."""
    normal = np.random.default_rng(seed).standard_normal
    return [tf.constant(normal(shape, np.float32)) for shape in SHAPES]


def train(optimizer: keras.Optimizer) -> list[Any]:
    """The weights and the state of the optimizer after some steps."""
    weights = [keras.Variable(array) for array in draw(0)]
    optimizer.build(weights)

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def step(gradients: list[tf.Tensor]) -> None:
        optimizer.apply(gradients, weights)

    for seed in range(1, STEPS + 1):
        step(draw(seed))
    return [np.array(variable) for variable in [*weights, *optimizer.variables]]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SGD", {}),
        ("SGD", {"momentum": 0.9, "learning_rate": COSINE}),
        ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        ("RMSprop", {"rho": 0.8, "epsilon": 0.5}),
        ("RMSprop", {"momentum": 0.5, "weight_decay": 0.01}),
        ("RMSprop", {"learning_rate": COSINE}),
        ("RMSprop", {"centered": True}),
        ("Adam", {"beta_1": 0.7, "beta_2": 0.98, "epsilon": 0.5}),
        ("Adam", {"learning_rate": COSINE, "weight_decay": 0.01}),
        ("Adam", {"amsgrad": True}),
    ],
)
def test_weights_and_state_are_those_of_keras_but_for_their_rounding(
    name: str, settings: dict[str, Any]
) -> None:
    settings = {"learning_rate": 0.01, **settings}

    ours = train(FUSED[name](**settings))

    expected = train(getattr(keras.optimizers, name)(**settings))
    for mine, theirs in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=1e-6)


def test_a_beta_next_to_1_is_rounded_as_its_difference_from_1() -> None:
    settings = {"learning_rate": 0.01, "beta_2": 0.9999}

    ours = train(FusedAdam(**settings))

    rounded = {**settings, "beta_2": 1 - float(np.float32(1) - np.float32(0.9999))}
    expected = train(keras.optimizers.Adam(**rounded))
    velocities = [-2, -1]  # of the optimizer's variables, the last
    for i in velocities:
        np.testing.assert_allclose(ours[i], expected[i], rtol=1e-5)


@pytest.mark.parametrize("name", FUSED)
def test_unfused_it_is_that_of_keras_bit_for_bit(name: str) -> None:
    unfused = FUSED[name](learning_rate=0.01)
    unfused.fused = False

    ours = train(unfused)

    expected = train(getattr(keras.optimizers, name)(learning_rate=0.01))
    for mine, theirs in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_what_is_not_finite_in_one_training_is_gone_in_the_next() -> None:
    def start(optimizer: keras.Optimizer) -> None:
        for variable, value in zip(weights, draw(0), strict=True):
            variable.assign(value)
        for variable in optimizer.variables:
            if variable is not optimizer.learning_rate:
                variable.assign(tf.zeros_like(variable.value))
        optimizer.reset()

    weights = [keras.Variable(array) for array in draw(0)]
    optimizer, alone = FusedRMSprop(learning_rate=0.01), FusedRMSprop(learning_rate=0.01)
    optimizer.build(weights)
    optimizer.apply([tf.fill(shape, np.inf) for shape in SHAPES], weights)
    assert not np.isfinite(np.array(weights[0])).any()

    start(optimizer)
    optimizer.apply(draw(1), weights)

    ours = [np.array(weight) for weight in weights]
    alone.build(weights)
    start(alone)
    alone.apply(draw(1), weights)
    for mine, theirs in zip(ours, weights, strict=True):
        np.testing.assert_array_equal(mine, np.array(theirs))
