"""One sweep: plan, stores, workers, the launcher's loop, the result."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import optuna
from coolname import generate_slug
from optuna.trial import TrialState

from pipeline import fast_imports
from pipeline.compose import run_cli
from pipeline.config import without_password
from pipeline.console import open_console
from pipeline.pages import store_command, ui_command
from sweeps import dry_run
from sweeps.config import VARIANTS, SweepConfig
from sweeps.display import Display, Progress, importance_table
from sweeps.executors import open_executor
from sweeps.interruption import held_signals, interruption
from sweeps.launcher import Launcher
from sweeps.leaderboard import board_table
from sweeps.parent import baseline, open_parent, publish, read_board
from sweeps.plan import Plan, build_plan
from sweeps.sharing import share
from sweeps.space import split_command_line
from sweeps.storage import patient_storage, storage_uri, warn_of_connections
from sweeps.study import (
    HeldError,
    best_trials,
    check_identity,
    find_study,
    hold,
    importances,
    open_study,
)
from sweeps.trial import rehearse, warm_up

if TYPE_CHECKING:  # or TensorFlow is imported
    from pipeline.data import Data
    from pipeline.tracking import Run
    from sweeps.board import Board

TOP = 5  # trials shown at the end

console = open_console()


class SweepFailedError(OSError):
    """The sweep cannot go on; what it has is kept."""


def main(arguments: list[str]) -> None:
    """Reads the command line `python -m sweeps.run`, and does what it says."""
    sys.argv[1:], searched = split_command_line(arguments)
    run_cli(
        "sweep",
        SweepConfig,
        partial(start, searched=searched, arguments=arguments),
        VARIANTS,
        interrupted="Interrupted: no trial was running.",
    )


def start(
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
    usual = plan.trial_config({})
    with ExitStack() as stack:
        held = stack.enter_context(hold(name, storage))
        with fast_imports():
            from pipeline.data import load
        data = load(usual.data)  # before a worker does, which finds what was downloaded
        shared = stack.enter_context(share(data, usual.data))
        executor = stack.enter_context(
            open_executor(
                plan.config.executor,
                partial(warm_up, shared),
                name=name,
                threads=plan.config.training.threads,
                most=_trials_left(plan, name, storage),
                addresses={"study.storage": storage, "tracking.uri": plan.config.tracking.uri},
            )
        )
        warn_of_connections(storage, executor.workers)
        for _ in range(executor.workers):
            executor.submit(rehearse, usual)
        with fast_imports():  # while the workers start
            from pipeline.store import open_store
            from pipeline.tracking import replay_left
        received = stack.enter_context(held_signals(console, command))
        patience = plan.config.sweep.patience
        database = patient_storage(storage, patience, lambda: bool(received))
        study = open_study(name, database, plan.config.sweep.directions)
        check_identity(study, {**plan.identity, "data": _digest(data)})
        store = open_store(plan.config.tracking)
        replay_left(store)
        study.set_user_attr("recorded", without_password(store.uri))
        parent = open_parent(plan, study, store, data, command)
        progress = Progress(budget=plan.trials, objectives=plan.config.sweep.objectives)
        progress.add(*study.get_trials(deepcopy=False))
        if not executor.workers and parent.status == "FINISHED":
            board = read_board(parent)
            _print_result(plan, study, parent, board, importances(study))
            return
        console.print(f"Sweep {name}: {progress.counts}; {executor.workers} at once.")
        if fixed := plan.fixed_text:
            console.print(fixed)
        launcher = Launcher(
            plan=plan,
            study=study,
            storage=storage,
            parent=parent,
            executor=executor,
            display=Display(console, progress, executor.workers),
            received=received,
            held=held,
            publish=partial(publish, plan, study, parent, progress, command),
        )
        try:
            launcher.run()
        except HeldError:  # since the server restarted: what is there is another's now
            executor.stop(grace=0)
            raise
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


def _trials_left(plan: Plan, name: str, storage: str) -> int:
    """Of the budget; none when there is a sweep of that name that is done."""
    study = find_study(name, storage) if plan.config.sweep.name else None
    if study is None:
        return plan.trials
    timeout = plan.config.sweep.timeout
    is_over = timeout is not None and study.user_attrs.get("seconds", 0.0) >= timeout
    progress = Progress(budget=plan.trials, objectives=plan.config.sweep.objectives)
    progress.add(*study.get_trials(deepcopy=False))
    if is_over or not plan.needs_more(progress.finished, progress.failed):
        return 0
    return plan.trials - progress.finished


def _conclude(launcher: Launcher, command: str) -> None:
    """Ends the sweep's run, and says what came out or how to go on."""
    parent, progress = launcher.parent, launcher.progress
    go_on = f"Go on with: {command}"
    if launcher.received:
        parent.end("KILLED")
        raise interruption(launcher.received[0], f"Stopped after {progress.counts}. {go_on}")
    if launcher.broken:
        parent.end("FAILED", error=launcher.broken)
        raise SweepFailedError(f"{launcher.broken} Stopped after {progress.counts}. {go_on}")
    try:
        launcher.tell_all()
    except Exception as error:  # the store is away, or refuses something
        with suppress(Exception):  # told later, with the rest
            parent.end("KILLED" if launcher.received else "FAILED", error=str(error))
        kept = (
            "The sweep is done, but what the store has yet to be told of it is kept in "
            f"{parent.store.spools}. {go_on}"
        )
        if launcher.received:
            raise interruption(launcher.received[0], kept) from error
        raise SweepFailedError(f"{error} {kept}") from error
    board, shares = launcher.publish()
    if launcher.has_failed and progress.finished < progress.budget:
        failed = launcher.study.get_trials(deepcopy=False, states=[TrialState.FAIL])
        reason = f"{len(failed)} failed trials reach sweep.max_failures"
        parent.end("FAILED", error=reason)
        last = failed[-1].user_attrs.get("reason", "for no recorded reason")
        more = f"Go on, with a larger sweep.max_failures: {command}"
        raise SweepFailedError(f"{reason}; the last one: {last} {more}")
    parent.end("FINISHED")
    parent.store.analyze()
    if launcher.is_over and progress.finished < progress.budget:
        console.print(f"The time is up after {progress.counts}; a larger sweep.timeout goes on.")
    if launcher.overheads:
        console.print(f"Beyond training: {median(launcher.overheads):.2f} s a trial.")
    _print_result(launcher.plan, launcher.study, parent, board, shares)


