"""What a sweep will do: its trials as configurations, all checked before the first one."""

import functools
import random
import shlex
from collections.abc import Iterator

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, IntDistribution

from pipeline.compose import CONF, Composer, Value, to_config, to_typed
from pipeline.config import RunConfig
from sweeps.config import VARIANTS, SweepConfig
from sweeps.plan import Plan, build_plan, to_override
from sweeps.space import Parameter, Values, split_command_line


@pytest.fixture(autouse=True)
def initialized() -> Iterator[None]:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield


@functools.cache
def plan_of(*arguments: str) -> Plan:
    overrides, searched = split_command_line(["data=digits", *arguments])
    config = to_typed(hydra.compose("sweep", overrides), SweepConfig, VARIANTS)
    return build_plan(config, overrides, searched)


def error_of(*arguments: str) -> str:
    with pytest.raises(ValueError) as error:
        plan_of(*arguments)
    return str(error.value)


def compose_run(command: str) -> RunConfig:
    python, dash_m, module, *overrides = shlex.split(command)
    assert (python, dash_m, module) == ("python", "-m", "pipeline.run")
    return to_config(hydra.compose("run", overrides))


def draw(plan: Plan, seed: int) -> Values:
    """A random trial."""
    rng = random.Random(seed)

    def choose(parameter: Parameter) -> Value:
        spread = parameter.distribution
        if isinstance(spread, CategoricalDistribution):
            return rng.choice(spread.choices)
        if isinstance(spread, IntDistribution):
            return rng.randrange(spread.low, spread.high + 1, spread.step)
        return rng.uniform(spread.low, spread.high)

    return plan.space.assign(choose, plan.configured)


# --- a trial is a command line -----------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["search=deep"],
        ["search=deep", "optimizer=sgd", "model.activation=tanh", "seed=3"],
        ["model=choice(mlp, wide)", "training=quick", "sweep.trials=3", "sampler=random"],
        ["+experiment=notebook", "model.max_norm=null,2.0", "+search.space={model.l2: 1e-5}"],
    ],
    ids=str,
)
def test_the_printed_command_composes_to_the_configuration_of_the_trial(
    arguments: list[str],
) -> None:
    plan = plan_of(*arguments)

    for values in [draw(plan, seed) for seed in range(8)]:
        trial, repeated = plan.trial_config(values), compose_run(plan.command(values))

        assert trial.data == repeated.data
        assert trial.model == repeated.model
        assert trial.optimizer == repeated.optimizer
        assert trial.training == repeated.training
        assert trial.seed == repeated.seed
        assert not trial.evaluate_test
        assert repeated.evaluate_test


def test_a_trial_is_the_configuration_with_its_values() -> None:
    plan = plan_of("search=deep", "training.epochs=7", "optimizer.weight_decay=0.01")
    base = plan.config.run

    trial = plan.trial_config({"optimizer": "adam", "model.dropout_rate": 0.25})

    assert trial.model.dropout_rate == 0.25
    assert (trial.optimizer.name, trial.optimizer.weight_decay) == ("adam", 0.01)
    assert (trial.data, trial.training, trial.seed) == (base.data, base.training, base.seed)


def test_what_the_space_fixes_is_of_every_trial_and_of_its_command() -> None:
    plan = plan_of("+search.space={model.activation: gelu}")

    assert plan.trial_config({}).model.activation == "gelu"
    assert plan.command({"model.hidden_units": 64}, "evaluate_test=false") == (
        "python -m pipeline.run data=digits model.activation=gelu model.hidden_units=64 "
        "evaluate_test=false"
    )


@pytest.mark.parametrize("seed", range(12))
def test_a_name_is_searched_only_in_the_trials_where_its_condition_holds(seed: int) -> None:
    values = draw(plan_of("search=deep"), seed)

    assert ("optimizer.momentum" in values) is (values["optimizer"] == "rmsprop")
    assert ("optimizer.warmup_epochs" in values) is (values["optimizer.schedule"] == "cosine")


@pytest.mark.parametrize(("optimizer", "is_searched"), [("rmsprop", True), ("adam", False)])
def test_a_condition_looks_at_what_the_command_line_fixed(
    optimizer: str, is_searched: bool
) -> None:
    values = draw(plan_of("search=deep", f"optimizer={optimizer}"), 0)

    assert "optimizer" not in values
    assert ("optimizer.momentum" in values) is is_searched


def test_a_condition_on_an_unknown_name_is_refused() -> None:
    told = error_of("+search.when={model.dropout_rate: 'model.hiden_units=64'}")

    assert "model.hiden_units: no such key; did you mean model.hidden_units?" in told


