"""The search space: Hydra's sweep grammar, read into Optuna's distributions."""

from collections.abc import Mapping

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from pipeline.compose import Value
from sweeps.config import SearchConfig
from sweeps.space import (
    Distribution,
    Space,
    build_space,
    run_overrides,
    split_command_line,
)

NAME = "model.hidden_units"


def read(
    space: Mapping[str, object],
    *command_line: str,
    when: Mapping[str, str] | None = None,
) -> Space:
    given, searched = split_command_line(command_line)
    return build_space(SearchConfig(space=dict(space), when=dict(when or {})), searched, given)


def error_of(space: Mapping[str, object], *command_line: str, **when: str) -> str:
    with pytest.raises(ValueError) as error:
        read(space, *command_line, when=when)
    return str(error.value)


# --- declarations ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declaration", "expected"),
    [
        ("interval(0.0, 0.5)", FloatDistribution(0.0, 0.5)),
        ("interval(0, 5)", FloatDistribution(0.0, 5.0)),
        ("interval(start=-1, end=1)", FloatDistribution(-1.0, 1.0)),
        ("interval(3.0, 3.0)", FloatDistribution(3.0, 3.0)),
        ("tag(log, interval(1e-4, 1e-2))", FloatDistribution(1e-4, 1e-2, log=True)),
        ("tag(other, interval(1e-4, 1e-2))", FloatDistribution(1e-4, 1e-2)),
        ("int(interval(1, 5))", IntDistribution(1, 5)),
        ("tag(log, int(interval(32, 1024)))", IntDistribution(32, 1024, log=True)),
        ("int(tag(log, interval(32, 1024)))", IntDistribution(32, 1024, log=True)),
        # As Python's, a range ends before its stop.
        ("range(5)", IntDistribution(0, 4)),
        ("range(1, 5)", IntDistribution(1, 4)),
        ("range(1, 2)", IntDistribution(1, 1)),
        ("range(32, 257, 32)", IntDistribution(32, 256, step=32)),
        ("range(32, 256, 32)", IntDistribution(32, 224, step=32)),
        ("range(1, 6, 3)", IntDistribution(1, 4, step=3)),
        ("tag(log, range(1, 5))", IntDistribution(1, 4, log=True)),
        ("range(0, 1, 0.25)", FloatDistribution(0.0, 0.75, step=0.25)),
        ("range(0.0, 0.3, 0.1)", FloatDistribution(0.0, 0.2, step=0.1)),
        ("range(0.1, 0.35, 0.1)", FloatDistribution(0.1, 0.3, step=0.1)),
        ("float(range(1, 4))", FloatDistribution(1.0, 3.0, step=1.0)),
    ],
)
def test_a_declaration_is_read_as_a_distribution(declaration: str, expected: Distribution) -> None:
    space = read({NAME: declaration})

    assert [each.distribution for each in space.parameters] == [expected]
    assert [each.declaration for each in space.parameters] == [declaration]


@pytest.mark.parametrize(
    ("declaration", "choices"),
    [
        ("choice(relu, gelu)", ["relu", "gelu"]),
        ("relu,gelu", ["relu", "gelu"]),
        ("choice(one)", ["one"]),
        ("choice(32, 64)", [32, 64]),
        ("choice(1e-3, 0.5)", [0.001, 0.5]),
        ("choice(true, false)", [True, False]),
        ("null,true,1,0.5,word", [None, True, 1, 0.5, "word"]),
        ("'null','1','a b',\"c,d\"", ["null", "1", "a b", "c,d"]),
        ("str(choice(1, 2))", ["1", "2"]),
        ("sort(choice(3, 1, 2))", [1, 2, 3]),
    ],
)
def test_a_choice_keeps_the_type_of_each_value(declaration: str, choices: list[Value]) -> None:
    [found] = read({NAME: declaration}).parameters

    assert isinstance(found.distribution, CategoricalDistribution)
    assert list(map(repr, found.distribution.choices)) == list(map(repr, choices))
    assert found.ends == found.points(2) == choices


@pytest.mark.parametrize(
    ("written", "value"),
    [
        (0.9, 0.9),
        (1e-5, 1e-5),
        (64, 64),
        (True, True),
        (None, None),
        ("relu", "relu"),
        ("0.9", 0.9),
        ("null", None),
        ("false", False),
        ("'a b'", "a b"),
        ("", ""),
    ],
)
def test_a_plain_value_fixes_its_name(written: object, value: Value) -> None:
    space = read({"fixed.name": written, NAME: "range(1, 5)"})

    assert repr(space.fixed) == repr({"fixed.name": value})
    assert [each.name for each in space.parameters] == [NAME]


# --- the command line --------------------------------------------------------------------

