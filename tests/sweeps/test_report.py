"""The report of a sweep: any study makes a page that is whole, safe and needs no network."""

import json
import random
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import hydra
import optuna
import pytest
from mlflow import MlflowClient
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial
from plotly.offline import get_plotlyjs

from pipeline.compose import CONF, Value, to_typed
from sweeps.config import OBJECTIVES, VARIANTS, SweepConfig
from sweeps.report import Facts, _lanes, build_report
from sweeps.study import importances
from tests.stores import parent_of, trials_of

FACTS = Facts(
    title="Sweep mine",
    what="A sweep on digits.",
    lines=("2 of 2 trials, 0 pruned", "best val_accuracy 0.9000 (trial 1)"),
    space={"model.hidden_units": "tag(log, int(interval(4, 512)))"},
    data="digits, 960+240 images",
    seeds={"sweep.seed": 0, "seed": 1, "data.split_seed": 2},
    command="python -m sweeps.run data=digits sweep.name=mine",
    repeat=[(1, "python -m pipeline.run data=digits model.hidden_units=9")],
)
# Like search=deep: the momentum is that of one optimizer alone.
SPACE: dict[str, BaseDistribution] = {
    "model.hidden_units": IntDistribution(4, 512, log=True),
    "model.dropout_rate": FloatDistribution(0.0, 0.5),
    "optimizer": CategoricalDistribution(("rmsprop", "adam")),
    "optimizer.learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
    "optimizer.momentum": FloatDistribution(0.0, 0.9),
    "optimizer.rho": FloatDistribution(0.0, 0.9),
    "model.max_norm": CategoricalDistribution((None, 2.0)),
    "model.batch_normalization": CategoricalDistribution((True, False)),
}
NUMBERS = ("model.hidden_units", "model.dropout_rate", "optimizer.learning_rate")
LARGEST = 12_000_000  # bytes of a page

Params = dict[str, Value]


def draw(rng: random.Random, names: Sequence[str]) -> Params:
    def choose(spread: BaseDistribution) -> Value:
        if isinstance(spread, CategoricalDistribution):
            return rng.choice(spread.choices)
        if isinstance(spread, IntDistribution):
            return rng.randint(spread.low, spread.high)
        assert isinstance(spread, FloatDistribution)
        return rng.uniform(spread.low, spread.high)

    return {name: choose(SPACE[name]) for name in names}


def trial_of(
    state: TrialState,
    params: Params,
    *values: float,
    reported: Mapping[int, float] | None = None,
    **attributes: object,
) -> FrozenTrial:
    return create_trial(
        state=state,
        values=list(values) or None,
        params=params,
        distributions={name: SPACE[name] for name in params},
        intermediate_values=dict(reported or {}),
        user_attrs={"worker": 1, **attributes},
    )


def complete(params: Params, *values: float, seconds: float = 3.0) -> FrozenTrial:
    reported = {epoch: values[0] * epoch / 3 for epoch in (1, 2, 3)}
    return trial_of(TrialState.COMPLETE, params, *values, reported=reported, seconds=seconds)


def pruned(params: Params) -> FrozenTrial:
    return trial_of(TrialState.PRUNED, params, reported={1: 0.1, 2: 0.2}, seconds=1.0)


def failed(params: Params, reason: str) -> FrozenTrial:
    return trial_of(TrialState.FAIL, params, reason=reason, seconds=1.0)


def many(number: int, names: Sequence[str] = NUMBERS, objectives: int = 1) -> list[FrozenTrial]:
    rng = random.Random(0)
    return [
        complete(draw(rng, names), *(rng.random() for _ in range(objectives)))
        for _ in range(number)
    ]


@dataclass
class Page(HTMLParser):
    """A page as a browser takes it apart."""

    text: str
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    pieces: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)
            self.pieces.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.pieces[self.open[-1]][-1] += data

    @property
    def headings(self) -> list[str]:
        return self.pieces.get("h2", [])

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """Data and layout by title, as the scripts of the page hand them to Plotly."""
        found = []
        for script in self.pieces["script"]:
            _, call, arguments = script.partition("Plotly.newPlot(")
            if call and script.lstrip().startswith("window.PLOTLYENV"):
                found.append(
                    dict(zip(("id", "data", "layout"), read_json(arguments), strict=False))
                )
        titles = [title for title in self.headings if title not in ("Leaderboard", *TABLES)]
        return dict(zip(titles, found, strict=True))