def _print_result(
    plan: Plan,
    study: optuna.Study,
    parent: Run,
    board: Board | None,
    shares: Mapping[str, float],
) -> None:
    """The best trials, what they depend on, how to repeat the best, where to see them."""
    objectives = plan.config.sweep.objectives
    console.print()
    if not best_trials(study):
        console.print("No trial is complete.")
    elif board:  # else it could not be read, as was said
        several = len(objectives) > 1
        title = "Pareto front" if several else f"Best of {board.total} complete trials"
        rows = [row for row in board.rows if row.rank == 1] if several else board.rows[:TOP]
        if several and len(best_trials(study)) > len(rows):
            title += f", {len(rows)} of {len(best_trials(study))}"
        console.print(board_table(replace(board, rows=rows), title))
        if board.noise and not several:
            console.print(f"\n{board.noise}")
    if line := baseline(plan, study, board):
        console.print(f"\n{line}")
    if shares:
        console.print()
        complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        console.print(importance_table(shares, objectives[0], len(complete)))
    console.print()
    for trial in best_trials(study)[:TOP]:
        console.print(
            f"Repeat trial {trial.number}, and look at the test split: {plan.command(trial.params)}"
        )
    if best_trials(study):
        name = f"sweep.name={study.study_name}"
        console.print(f"Promote it: {store_command(plan.overrides, 'sweeps.promote', name)}")
    see = parent.address or ui_command(parent.run_id, plan.overrides)
    console.print(f"See the report, the trials and charts of them: {see}")
