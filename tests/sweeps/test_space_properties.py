"""What holds of every search space: its points, its errors, its command lines."""

import math
from fractions import Fraction

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import create_trial

from pipeline.compose import Value, explain
from sweeps.config import SearchConfig
from sweeps.space import Distribution, Parameter, Space, build_space, split_command_line

NAME = "a.x"


def read(declaration: str) -> Parameter:
    [found] = build_space(SearchConfig(space={NAME: declaration}, when={}), {}, []).parameters
    return found


def is_accepted_by_optuna(value: Value, spread: Distribution) -> bool:
    try:
        create_trial(value=0.0, params={NAME: value}, distributions={NAME: spread})
    except ValueError:
        return False
    return True


# Ranges of hundredths: `range(0.1, 0.4, 0.1)` is where floats go wrong.
STEPPED = st.builds(
    lambda start, step, count, tail: (
        f"range({start / 100}, {(start + step * count + tail % step) / 100}, {step / 100})"
    ),
    st.integers(-300, 300),
    st.integers(1, 100),
    st.integers(1, 30),
    st.integers(0, 99),
)
WHOLE = st.integers(-(10**6), 10**6)
PAIRS = st.tuples(WHOLE, WHOLE).map(sorted)
POSITIVE = st.floats(1e-9, 1e9)
FLOATS = st.floats(-1e9, 1e9)
DECLARATIONS = st.one_of(
    STEPPED,
    st.tuples(FLOATS, FLOATS).map(sorted).map(lambda pair: f"interval({pair[0]}, {pair[1]})"),
    st.tuples(POSITIVE, POSITIVE)
    .map(sorted)
    .map(lambda pair: f"tag(log, interval({pair[0]}, {pair[1]}))"),
    PAIRS.map(lambda pair: f"int(interval({pair[0]}, {pair[1]}))"),
    PAIRS.map(lambda pair: f"tag(log, int(interval({abs(pair[0]) + 1}, {10**7 + pair[1]})))"),
    st.lists(WHOLE, min_size=1, max_size=8, unique=True).map(
        lambda values: f"choice({', '.join(map(str, values))})"
    ),
)


@settings(deadline=None)
@given(DECLARATIONS, st.integers(2, 9))
@example("range(0.0, 0.4, 0.1)", 2)
@example("range(0.1, 1.0, 0.2)", 5)
@example("interval(3.0, 3.0000000000000004)", 5)
def test_the_points_of_a_grid_are_of_the_distribution_each_once_with_both_ends(
    declaration: str, count: int
) -> None:
    searched = read(declaration)

    points = searched.points(count)

    assert [p for p in points if not is_accepted_by_optuna(p, searched.distribution)] == []
    assert [p for p in points if not searched.contains(p)] == []
    assert len(set(points)) == len(points)
    assert {*searched.ends} <= {*points}


@settings(deadline=None)
@given(DECLARATIONS, st.integers(2, 9))
def test_the_points_of_a_grid_increase_and_are_no_more_than_asked_for(
    declaration: str, count: int
) -> None:
    assume(not declaration.startswith(("choice", "range")))

    points = read(declaration).points(count)

    assert points == sorted(points, key=float)  # type: ignore[arg-type]
    assert len(points) <= count


def test_the_points_of_a_logarithmic_interval_are_evenly_spaced_on_its_scale() -> None:
    points = read("tag(log, interval(1e-4, 1e-2))").points(5)

    assert points == pytest.approx([1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2])


def test_a_grid_takes_every_value_of_a_range() -> None:
    assert read("range(0, 8)").points(5) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert read("range(32, 257, 32)").points(2) == [32, 64, 96, 128, 160, 192, 224, 256]
    assert read("range(0.0, 0.4, 0.1)").points(2) == [0.0, 0.1, 0.2, 0.3]


def test_a_grid_takes_so_many_values_of_an_interval() -> None:
    assert read("int(interval(0, 8))").points(5) == [0, 2, 4, 6, 8]
    assert read("int(interval(1, 3))").points(5) == [1, 2, 3]
    assert read("interval(0, 1)").points(2) == [0.0, 1.0]


@settings(deadline=None)
@given(st.integers(-(10**20), 10**20), st.integers(1, 10**20), st.integers(1, 10**20))
@example(0, 9999999999999999999999999, 1)
def test_a_range_of_whole_numbers_is_pythons(start: int, length: int, step: int) -> None:
    expected = range(start, start + length, step)

    found = read(f"range({start}, {start + length}, {step})").distribution

    assert isinstance(found, IntDistribution)
    assert (found.low, found.high, found.step) == (start, expected[-1], step)


@settings(deadline=None)
@given(STEPPED)
def test_a_range_of_fractions_has_as_many_values_as_in_exact_arithmetic(declaration: str) -> None:
    start, stop, step = map(Fraction, declaration.removeprefix("range(")[:-1].split(", "))

    found = read(declaration)

    assert isinstance(found.distribution, FloatDistribution)
    assert len(found.points(2)) == math.ceil((stop - start) / step)


@settings(deadline=None)
@given(DECLARATIONS, WHOLE | FLOATS | st.sampled_from([math.nan, math.inf, -math.inf]), st.data())
def test_a_value_lies_inside_where_optuna_takes_it(
    declaration: str, value: float, data: st.DataObject
) -> None:
    searched = read(declaration)
    points: list[Value] = searched.points(5)
    drawn = data.draw(st.sampled_from([value, *points]))

    assert searched.contains(drawn) is is_accepted_by_optuna(drawn, searched.distribution)