TABLES = ("Failed trials", "Setup")


def read_json(text: str) -> Iterator[Any]:
    """Values in JSON, parted by commas, up to the end of a call."""
    decoder = json.JSONDecoder()
    while not text.lstrip().startswith(")"):
        value, end = decoder.raw_decode(text.lstrip())
        yield value
        text = text.lstrip()[end:].lstrip().removeprefix(",")


def report(
    trials: Sequence[FrozenTrial],
    objectives: Sequence[str] = ("val_accuracy",),
    facts: Facts = FACTS,
) -> Page:
    """Of a study in memory, without a leaderboard."""
    directions = [OBJECTIVES[name] for name in objectives]
    study = optuna.create_study(directions=directions)
    study.add_trials(trials)
    return Page(build_report(study, objectives, None, importances(study), facts))


CURVES, TIMES = "Learning curves", "Time line of the workers"
SPACES = ["Slices", "Parallel coordinates", "Contours"]
ONE: Params = {"model.hidden_units": 8, "optimizer": "adam"}
TWO: Params = {"model.hidden_units": 64, "optimizer": "rmsprop"}
SHOWN = ["History", "Importances", CURVES, *SPACES, TIMES]


# --- any study ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trials", "headings"),
    [
        ([], ["Setup"]),
        ([trial_of(TrialState.RUNNING, ONE)], ["Setup"]),
        ([trial_of(TrialState.WAITING, {})], ["Setup"]),
        ([trial_of(TrialState.PRUNED, ONE)], ["Setup"]),
        ([pruned(ONE), pruned(TWO)], [CURVES, TIMES, "Setup"]),
        ([failed(ONE, "diverged"), failed({}, "diverged")], [TIMES, "Failed trials", "Setup"]),
        ([complete(ONE, 0.5)], ["History", CURVES, TIMES, "Setup"]),
        ([complete(ONE, 0.5), complete(TWO, 0.6)], ["History", CURVES, *SPACES, TIMES, "Setup"]),
        ([complete(ONE, 0.5), complete(ONE, 0.5)], ["History", CURVES, *SPACES, TIMES, "Setup"]),
        ([*many(20), *[pruned(draw(random.Random(1), NUMBERS))] * 10], [*SHOWN, "Setup"]),
        ([*many(4), failed(ONE, "diverged")], [*SHOWN, "Failed trials", "Setup"]),
    ],
    ids=[
        "none",
        "one runs",
        "one waits",
        "pruned at once",
        "only pruned",
        "only failed",
        "one",
        "two",
        "twice the same",
        "thirty",
        "one failed",
    ],
)
def test_a_study_in_any_state_has_the_pictures_that_can_be_drawn_of_it(
    trials: list[FrozenTrial], headings: list[str]
) -> None:
    page = report(trials)

    assert page.headings == headings
    assert page.open == []
    assert all(figure["data"] for figure in page.figures.values())


@pytest.mark.parametrize(
    "trials", [[], [pruned(ONE)], [failed(ONE, "diverged")]], ids=["none", "pruned", "failed"]
)
def test_a_report_without_a_complete_trial_says_so(trials: list[FrozenTrial]) -> None:
    page = report(trials)

    assert "No trial is complete yet." in page.pieces["p"]
    assert not any(attributes.get("id") == "leaderboard" for _, attributes in page.tags)


def test_a_failed_trial_is_listed_with_its_settings_and_its_reason() -> None:
    page = report([complete(ONE, 0.5), failed(TWO, "the loss diverged in epoch 3")])

    cells = page.pieces["td"]
    start = cells.index("the loss diverged in epoch 3")
    assert cells[start - 2 : start] == ["1", "hidden_units=64 optimizer=rmsprop"]


