"""The sweep's own run in MLflow: its settings, its view of the trials, its description."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from pipeline.config import without_password
from pipeline.pages import (
    Chart,
    View,
    attribute,
    compare_page,
    contour,
    curves,
    metric,
    parallel_coordinates,
    param,
    run_page,
    runs_page,
    scatter,
)
from sweeps.config import OBJECTIVES, VARIANTS
from sweeps.display import Progress, number
from sweeps.plan import Plan
from sweeps.space import Parameter
from sweeps.study import best_trials, importances
from sweeps.trial import METRICS

if TYPE_CHECKING:  # or TensorFlow is imported
    from pipeline.data import Data
    from pipeline.store import Store
    from pipeline.tracking import Run
    from sweeps.board import Board
    from sweeps.report import Facts

log = logging.getLogger(__name__)

REPORT = "report.html"
ROWS = 20  # trials on the leaderboard of the report
REPEATED = 3  # commands in the description, of which MLflow keeps 8,000 characters
SIDE_BY_SIDE = 10  # runs that the UI compares at first

# Metric of a run, also of one that was pruned, that charts show for an objective.
CHARTED = {"val_accuracy": "best_val_accuracy"}


def open_parent(plan: Plan, study: optuna.Study, store: Store, data: Data, command: str) -> Run:
    """The sweep's run: that of an earlier launcher, or a new one."""
    from pipeline.tracking import create_run, find_run, log_inputs

    name = study.study_name
    tags = {"sweep": name, "kind": "sweep", "study": study.user_attrs["key"]}
    objective = ", ".join(plan.config.sweep.objectives)
    run = find_run(store, tags)
    if run is None:
        run = create_run(store, name, tags)
        run.adopt([t.user_attrs.get("run_id", "") for t in study.get_trials(deepcopy=False)])
    # Also of a sweep that an older version began, and of one whose budget has grown.
    run.set_tags({"objective": objective, "command": command})
    if "recorded" not in run.tags:  # an earlier launcher may have died before it was
        log_inputs(run, plan.config, data, command, note=what(plan), settings=_settings(plan))
        run.set_tags({"mlflow.source.name": "sweeps.run", "recorded": "true"})
    store.save_view(run.run_id, view(plan, run.run_id))
    return run


def _settings(plan: Plan) -> Mapping[str, Any]:
    """What all trials share: a value that is searched is not the sweep's; what is fixed is."""
    settings = asdict(plan.composer(plan.space.fixed))
    for parameter in plan.space.parameters:
        *sections, last = parameter.name.split(".")
        inside = settings
        for section in sections:
            inside = inside.get(section, {})
        inside.pop(last, None)
    settings["search"] = {"space": plan.declarations}
    return settings


def what(plan: Plan) -> str:
    """What the sweep does, in a sentence or two."""
    config = plan.config
    names = ", ".join(parameter.name for parameter in plan.space.parameters)
    prunes = len(config.sweep.objectives) == 1 and config.sweep.objectives[0] in METRICS
    pruner = f"the pruner {config.pruner.name}" if prunes else "no pruner"
    sentence = (
        f"A sweep on {config.data.name}: searches {names} for "
        f"{' and '.join(config.sweep.objectives)}, with the sampler {config.sampler.name} and "
        f"{pruner}."
    )
    return " ".join(filter(None, [sentence, plan.fixed_text]))


def sweep_note(parent: Run, board: Board | None, facts: Facts) -> str:
    """What the UI shows on top of the sweep's run, with links to what there is to see."""
    experiment, run_id = parent.store.experiment_id, parent.run_id
    links = {
        "the report": run_page(experiment, run_id, REPORT),
        "the trials, best first": runs_page(experiment, run_id),
        "charts of the trials": runs_page(experiment, run_id, charts=True),
    }
    if board and len(board.rows) > 1:
        ids = [row.run.run_id for row in board.rows[:SIDE_BY_SIDE]]
        links["the best side by side"] = compare_page(experiment, ids)
    see = "See " + " · ".join(f"[{title}]({page})" for title, page in links.items())
    go_on = f"Go on, with a larger `sweep.trials`: `{facts.command}`"
    repeat = (f"repeat trial {number}: `{line}`" for number, line in facts.repeat)
    listed = "\n".join(f"- {line}" for line in [*facts.lines, *repeat])
    return "\n\n".join([see, facts.what, go_on, listed])


def read_board(parent: Run) -> Board | None:
    """The best trials of the sweep, ranked; None before the first is complete."""
    from pipeline.store import read_run
    from sweeps.board import UnrankedError, load_board

    try:
        return load_board([read_run(parent.run_id)], limit=ROWS)
    except UnrankedError:
        return None


