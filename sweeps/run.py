"""One sweep: plan, stores, workers, the launcher's loop, the result; the command line of it."""

from __future__ import annotations

import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from statistics import median
from types import FrameType
from typing import TYPE_CHECKING

import optuna
from coolname import generate_slug
from optuna.trial import TrialState
from rich.console import Console

from pipeline import fast_imports
from pipeline.compose import Terminated, run_cli
from pipeline.config import without_password
from sweeps import dry_run
from sweeps.config import OBJECTIVES, VARIANTS, SweepConfig
from sweeps.display import Display, Progress, importance_table, number, top_table
from sweeps.executors import LocalExecutor
from sweeps.launcher import Launcher
from sweeps.plan import Plan, build_plan
from sweeps.space import split_command_line
from sweeps.study import (
    best_trials,
    check_identity,
    find_study,
    hold,
    open_storage,
    open_study,
    storage_uri,
)
from sweeps.trial import METRICS, warm_up

if TYPE_CHECKING:  # or TensorFlow is imported
    from pipeline.data import Data
    from pipeline.tracking import Run, Store

TOP = 5  # trials shown at the end

# A file has no width at which to cut a table.
console = Console(
    highlight=False, soft_wrap=True, markup=False, width=None if sys.stdout.isatty() else 200
)


class SweepFailedError(OSError):
    """The sweep cannot go on; what it has is kept."""


def main(
    config: SweepConfig, overrides: list[str], *, searched: dict[str, str], arguments: list[str]
) -> None:
    """Runs a sweep, or goes on with it.

    Args:
        config: The sweep.
        overrides: The command line, without what it searches.
        searched: What the command line searches.
        arguments: The command line, whole.
    """
    plan = build_plan(config, overrides, searched)
    if config.sweep.dry_run:
        dry_run.show(plan, console)
        return
    storage = storage_uri(config.study, config.tracking)
    name = config.sweep.name or generate_slug(2)
    command = shlex.join(["python", "-m", "sweeps.run", *arguments])
    if config.sweep.name is None:
        command += f" sweep.name={name}"
    command = without_password(command)
    run_sweep(plan, name=name, storage=storage, command=command)


def run_sweep(plan: Plan, *, name: str, storage: str, command: str) -> None:
    """Runs a sweep to its budget and prints what it came to.

    Args:
        plan: The sweep.
        name: Of it; an unfinished one of that name is gone on with.
        storage: Address of the study's database.
        command: Command line that goes on with it.

    Raises:
        ValueError: The data is refused, or the sweep was started differently.
        OSError: Another launcher runs it, or something broke.
        KeyboardInterrupt: A signal stopped it.
    """
    with ExitStack() as stack:
        stack.enter_context(hold(name, storage))
        workers = _count_workers(plan, name, storage)
        executor = stack.enter_context(LocalExecutor(workers, warm_up))
        with fast_imports():  # while the workers start
            from pipeline.data import load
            from pipeline.tracking import open_store
        data = load(plan.config.data)
        received = stack.enter_context(_held_signals(command))
        study = open_study(name, open_storage(storage), plan.config.sweep.directions)
        check_identity(study, {**plan.identity, "data": _digest(data)})
        parent = _parent_run(plan, study, open_store(plan.config.tracking), data, command)
        progress = Progress(budget=plan.trials, objectives=plan.config.sweep.objectives)
        progress.add(*study.get_trials(deepcopy=False))
        if not workers and parent.status == "FINISHED":
            _print_result(plan, study, parent)
            return
        console.print(f"Sweep {name}: {progress.counts}; {workers} at once.")
        launcher = Launcher(
            plan=plan,
            study=study,
            storage=storage,
            parent=parent,
            executor=executor,
            workers=workers,
            display=Display(console, progress, workers),
            received=received,
        )
        try:
            launcher.run()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            launcher.abandon("FAILED", reason)
            raise SweepFailedError(f"{reason} Go on with: {command}") from error
        except BaseException:
            launcher.abandon("KILLED")
            raise
        _conclude(launcher, command)


def _digest(data: Data) -> str:
    """What tells one split of one data set from another."""
    digests = (split.digest[:12] for split in (data.train, data.validation) if split)
    sizes = f"{len(data.train)}+{len(data.validation or ())} images"
    return " ".join((sizes, *digests))


def _count_workers(plan: Plan, name: str, storage: str) -> int:
    """Workers that there is work for; none when there is a sweep of that name that is done."""
    study = find_study(name, storage) if plan.config.sweep.name else None
    if study is None:
        return plan.workers
    timeout = plan.config.sweep.timeout
    is_over = timeout is not None and study.user_attrs.get("seconds", 0.0) >= timeout
    progress = Progress(budget=plan.trials, objectives=plan.config.sweep.objectives)
    progress.add(*study.get_trials(deepcopy=False))
    if is_over or not plan.needs_more(progress.finished, progress.failed):
        return 0
    return min(plan.workers, plan.trials - progress.finished)