def test_a_report_says_what_was_asked_and_how_to_go_on() -> None:
    page = report([])

    assert page.pieces["h1"] == ["Sweep mine"]
    assert "A sweep on digits." in page.pieces["p"]
    assert [line.strip() for line in page.pieces["li"]] == list(FACTS.lines)
    assert set(page.pieces["code"]) == {*FACTS.space.values(), FACTS.command}
    assert {"960+240" in cell for cell in page.pieces["td"]} == {True, False}
    names = ["model.hidden_units", "data", "sweep.seed", "seed", "data.split_seed", "go on with"]
    assert page.pieces["th"] == names


def test_importances_are_shown_when_they_are_known() -> None:
    figure = report(many(30)).figures["Importances"]

    (bars,) = figure["data"]
    assert set(bars["y"]) == set(NUMBERS)


# --- learning curves ---------------------------------------------------------------------


def test_curves_are_parted_by_state_and_by_gaps() -> None:
    trials = [complete(ONE, 0.6), pruned(TWO), complete(TWO, 0.9)]

    traces = {trace["name"]: trace for trace in report(trials).figures[CURVES]["data"]}

    assert list(traces) == ["pruned", "complete"]
    assert traces["pruned"]["x"] == [1, 2, None]
    assert traces["complete"]["x"] == [1, 2, 3, None, 1, 2, 3, None]
    assert traces["complete"]["y"][2] == 0.6
    assert traces["complete"]["text"] == ["trial 0"] * 4 + ["trial 2"] * 4


def test_curves_of_thirty_trials_end_where_they_were_pruned() -> None:
    rng = random.Random(2)
    trials = [*many(15), *(pruned(draw(rng, NUMBERS)) for _ in range(15))]

    first, second = report(trials).figures[CURVES]["data"]

    assert first["x"].count(2) == first["x"].count(None) == 15
    assert first["x"].count(3) == 0
    assert second["x"].count(3) == second["x"].count(None) == 15


# --- several objectives ------------------------------------------------------------------

NAMES = tuple(OBJECTIVES)  # all four


@pytest.mark.parametrize("objectives", [2, 3])
@pytest.mark.parametrize("number", [1, 2, 30])
def test_several_objectives_have_a_pareto_front_with_each_on_an_axis(
    number: int, objectives: int
) -> None:
    named = NAMES[:objectives]

    figures = report(many(number, objectives=objectives), named).figures

    layout = figures["Pareto front"]["layout"]
    axes = layout.get("scene", layout)
    assert [axes[f"{axis}axis"]["title"]["text"] for axis in "xyz"[:objectives]] == list(named)
    assert next(iter(figures)) == "Pareto front"


def test_the_front_alone_is_red_and_parameters_have_a_logarithmic_axis() -> None:
    named = ("val_accuracy", "parameters")
    values = [(0.9, 5_000.0), (0.8, 900.0), (0.7, 2_000.0), (0.6, 90_000.0)]

    figure = report([complete(ONE, *each) for each in values], named).figures["Pareto front"]

    points = {
        trace["marker"]["color"]: sorted(zip(trace["x"], trace["y"], strict=True))
        for trace in figure["data"]
    }
    assert points["#d62728"] == [(0.8, 900.0), (0.9, 5_000.0)]
    assert points["#1f77b4"] == [(0.6, 90_000.0), (0.7, 2_000.0)]
    assert figure["layout"]["yaxis"]["type"] == "log"


def test_four_objectives_are_drawn_too() -> None:
    page = report(many(10, objectives=4), NAMES)

    assert {"History", *SPACES} <= page.figures.keys()


@pytest.mark.parametrize("objectives", [1, 2])
def test_the_history_shows_the_best_so_far_of_the_first_objective(objectives: int) -> None:
    page = report(many(5, objectives=objectives), NAMES[:objectives])

    drawn = {trace["name"] for trace in page.figures["History"]["data"]}
    assert {"val_accuracy", "Best Value"} <= drawn


def test_several_objectives_without_a_complete_trial_have_no_front() -> None:
    assert report([failed(ONE, "diverged")], NAMES[:2]).headings == [TIMES, *TABLES]


