"""What a sweep shows: counts, the best, an honest time left, tables."""

import io
import math
import random
import re
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from rich.console import Console
from rich.table import Table

from sweeps import display as shown
from sweeps.display import (
    SHOWN,
    Display,
    Progress,
    Running,
    duration,
    importance_table,
    number,
    short,
    trial_name,
)

SPACE = {
    "model.hidden_units": IntDistribution(32, 1024),
    "optimizer.learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
    "optimizer": CategoricalDistribution(["rmsprop", "adam"]),
}


def trial(
    number: int,
    *values: float,
    state: TrialState = TrialState.COMPLETE,
    seconds: float = 2.5,
    **params: object,
) -> FrozenTrial:
    dotted = {"units": "model.hidden_units", "rate": "optimizer.learning_rate"}
    named = {dotted.get(name, name): value for name, value in params.items()}
    made = create_trial(
        state=state,
        values=values or None,
        params=named,
        distributions={name: SPACE[name] for name in named},
        user_attrs={"seconds": seconds, "epochs": 2},
    )
    made.number = number
    return made


def progress(*objectives: str, budget: int = 10) -> Progress:
    return Progress(budget=budget, objectives=objectives or ("val_accuracy",))


def rendered(table: Table) -> list[str]:
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(table)
    return [line.rstrip() for line in console.export_text().splitlines()]


# --- counts and the best -----------------------------------------------------------------


def test_before_the_first_trial_there_is_no_best() -> None:
    begun = progress()

    assert begun.counts == "0 of 10 trials, 0 pruned"
    assert begun.best_text == "no trial is complete yet"
    assert begun.metrics == {"finished": 0, "pruned": 0, "failed": 0}


def test_complete_and_pruned_trials_are_finished_and_failed_ones_are_not() -> None:
    begun = progress()

    begun.add(
        trial(0, 0.9),
        trial(1, 0.5, state=TrialState.PRUNED),
        trial(2, state=TrialState.FAIL),
        trial(3, state=TrialState.RUNNING),
        trial(4, state=TrialState.WAITING),
    )

    assert begun.counts == "2 of 10 trials, 1 pruned, 1 failed"
    assert begun.metrics == {"best_val_accuracy": 0.9, "finished": 2, "pruned": 1, "failed": 1}


@pytest.mark.parametrize(
    ("objective", "values", "best", "best_trial"),
    [
        ("val_accuracy", [0.8, 0.9, 0.7], 0.9, 1),
        ("val_accuracy", [0.9, 0.9], 0.9, 0),
        ("val_loss", [0.8, 0.1, 0.7], 0.1, 1),
        ("parameters", [3.0, 2.0, 2.0], 2.0, 1),
        ("val_loss", [0.0], 0.0, 0),
    ],
)
def test_the_best_is_the_first_of_the_best_values(
    objective: str, values: list[float], best: float, best_trial: int
) -> None:
    begun = progress(objective)

    begun.add(*(trial(index, value) for index, value in enumerate(values)))

    assert (begun.best, begun.best_trial) == ((best,), best_trial)
    assert begun.metrics[f"best_{objective}"] == best
    assert begun.best_text == f"best {objective} {number(best)} (trial {best_trial})"


def test_a_pruned_trial_is_never_the_best() -> None:
    begun = progress()

    begun.add(trial(0, 0.6), trial(1, 0.99, state=TrialState.PRUNED))

    assert begun.best == (0.6,)


def test_of_several_objectives_each_has_a_best_value_and_no_trial_is_the_best() -> None:
    begun = progress("val_accuracy", "parameters")

    begun.add(trial(0, 0.9, 5000.0), trial(1, 0.8, 1000.0))

    assert begun.best == (0.9, 1000.0)
    assert begun.best_trial is None
    assert begun.best_text == "best of each alone: val_accuracy 0.9000, parameters 1,000"
    assert begun.metrics == {
        "best_val_accuracy": 0.9,
        "best_parameters": 1000.0,
        "finished": 2,
        "pruned": 0,
        "failed": 0,
    }


