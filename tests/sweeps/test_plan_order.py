"""Which trials come first, which a grid has, and what makes a sweep the same sweep."""

import functools
import json
import logging
from collections.abc import Iterator

import hydra
import pytest

from pipeline.compose import CONF, to_typed
from sweeps.config import VARIANTS, SweepConfig
from sweeps.plan import Plan, build_plan
from sweeps.space import Values, split_command_line


@pytest.fixture(autouse=True)
def initialized() -> Iterator[None]:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield


@functools.cache
def plan_of(*arguments: str) -> Plan:
    overrides, searched = split_command_line(["data=digits", *arguments])
    config = to_typed(hydra.compose("sweep", overrides), SweepConfig, VARIANTS)
    return build_plan(config, overrides, searched)


# --- the first configurations ------------------------------------------------------------

AS_CONFIGURED = {
    "model.hidden_units": 512,
    "model.dropout_rate": 0.2,
    "optimizer.learning_rate": 0.001,
}


@pytest.mark.parametrize(
    ("first", "known"),
    [
        ("[]", []),
        ("[{}]", [AS_CONFIGURED]),
        ("[{}, {}]", [AS_CONFIGURED]),
        ("[{model.hidden_units: 64}]", [AS_CONFIGURED | {"model.hidden_units": 64}]),
        (
            "[{model.dropout_rate: 0.0, model.hidden_units: 32}, {}]",
            [AS_CONFIGURED | {"model.dropout_rate": 0.0, "model.hidden_units": 32}, AS_CONFIGURED],
        ),
    ],
)
def test_the_first_trials_are_as_configured_but_for_what_they_give(
    first: str, known: list[dict[str, object]]
) -> None:
    assert plan_of(f"sweep.first={first}").known == known


def test_the_first_trial_is_by_default_the_one_configured() -> None:
    assert plan_of().known == [AS_CONFIGURED]
    assert plan_of("model=wide").known == [AS_CONFIGURED | {"model.hidden_units": 1000}]


@pytest.mark.parametrize(
    ("first", "baseline"),
    [("[]", None), ("[{model.hidden_units: 64}]", None), ("[{model.hidden_units: 64}, {}]", 1)],
)
def test_the_baseline_is_the_configuration_as_it_stands(first: str, baseline: int | None) -> None:
    assert plan_of().baseline == 0
    assert plan_of(f"sweep.first={first}").baseline == baseline


def test_a_first_configuration_follows_the_options_it_gives() -> None:
    space = "{optimizer: 'choice(rmsprop, adam)', optimizer.beta_1: 'interval(0.8, 0.95)'}"
    plan = plan_of(
        f"+search.space={space}",
        "+search.when={optimizer.beta_1: 'optimizer=adam'}",
        "sweep.first=[{}, {optimizer: adam}]",
    )

    assert plan.known == [
        AS_CONFIGURED | {"optimizer": "rmsprop"},
        AS_CONFIGURED | {"optimizer": "adam", "optimizer.beta_1": 0.9},
    ]


def test_a_whole_number_for_a_fraction_is_still_the_configured_value() -> None:
    assert plan_of("model.l2=choice(0, 1e-4)").known == [AS_CONFIGURED | {"model.l2": 0.0}]


@pytest.mark.parametrize(
    ("first", "told"),
    [
        (
            "{model.hiden_units: 64}",
            "model.hiden_units is not searched; the searched names are model.hidden_units, ",
        ),
        ("{model.l2: 0.1}", "model.l2 is not searched"),
        (
            "{model.hidden_units: 2000}",
            "model.hidden_units=2000 lies outside tag(log, int(interval(32, 1024))).",
        ),
        ("{model.hidden_units: inf}", "model.hidden_units=inf lies outside "),
        ("{model.hidden_units: nan}", "model.hidden_units=nan lies outside "),
        ("{model.hidden_units: 64.5}", "model.hidden_units=64.5 lies outside "),
        ("{model.hidden_units: many}", "model.hidden_units=many lies outside "),
        ("{model.hidden_units: null}", "model.hidden_units=null lies outside "),
        ("{model.dropout_rate: true}", "model.dropout_rate=true lies outside interval(0.0, 0.5)."),
    ],
)
def test_a_first_configuration_that_is_not_of_the_space_is_refused(first: str, told: str) -> None:
    with pytest.raises(ValueError) as error:
        plan_of(f"sweep.first=[{{}}, {first}]")

    assert str(error.value).startswith(f"sweep.first[1]: {told}")


def test_a_configured_value_outside_the_space_leaves_the_configuration_out_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        plan = plan_of("model.hidden_units=range(4, 20)")

    assert plan.known == []
    assert caplog.messages == [
        "sweep.first[0]: model.hidden_units=512, as configured, lies outside range(4, 20): "
        "left out, so there is no such baseline"
    ]


# --- a grid ------------------------------------------------------------------------------

SMALL = [
    "sampler=grid",
    "model.hidden_units=range(32, 129, 32)",
    "model.dropout_rate=choice(0.0, 0.2)",
    "optimizer.learning_rate=0.001",
    "sweep.first=[]",
]


def test_a_grid_is_every_combination_once() -> None:
    known = plan_of(*SMALL).known

    assert sorted(tuple(values.values()) for values in known) == [
        (units, rate) for units in (32, 64, 96, 128) for rate in (0.0, 0.2)
    ]


def test_the_seed_of_the_sweep_shuffles_a_grid() -> None:
    first, again, other = (plan_of(*SMALL, f"sweep.seed={seed}").known for seed in (0, 0, 1))

    assert first == again
    assert first != other
    assert sorted(map(json.dumps, first)) == sorted(map(json.dumps, other))