def _parent_run(plan: Plan, study: optuna.Study, store: Store, data: Data, command: str) -> Run:
    """The sweep's own run in MLflow, with its settings; that of before, or a new one."""
    from pipeline.tracking import create_run, find_run, log_inputs

    name = study.study_name
    tags = {"sweep": name, "kind": "sweep", "study": study.user_attrs["key"]}
    run = find_run(store, tags) or create_run(store, name, tags)
    if "recorded" not in run.tags:  # an earlier launcher may have died before it was
        settings = asdict(plan.config)
        settings["search"] = {"space": plan.declarations}
        log_inputs(run, plan.config, data, command, settings=settings)
        run.set_tags({"mlflow.source.name": "sweeps.run", "recorded": "true"})
    return run


@contextmanager
def _held_signals(command: str) -> Iterator[list[int]]:
    """Collects the first Ctrl-C or SIGTERM; a second one interrupts at once."""
    received: list[int] = []

    def hold_back(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise _interruption(number, f"Stopped at once. Go on with: {command}")
        console.print("Stopping at the end of the batch; once more to stop at once.")

    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, hold_back) for number in handled}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interruption(number: int, message: str) -> KeyboardInterrupt:
    kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
    return kind(message)


def _conclude(launcher: Launcher, command: str) -> None:
    """Ends the sweep's run, and says what came out or how to go on."""
    parent, progress = launcher.parent, launcher.progress
    go_on = f"Go on with: {command}"
    if launcher.received:
        parent.end("KILLED")
        raise _interruption(launcher.received[0], f"Stopped after {progress.counts}. {go_on}")
    if launcher.broken:
        parent.end("FAILED", error=launcher.broken)
        raise SweepFailedError(f"{launcher.broken} Stopped after {progress.counts}. {go_on}")
    if launcher.has_failed and progress.finished < progress.budget:
        failed = launcher.study.get_trials(deepcopy=False, states=[TrialState.FAIL])
        reason = f"{len(failed)} failed trials reach sweep.max_failures"
        parent.end("FAILED", error=reason)
        last = failed[-1].user_attrs.get("reason", "for no recorded reason")
        more = f"Go on, with a larger sweep.max_failures: {command}"
        raise SweepFailedError(f"{reason}; the last one: {last} {more}")
    parent.describe(_description(launcher, command))
    parent.end("FINISHED")
    if launcher.is_over and progress.finished < progress.budget:
        console.print(f"The time is up after {progress.counts}; a larger sweep.timeout goes on.")
    if launcher.overheads:
        console.print(f"Beyond training: {median(launcher.overheads):.2f} s a trial.")
    _print_result(launcher.plan, launcher.study, parent)


def _description(launcher: Launcher, command: str) -> str:
    """What the UI shows on top of the sweep's run."""
    lines = [f"- {launcher.progress.counts}", f"- {launcher.progress.best_text}"]
    for trial in best_trials(launcher.study)[:TOP]:
        lines.append(f"- repeat trial {trial.number}: `{launcher.plan.command(trial.params)}`")
    return "\n".join([*lines, "", f"Go on, with a larger `sweep.trials`: `{command}`"])


def _print_result(plan: Plan, study: optuna.Study, parent: Run) -> None:
    """The best trials, what they depend on, how to repeat the best, where to see them."""
    objectives = plan.config.sweep.objectives
    best = best_trials(study)
    console.print()
    if not best:
        console.print("No trial is complete.")
    elif len(objectives) > 1:
        console.print(top_table(best, objectives, "Pareto front"))
    else:
        complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        sign = -1 if plan.config.sweep.directions[0] == "maximize" else 1
        ranked = sorted(complete, key=lambda trial: (sign * trial.values[0], trial.number))
        title = f"Best of {len(complete)} complete trials"
        console.print(top_table(ranked[:TOP], objectives, title))
        baseline = [trial for trial in complete if trial.number == plan.baseline]
        if baseline:
            value = number(baseline[0].values[0])
            console.print(f"\nBaseline, as configured (trial {plan.baseline}): {value}")
    if importances := _importances(plan, study):
        console.print()
        console.print(importance_table(importances, objectives[0]))
    console.print()
    for trial in best[:TOP]:
        console.print(
            f"Repeat trial {trial.number}, and look at the test split: {plan.command(trial.params)}"
        )
    console.print(f"See it: {_ui(study, objectives[0], parent)}")


def _ui(study: optuna.Study, objective: str, parent: Run) -> str:
    """The line that opens the UI on the trials, the best first."""
    return parent.store.ui_of_runs(
        f"tags.sweep = '{study.study_name}'",
        order_by=METRICS.get(objective, objective),
        ascending=OBJECTIVES[objective] == "minimize",
    )


def _importances(plan: Plan, study: optuna.Study) -> dict[str, float]:
    """Share of each parameter in the variance of the first objective; empty where unknown."""
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if len({trial.values[0] for trial in complete}) < 3:
        return {}
    # Of one objective, Optuna knows the direction; of a target, that less is better.
    sign = -1 if plan.config.sweep.directions[0] == "maximize" else 1
    several = len(plan.config.sweep.objectives) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.importance.get_param_importances(
            study, target=(lambda trial: sign * trial.values[0]) if several else None
        )


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.argv[1:], searched = split_command_line(given)
    run_cli("sweep", SweepConfig, partial(main, searched=searched, arguments=given), VARIANTS)
