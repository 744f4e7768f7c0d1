"""The network and its optimizer are what the configuration says; row 5 of the faults."""

import functools
from dataclasses import replace
from typing import Any

import hydra
import keras
import numpy as np
import numpy.typing as npt
import pytest
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.compose import CONF, to_config
from pipeline.config import ACTIVATIONS, INITIALIZERS, ModelConfig, RunConfig
from pipeline.data import Data, Split
from pipeline.model import build_mlp, build_optimizer, check_memory, count_parameters

pytestmark = pytest.mark.usefixtures("tensorflow")

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]

# He et al. 2015, Klambauer et al. 2017, Glorot and Bengio 2010.
SUITS = {
    "relu": "HeNormal",
    "gelu": "HeNormal",
    "silu": "HeNormal",
    "elu": "HeNormal",
    "selu": "LecunNormal",
    "tanh": "GlorotUniform",
    "sigmoid": "GlorotUniform",
}


@pytest.fixture(autouse=True)
def seed() -> None:
    keras.utils.set_random_seed(0)


@functools.cache
def compose(*overrides: str) -> RunConfig:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return to_config(hydra.compose("run", ["training=quick", *overrides]))


def model_config(**fields: Any) -> ModelConfig:
    """The default network, but for the fields given."""
    return replace(compose().model, **fields)