@pytest.mark.parametrize("value", [500_000_000_000.5, -1, 10**12 + 1, True, "3", None, [3]])
def test_what_only_looks_like_a_value_of_an_interval_lies_outside(value: Value) -> None:
    assert not read("int(interval(0, 1000000000000))").contains(value)


@pytest.mark.parametrize(
    ("value", "is_inside"),
    [(0, True), (0.0, True), (1, True), (1.0, True), (False, False), (True, False), ("0", False)],
)
def test_a_number_lies_in_a_choice_whole_or_not_but_a_truth_value_does_not(
    value: Value, is_inside: bool
) -> None:
    assert read("choice(0, 1)").contains(value) is is_inside


# --- combinations ------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_the_combinations_are_all_those_that_the_conditions_leave_each_once(
    sizes: list[int],
) -> None:
    declared = {f"p{i}": f"choice({', '.join(map(str, range(n)))})" for i, n in enumerate(sizes)}
    when = {f"p{i}": f"p{i - 1}=0" for i in range(1, len(sizes))}
    space = build_space(SearchConfig(space={**declared}, when=when), {}, [])

    found = space.combinations(lambda each: each.ends, {})

    # A chain: each value but 0 ends it.
    assert len(found) == sum(size - 1 for size in sizes) + 1
    assert len({tuple(values.items()) for values in found}) == len(found)
    assert {values["p0"] for values in found} == {*range(sizes[0])}


def test_without_conditions_there_are_as_many_combinations_as_the_product() -> None:
    space = build_space(
        SearchConfig(space={"a": "choice(1, 2)", "b": "range(3)", "c": "null,true"}, when={}),
        {},
        [],
    )

    found = space.combinations(lambda each: each.points(5), {})

    assert len(found) == 2 * 3 * 2
    assert found[0] == {"a": 1, "b": 0, "c": None}
    assert found[-1] == {"a": 2, "b": 2, "c": True}


# --- anything ----------------------------------------------------------------------------

WORDS = st.one_of(
    st.text(max_size=5),
    st.floats().map(str),
    st.integers().map(str),
    st.sampled_from(
        ["null", "true", "nan", "inf", "1e400", "0", "'a b'", "${seed}", "log", "[1]", "{a:1}", "*"]
    ),
)
FUNCTIONS = ["interval", "range", "choice", "tag", "int", "float", "str", "bool", "sort", "shuffle"]
ANYTHING = st.text() | st.recursive(
    WORDS,
    lambda inner: (
        st.builds(
            lambda name, arguments: f"{name}({', '.join(arguments)})",
            st.sampled_from([*FUNCTIONS, "glob", "json_str"]),
            st.lists(inner, max_size=4),
        )
        | st.lists(inner, min_size=2, max_size=3).map(",".join)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(ANYTHING)
@example("range(0, inf)")
@example("range(1e400, 2)")
@example("range(-3.7e201, -1)")
@example("choice(a,\nb)")
def test_any_declaration_is_read_or_refused_in_one_line_that_names_it(declaration: str) -> None:
    search = SearchConfig(space={NAME: declaration, "b.y": "range(3)"}, when={})
    try:
        found: object = build_space(search, {}, [])
    except ValueError as error:
        found = explain(error)

    assert isinstance(found, Space | str)
    assert isinstance(found, Space) or found.startswith(f"search.space['{NAME}']: ")
    assert len(str(found).splitlines()) == 1


@settings(deadline=None, max_examples=300)
@given(st.text() | ANYTHING.map(f"{NAME}=".__add__) | st.text(alphabet="ab=~+@:-/.,()[]{}$' 1"))
@example("range(-3.7e201, -1)")
def test_any_command_line_is_split_and_read_or_refused_in_one_line(argument: str) -> None:
    rest, searched = split_command_line(["seed=3", argument, "-m"])
    try:
        found: object = build_space(
            SearchConfig(space={"b.y": "range(3)"}, when={}), searched, rest
        )
    except ValueError as error:
        found = explain(error)

    assert rest in (["seed=3", argument, "-m"], ["seed=3", "-m"])
    assert len(searched) == 3 - len(rest)
    assert isinstance(found, Space | str)
    assert len(str(found).splitlines()) == 1


@settings(deadline=None)
@given(
    st.from_regex(r"--?[a-z][a-z-]*(=[a-z0-9(),]*)?", fullmatch=True)
    | st.from_regex(
        r"[~+]{0,2}[a-z]+(\.[a-z_]+)*=([a-z]+|\d+|'[a-z ,]*'|\[[a-z,]*\])", fullmatch=True
    )
)
def test_flags_and_plain_values_are_left_alone(argument: str) -> None:
    assert split_command_line([argument]) == ([argument], {})


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(["relu", "gelu", "silu", "tanh"]), min_size=1, unique=True))
def test_a_choice_of_words_reads_alike_in_both_its_forms(words: list[str]) -> None:
    assume(len(words) > 1)

    spelt_out, simple = read(f"choice({', '.join(words)})"), read(",".join(words))

    assert spelt_out.distribution == simple.distribution == CategoricalDistribution(words)