# --- every end is checked ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "rule"),
    [
        ("model.dropout_rate=interval(0.0, 1.0)", "must be in [0, 1), got 1.0."),
        ("model.dropout_rate=interval(-0.1, 0.5)", "must be in [0, 1), got -0.1."),
        ("model.hidden_units=range(0, 512, 32)", "must be at least 1, got 0."),
        ("model.activation=choice(relu, gelu, rely)", "got 'rely'."),
        ("model.hidden_layers=choice(1, 200, 2)", "must be in [0, 100], got 200."),
        ("model.hidden_units=interval(32, 64.5)", "could not be converted to Integer"),
        ("model=choice(mlp, wid)", "no such option among mlp, wide; did you mean wide?"),
        ("model.hiden_units=range(1, 5)", "no such key; did you mean model.hidden_units?"),
        ("optimizer.beta_1=interval(0.8, 0.9)", "no such key with the options chosen"),
        ("optimizer.momentum=interval(0.0, 1.0)", "must be in [0, 1), got 1.0."),
    ],
)
def test_an_end_that_a_run_refuses_is_refused_before_the_first_trial(
    argument: str, rule: str
) -> None:
    told = error_of(argument)

    assert told.startswith(f"{argument}: {argument.partition('=')[0]}")
    assert rule in told
    assert len(told.splitlines()) == 1


def test_an_error_of_a_fixed_value_names_its_key() -> None:
    told = error_of("+search.space={model.l2: -1}")

    assert told == "search.space['model.l2']: -1: model.l2 must be at least 0, got -1.0."


def test_an_end_is_also_checked_where_only_its_condition_allows_it() -> None:
    told = error_of("search=deep", "training.epochs=2")

    assert told == (
        "search.space['optimizer.warmup_epochs']: interval(0.0, 2.0): "
        "optimizer.warmup_epochs must be below training.epochs=2, got 2.0."
    )


def test_values_that_do_not_go_together_are_refused() -> None:
    told = error_of("optimizer.warmup_epochs=interval(0, 2)", "optimizer.schedule=constant,cosine")

    assert told.startswith("optimizer.warmup_epochs=interval(0, 2): ")
    assert "optimizer.warmup_epochs=2.0 needs optimizer.schedule=cosine, got 'constant'." in told


# --- corners -----------------------------------------------------------------------------


def test_the_corners_are_all_combinations_of_the_ends() -> None:
    corners = plan_of().corners(most=8)

    assert len(corners) == 8
    assert {values["model.hidden_units"] for values in corners} == {32, 1024}
    assert {values["model.dropout_rate"] for values in corners} == {0.0, 0.5}
    assert {values["optimizer.learning_rate"] for values in corners} == {1e-4, 1e-2}


def test_of_too_many_corners_so_many_are_drawn_always_the_same() -> None:
    plan = plan_of("search=deep")

    corners = plan.corners(most=50)

    assert len(corners) == 50
    assert corners == plan.corners(most=50)
    for parameter in plan.space.parameters:
        assert {values.get(parameter.name) for values in corners} <= {None, *parameter.ends}


# --- a value as an override --------------------------------------------------------------

LETTERS = st.text(alphabet="ab'\\\"$(){}[],=:.~* \t\n#1e-é")
TEXTS = st.one_of(
    st.text(),
    LETTERS,
    st.sampled_from(
        ["null", "true", "1", "1e-4", "", " ", "a,b", "choice(1,2)", "'a'", "a\\", "???"]
    ),
)


@settings(deadline=None, max_examples=300)
@given(st.none() | st.booleans() | st.integers() | st.floats() | TEXTS)
@example("\\\\ '")
@example("\\\\ ,")
@example("a,\\")
def test_any_value_as_an_override_is_read_as_the_same_value(value: Value) -> None:
    override = OverridesParser.create().parse_override(to_override("a.b", value))

    assert (override.key_or_group, override.is_sweep_override()) == ("a.b", False)
    assert repr(override.value()) == repr(value)


@settings(deadline=None, max_examples=20)
@given(
    st.none() | TEXTS.filter(lambda text: "$" not in text and text != "???"),
    st.integers(0, 2**32 - 1),
    st.floats(1e-300, 1e300),
    st.booleans(),
)
@example("\\\\ '", 0, 1e-05, True)
def test_values_compose_alike_on_the_command_line_and_in_a_trial(
    text: str | None, whole: int, number: float, truth: bool
) -> None:
    values: Values = {
        "tracking.run_name": text,
        "seed": whole,
        "optimizer.learning_rate": number,
        "training.restore_best_weights": truth,
    }
    composer = Composer("run", ["data=digits"], RunConfig, {"optimizer": VARIANTS["optimizer"]})

    on_the_command_line = hydra.compose(
        "run", ["data=digits", *(to_override(*item) for item in values.items())]
    )

    assert composer(values) == to_config(on_the_command_line)
    assert composer(values).tracking.run_name == text
    assert composer(values).optimizer.learning_rate == number