def pixels(num_images: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    draw = np.random.default_rng(0)
    return draw.integers(0, 256, (num_images, height, width), dtype=np.uint8)


def data_of(images: Pixels, *, num_classes: int = 10, pixel_max: float = 255) -> Data:
    split = Split(
        name="train",
        images=images,
        labels=np.arange(len(images), dtype=np.int32) % num_classes,
        digest="",
    )
    return Data(
        train=split,
        validation=None,
        test=split,
        class_names=[str(label) for label in range(num_classes)],
        pixel_max=pixel_max,
        digest="",
        source="drawn",
    )


def small_mlp(*, hidden_units: int = 7, **fields: Any) -> keras.Model:
    """Of 5 x 4 images in 3 classes."""
    config = model_config(hidden_units=hidden_units, **fields)
    return build_mlp(config, data_of(pixels(6, 5, 4), num_classes=3))


def layers_of(model: keras.Model, kind: str) -> list[keras.Layer]:
    return [layer for layer in model.layers if type(layer).__name__ == kind]


# --- the network -------------------------------------------------------------------------


def test_the_notebook_has_its_layers_and_669706_parameters() -> None:
    config = compose("+experiment=notebook").model

    model = build_mlp(config, data_of(pixels(10, 28, 28)))

    hidden = ["Dense", "Activation", "Dropout"]
    assert [type(layer).__name__ for layer in model.layers] == [
        *("Rescaling", "Flatten"),
        *hidden,
        *hidden,
        "Dense",
    ]
    dense = layers_of(model, "Dense")
    assert [layer.units for layer in dense] == [512, 512, 10]
    assert {type(layer.kernel_initializer).__name__ for layer in dense} == {"GlorotUniform"}
    assert [layer.activation.__name__ for layer in layers_of(model, "Activation")] == ["relu"] * 2
    assert [layer.rate for layer in layers_of(model, "Dropout")] == [0.2, 0.2]
    assert dense[-1].activation.__name__ == "softmax"
    assert model.count_params() == 669_706


@pytest.mark.parametrize("hidden_layers", [0, 1, 2, 5])
@pytest.mark.parametrize("hidden_units", [1, 33])
def test_widths_and_layers_are_as_configured(hidden_units: int, hidden_layers: int) -> None:
    model = small_mlp(hidden_units=hidden_units, hidden_layers=hidden_layers)

    units = [layer.units for layer in layers_of(model, "Dense")]
    assert units == [hidden_units] * hidden_layers + [3]


@pytest.mark.parametrize(("rate", "rates"), [(0.0, []), (0.35, [0.35, 0.35])])
def test_dropout_follows_each_hidden_layer_unless_its_rate_is_zero(
    rate: float, rates: list[float]
) -> None:
    model = small_mlp(dropout_rate=rate)

    assert [layer.rate for layer in layers_of(model, "Dropout")] == rates


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_as_configured_and_the_automatic_initializer_suits_it(
    activation: str,
) -> None:
    model = small_mlp(activation=activation)

    *hidden, output = layers_of(model, "Dense")
    used = {layer.activation.__name__ for layer in layers_of(model, "Activation")}
    assert used == {activation}
    assert {type(layer.kernel_initializer).__name__ for layer in hidden} == {SUITS[activation]}
    assert type(output.kernel_initializer).__name__ == "GlorotUniform"


@pytest.mark.parametrize("name", sorted(set(INITIALIZERS) - {"auto"}))
def test_a_named_initializer_is_that_of_the_hidden_layers(name: str) -> None:
    model = small_mlp(initializer=name)

    hidden = layers_of(model, "Dense")[:-1]
    expected = type(keras.initializers.get(name))
    assert {type(layer.kernel_initializer) for layer in hidden} == {expected}


def test_batch_normalization_stands_between_product_and_activation_and_replaces_the_bias() -> None:
    model = small_mlp(batch_normalization=True, hidden_layers=1)

    names = [type(layer).__name__ for layer in model.layers]
    hidden, output = layers_of(model, "Dense")
    assert names[2:6] == ["Dense", "BatchNormalization", "Activation", "Dropout"]
    assert (hidden.use_bias, output.use_bias) == (False, True)


def test_l2_penalizes_every_kernel_and_nothing_else() -> None:
    model = small_mlp(l2=0.01)

    penalty = float(sum(model.losses))

    kernels = [layer.kernel.numpy() for layer in layers_of(model, "Dense")]
    assert penalty == pytest.approx(0.01 * sum((kernel**2).sum() for kernel in kernels))


def test_max_norm_bounds_the_weights_into_each_unit() -> None:
    model = small_mlp(max_norm=1.5)

    constraint = layers_of(model, "Dense")[0].kernel_constraint
    norms = np.linalg.norm(constraint(np.full((20, 7), 9.0, np.float32)), axis=0)

    assert len({id(layer.kernel_constraint) for layer in layers_of(model, "Dense")}) == 3
    assert norms == pytest.approx(1.5, rel=1e-5)


def test_without_l2_and_max_norm_nothing_is_penalized_or_bound() -> None:
    model = small_mlp()

    assert model.losses == []
    assert {layer.kernel_constraint for layer in layers_of(model, "Dense")} == {None}


# --- inputs and outputs ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_raw_pixels_go_in_and_probabilities_come_out(dtype: str) -> None:
    images = pixels(9, 6, 5).astype(dtype)

    model = build_mlp(model_config(), data_of(images, num_classes=4))

    probabilities = model(images).numpy()
    assert (model.input_shape, model.inputs[0].dtype) == ((None, 6, 5), dtype)
    assert (probabilities.shape, probabilities.dtype) == ((9, 4), np.float32)
    assert probabilities.min() >= 0
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("fields", [{"hidden_layers": 0}, {"batch_normalization": True}])
def test_the_same_images_on_another_scale_give_equal_outputs(fields: dict[str, Any]) -> None:
    raw = pixels(9, 6, 5)
    scaled = (raw / 255).astype(np.float32)
    model = build_mlp(model_config(**fields), data_of(raw, pixel_max=255))
    other = build_mlp(model_config(**fields), data_of(scaled, pixel_max=1))

    other.set_weights(model.get_weights())

    np.testing.assert_allclose(other(scaled), model(raw), atol=1e-6)


# --- its size ----------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, database=None)
@given(
    fields=st.fixed_dictionaries(
        {
            "hidden_units": st.integers(1, 40),
            "hidden_layers": st.integers(0, 4),
            "batch_normalization": st.booleans(),
            "dropout_rate": st.sampled_from([0.0, 0.5]),
        }
    ),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    num_classes=st.integers(1, 12),
)
def test_parameters_are_counted_as_keras_counts_them(
    fields: dict[str, Any], size: tuple[int, int], num_classes: int
) -> None:
    config = model_config(**fields)
    model = build_mlp(config, data_of(pixels(2, *size), num_classes=num_classes))

    count = count_parameters(config, num_inputs=size[0] * size[1], num_classes=num_classes)

    assert count == model.count_params()


@pytest.mark.parametrize("hidden_layers", [1, 2, 100])
def test_a_network_too_large_for_memory_is_refused_in_one_line(hidden_layers: int) -> None:
    config = model_config(hidden_units=10**9, hidden_layers=hidden_layers)

    with pytest.raises(ValueError, match=r"parameters, which take [\d,.]+ GiB") as refused:
        build_mlp(config, data_of(pixels(2, 28, 28)))

    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith(
        f"model.hidden_units=1000000000 with model.hidden_layers={hidden_layers} makes "
    )


def test_a_width_without_a_layer_costs_nothing() -> None:
    config = model_config(hidden_units=10**9, hidden_layers=0)

    check_memory(config, num_inputs=784, num_classes=10)

    assert count_parameters(config, num_inputs=784, num_classes=10) == 7_850


# --- the optimizer -----------------------------------------------------------------------


def optimizer_of(
    name: str, *, steps_per_epoch: int = 10, epochs: int = 3, **fields: Any
) -> keras.Optimizer:
    config = replace(compose(f"optimizer={name}").optimizer, **fields)
    return build_optimizer(config, steps_per_epoch=steps_per_epoch, epochs=epochs, ema_momentum=0.0)


def rates_of(optimizer: keras.Optimizer, steps: int) -> npt.NDArray[np.float64]:
    """The learning rate before each step, and after the last."""
    rates = []
    for step in range(steps + 1):
        optimizer.iterations.assign(step)
        rates.append(float(optimizer.learning_rate))
    return np.array(rates)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("rmsprop", {"rho": 0.8, "momentum": 0.3}),
        ("adam", {"beta_1": 0.7, "beta_2": 0.95}),
        ("sgd", {"momentum": 0.6, "nesterov": False}),
        ("sgd", {"momentum": 0.6, "nesterov": True}),
    ],
)
def test_an_optimizer_carries_every_setting(name: str, own: dict[str, Any]) -> None:
    fields = {"learning_rate": 0.25, "weight_decay": 0.125, **own}

    optimizer = optimizer_of(name, **fields)

    config = optimizer.get_config()
    assert type(optimizer).__name__.lower() == name
    assert {key: config[key] for key in fields} == pytest.approx(fields)


