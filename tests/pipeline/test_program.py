"""One program trains networks of any width, each as a program of its own would."""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pytest

from pipeline import program
from pipeline.data import Data
from pipeline.program import Program, program_for
from tests.pipeline.test_train import EVERYTHING, Network, assert_equal_weights, first, network

pytestmark = pytest.mark.usefixtures("tensorflow")


@pytest.fixture(autouse=True)
def no_programs() -> None:
    program._program.cache_clear()


def small(*options: str, compile_: str = "never", **settings: Any) -> Network:
    model = {"hidden_layers": 2, "dropout_rate": 0.2, **settings.pop("model", {})}
    return network(
        *options, data=first(110), batch_size=20, compile=compile_, model=model, **settings
    )


def program_of(net: Network, *, batch_size: int = 20, steps: int = 6) -> Program:
    net.optimizer.build(net.model.trainable_variables)
    return program_for(net.model, net.optimizer, batch_size=batch_size, steps=steps)


OTHER: dict[str, Any] = {
    "model": {"hidden_units": 40, "dropout_rate": 0.5},
    "optimizer": {"learning_rate": 0.01},
}


# --- one program of many models ----------------------------------------------------------


@pytest.mark.parametrize("compile_", ["always", "never"])
@pytest.mark.parametrize("option", ["optimizer=rmsprop", "optimizer=adam", "optimizer=sgd"])
@pytest.mark.parametrize("model", [{}, EVERYTHING])
def test_a_model_is_trained_bit_for_bit_as_if_no_other_had_been_before(
    compile_: str, option: str, model: dict[str, Any]
) -> None:
    ours, alone = (small(option, compile_=compile_, model=model) for _ in range(2))
    alone.train(seed=3)
    expected = alone.model.get_weights()
    program._program.cache_clear()
    other = {**OTHER, "model": {**model, **OTHER["model"]}}
    small(option, compile_=compile_, **other).train(seed=7)

    history = ours.train(seed=3)

    assert program._program.cache_info().currsize == 1
    for got, wanted in zip(ours.model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert len(history.epochs) == 2


@pytest.mark.parametrize("compile_", ["always", "never"])
def test_another_width_dropout_or_learning_rate_is_not_traced_anew(compile_: str) -> None:
    one = small(compile_=compile_)
    one.train()
    served = program_of(one)
    before = tracings(served)

    small(compile_=compile_, **OTHER).train()

    assert program_of(small(**OTHER)) is served
    assert tracings(served) == before
    assert max(before) == 1


def tracings(served: Program) -> list[int]:
    functions = (served._train_full, served._train_any, served._evaluate)
    return [function.experimental_get_tracing_count() for function in functions]


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ((), {"model": {"hidden_layers": 1}}),
        ((), {"model": {"activation": "tanh"}}),
        ((), {"model": {"dropout_rate": 0.0}}),
        ((), {"model": {"l2": 1e-3}}),
        ((), {"model": {"max_norm": 2.0}}),
        ((), {"model": {"batch_normalization": True}}),
        ((), {"optimizer": {"momentum": 0.5}}),
        ((), {"optimizer": {"weight_decay": 1e-3}}),
        ((), {"optimizer": {"schedule": "cosine"}}),
        (("optimizer=adam",), {}),
    ],
)
def test_what_is_traced_as_it_is_has_a_program_of_its_own(
    options: tuple[str, ...], settings: dict[str, Any]
) -> None:
    usual = program_of(small())

    assert program_of(small(*options, **settings)) is not usual
    assert program_of(small()) is usual


@pytest.mark.parametrize("size", [{"batch_size": 21}, {"steps": 5}])
def test_another_batch_size_or_number_of_steps_has_a_program_of_its_own(
    size: dict[str, int],
) -> None:
    assert program_of(small(), **size) is not program_of(small())


@pytest.mark.parametrize("units", [1, 2, 3, 4, 8, 10, 64])
def test_a_width_may_equal_any_other_size(units: int) -> None:
    nets = [small(model={"hidden_units": size}) for size in (16, units)]
    for net in nets:
        net.train()

    sizes = [weights.shape[-1] for weights in nets[1].model.get_weights()]
    assert sizes == [units, units, units, units, 10, 10]
    assert program_of(nets[1]) is program_of(nets[0])


# --- what it gives back, and what it keeps -----------------------------------------------


def test_a_program_keeps_nothing_of_the_models_it_has_trained() -> None:
    net = small(model={"hidden_units": 500})

    net.train()

    served = program_of(net)
    sizes = [np.size(variable.value.numpy()) for variable in served._variables]
    assert sum(sizes) < 1_000 < net.model.count_params()


@dataclass(frozen=True)
class Failing:
    """A hook that fails in an epoch."""

    epoch: int

    def __call__(self, epoch: int, metrics: dict[str, float]) -> None:
        if epoch == self.epoch:
            raise OSError("disk full")


def test_a_training_that_fails_leaves_no_trace_in_the_next() -> None:
    ours, alone = (small() for _ in range(2))
    alone.train()
    with pytest.raises(OSError, match="disk full"):
        small(**OTHER).train(Failing(1))

    ours.train()

    assert_equal_weights(ours.model, alone.model)


def test_a_training_inside_the_hook_of_another_disturbs_neither() -> None:
    outer, inner = small(epochs=1), small(**OTHER)
    alone, also_alone = small(epochs=1), small(**OTHER)

    def hook(epoch: int, metrics: dict[str, float]) -> None:
        inner.train(seed=5)

    history = outer.train(hook)

    assert history.epochs == alone.train().epochs
    also_alone.train(seed=5)
    assert_equal_weights(outer.model, alone.model)
    assert_equal_weights(inner.model, also_alone.model)


def test_the_layers_of_the_model_stay_those_of_keras() -> None:
    net = small()
    before = [type(layer) for layer in net.model.layers]

    net.train()

    assert [type(layer) for layer in net.model.layers] == before
    assert {kind.__module__.split(".")[0] for kind in before} == {"keras"}


def test_the_oldest_of_many_outlines_is_forgotten() -> None:
    data: Data = first(20)
    usual = program_of(small())
    for size in range(1, 1 + program._MOST):
        net = network(data=data)
        net.optimizer.build(net.model.trainable_variables)
        program_for(net.model, net.optimizer, batch_size=size, steps=1)

    assert program_of(small()) is not usual


def test_a_model_of_another_outline_is_refused() -> None:
    served, other = program_of(small()), small(model={"hidden_layers": 1})
    other.optimizer.build(other.model.trainable_variables)
    images = keras.ops.convert_to_tensor(other.data.train.images[:20])
    labels = keras.ops.convert_to_tensor(other.data.train.labels[:20])

    with pytest.raises(ValueError, match="zip"):
        served.train(other.model, other.optimizer, images, labels, compiled=False)