# --- time left ---------------------------------------------------------------------------


UNITS = {"s": (1, 0.5), "min": (60, 30), "h": (3600, 180)}  # in seconds, and half of what is shown


def range_of(text: str) -> tuple[float, float]:
    """The ends of a range, each widened by the rounding of its text."""
    low, low_unit, high, high_unit = text.removesuffix(" left").replace(" to ", " ").split()
    factor, rounding = UNITS[low_unit]
    least = float(low) * factor - rounding
    factor, rounding = UNITS[high_unit]
    return least - 1e-6, float(high) * factor + rounding + 1e-6


def schedule(durations: Sequence[float], workers: int) -> list[tuple[float, float]]:
    """Begin and end of each trial, each begun by the first worker that is free."""
    free, times = [0.0] * workers, []
    for seconds in durations:
        begin = min(free)
        free[free.index(begin)] = begin + seconds
        times.append((begin, begin + seconds))
    return times


def told(durations: Sequence[float], workers: int, at: float) -> tuple[str, float]:
    """What is told at a moment of a sweep, and what is true."""
    times = schedule(durations, workers)
    ended = [end - begin for begin, end in times if end <= at]
    running = sum(begin <= at < end for begin, end in times)
    begun = progress(budget=len(durations))
    begun.finished, begun.seconds = len(ended), ended
    return begun.time_left(running, workers), max(end for _, end in times) - at


@settings(deadline=None)
@given(
    st.integers(4, 200),
    st.integers(1, 16),
    st.integers(1, 5000),
    st.floats(0.0, 0.99),
)
def test_with_trials_of_one_length_the_range_holds_the_true_time(
    trials: int, workers: int, seconds: int, moment: float
) -> None:
    rounds, after = -(-trials // workers), -(-3 // workers)
    assume(rounds > after)

    text, truth = told([seconds] * trials, workers, seconds * (after + moment * (rounds - after)))
    low, high = range_of(text)

    assert low <= truth <= high


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_the_range_holds_the_true_time_in_most_sweeps_of_trials_that_differ(
    workers: int, share: float
) -> None:
    rng = random.Random(0)
    held = 0
    for _ in range(200):
        durations = [60 * rng.lognormvariate(0, 0.4) for _ in range(60)]
        at = schedule(durations, workers)[int(share * 60)][0]
        text, truth = told(durations, workers, at)
        low, high = range_of(text)
        held += low <= truth <= high

    assert held >= 0.85 * 200


def test_the_range_narrows_as_trials_end() -> None:
    rng = random.Random(0)
    durations = [60 * rng.lognormvariate(0, 0.4) for _ in range(100)]

    early, late = (range_of(told(durations, 1, sum(durations[:n]))[0]) for n in (5, 80))

    assert late[1] - late[0] < early[1] - early[0]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_time_left_is_not_known_before_three_trials(count: int) -> None:
    begun = progress()
    begun.finished, begun.seconds = count, [1.0] * count

    assert begun.time_left(1, 1) == "time left: known after 3 trials"


def test_a_sweep_at_its_budget_is_nearly_done() -> None:
    begun = progress()
    begun.finished, begun.seconds = 10, [1.0] * 10

    assert begun.time_left(0, 2) == "nearly done"


# --- texts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (89.4, "89 s"),
        (90, "2 min"),
        (600, "10 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (36000, "10.0 h"),
    ],
)
def test_a_duration_is_told_as_people_say_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.97654, "0.9765"),
        (0.0, "0.0000"),
        (1.0, "1.0000"),
        (12.34567, "12.3457"),
        (2.0, "2"),
        (669706.0, "669,706"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_a_metric_has_four_places_and_a_count_separators(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0012345, "0.00123"),
        (0.5, "0.5"),
        (512, "512"),
        ("adam", "adam"),
        (None, "null"),
        (True, "true"),
    ],
)
def test_a_setting_is_short(value: str | float | None, text: str) -> None:
    assert short(value) == text