def test_the_first_configurations_of_a_grid_come_first_and_once() -> None:
    first: Values = {"model.hidden_units": 64, "model.dropout_rate": 0.0}

    known = plan_of(*SMALL, "sweep.first=[{model.hidden_units: 64, model.dropout_rate: 0.0}]").known

    assert known[0] == first
    assert known.count(first) == 1
    assert len(known) == 8


@pytest.mark.parametrize(("budget", "trials"), [(3, 3), (8, 8), (1000, 8)])
def test_a_sweep_of_a_grid_ends_with_its_last_combination(budget: int, trials: int) -> None:
    assert plan_of(*SMALL, f"sweep.trials={budget}").trials == trials


@pytest.mark.parametrize(
    ("finished", "failed", "needs_more"),
    [(7, 0, True), (8, 0, False), (7, 1, False), (0, 8, False)],
)
def test_a_grid_tries_no_combination_twice(finished: int, failed: int, needs_more: bool) -> None:
    assert plan_of(*SMALL).needs_more(finished, failed) is needs_more


def test_other_samplers_try_again_until_the_budget_is_reached() -> None:
    plan = plan_of("sweep.trials=8")

    assert plan.needs_more(7, 5)
    assert not plan.needs_more(8, 0)


def test_a_grid_has_so_many_points_of_an_interval() -> None:
    plan = plan_of("sampler=grid", "sampler.points=3", "sweep.first=[]", "sweep.trials=1000")

    assert plan.trials == 3**3


def test_a_grid_leaves_out_what_its_conditions_do() -> None:
    space = "{optimizer.schedule: 'constant,cosine', optimizer.warmup_epochs: 'range(3)'}"
    plan = plan_of(
        "sampler=grid",
        "sampler.points=2",
        "sweep.first=[]",
        f"+search.space={space}",
        "+search.when={optimizer.warmup_epochs: optimizer.schedule\\=cosine}",
        "model.hidden_units=64",
        "model.dropout_rate=0.0",
        "optimizer.learning_rate=1e-3",
    )

    assert sorted(map(json.dumps, plan.known)) == sorted(
        map(
            json.dumps,
            [
                {"optimizer.schedule": "constant"},
                *(
                    {"optimizer.schedule": "cosine", "optimizer.warmup_epochs": epochs}
                    for epochs in range(3)
                ),
            ],
        )
    )


def test_a_grid_that_no_one_could_finish_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sampler=grid: 1,200,000 combinations; use fewer names"):
        plan_of("sampler=grid", "search=deep")


def test_other_samplers_have_the_whole_budget_and_no_more_workers_than_trials() -> None:
    plan = plan_of("sweep.trials=7", "executor.workers=16")

    assert (plan.trials, plan.workers) == (7, 7)
    assert plan_of("executor.workers=2").workers == 2


# --- what makes it the same sweep --------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["sweep.trials=99"],
        ["sweep.timeout=60"],
        ["sweep.name=other", "sweep.max_failures=3"],
        ["executor.workers=2"],
        ["sampler=random"],
        ["sampler.n_startup_trials=3"],
        ["pruner=none"],
        ["tracking.directory=elsewhere", "tracking.figures=true"],
        ["study.storage=sqlite:///other.db"],
    ],
    ids=str,
)
def test_a_sweep_may_be_gone_on_with_by_other_means(arguments: list[str]) -> None:
    assert plan_of(*arguments).identity == plan_of().identity


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        (["sweep.objective=val_loss"], {"sweep.objective"}),
        (["sweep.objective=[val_accuracy,parameters]"], {"sweep.objective"}),
        (["training.epochs=3"], {"training.epochs"}),
        (["training.batch_size=64"], {"training.batch_size"}),
        (["model.activation=gelu"], {"model.activation"}),
        (["+search.space={model.activation: gelu}"], {"model.activation"}),
        (["seed=1"], {"seed"}),
        (["sweep.first=[]"], {"sweep.first"}),
        (["sampler=grid"], {"sampler", "sweep.seed"}),
        (["model.dropout_rate=interval(0.0, 0.4)"], {"search.space['model.dropout_rate']"}),
        (["model.dropout_rate=0.2"], {"search.space['model.dropout_rate']", "model.dropout_rate"}),
        (["model.l2=interval(0.0, 0.1)"], {"search.space['model.l2']", "model.l2"}),
        (
            ["+search.when={model.dropout_rate: 'model.hidden_units=64'}"],
            {"search.space['model.dropout_rate']", "model.dropout_rate"},
        ),
    ],
    ids=lambda given: " ".join(sorted(given)),  # alike in each process
)
def test_a_sweep_of_something_else_is_another_sweep(
    arguments: list[str], changed: set[str]
) -> None:
    before, after = plan_of().identity, plan_of(*arguments).identity

    names = before.keys() | after.keys()
    assert {name for name in names if before.get(name) != after.get(name)} == changed


def test_the_configured_value_of_what_is_always_searched_is_no_part_of_the_sweep() -> None:
    mlp, wide = plan_of("search=deep"), plan_of("search=deep", "model=wide")

    assert mlp.config.model != wide.config.model
    assert mlp.identity == wide.identity


def test_the_same_space_in_another_order_is_the_same_sweep() -> None:
    assert plan_of("model.l2=1,2", "model.activation=relu,gelu").identity == (
        plan_of("model.activation=relu,gelu", "model.l2=1,2").identity
    )