# --- any search space --------------------------------------------------------------------


def conditional(rng: random.Random) -> FrozenTrial:
    """Each optimizer has a setting of its own."""
    optimizer = rng.choice(["rmsprop", "adam"])
    own = "optimizer.momentum" if optimizer == "rmsprop" else "optimizer.rho"
    params = draw(rng, ["model.hidden_units", "optimizer.learning_rate", own])
    return complete({"optimizer": optimizer, **params}, rng.random())


def conditionals() -> list[FrozenTrial]:
    rng = random.Random(0)
    return [conditional(rng) for _ in range(20)]


def test_names_that_some_trials_lack_are_drawn_of_those_that_have_them() -> None:
    slices = report(conditionals()).figures["Slices"]["data"]

    searched = {name for trial in conditionals() for name in trial.params}
    assert len(slices) == len(searched) == 5
    assert {len(trace["x"]) for trace in slices} == {
        20,
        *(
            sum(name in trial.params for trial in conditionals())
            for name in ("optimizer.momentum", "optimizer.rho")
        ),
    }


def lines_of(page: Page) -> list[dict[str, str]]:
    """Text by axis of each line of the parallel coordinates."""
    traces = page.figures["Parallel coordinates"]["data"]
    return [dict(trace["customdata"]) for trace in traces if "customdata" in trace]


def test_every_complete_trial_is_a_line_of_the_parallel_coordinates() -> None:
    lines = lines_of(report(conditionals()))

    lacking = [trial for trial in conditionals() if "optimizer.momentum" not in trial.params]
    assert len(lines) == 20
    assert sum(line["optimizer.momentum"] == "None" for line in lines) == len(lacking)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("optimizer", ["rmsprop", "adam"]),
        ("model.max_norm", [None, 2.0]),
        ("model.batch_normalization", [True, False]),
    ],
)
def test_a_choice_of_anything_is_drawn(name: str, choices: list[Value]) -> None:
    trials = [
        complete({name: choices[number % 2], "model.hidden_units": 4 + number}, number / 10)
        for number in range(8)
    ]

    page = report(trials)

    assert page.headings == [*SHOWN, "Setup"]
    drawn = {
        text for line in lines_of(page) for axis, text in line.items() if name.startswith(axis[:10])
    }
    assert drawn == {str(choice) for choice in choices}


# --- what is in it does no harm ----------------------------------------------------------

EVIL = """</script><script>alert(1)</script><img src=x onerror="alert(2)">'&"""


def test_html_in_texts_is_shown_as_text() -> None:
    facts = Facts(
        title=EVIL,
        what=EVIL,
        lines=(EVIL,),
        space={EVIL: EVIL},
        data=EVIL,
        seeds={EVIL: 0},
        command=EVIL,
        repeat=[(0, EVIL)],
    )

    page = report([failed({}, EVIL), *many(3)], facts=facts)

    tags = [tag for tag, _ in page.tags]
    assert "img" not in tags
    assert tags.count("script") == 1 + len(page.figures)
    assert page.pieces["h1"] == page.pieces["title"] == [EVIL]
    assert page.pieces["td"].count(EVIL) == 2
    assert page.open == []


def test_html_in_searched_values_is_shown_as_text() -> None:
    spread = CategoricalDistribution((EVIL, "gelu"))
    trials = [
        create_trial(
            state=TrialState.COMPLETE,
            value=number / 10,
            params={"model.activation": choice, EVIL: choice},
            distributions={"model.activation": spread, EVIL: spread},
            intermediate_values={1: 0.5},
            user_attrs={"seconds": 1.0},
        )
        for number, choice in enumerate(spread.choices * 2)
    ]

    page = report(trials)

    tags = [tag for tag, _ in page.tags]
    assert "img" not in tags
    assert tags.count("script") == 1 + len(page.figures)
    texts = [text for line in lines_of(page) for text in line.values()]
    assert texts.count("gelu") == 4


