"""Masks from the hash are as good as Keras' own, and leave its layers as they were."""

import keras
import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf

from pipeline.dropout import HashedDropout, SeedDropout

pytestmark = pytest.mark.usefixtures("tensorflow")

Array = npt.NDArray[np.float32]

SHAPE = (500, 400)
ONES = np.ones(SHAPE, np.float32)
COUNT = ONES.size
KEPT = 0.7
RATES = [0.01, 0.2, 0.5, 0.9]


def dropout_model(rate: float = 1 - KEPT) -> keras.Model:
    """Two dropouts of their own, told apart by what they are called on."""
    return keras.Sequential([keras.Input((SHAPE[1],)), HashedDropout(rate), HashedDropout(rate)])


def seed(model: keras.Model, *, seed: int = 0, epoch: int = 0) -> None:
    callback = SeedDropout(seed)
    callback.set_model(model)
    callback.on_epoch_begin(epoch)


def draw(*, rate: float = 1 - KEPT, layer: int = 0, epoch: int = 0, run: int = 0) -> Array:
    """What one layer makes of ones in the first step of an epoch."""
    return draw_steps(1, rate=rate, layer=layer, epoch=epoch, run=run)[0]


def draw_steps(
    steps: int, *, rate: float = 1 - KEPT, layer: int = 0, epoch: int = 0, run: int = 0
) -> list[Array]:
    model = dropout_model(rate)
    seed(model, seed=run, epoch=epoch)
    return [model.layers[layer](ONES, training=True).numpy() for _ in range(steps)]


def masks(outputs: Array) -> npt.NDArray[np.float64]:
    return np.asarray(outputs != 0, np.float64)


def correlation(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


UNCORRELATED = 5 / COUNT**0.5  # five standard errors


@pytest.mark.parametrize("rate", RATES)
def test_the_configured_fraction_is_zeroed(rate: float) -> None:
    zeroed = 1 - masks(draw(rate=rate)).mean()

    assert zeroed == pytest.approx(rate, abs=5 * (rate * (1 - rate) / COUNT) ** 0.5)


@pytest.mark.parametrize("rate", RATES)
def test_what_is_kept_is_scaled_so_that_the_expectation_stays(rate: float) -> None:
    outputs = draw(rate=rate)

    assert set(np.unique(outputs)) == {0, np.float32(1) / np.float32(1 - rate)}
    assert outputs.mean() == pytest.approx(1, abs=5 * (rate / (1 - rate) / COUNT) ** 0.5)


@pytest.mark.parametrize(("rate", "kept"), [(1e-12, 1.0), (1 - 1e-12, 0.0)])
def test_a_rate_next_to_a_bound_of_its_range_draws(rate: float, kept: float) -> None:
    outputs = draw(rate=rate)

    assert masks(outputs).mean() == kept


def test_equal_seed_and_epoch_give_equal_masks() -> None:
    first, second = (draw_steps(3, run=4, epoch=2) for _ in range(2))

    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("other", [{"layer": 1}, {"epoch": 1}, {"run": 1}])
def test_another_layer_epoch_or_seed_draws_another_mask(other: dict[str, int]) -> None:
    ours, theirs = masks(draw()), masks(draw(**other))

    assert abs(correlation(ours, theirs)) < UNCORRELATED


def test_each_step_draws_another_mask() -> None:
    first, second, third = map(masks, draw_steps(3))

    pairs = [(first, second), (second, third), (first, third)]
    assert max(abs(correlation(*pair)) for pair in pairs) < UNCORRELATED


@pytest.mark.parametrize("lag", [1, 2, 3, 64, SHAPE[1] - 1, SHAPE[1], SHAPE[1] + 1])
def test_neighbouring_positions_are_uncorrelated(lag: int) -> None:
    mask = masks(draw()).ravel()

    assert abs(correlation(mask[:-lag], mask[lag:])) < UNCORRELATED


@pytest.mark.parametrize("axis", [0, 1])
def test_no_image_and_no_unit_is_dropped_more_often_than_chance(axis: int) -> None:
    mask = masks(draw())

    z_scores = (mask.mean(axis) - KEPT) / (KEPT * (1 - KEPT) / SHAPE[axis]) ** 0.5

    assert z_scores.std() == pytest.approx(1, abs=0.2)
    assert np.abs(z_scores).max() < 5


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_step_draws_the_mask_of_the_uncompiled(compiled: bool) -> None:
    model = dropout_model()
    seed(model)

    function = tf.function(lambda x: model.layers[0](x, training=True), jit_compile=compiled)
    drawn = function(tf.constant(ONES)).numpy()

    np.testing.assert_array_equal(drawn, draw())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_rate_that_changes_is_that_of_the_next_masks(compiled: bool) -> None:
    layer = dropout_model(0.5).layers[0]
    function = tf.function(lambda x: layer(x, training=True), jit_compile=compiled)
    before = masks(function(tf.constant(ONES)).numpy()).mean()

    layer.open_rate.assign(0.1)
    after = masks(function(tf.constant(ONES)).numpy()).mean()

    assert (before, after) == pytest.approx((0.5, 0.9), abs=5 * 0.5 / COUNT**0.5)
    assert function.experimental_get_tracing_count() == 1


def test_inference_stays_the_identity() -> None:
    model = dropout_model()
    inputs = np.random.default_rng(0).random(SHAPE, np.float32)

    outputs = model(inputs, training=False).numpy()

    np.testing.assert_array_equal(outputs, inputs)
