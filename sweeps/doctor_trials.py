"""What the doctor finds of trials: whether the study and the runs of a sweep say the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial, TrialState

from pipeline.config import without_password
from pipeline.database import sqlite_path
from pipeline.pages import store_command
from sweeps.doctor_runs import STATUS, end, is_trial, title
from sweeps.finding import (
    PARENT,
    Check,
    Finding,
    Stores,
    StudyRecord,
    count,
    few,
    note,
    trials,
    wrong,
)
from sweeps.trial import METRICS, objective_values

if TYPE_CHECKING:  # or MLflow is imported
    from pipeline.outline import Outline


@dataclass(kw_only=True)
class Pairs:
    """What is wrong with the pairs of trial and run of one sweep; trials by their numbers.

    Attributes:
        lost: Trials without a run, and whether it was only deleted.
        values: How a trial differs from its run.
        statuses: Trials whose run ended otherwise, as it should have.
        unfinished: Likewise, but what it should have is not there.
        models: Trials without a model.
        second: Runs of a trial that has another one.
        stray: Runs of no trial.
    """

    lost: dict[int, str] = field(default_factory=dict)
    values: dict[int, tuple[str, Outline]] = field(default_factory=dict)
    statuses: dict[int, tuple[FrozenTrial, Outline]] = field(default_factory=dict)
    unfinished: dict[int, Outline] = field(default_factory=dict)
    models: dict[int, Outline] = field(default_factory=dict)
    second: list[Outline] = field(default_factory=list)
    stray: list[Outline] = field(default_factory=list)


def check_trials(stores: Stores) -> Check:
    """Whether the study and the runs of each sweep say the same."""
    suspects = {study.name for study in stores.studies if _findings_of(stores, study)}
    free = {name for name in suspects if not stores.holder({"sweep": name})}
    if free:  # one that has just ended was read half-way
        stores.read()
    for study in stores.studies:
        if study.name in free and not stores.holder({"sweep": study.name}):
            yield from _findings_of(stores, study)
    yield from _without_study(stores)
    number = sum(len(study.trials) for study in stores.studies)
    return f"{count(number, 'trial')} of {count(len(stores.studies), 'sweep')} and their runs agree"


def _parents(stores: Stores) -> dict[str, Outline]:
    """Runs of the sweeps themselves, by the keys of their studies."""
    return {
        run.tags["study"]: run
        for run in stores.runs.values()
        if run.tags.get("kind") == "sweep" and "study" in run.tags and not run.is_deleted
    }


def _without_study(stores: Stores) -> Iterator[Finding]:
    keys = {study.key for study in stores.studies}
    parents = {key: run for key, run in _parents(stores).items() if key not in keys}
    path = sqlite_path(stores.storage)
    if parents and not stores.has_studies and (path is None or path.exists()):
        yield note("not looked at: the database of the studies is not open")
    elif parents and not stores.has_studies:
        yield wrong(
            f"{count(len(parents), 'sweep')} recorded, and no study is kept where the studies "
            f"are: {few([run.name for run in parents.values()])}",
            "set study.storage to where they are, or put the file back",
        )
    elif parents:
        yield note(
            f"no study is kept of {few([run.name for run in parents.values()])}",
            "if it was not deleted: set study.storage to where it is",
        )


def _findings_of(stores: Stores, study: StudyRecord) -> list[Finding]:
    return list(_of_sweep(stores, study, _parents(stores).get(study.key)))


def _of_sweep(stores: Stores, study: StudyRecord, parent: Outline | None) -> Iterator[Finding]:
    of = f"sweep {study.name}:"
    if parent is None and _is_elsewhere(stores, study):
        where = study.recorded or "another store, or it was deleted here for good"
        yield note(f"{of} its runs are in {where}")
        return
    if parent is None and study.trials:
        yield wrong(f"{of} it has no run", f"{of} restore its run in MLflow, if it was deleted")
    running = [trial for trial in study.trials if trial.state == TrialState.RUNNING]
    if running:
        command = parent.tags.get("command") if parent else None
        yield note(
            f"{of} interrupted in {trials([trial.number for trial in running])}",
            f"go on with: {command}" if command else "",
        )
    yield from _findings(stores, of, _compare(stores, study, parent))


def _is_elsewhere(stores: Stores, study: StudyRecord) -> bool:
    """Whether another store has its runs: several may share the studies of one folder."""
    is_known = any(trial.user_attrs.get("run_id") in stores.runs for trial in study.trials)
    return not is_known and study.recorded != without_password(stores.uri)


def _compare(stores: Stores, study: StudyRecord, parent: Outline | None) -> Pairs:
    pairs = Pairs()
    objective = parent.tags.get("objective") if parent else None
    objectives = tuple(objective.split(", ")) if objective else ()
    for trial in study.trials:
        run_id = trial.user_attrs.get("run_id", "")
        if trial.state in STATUS and run_id not in stores.behind:
            run = stores.runs.get(run_id)
            if run is None or run.is_deleted:
                pairs.lost[trial.number] = run_id if run else ""
            else:
                _compare_pair(pairs, trial, run, objectives)
    if parent:
        _find_others(pairs, stores, study, parent)
    return pairs


def _find_others(pairs: Pairs, stores: Stores, study: StudyRecord, parent: Outline) -> None:
    """Runs of the sweep that are no trial's."""
    claimed = {trial.user_attrs.get("run_id") for trial in study.trials}
    # The launcher may have been killed before it wrote down which run the trial has.
    unclaimed = {trial.number for trial in study.trials if "run_id" not in trial.user_attrs}
    numbers = {trial.number for trial in study.trials}
    for run in stores.runs.values():
        if (
            run.tags.get(PARENT) == parent.run_id
            and is_trial(run)
            and not run.is_deleted
            and run.run_id not in claimed
        ):
            number = int(run.tags["trial"])
            if number not in numbers:
                pairs.stray.append(run)
            elif number not in unclaimed:
                pairs.second.append(run)