def test_settings_are_told_by_the_last_part_of_their_names() -> None:
    text = shown.settings({"model.hidden_units": 64, "optimizer.learning_rate": 0.0012345})

    assert text == "hidden_units=64 learning_rate=0.00123"


# --- tables ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (
            {"hidden_units": 412, "model.dropout_rate": 0.183, "optimizer.learning_rate": 8.1e-4},
            "trial-012 width=412 dropout=0.18 lr=8.1e-4",
        ),
        ({"optimizer.learning_rate": 1e-5}, "trial-012 lr=1e-5"),
        ({"optimizer.learning_rate": 0.0}, "trial-012 lr=0"),
        ({"optimizer": "adam", "model.bias": None}, "trial-012 optimizer=adam bias=null"),
    ],
)  # fmt: skip
def test_the_name_of_a_run_tells_its_settings_in_few_letters(
    values: dict[str, str | int | float | None], name: str
) -> None:
    assert trial_name(12, values) == name


def test_importances_are_bars_with_their_shares() -> None:
    shares = {"optimizer.learning_rate": 0.75, "model.dropout_rate": 0.25}

    title, *rows = rendered(importance_table(shares, "val_accuracy", 7))

    assert title.strip() == "What val_accuracy depends on, by 7 complete trials"
    assert [row.split()[0] for row in rows] == [*shares]
    assert [row.split()[-1] for row in rows] == ["0.75", "0.25"]
    assert len(set(map(len, rows))) == 1


# --- the display -------------------------------------------------------------------------


@pytest.fixture
def output() -> Iterator[io.StringIO]:
    with io.StringIO() as file:
        yield file


def running(index: int, epoch: int = 2) -> Running:
    values = {"model.hidden_units": 64}
    pace = 1.5 if epoch else None
    return Running(number=index, values=values, epoch=epoch, epochs=5, value=0.8, pace=pace)


def test_what_is_no_terminal_gets_plain_lines(output: io.StringIO) -> None:
    begun = progress()
    console = Console(file=output, force_terminal=False, width=120)

    with Display(console, begun, 2) as display:
        display.show([running(1)], 1)
        begun.add(trial(0, 0.91234, units=64))
        display.print_trial(trial(0, 0.91234, units=64), "", 2.5)
        display.print_trial(trial(1, state=TrialState.FAIL), "diverged", 1.0)

    assert not display.is_live
    assert output.getvalue().splitlines() == [
        "trial 0  complete    0.9123  epoch   2    2.5 s  hidden_units=64  best",
        "trial 1  fail      diverged  epoch   2    1.0 s  ",
    ]


def test_a_terminal_gets_a_table_of_what_runs(output: io.StringIO) -> None:
    console = Console(file=output, force_terminal=True, width=120, color_system=None)
    display = Display(console, progress(budget=30), 2)
    display.show([running(11), running(12, epoch=0)], 2)

    with display:
        pass

    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())
    assert display.is_live
    assert re.search(r"11 +2/5 .* 0\.8000 +1\.50 +hidden_units=64", text)
    assert re.search(r"12 +0/5 .* 0\.8000 +hidden_units=64", text)
    assert "0 of 30 trials, 0 pruned; no trial is complete yet; time left: known after" in text


def test_of_many_running_trials_some_are_shown_and_the_others_counted(output: io.StringIO) -> None:
    console = Console(file=output, force_terminal=True, width=120, height=40, color_system=None)
    display = Display(console, progress(budget=300), 99)
    display.show([running(100 + index) for index in range(SHOWN)], SHOWN + 4)

    with display:
        pass

    assert "and 4 more" in output.getvalue()
    assert str(100 + SHOWN) not in output.getvalue()
