"""One program trains networks of any width, each as a program of its own would."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from pipeline import program
from pipeline.data import Data, Split
from pipeline.endings import DivergedError
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


def program_of(
    net: Network, *, batch_size: int = 20, steps: int = 6, smooths: bool = False
) -> Program:
    net.model.compile(net.optimizer)
    net.optimizer.build(net.model.trainable_variables)
    return program_for(net.model, batch_size=batch_size, steps=steps, smooths=smooths)


OTHER: dict[str, Any] = {
    "model": {"hidden_units": 40, "dropout_rate": 0.5},
    "optimizer": {"learning_rate": 0.01},
}


# --- one program of many models ----------------------------------------------------------


@pytest.mark.parametrize(
    ("compile_", "option", "model"),
    [
        ("always", "optimizer=rmsprop", {}),
        ("always", "optimizer=adam", EVERYTHING),
        ("never", "optimizer=rmsprop", EVERYTHING),
        ("never", "optimizer=adam", {}),
        ("never", "optimizer=sgd", {}),
    ],
)
def test_a_model_is_trained_bit_for_bit_as_if_no_other_had_been_before(
    compile_: str, option: str, model: dict[str, Any]
) -> None:
    ours, alone = (small(option, compile_=compile_, model=model) for _ in range(2))
    expected = alone.train(seed=3)
    program._program.cache_clear()
    other = {**OTHER, "model": {**model, **OTHER["model"]}}
    small(option, compile_=compile_, **other).train(seed=7)

    history = ours.train(seed=3)

    assert program._program.cache_info().currsize == 1
    assert_equal_weights(ours.model, alone.model)
    assert history.epochs == expected.epochs


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
        ((), {"optimizer": {"schedule": "cosine", "warmup_epochs": 1}}),
        (("optimizer=adam",), {}),
        ((), {"model": {"input_dropout_rate": 0.1}}),
        ((), {"ema_momentum": 0.9}),
    ],
)
def test_what_is_traced_as_it_is_has_a_program_of_its_own(
    options: tuple[str, ...], settings: dict[str, Any]
) -> None:
    usual = program_of(small())

    assert program_of(small(*options, **settings)) is not usual
    assert program_of(small()) is usual


@pytest.mark.parametrize("size", [{"batch_size": 21}, {"steps": 5}, {"smooths": True}])
def test_another_batch_size_or_number_of_steps_has_a_program_of_its_own(
    size: dict[str, Any],
) -> None:
    assert program_of(small(), **size) is not program_of(small())


WARM = {"schedule": "cosine", "warmup_epochs": 1.0}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"schedule": "cosine"}, {"schedule": "cosine", "learning_rate": 0.02}),
        (WARM, {**WARM, "learning_rate": 0.02, "warmup_epochs": 0.4}),
    ],
)
def test_the_numbers_of_a_schedule_are_not_traced_anew(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    alone, ours = small(optimizer=other, epochs=3), small(optimizer=other, epochs=3)
    expected = alone.train()
    program._program.cache_clear()
    small(optimizer=one).train()

    history = ours.train()

    assert program._program.cache_info().currsize == 1
    assert history.epochs == expected.epochs
    assert_equal_weights(ours.model, alone.model)


@pytest.mark.parametrize("compile_", ["always", "never"])
def test_another_smoothing_or_averaging_is_not_traced_anew(compile_: str) -> None:
    def build(smoothing: float, momentum: float) -> Network:
        return small(compile_=compile_, label_smoothing=smoothing, ema_momentum=momentum)

    ours, alone = build(0.05, 0.5), build(0.05, 0.5)
    expected = alone.train()
    program._program.cache_clear()
    build(0.2, 0.9).train()

    history = ours.train()

    assert program._program.cache_info().currsize == 1
    assert history.epochs == expected.epochs
    assert_equal_weights(ours.model, alone.model)


@pytest.mark.parametrize(
    ("units", "side", "compile_"),
    [(1, 3, "never"), (2, 2, "never"), (3, 2, "never"), (4, 2, "never"), (9, 3, "always")],
)
def test_a_width_may_equal_any_other_size(units: int, side: int, compile_: str) -> None:
    def build(units: int) -> Network:
        model = {"hidden_units": units, "hidden_layers": 2, "batch_normalization": True}
        return network(data=tiny(side), batch_size=20, compile=compile_, model=model)

    ours, alone = build(units), build(units)
    expected = alone.train()
    program._program.cache_clear()
    build(17).train()

    history = ours.train()

    assert program._program.cache_info().currsize == 1
    assert history.epochs == expected.epochs
    assert_equal_weights(ours.model, alone.model)


def tiny(side: int) -> Data:
    """Of small images and three classes."""
    data = first(110)

    def cut(split: Split | None) -> Split:
        assert split is not None
        return replace(split, images=split.images[:, :side, :side], labels=split.labels % 3)

    return replace(
        data,
        train=cut(data.train),
        validation=cut(data.validation),
        test=cut(data.test),
        class_names=["a", "b", "c"],
    )


# --- what it gives back, and what it keeps -----------------------------------------------


def test_a_program_keeps_nothing_of_the_models_it_has_trained() -> None:
    net = small(model={"hidden_units": 500})

    net.train()

    served = program_of(net)
    kept = [variable.value for variable in served._variables] + served.optimizer._spare
    assert sum(np.size(array.numpy()) for array in kept) < 1_000 < net.model.count_params()


def test_a_call_that_fails_leaves_no_trace_in_the_next() -> None:
    ours, alone, failing = small(), small(), small(**OTHER)
    alone.train()
    served = program_of(small())
    full = tf.constant(np.zeros((0, 9, 9), np.uint8)), tf.constant(np.zeros(0, np.int32))
    failing.model.compile(failing.optimizer)
    failing.optimizer.build(failing.model.trainable_variables)
    with pytest.raises((TypeError, ValueError)):
        served.train(failing.model, *full, compiled=False, smoothing=0.0)

    ours.train()

    assert_equal_weights(ours.model, alone.model)


def test_two_threads_do_not_train_by_one_program_at_once() -> None:
    served, net = program_of(small()), small()
    net.model.compile(net.optimizer)
    net.optimizer.build(net.model.trainable_variables)

    with (
        served._lent_to(net.model, served._variables),
        pytest.raises(RuntimeError, match="another thread"),
    ):
        served.evaluate(net.model, tf.zeros((1, 8, 8), tf.uint8), tf.zeros(1, tf.int32))


def test_a_thread_that_was_refused_leaves_the_other_its_values() -> None:
    served, net = program_of(small()), small()
    net.model.compile(net.optimizer)
    net.optimizer.build(net.model.trainable_variables)

    with served._lent_to(net.model, served._variables):
        served.release()

        assert_equal_weights(served.model, net.model)


@pytest.mark.parametrize(
    ("option", "optimizer", "operation"),
    [
        ("optimizer=sgd", {"momentum": 0.0, "nesterov": False}, "ResourceApplyGradientDescent"),
        ("optimizer=sgd", {"momentum": 0.9}, "ResourceApplyKerasMomentum"),
        ("optimizer=rmsprop", {}, "ResourceApplyRMSProp"),
        ("optimizer=adam", {}, "ResourceApplyAdam"),
    ],
)
def test_an_update_is_one_operation_where_xla_does_not_compile(
    option: str, optimizer: dict[str, Any], operation: str
) -> None:
    net = small(option, optimizer=optimizer)
    served = program_of(net)

    any_rows, full = (operations(each) for each in (served._train_any, served._train_full))

    assert any_rows.count(operation) == len(net.model.trainable_variables)
    assert not any(each.startswith("ResourceApply") for each in full)


def operations(function: Any) -> list[str]:
    """Kinds of operations of a traced function, in its loop too."""
    graph = function.get_concrete_function().graph.as_graph_def()
    inner = [node.op for each in graph.library.function for node in each.node_def]
    return [node.op for node in graph.node] + inner


@pytest.mark.parametrize("option", ["optimizer=rmsprop", "optimizer=adam"])
def test_a_training_that_diverged_leaves_no_trace_in_the_next(option: str) -> None:
    ours, alone = small(option), small(option)
    alone.train()
    program._program.cache_clear()
    with pytest.raises(DivergedError):
        small(option, optimizer={"learning_rate": 1e38}).train()

    ours.train()

    assert program._program.cache_info().currsize == 1
    assert_equal_weights(ours.model, alone.model)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_what_xla_leaves_for_the_last_batch_goes_on_with_its_state(momentum: float) -> None:
    settings: dict[str, Any] = {"optimizer": {"momentum": momentum}, "epochs": 3}
    compiled, uncompiled = small(compile_="always", **settings), small(**settings)

    compiled.train()
    uncompiled.train()

    assert_equal_weights(compiled.model, uncompiled.model, atol=2e-5)


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
        program_of(network(data=data), batch_size=size, steps=1)

    assert program_of(small()) is not usual


def test_a_model_of_another_outline_is_refused() -> None:
    served, other = program_of(small()), small(model={"hidden_layers": 1})
    other.model.compile(other.optimizer)
    other.optimizer.build(other.model.trainable_variables)

    with pytest.raises(ValueError, match="zip"):
        served.evaluate(other.model, tf.zeros((1, 8, 8), tf.uint8), tf.zeros(1, tf.int32))