def _compare_pair(
    pairs: Pairs, trial: FrozenTrial, run: Outline, objectives: tuple[str, ...]
) -> None:
    from pipeline.owner import lives

    number, is_complete = trial.number, trial.state == TrialState.COMPLETE
    missing = [METRICS.get(name, name) for name in objectives if _lacks(run, name)]
    if is_complete and missing:
        pairs.values[number] = f"its run has no {missing[0]}", run
    elif is_complete and objectives:
        values = objective_values(objectives, dict(run.metrics))
        if not all(map(math.isclose, values, trial.values)):
            how = f"{_shown(trial.values)} in the study, {_shown(values)} in its run"
            pairs.values[number] = how, run
    if is_complete and not run.has_model:
        pairs.models[number] = run
    if run.status != STATUS[trial.state]:
        if is_complete and (missing or not run.has_model):
            pairs.unfinished[number] = run
        elif run.status != "RUNNING" or not lives(run.tags.get("owner", "")):
            pairs.statuses[number] = trial, run


def _lacks(run: Outline, objective: str) -> bool:
    return METRICS.get(objective, objective) not in run.metrics


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _findings(stores: Stores, of: str, pairs: Pairs) -> Iterator[Finding]:
    deleted = {number: run_id for number, run_id in pairs.lost.items() if run_id}
    if deleted:
        restored, *others = deleted.values()
        yield wrong(
            f"{of} the run of {trials(deleted)} was deleted",
            f"restore it: MLFLOW_TRACKING_URI={stores.uri} mlflow runs restore --run-id {restored}"
            + (f", likewise {few(others)}" if others else ""),
        )
    if gone := pairs.lost.keys() - deleted.keys():
        yield wrong(
            f"{of} no run is recorded of {trials(gone)}",
            f"{of} the leaderboard has them no more; sweep.trials may add others",
        )
    if values := pairs.values:
        first, (how, run) = next(iter(values.items()))
        also = "" if len(values) == 1 else f"{trials(values)} differ from their runs, the first: "
        yield wrong(
            f"{of} {also}trial {first}: {how}",
            f"see which is true: {_repeat(stores, run)}",
        )
    if statuses := pairs.statuses:
        states = dict.fromkeys(
            f"{trial.state.name}, its run {run.status}" for trial, run in statuses.values()
        )
        yield wrong(
            f"{of} {trials(statuses)}: {few(list(states))}",
            "fix=true has the run end as its trial did",
            partial(_set_statuses, stores, list(statuses.values())),
        )
    if models := pairs.models:
        run = next(iter(models.values()))
        yield wrong(
            f"{of} {trials(models)} COMPLETE, and its run has no model",
            f"train it again: {_repeat(stores, run)}",
        )
    if unfinished := pairs.unfinished.keys() - pairs.models.keys():
        yield wrong(f"{of} {trials(unfinished)} COMPLETE, and its run did not finish")
    for runs, what in ((pairs.second, "a trial that has another"), (pairs.stray, "no trial")):
        if runs:
            yield wrong(
                f"{of} {count(len(runs), 'run')} of {what}: {few([title(run) for run in runs])}",
                "delete it in MLflow, if nobody needs it",
            )


def _repeat(stores: Stores, run: Outline) -> str:
    return store_command(stores.overrides, "pipeline.repeat", f"run={run.run_id}")


def _set_statuses(stores: Stores, found: Sequence[tuple[FrozenTrial, Outline]]) -> str:
    ended = 0
    for trial, run in found:
        at = trial.datetime_complete.timestamp() if trial.datetime_complete else None
        error = str(trial.user_attrs.get("reason", "")) if trial.state == TrialState.FAIL else ""
        ended += end(stores, run, STATUS[trial.state], error=error, at=at)
    return f"ended {count(ended, 'run')} as its trial did"