@pytest.mark.parametrize("name", ["rmsprop", "adam", "sgd"])
def test_weight_decay_subtracts_its_fraction_times_the_learning_rate(name: str) -> None:
    optimizer = optimizer_of(name, learning_rate=0.5, weight_decay=0.1)
    weight = keras.Variable([2.0, -4.0])

    optimizer.apply([keras.ops.zeros(2)], [weight])

    np.testing.assert_allclose(weight.numpy(), [1.9, -3.8], rtol=1e-6)


def test_a_constant_learning_rate_stays() -> None:
    rates = rates_of(optimizer_of("adam", learning_rate=0.25), steps=30)

    assert set(rates) == {0.25}


@pytest.mark.parametrize("name", ["rmsprop", "adam", "sgd"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 10, 29])
def test_a_cosine_schedule_rises_to_the_learning_rate_and_falls_to_zero(
    name: str, warmup_steps: int
) -> None:
    optimizer = optimizer_of(
        name, learning_rate=0.25, schedule="cosine", warmup_epochs=warmup_steps / 10
    )

    rates = rates_of(optimizer, steps=30)

    rise, fall = rates[: warmup_steps + 1], rates[warmup_steps:]
    middle = (1 + np.cos(np.pi * np.linspace(0, 1, len(fall)))) / 2
    np.testing.assert_allclose(rise, 0.25 * np.linspace(1 - bool(warmup_steps), 1, len(rise)))
    np.testing.assert_allclose(fall, 0.25 * middle, atol=1e-7)
    assert rates[-1] == pytest.approx(0, abs=1e-7)


def test_a_warm_up_of_nearly_all_epochs_leaves_a_finite_learning_rate() -> None:
    optimizer = optimizer_of("adam", schedule="cosine", warmup_epochs=2.99, steps_per_epoch=1)

    rates = rates_of(optimizer, steps=3)

    assert np.isfinite(rates).all()