def publish(
    plan: Plan, study: optuna.Study, parent: Run, progress: Progress, command: str
) -> tuple[Board | None, Mapping[str, float]]:
    """Records what came out so far on the sweep's run: its description and its report.

    Returns:
        The best trials, if any is complete, and the share of each parameter.
    """
    board: Board | None = None
    shares: Mapping[str, float] = {}
    try:
        from sweeps.report import build_report

        board, shares = read_board(parent), importances(study)
        lines = [progress.counts, progress.best_text, baseline(plan, study, board)]
        facts = _facts(plan, study, command, lines)
        parent.describe(sweep_note(parent, board, facts))
        page = build_report(study, plan.config.sweep.objectives, board, shares, facts)
        parent.log_text(page, REPORT)
    except Exception as error:  # a picture is not worth a sweep
        reason = without_password(" ".join(f"{type(error).__name__}: {error}".split()))
        log.warning("the report is not refreshed: %s", reason)
    return board, shares


def baseline(plan: Plan, study: optuna.Study, board: Board | None) -> str:
    """What the configuration as it stands came to, and whether the best is better beyond noise.

    Empty with several objectives, and where that trial is not complete.
    """
    from pipeline.store import read_run
    from sweeps.board import gain_over
    from sweeps.leaderboard import weigh

    found = [
        trial
        for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        if trial.number == plan.baseline and len(trial.values) == 1
    ]
    if not found:
        return ""
    fixed = " but for what the space fixes" if plan.space.fixed else ""
    text = f"Baseline, as configured{fixed} (trial {found[0].number}): {number(found[0].values[0])}"
    run_id = found[0].user_attrs.get("run_id")
    if not (board and run_id):
        return text
    try:
        run = read_run(run_id)
    except ValueError:  # it was deleted for good
        return text
    gain, margin = gain_over(board, run, board.best[0])
    if not gain:
        return f"{text}, which nothing surpassed."
    return f"{text}; the best is {number(gain)} better{weigh(gain, margin, board)}."


def _facts(plan: Plan, study: optuna.Study, command: str, lines: Sequence[str]) -> Facts:
    from sweeps.report import Facts

    config = plan.config
    return Facts(
        title=f"Sweep {study.study_name}",
        what=what(plan),
        lines=list(filter(None, lines)),
        space={name: without_password(text) for name, text in plan.declarations.items()},
        data=f"{config.data.name}, {json.loads(study.user_attrs['identity'])['data']}",
        seeds={
            "sweep.seed": config.sweep.seed,
            "seed": config.seed,
            "data.split_seed": config.data.split_seed,
        },
        command=without_password(command),
        repeat=[
            (trial.number, plan.command(trial.params)) for trial in best_trials(study)[:REPEATED]
        ],
    )


# --- the view of its trials --------------------------------------------------------------


def view(plan: Plan, run_id: str) -> View:
    """The trials, the best first, what was searched beside what came out; and charts of it."""
    objectives, parameters = plan.config.sweep.objectives, plan.space.parameters
    values = [metric(METRICS.get(name, name)) for name in objectives]
    height = metric(CHARTED.get(objectives[0], objectives[0]))
    progress = [metric("best_val_accuracy"), metric("epoch"), metric("parameters")]
    settings = [_setting(parameter) for parameter in parameters if _has_column(parameter)]
    columns = [*values, *settings, *progress, attribute("Duration")]
    return View(
        condition=f"tags.`mlflow.parentRunId` = '{run_id}'",
        order_by=values[0],
        ascending=OBJECTIVES[objectives[0]] == "minimize",
        columns=list(dict.fromkeys(columns)),
        charts=list(_charts(parameters, objectives, height)),
        title=plan.config.data.name,
    )


def _charts(
    parameters: Sequence[Parameter], objectives: Sequence[str], height: str
) -> Iterator[Chart]:
    parameters = [parameter for parameter in parameters if _has_column(parameter)]
    axes = [_axis(parameter) for parameter in parameters]
    yield parallel_coordinates(axes, height)
    if objectives[0] in METRICS:
        yield curves(objectives[0])
    if len(objectives) > 1:
        yield scatter(*(metric(METRICS.get(name, name)) for name in objectives[:2]))
    numbers = [axis for axis, p in zip(axes, parameters, strict=True) if _is_number(p)]
    for axis in numbers[:4]:
        yield scatter(axis, height)
    for x, y in itertools.islice(itertools.combinations(numbers, 2), 3):
        yield contour(x, y, height)


def _is_number(parameter: Parameter) -> bool:
    return not isinstance(parameter.distribution, CategoricalDistribution)


def _has_column(parameter: Parameter) -> bool:
    """Of the groups, those have one whose options record their name."""
    return "." in parameter.name or parameter.name in VARIANTS


def _setting(parameter: Parameter) -> str:
    """Column of the values; of a group, of the option's name."""
    return param(parameter.name if "." in parameter.name else f"{parameter.name}.name")


def _axis(parameter: Parameter) -> str:
    """Likewise, of its logarithm where it is searched on a logarithmic scale."""
    is_log = getattr(parameter.distribution, "log", False)
    return metric(f"log10/{parameter.name}") if is_log else _setting(parameter)


def logarithms(plan: Plan, values: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of a trial that stand in for what is searched on a logarithmic scale.

    The charts of MLflow's UI have linear axes alone.
    """
    return {
        f"log10/{parameter.name}": math.log10(values[parameter.name])
        for parameter in plan.space.parameters
        if parameter.name in values and getattr(parameter.distribution, "log", False)
    }