def test_a_page_loads_nothing() -> None:
    page = report([*many(5), *many(5), failed(ONE, "see https://example.org/x.png")])

    loaded = [
        (tag, name)
        for tag, attributes in page.tags
        for name in attributes
        if name in ("src", "href", "srcset", "data", "action")
    ]
    assert loaded == []
    assert not {"link", "iframe", "img", "object", "base"} & {tag for tag, _ in page.tags}
    assert "@import" not in "".join(page.pieces["style"])
    assert "url(" not in "".join(page.pieces["style"])


def test_the_library_that_draws_is_in_the_page_whole() -> None:
    page = report(many(3))

    assert get_plotlyjs() in page.pieces["script"]


# --- the time line -----------------------------------------------------------------------

NOON = datetime(2026, 1, 1, 12)  # as Optuna has it, in local time


def span(
    start: float, end: float, worker: int, *, state: TrialState = TrialState.COMPLETE
) -> FrozenTrial:
    """A trial, in seconds after noon."""
    values = [0.5] if state == TrialState.COMPLETE else []
    trial = trial_of(state, ONE, *values, seconds=end - start, worker=worker)
    trial.datetime_start = NOON + timedelta(seconds=start)
    trial.datetime_complete = NOON + timedelta(seconds=end)
    return trial


def lanes_of(*spans: tuple[float, float, int]) -> dict[int, list[tuple[float, float]]]:
    """Seconds after noon, by worker."""
    lanes = _lanes([span(*each) for each in spans])
    return {
        worker: [
            ((start - NOON).total_seconds(), (end - NOON).total_seconds()) for start, end, _ in lane
        ]
        for worker, lane in lanes.items()
    }


@pytest.mark.parametrize(
    ("spans", "lanes"),
    [
        ([], {}),
        ([(0, 5, 1)], {1: [(0, 5)]}),
        ([(0, 5, 1), (5, 9, 1)], {1: [(0, 5), (5, 9)]}),
        ([(0, 5, 1), (4, 9, 2)], {1: [(0, 5)], 2: [(4, 9)]}),
        ([(0, 5, 1), (3, 9, 1)], {1: [(0, 5), (3, 9)]}),
        ([(0, 5, 1), (5, 9, 2)], {1: [(0, 5)], 2: [(5, 9)]}),
        ([(0, 5, 3)], {3: [(0, 5)]}),
        ([(0, 9, 2), (1, 2, 1), (3, 4, 1)], {2: [(0, 9)], 1: [(1, 2), (3, 4)]}),
    ],
    ids=str,
)
def test_a_trial_is_on_the_lane_of_its_worker_whatever_the_times(
    spans: list[tuple[float, float, int]], lanes: dict[int, list[tuple[float, float]]]
) -> None:
    assert lanes_of(*spans) == lanes


def test_a_sweep_that_is_resumed_after_a_pause_has_no_more_workers_for_it() -> None:
    day = 86_400
    lanes = lanes_of((0, 5, 1), (0, 6, 2), (day, day + 5, 1), (day + 1, day + 6, 2))

    assert lanes == {1: [(0, 5), (day, day + 5)], 2: [(0, 6), (day + 1, day + 6)]}


def test_a_trial_that_no_worker_was_busy_with_is_on_no_lane() -> None:
    refused = trial_of(TrialState.FAIL, ONE, reason="refused", seconds=0.0)
    running = trial_of(TrialState.RUNNING, ONE)

    assert _lanes([refused, running, trial_of(TrialState.WAITING, {})]) == {}


def test_the_time_line_has_a_bar_a_trial_in_the_colour_of_its_state() -> None:
    pruned, failed = TrialState.PRUNED, TrialState.FAIL
    trials = [span(0, 5, 1), span(0, 2, 2, state=pruned), span(2, 3, 2, state=failed)]

    traces = {trace["name"]: trace for trace in report(trials).figures[TIMES]["data"]}

    assert {name: trace["text"] for name, trace in traces.items()} == {
        "complete": ["0"],
        "pruned": ["1"],
        "fail": ["2"],
    }
    assert [traces[name]["x"] for name in traces] == [[5_000.0], [2_000.0], [1_000.0]]
    assert [traces[name]["y"] for name in traces] == [[1], [2], [2]]
    assert traces["complete"]["base"][0].startswith("2026-01-01T12:00:00")
    assert len({trace["marker"]["color"] for trace in traces.values()}) == 3