BASE = {"a.x": "interval(0, 1)", "a.y": "interval(0, 2)", "a.z": "interval(0, 3)"}


def declarations(space: Space) -> list[tuple[str, str]]:
    return [(each.name, each.declaration) for each in space.parameters]


def test_parameters_stand_in_the_order_of_their_declarations() -> None:
    assert declarations(read(BASE)) == list(BASE.items())


def test_the_command_line_replaces_a_declaration_in_its_place_and_adds_others_at_the_end() -> None:
    space = read(BASE, "b=choice(p, q)", "a.y=range(1, 9)", "+a.w=1,2")

    assert declarations(space) == [
        ("a.x", "interval(0, 1)"),
        ("a.y", "range(1, 9)"),
        ("a.z", "interval(0, 3)"),
        ("b", "choice(p, q)"),
        ("a.w", "1,2"),
    ]


@pytest.mark.parametrize("override", ["a.y=0.3", "+a.y=0.3", "++a.y=0.3", "a.y=null", "a.y='1,2'"])
def test_a_value_on_the_command_line_takes_the_name_out_of_the_search(override: str) -> None:
    space = read(BASE, override)

    assert [each.name for each in space.parameters] == ["a.x", "a.z"]
    assert space.fixed == {}  # Hydra composes it


def test_a_value_on_the_command_line_replaces_the_one_the_space_fixes() -> None:
    assert read({**BASE, "a.y": 0.9}, "a.y=0.3").fixed == {}


def test_a_searched_name_leaves_the_command_line_that_hydra_sees() -> None:
    rest, searched = split_command_line(
        ["data=digits", "optimizer=choice(rmsprop, adam)", "-m", "a.x=b,c", "--cfg", "job", "~b"]
    )

    assert rest == ["data=digits", "-m", "--cfg", "job", "~b"]
    assert searched == {"optimizer": "choice(rmsprop, adam)", "a.x": "b,c"}


def test_only_what_is_of_the_run_is_repeated_in_the_command_of_a_run() -> None:
    of_the_run = ["data=digits", "+experiment=notebook", "seed=3", "tracking.experiment=sweep"]
    of_the_sweep = ["sweep.trials=3", "search=deep", "sampler.points=3", "+search.space={a: 1}"]
    others = ["pruner=none", "executor.workers=2", "study.storage=x", "hydra/job_logging=none"]

    assert run_overrides([*of_the_sweep, *of_the_run, *others]) == of_the_run


# --- conditions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parent", "condition", "value", "is_searched"),
    [
        ("choice(rmsprop, adam)", "rmsprop", "rmsprop", True),
        ("choice(rmsprop, adam)", "rmsprop", "adam", False),
        ("choice(rmsprop, adam, sgd)", "choice(adam, sgd)", "sgd", True),
        ("choice(rmsprop, adam, sgd)", "adam,sgd", "rmsprop", False),
        ("null,1.0", "null", None, True),
        ("null,1.0", "null", 1.0, False),
        ("choice(true, false)", "true", True, True),
        ("choice(true, false)", "true", False, False),
        ("range(1, 9)", "range(2, 5)", 4, True),
        ("range(1, 9)", "range(2, 5)", 5, False),
        ("interval(0, 1)", "interval(0.5, 1)", 0.5, True),
        ("interval(0, 1)", "interval(0.5, 1)", 0.499, False),
        ("choice(1, 2)", "choice(1.0)", 1, True),
    ],
)
@pytest.mark.parametrize("decided", ["searched", "fixed", "configured"])
def test_a_parameter_is_searched_only_where_its_condition_holds(
    parent: str, condition: str, value: Value, is_searched: bool, decided: str
) -> None:
    spaces: dict[str, dict[str, object]] = {
        "searched": {"parent": parent, "child": "interval(0, 1)"},
        "fixed": {"parent": value, "child": "interval(0, 1)"},
        "configured": {"child": "interval(0, 1)"},
    }
    space = read(spaces[decided], when={"child": f"parent={condition}"})
    chosen = {"parent": value, "child": 0.3}

    values = space.assign(lambda each: chosen[each.name], {"parent": value})

    assert ("child" in values) is is_searched


def test_a_condition_on_what_is_not_searched_in_a_trial_looks_at_its_configured_value() -> None:
    space = read(
        {"a": "choice(x, y)", "b": "choice(x, y)", "c": "interval(0, 1)"},
        when={"b": "a=x", "c": "b=y"},
    )
    chosen: dict[str, Value] = {"a": "y", "b": "x", "c": 0.5}

    values = space.assign(lambda each: chosen[each.name], {"a": "x", "b": "y"})

    assert values == {"a": "y", "c": 0.5}


