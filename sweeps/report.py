"""One sweep in pictures: an HTML file that needs no network."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader
from optuna.trial import FrozenTrial, TrialState
from plotly.offline import get_plotlyjs

from pipeline import as_if_missing
from sweeps.board import Board
from sweeps.display import number, settings
from sweeps.leaderboard import board_table
from sweeps.study import of_first_objective, sample, spread

with as_if_missing("matplotlib"):
    import optuna.visualization as plots

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
)
SIZES = ("parameters", "fit_seconds")  # differ by factors: their axes are logarithmic
SHADE = "#e5ecf6"  # behind points and lines the palest of which are white
COLORS = {"COMPLETE": "#1f77b4", "PRUNED": "#c7c7c7", "FAIL": "#d62728"}
CONTOURS = 3  # parameters whose pairs are drawn as contours
# Trials that are drawn: the size of contours is the square of theirs.
SPACE, CURVES, TIMES, FAILED = 200, 500, 2_000, 50


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the report says beside what is in the study.

    Attributes:
        title: Of the page.
        what: The sweep in a sentence.
        lines: What came out.
        space: Declaration by searched name.
        data: Data set, sizes and digests.
        seeds: By name.
        command: Command line that goes on with the sweep.
        repeat: Numbers of the best trials, and the command lines that repeat them.
    """

    title: str
    what: str
    lines: Sequence[str]
    space: Mapping[str, str]
    data: str
    seeds: Mapping[str, int]
    command: str
    repeat: Sequence[tuple[int, str]]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure of the report.

    Attributes:
        title: Above it.
        caption: What to see in it.
        html: The figure.
    """

    title: str
    caption: str
    html: str


def build_report(
    study: optuna.Study,
    objectives: Sequence[str],
    board: Board | None,
    importances: Mapping[str, float],
    facts: Facts,
) -> str:
    """The page, whole: pictures, leaderboard, space, data, seeds and command.

    Args:
        study: With any number of trials, in any state.
        objectives: Names of its values.
        board: Its best trials, if any is complete.
        importances: Share of each parameter; empty where unknown.
        facts: What else it says.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what cannot be drawn, or may change
        pictures = list(_pictures(study, objectives, importances))
    trials = study.get_trials(deepcopy=False)
    failed = [trial for trial in trials if trial.state == TrialState.FAIL][-FAILED:]
    return TEMPLATES.get_template("report.html").render(
        facts=facts,
        pictures=pictures,
        plotly=get_plotlyjs(),
        board=board,
        table=_cells(board) if board else None,
        failed=[(t.number, settings(t.params), t.user_attrs.get("reason", "")) for t in failed],
        now=datetime.now().astimezone(),
    )


