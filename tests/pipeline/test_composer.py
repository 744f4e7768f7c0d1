"""Variations of one configuration, composed and typed."""

from collections.abc import Iterator

import hydra
import pytest

from pipeline.compose import CONF, VARIANTS, Composer, Value, to_config, to_typed
from pipeline.config import OPTIMIZERS, AdamConfig, RMSpropConfig, RunConfig, SGDConfig


@pytest.fixture(autouse=True)
def initialized() -> Iterator[None]:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield


def composer(*overrides: str) -> Composer[RunConfig]:
    return Composer("run", ["data=digits", *overrides], RunConfig, VARIANTS)


def composed(*overrides: str) -> RunConfig:
    return to_config(hydra.compose("run", ["data=digits", *overrides]))


@pytest.mark.parametrize(
    ("values", "overrides"),
    [
        ({}, []),
        ({"model.hidden_units": 64}, ["model.hidden_units=64"]),
        ({"model": "wide"}, ["model=wide"]),
        ({"model": "wide", "model.hidden_layers": 3}, ["model=wide", "model.hidden_layers=3"]),
        ({"model.hidden_layers": 3, "model": "wide"}, ["model.hidden_layers=3", "model=wide"]),
        ({"optimizer": "adam", "optimizer.beta_1": 0.8}, ["optimizer=adam", "optimizer.beta_1=.8"]),
        ({"model.max_norm": None}, ["model.max_norm=null"]),
        ({"model.batch_normalization": True}, ["model.batch_normalization=true"]),
        ({"optimizer.learning_rate": 1}, ["optimizer.learning_rate=1"]),
        ({"seed": 7, "training": "quick"}, ["seed=7", "training=quick"]),
    ],
    ids=str,
)
def test_values_compose_as_overrides_do(values: dict[str, Value], overrides: list[str]) -> None:
    assert composer()(values) == composed(*overrides)


def test_values_go_before_what_all_variations_share() -> None:
    shared = composer("model.hidden_units=64", "optimizer=sgd")

    assert shared({}).model.hidden_units == 64
    assert shared({"model.hidden_units": 32}).model.hidden_units == 32
    assert type(shared({"optimizer": "adam"}).optimizer) is AdamConfig


def test_an_option_leaves_a_shared_value_as_it_is() -> None:
    assert composer("model.hidden_units=64")({"model": "wide"}).model.hidden_units == 64


def test_variations_do_not_touch_one_another() -> None:
    vary = composer()

    first = vary({"model.hidden_units": 64, "model.dropout_rate": 0.1})
    second = vary({"model.hidden_units": 32})

    assert first.model.hidden_units == 64
    assert (second.model.hidden_units, second.model.dropout_rate) == (32, 0.2)
    assert vary({}) == composed()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.hidden_units", 512),
        ("optimizer.learning_rate", 0.01),
        ("model.max_norm", None),
        ("model", "mlp"),
        ("optimizer", "sgd"),
        ("seed", 0),
        ("experiment", None),
    ],
)
def test_a_configured_value_is_known_by_its_name(name: str, value: Value) -> None:
    assert composer("optimizer=sgd", "optimizer.learning_rate=0.01").value(name) == value


def test_a_configured_value_may_depend_on_an_option() -> None:
    assert composer().value("model.hidden_units", {"model": "wide"}) == 1000
    assert composer().value("optimizer.beta_1", {"optimizer": "adam", "seed": 3}) == 0.9


def test_a_value_of_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.hiden_units: no such key; did you mean"):
        composer().value("model.hiden_units")


@pytest.mark.parametrize("name", ["model", "optimizer", "data", "training", "experiment"])
def test_a_group_is_told_from_a_value(name: str) -> None:
    assert composer().is_group(name)
    assert not composer().is_group(f"{name}.name")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"model.dropout_rate": 1.0}, "model.dropout_rate must be in [0, 1), got 1.0."),
        ({"model.hidden_units": "many"}, "model.hidden_units: Value 'many'"),
        ({"model.hidden_units": 1.5}, "model.hidden_units: Value '1.5'"),
        ({"model.hidden_units": None}, "model.hidden_units: "),
        ({"model": "wid"}, "model=wid: no such option among mlp, wide; did you mean wide?"),
        ({"model": 3}, "model=3: "),
        ({"model": None}, "model=null: "),
        ({"optimizer.name": "adam"}, "optimizer.name goes with its group: set optimizer=adam."),
        ({"optimizer.beta_1": 0.9}, "optimizer.beta_1: no such key with the options chosen"),
        ({"optimizer.warmup_epochs": 1.0}, "optimizer.warmup_epochs=1.0 needs optimizer.schedule"),
        ({"seed": "${oc.env:NO_SUCH_VARIABLE}"}, "NO_SUCH_VARIABLE"),
        ({"seed": 10**400}, "seed"),
    ],
    ids=str,
)
def test_a_refused_variation_is_a_value_error_that_names_its_key(
    values: dict[str, Value], told: str
) -> None:
    with pytest.raises(ValueError) as error:
        composer()(values)

    assert told in str(error.value)


@pytest.mark.parametrize(
    ("option", "expected"), [("adam", AdamConfig), ("rmsprop", RMSpropConfig), ("sgd", SGDConfig)]
)
def test_a_section_has_the_type_of_its_name(option: str, expected: type) -> None:
    cfg = hydra.compose("run", [f"optimizer={option}"])

    config = to_typed(cfg, RunConfig, {"optimizer": OPTIMIZERS})

    assert type(config.optimizer) is expected


def test_a_section_of_no_known_type_is_refused() -> None:
    cfg = hydra.compose("run", ["optimizer=adam"])

    with pytest.raises(ValueError, match=r"optimizer\.name must be one of sgd, got 'adam'\."):
        to_typed(cfg, RunConfig, {"optimizer": {"sgd": SGDConfig}})