# --- large studies -----------------------------------------------------------------------


def test_a_report_of_two_thousand_trials_can_still_be_opened() -> None:
    trials = many(2_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    page = report(trials)

    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert page.headings == [*SHOWN, "Setup"]
    assert len(page.figures["History"]["data"][0]["x"]) == 2_000
    assert len(page.text.encode()) < LARGEST
    assert grown < 500 * 1024


# --- of a real sweep ---------------------------------------------------------------------


def artifact(folder: Path, name: str) -> Page:
    """The report of a sweep's run, from where MLflow keeps artifacts."""
    client = MlflowClient(f"sqlite:///{folder / 'mlruns' / 'mlflow.db'}")
    run_id = parent_of(folder, name).run_id
    (listed,) = [file for file in client.list_artifacts(run_id) if file.path == "report.html"]
    path = folder / "mlruns" / "artifacts" / run_id / "artifacts" / listed.path
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["narrow", "wide"])
def real(request: pytest.FixtureRequest, swept: Path) -> tuple[Page, list[FrozenTrial]]:
    return artifact(swept, request.param), trials_of(swept, request.param)


def best_of(trials: Sequence[FrozenTrial]) -> FrozenTrial:
    return max(
        (trial for trial in trials if trial.state == TrialState.COMPLETE),
        key=lambda trial: (trial.values[0], -trial.number),
    )


def test_a_sweep_leaves_its_report_with_the_best_trial_first(
    real: tuple[Page, list[FrozenTrial]],
) -> None:
    page, trials = real
    best = best_of(trials)

    headings, cells = page.pieces["th"], page.pieces["td"]
    first = dict(zip(headings, cells, strict=False))
    assert headings[:3] == ["rank", "trial", "val_accuracy"]
    assert first["rank"] == "1"
    assert first["trial"] == str(best.number)
    assert first["val_accuracy"] == f"{best.values[0]:.4f}"
    assert first["hidden_units"] == str(best.params["model.hidden_units"])


def test_the_leaderboard_of_a_report_has_a_row_a_complete_trial(
    real: tuple[Page, list[FrozenTrial]],
) -> None:
    page, trials = real

    start = next(i for i, (_, found) in enumerate(page.tags) if found.get("id") == "leaderboard")
    after = [tag for tag, _ in page.tags[start:]]
    rows = after[: after.index("script")].count("tr")
    assert rows - 1 == sum(trial.state == TrialState.COMPLETE for trial in trials)


def test_a_report_of_a_sweep_says_how_to_repeat_the_best_and_how_to_go_on(
    real: tuple[Page, list[FrozenTrial]],
) -> None:
    page, trials = real

    repeat, *_, go_on = page.pieces["code"]
    assert repeat.startswith("python -m pipeline.run data=digits training.epochs=6 ")
    assert f"model.hidden_units={best_of(trials).params['model.hidden_units']} " in f"{repeat} "
    assert go_on.startswith("python -m sweeps.run data=digits ")
    assert "sweep.name=" in go_on


def test_a_report_of_a_sweep_is_drawn_whole(real: tuple[Page, list[FrozenTrial]]) -> None:
    page, trials = real

    assert page.figures.keys() == set(SHOWN)
    assert get_plotlyjs() in page.pieces["script"]
    bars = [text for trace in page.figures[TIMES]["data"] for text in trace["text"]]
    assert sorted(bars, key=int) == [str(trial.number) for trial in trials]


def test_the_lanes_of_a_sweep_are_its_workers(real: tuple[Page, list[FrozenTrial]]) -> None:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = to_typed(hydra.compose("sweep", ["data=digits"]), SweepConfig, VARIANTS)
    workers = min(config.executor.count(config.training.threads) or 0, 8)

    lanes = _lanes(real[1])

    assert sorted(lanes) == list(range(1, workers + 1))
    assert sum(len(lane) for lane in lanes.values()) == len(real[1])