@pytest.mark.parametrize("parent", ["later", "child"])
def test_a_condition_must_look_at_what_stands_before_it(parent: str) -> None:
    space = {"child": "interval(0, 1)", "later": "choice(x, y)"}

    assert error_of(space, child=f"{parent}=x") == (
        f"search.when['child']: {parent}=x: {parent} must stand before child in search.space."
    )


@pytest.mark.parametrize(
    ("condition", "rule"),
    [
        ("a", "must be an override"),
        ("a=interval(5, 1)", "`low <= high` must hold"),
        ("a=choice()", "empty choice"),
        ("a=glob(*)", "write interval, range or choice"),
        ("a=[", "no viable alternative"),
    ],
)
def test_an_error_of_a_condition_names_its_key(condition: str, rule: str) -> None:
    told = error_of({"a": "interval(0, 1)", "b": "interval(0, 1)"}, b=condition)

    assert told.startswith(f"search.when['b']: {condition}: ")
    assert rule in told


# --- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declaration", "rule"),
    [
        ("choice()", "empty choice is not legal"),
        ("interval(0.5, 0.1)", "`low <= high` must hold, but got (low=0.5, high=0.1)."),
        ("int(interval(5, 1))", "`low <= high` must hold, but got (low=5, high=1)."),
        ("tag(log, interval(0.0, 0.1))", "`low > 0` must hold for `log=True`"),
        ("tag(log, int(interval(0, 4)))", "`low >= 1` must hold for `log=True`"),
        ("tag(log, range(1, 5, 2))", "step is 1"),
        ("tag(log, choice(1, 2))", "log is for interval and range, not for choice."),
        ("range(5, 1)", "`start < stop` must hold for a range."),
        ("range(1, 1)", "`start < stop` must hold for a range."),
        ("range(5, 1, -1)", "a positive step"),
        ("range(1, 5, 0)", "a positive step"),
        ("interval(nan, 1)", "must be finite"),
        ("interval(0, inf)", "must be finite"),
        ("range(0, inf)", "must be finite"),
        ("range(nan, 1)", "must be finite"),
        ("range(0, 1, nan)", "must be finite"),
        ("range(-3.7e201, 5)", "range"),
        ("choice(a, b, a)", "each value once"),
        ("choice(1, 1.0)", "each value once"),
        ("choice([1], [2])", "must be a string, a number, true, false or null, got [1]."),
        ("interval(1)", "missing a required argument: 'end'"),
        ("interval(a, b)", "str is incompatible with"),
        ("glob(*)", "write interval, range or choice."),
        ("uniform(0, 1)", "Unknown function 'uniform'"),
        ("interval(0, 1", "no viable alternative"),
        ("choice(été)", "token recognition error at: 'é'"),
    ],
)
def test_an_error_names_its_key_the_declaration_and_the_rule(declaration: str, rule: str) -> None:
    told = error_of({NAME: declaration})

    assert told.startswith(f"search.space['{NAME}']: {declaration}: ")
    assert rule in told
    assert len(told.splitlines()) == 1


def test_an_error_of_the_command_line_is_told_as_it_was_written() -> None:
    told = error_of({}, "a.x=interval(0.5, 0.1)")

    assert told == "a.x=interval(0.5, 0.1): `low <= high` must hold, but got (low=0.5, high=0.1)."


@pytest.mark.parametrize(
    "name",
    [
        *("experiment", "seed", "evaluate_test"),
        *("data", "data.train_size", "tracking.figures", "training.threads"),
    ],
)
def test_what_is_the_same_in_every_trial_is_not_searched(name: str) -> None:
    rule = f"{name} is the same in every trial, it is not searched."

    assert error_of({name: "choice(1, 2)"}) == f"search.space['{name}']: choice(1, 2): {rule}"
    assert error_of({}, f"{name}=1,2") == f"{name}=1,2: {rule}"


@pytest.mark.parametrize(
    "name",
    [
        "sweep.trials",
        "search",
        "sampler.points",
        "pruner",
        "executor.workers",
        "study.storage",
        "hydra.job.name",
        "hydra/job_logging",
    ],
)
def test_the_sections_of_the_sweep_are_not_searched(name: str) -> None:
    assert error_of({}, f"{name}=1,2") == (
        f"{name}=1,2: {name} is not of the run, so it cannot be searched."
    )


@pytest.mark.parametrize("name", ["seeds", "database", "training", "training.epochs", "searching"])
def test_a_name_that_only_begins_like_one_of_those_is_searched(name: str) -> None:
    assert [each.name for each in read({name: "1,2"}).parameters] == [name]


@pytest.mark.parametrize("space", [{}, {NAME: 64}])
def test_a_space_without_a_name_to_search_is_refused(space: dict[str, object]) -> None:
    assert error_of(space).startswith("search.space must have a name to search: choose search=mlp")