def _cells(board: Board) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the leaderboard, as the terminal shows them."""
    columns = board_table(board, "").columns
    rows = zip(*([str(cell) for cell in column.cells] for column in columns), strict=True)
    return [str(column.header) for column in columns], [list(row) for row in rows]


# --- pictures ----------------------------------------------------------------------------


def _pictures(
    study: optuna.Study, objectives: Sequence[str], importances: Mapping[str, float]
) -> Iterator[Picture]:
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    objective = objectives[0]
    if complete:
        yield from _results(study, objectives)
    if importances:
        figure, height = _importances(importances), 110 + 32 * len(importances)
        caption = (
            f"Share of each parameter in the variance of {objective} (fANOVA), by "
            f"{len(complete):,} complete trials: the fewer, the less it says."
        )
        yield _picture("Importances", caption, figure, height)
    if any(trial.intermediate_values for trial in trials):
        caption = f"{objective} by epoch. Pruned trials end early, in grey."
        if len(trials) > CURVES:
            caption += f" At most {CURVES:,} of {len(trials):,} trials."
        yield _picture("Learning curves", caption, _curves(spread(trials, CURVES), objective))
    if len(complete) > 1:
        searched = dict.fromkeys(name for trial in complete for name in trial.params)
        names = sorted(searched, key=lambda name: -importances.get(name, 0.0))
        yield from _space(study, objectives, names)
    if lanes := _lanes(trials[-TIMES:]):
        caption = "What each worker was busy with; gaps are idle."
        if len(trials) > TIMES:
            caption += f" The latest {TIMES:,} of {len(trials):,} trials."
        yield _picture("Time line of the workers", caption, _timeline(lanes), 130 + 40 * len(lanes))


def _results(study: optuna.Study, objectives: Sequence[str]) -> Iterator[Picture]:
    if len(objectives) in (2, 3):  # more have no picture
        front = plots.plot_pareto_front(study, target_names=list(objectives))
        for trace in front.data:  # by what they are, not by when they were
            color = COLORS["FAIL" if "Best Trial" in str(trace.hovertemplate) else "COMPLETE"]
            trace.marker.update(color=color, showscale=False)
        if len(objectives) == 2:
            front.update_xaxes(type="log" if objectives[0] in SIZES else "linear")
            front.update_yaxes(type="log" if objectives[1] in SIZES else "linear")
        caption = "In red the front: no other trial is better in one objective and as good in all."
        yield _picture("Pareto front", caption, front)
    figure = plots.plot_optimization_history(of_first_objective(study), target_name=objectives[0])
    caption = f"{objectives[0]} of each complete trial, and the best so far."
    yield _picture("History", caption, figure)


def _space(
    study: optuna.Study, objectives: Sequence[str], names: Sequence[str]
) -> Iterator[Picture]:
    """What came out where in the search space; the most important names come first."""
    study, objective = of_first_objective(study), objectives[0]
    slices = plots.plot_slice(study, list(names), target_name=objective)
    slices.update_layout(plot_bgcolor=SHADE)
    slices.update_xaxes(dtick="D2", selector={"type": "log"})  # or the labels overlap
    yield _picture("Slices", f"{objective} over each parameter alone.", slices)
    some = sample(study, SPACE)
    parallel = plots.plot_parallel_coordinate(some, list(names), target_name=objective)
    parallel.update_layout(plot_bgcolor=SHADE)
    parallel.update_traces(opacity=1.0)
    caption = f"A line a complete trial{_at_most(SPACE, study)}."
    yield _picture("Parallel coordinates", caption, parallel)
    together = _together(some, names)[:CONTOURS]
    if len(together) > 1:
        contour = plots.plot_contour(some, together, target_name=objective)
        caption = f"Interpolated over pairs of parameters{_at_most(SPACE, study)}."
        yield _picture("Contours", caption, contour, 300 * len(together))


def _at_most(count: int, study: optuna.Study) -> str:
    """What to say where not all is drawn."""
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return f", of {count:,} of {len(complete):,}" if len(complete) > count else ""


def _together(study: optuna.Study, names: Sequence[str]) -> list[str]:
    """The first of the names that occur in the same trials: of a pair that never does, one."""
    chosen: list[str] = []
    searched = [set(trial.params) for trial in study.get_trials(deepcopy=False)]
    for name in names:
        if any({*chosen, name} <= of_trial for of_trial in searched):
            chosen.append(name)
    return chosen


def _picture(title: str, caption: str, figure: go.Figure, height: int = 420) -> Picture:
    figure.update_layout(
        template="plotly_white",
        title=None,
        height=height,
        margin={"l": 60, "r": 40, "t": 40, "b": 50},
    )
    html = figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})
    return Picture(title=title, caption=caption, html=html)


def _importances(importances: Mapping[str, float]) -> go.Figure:
    names, shares = list(importances)[::-1], list(importances.values())[::-1]
    text = [f"{share:.2f}" for share in shares]
    return go.Figure(go.Bar(x=shares, y=names, orientation="h", text=text))


def _curves(trials: Sequence[FrozenTrial], objective: str) -> go.Figure:
    """One trace a state, its curves parted by gaps: of thousands of trials, too."""
    figure = go.Figure()
    for state in (TrialState.PRUNED, TrialState.FAIL, TrialState.COMPLETE):
        x: list[int | None] = []
        y: list[float | None] = []
        text: list[str] = []
        for trial in (trial for trial in trials if trial.state == state):
            reported = sorted(trial.intermediate_values.items())
            x += [*(epoch for epoch, _ in reported), None]
            y += [*(value for _, value in reported), None]
            text += [f"trial {trial.number}"] * (len(reported) + 1)
        if x:
            figure.add_trace(
                go.Scatter(
                    x=x,
                    y=y,
                    text=text,
                    name=state.name.lower(),
                    mode="lines+markers",
                    marker={"size": 4},
                    line={"color": COLORS[state.name], "width": 1.2},
                )
            )
    figure.update_layout(xaxis_title="epoch", yaxis_title=objective)
    return figure


Span = tuple[datetime, datetime, FrozenTrial]


def _lanes(trials: Sequence[FrozenTrial]) -> dict[int, list[Span]]:
    """When each worker was busy with what: the last try of each trial that ended."""
    lanes: dict[int, list[Span]] = {}
    for trial in trials:
        worker, seconds = trial.user_attrs.get("worker"), trial.user_attrs.get("seconds")
        if trial.datetime_complete and worker and seconds:
            end = trial.datetime_complete
            span = (end - timedelta(seconds=seconds), end, trial)
            lanes.setdefault(worker, []).append(span)
    return lanes


def _timeline(lanes: Mapping[int, Sequence[Span]]) -> go.Figure:
    figure = go.Figure()
    for state, color in COLORS.items():
        bars = [
            (worker, start, end, trial)
            for worker, spans in lanes.items()
            for start, end, trial in spans
            if trial.state.name == state
        ]
        if bars:
            figure.add_trace(
                go.Bar(
                    base=[start for _, start, _, _ in bars],
                    x=[(end - start).total_seconds() * 1000 for _, start, end, _ in bars],
                    y=[worker for worker, *_ in bars],
                    orientation="h",
                    name=state.lower(),
                    marker={"color": color, "line": {"color": "white", "width": 1}},
                    text=[str(trial.number) for *_, trial in bars],
                    hovertext=[_hover(trial) for *_, trial in bars],
                    hoverinfo="text",
                    insidetextanchor="middle",
                )
            )
    figure.update_layout(barmode="overlay", xaxis={"type": "date"})
    figure.update_yaxes(title="worker", tickvals=sorted(lanes), autorange="reversed")
    return figure


def _hover(trial: FrozenTrial) -> str:
    value = ", ".join(map(number, trial.values or ()))
    head = f"trial {trial.number} {trial.state.name.lower()} {value}"
    return f"{head}<br>{settings(trial.params)}<br>{trial.user_attrs['seconds']:.1f} s"
