"""Promotes the best model, if it is better than the champion beyond chance; takes it back.

The top of a sweep is a maximum over noise. So its best configurations are trained again on fresh
seeds, and the one with the best mean is the finalist. Its trainings are compared with those of the
champion; the median one is what is registered, as the best of them would be lucky again.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline import fast_imports, start_libraries
from pipeline.compose import run_cli
from pipeline.config import TrackingConfig, check_name, without_password
from pipeline.pages import store_command, ui_command
from sweeps.candidates import (
    Candidate,
    NothingToPromoteError,
    Retrained,
    Retraining,
    Source,
    best_of,
    candidates_of,
    find_source,
)
from sweeps.config import EXECUTORS, GateConfig, PromotionConfig
from sweeps.display import open_console
from sweeps.executors import LocalExecutor, WorkerDiedError
from sweeps.gate import (
    HOLD,
    PROMOTE,
    REJECT,
    Check,
    Comparison,
    Correct,
    beats,
    compare,
    decide,
)
from sweeps.interruption import held_signals, interruption
from sweeps.judge import Judgement, judge
from sweeps.study import HeldError, hold
from sweeps.trial import warm_up
from sweeps.verdict import (
    Challenge,
    Verdict,
    as_json,
    as_markdown,
    candidates_table,
    describe_test,
    headline,
    lines,
    luck,
    model_card,
    seeds_figure,
)

if TYPE_CHECKING:  # or MLflow is imported
    from pipeline.registry import Version
    from pipeline.store import Recorded, Store
    from pipeline.tracking import Run

SMOKE = "smoke"  # tag of a version: the classes it predicts for its input example
POLL = 1.0  # seconds between two tries to be the only promotion of a model

console = open_console()


class PromotionFailedError(OSError):
    """The promotion cannot go on; what it has is kept, and the champion stays."""


def main(config: PromotionConfig, overrides: list[str]) -> None:
    with fast_imports():
        from pipeline.store import connect
    try:
        uri = connect(config.tracking)
    except FileNotFoundError as error:
        raise NothingToPromoteError(str(error)) from error
    if config.history:
        show_history(config)
    elif config.rollback:
        roll_back(config, uri)
    else:
        promote(config, overrides, uri)


# --- promotion ---------------------------------------------------------------------------


def promote(config: PromotionConfig, overrides: Sequence[str], uri: str) -> None:
    """Trains again, judges, decides, records, and prints the verdict.

    Raises:
        NothingToPromoteError: Nothing that finished is there.
        ValueError: A configuration or its data is refused.
        OSError: Something broke on the way; the champion stands.
        KeyboardInterrupt: A signal stopped it.
    """
    from pipeline.registry import deciding
    from pipeline.store import experiments, open_store

    source = find_source(config)
    candidates = candidates_of(source, config, experiments()[source.run.experiment_id])
    first = candidates[0].config
    name = config.name or first.data.name
    check_name("name", name)
    command = _command(config, source, overrides)
    lock = _lock_uri(uri, config.tracking)
    with _queue(name, lock):
        store = open_store(first.tracking)
        retraining = Retraining(store=store, name=name, seeds=config.promote.seeds)
        if not retraining.missing(candidates):
            retrained = [retraining.result(candidate) for candidate in candidates]
            if _is_champion(best_of(retrained), name):
                _close(store, source, name)
                return
        parent = _open_parent(store, source, name, config, command)
        with _ending(parent, command):
            retrained = _retrain(retraining, candidates, config, parent, command)
            if _is_champion(best_of(retrained), name):
                return
            challenge = _challenge(source, retrained, command)
            with deciding(lock, name):
                verdict = _decide(challenge, name, config.promote)
                version = _record(verdict, parent)
        _print(verdict, version, parent, overrides)


def _command(config: PromotionConfig, source: Source, overrides: Sequence[str]) -> str:
    given = list(overrides)
    if not config.run and not config.sweep.names:
        given.append(f"sweep.name={source.run.tags['sweep']}")
    return without_password(shlex.join(["python", "-m", "sweeps.promote", *given]))


def _lock_uri(uri: str, tracking: TrackingConfig) -> str:
    """Of the database that the lock is in or beside; of a server, in our own folder."""
    from pipeline.store import is_server

    if is_server(uri):
        return f"sqlite:///{Path(tracking.directory).absolute() / 'mlflow.db'}"
    return uri


@contextmanager
def _queue(name: str, uri: str) -> Iterator[None]:
    """Waits until no other promotion of this model is under way."""
    with ExitStack() as stack:
        told = False
        while True:
            try:
                stack.enter_context(hold(name, uri, "promotion"))
                break
            except HeldError as error:
                if not told:
                    console.print(f"Waiting: {error}")
                told = True
                time.sleep(POLL)
        yield


def _is_champion(finalist: Retrained | None, name: str) -> bool:
    """Whether a promotion would change nothing, which is said."""
    from pipeline.registry import version_of

    champion = version_of(name)
    if champion is None or finalist is None or finalist.median[1].run_id != champion.run_id:
        return False
    console.print(f"{champion} is the champion already: nothing is changed.")
    return True


def _find_parent(store: Store, source: Source, name: str) -> Run | None:
    """The run of a promotion that was interrupted."""
    from pipeline.tracking import find_run

    tags = {"kind": "promotion", "promotes": source.run.run_id, "promotion.model": name}
    found = find_run(store, tags)
    return found if found and found.status != "FINISHED" else None


def _close(store: Store, source: Source, name: str) -> None:
    """Ends the run of a promotion that was killed after its last step."""
    if parent := _find_parent(store, source, name):
        parent.end("FINISHED")


def _open_parent(
    store: Store, source: Source, name: str, config: PromotionConfig, command: str
) -> Run:
    """The promotion's run: that of an interrupted one, or a new one."""
    from pipeline.tracking import create_run

    if found := _find_parent(store, source, name):
        found.reopen()
        return found
    tags = {
        "kind": "promotion",
        "promotes": source.run.run_id,
        "promotion.model": name,
        "command": command,
        **{f"promote.{key}": value for key, value in vars(config.promote).items()},
    }
    run = create_run(store, f"promotion of {source.title}", tags)
    run.describe(f"A promotion of {source.title}, under way. Go on with: `{command}`")
    return run


@contextmanager
def _ending(parent: Run, command: str) -> Iterator[None]:
    """Ends the promotion's run: FINISHED with a verdict, KILLED when stopped, else FAILED."""
    try:
        yield
    except KeyboardInterrupt:
        parent.end("KILLED")
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        with suppress(Exception):  # what failed may be the store
            parent.end("FAILED", error=reason)
        if isinstance(error, ValueError):
            raise
        raise PromotionFailedError(f"{reason} Go on with: {command}") from error
    parent.end("FINISHED")


def _retrain(
    retraining: Retraining,
    candidates: Sequence[Candidate],
    config: PromotionConfig,
    parent: Run,
    command: str,
) -> list[Retrained]:
    """Trains each candidate on each fresh seed, where that is not done.

    Raises:
        KeyboardInterrupt: A signal stopped it.
        OSError: The store is out of reach.
    """
    if missing := retraining.missing(candidates):
        workers = min(config.executor.count(candidates[0].config.training.threads), len(missing))
        console.print(
            f"{parent.name.capitalize()}: {len(candidates)} candidates on {len(retraining.seeds)} "
            f"fresh seeds each, {len(missing)} trainings to do; {workers} at once."
        )
        with (
            held_signals(console, command) as received,
            LocalExecutor(workers, warm_up) as executor,
            _progress(len(missing)) as show,
        ):
            retraining.run(missing, parent, executor, workers, received=received, show=show)
        if received:
            raise interruption(received[0], f"Stopped. Go on with: {command}")
    return [retraining.result(candidate) for candidate in candidates]


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A function that shows a line and moves the bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("training", total=total)

        def show(line: str) -> None:
            progress.console.print(line)
            progress.advance(task)

        yield show


def _challenge(source: Source, retrained: Sequence[Retrained], command: str) -> Challenge:
    """The finalist, its median run judged in a clean process."""
    finalist, judgement = best_of(retrained), Judgement(problem="a seed of each candidate failed")
    if finalist:
        config, run_id = finalist.candidate.config, finalist.median[1].run_id
        arguments = (config.tracking, config.data, run_id, config.training.threads)
        with (
            console.status("judging the challenger in a clean process"),
            LocalExecutor(1, warm_up) as executor,
        ):
            try:
                judgement = executor.submit(judge, *arguments).result()
            except WorkerDiedError as error:
                judgement = Judgement(problem=f"loading and using it: {error}")
    return Challenge(
        source=source,
        retrained=retrained,
        finalist=finalist,
        judgement=judgement,
        command=command,
    )


def _decide(challenge: Challenge, name: str, gate: GateConfig) -> Verdict:
    """Compares the challenger with who is champion now."""
    from pipeline.registry import version_of

    champion, comparison = version_of(name), None
    checks = _checks_alone(challenge.judgement, gate)
    if challenge.finalist:
        candidates = sum(bool(found.runs) for found in challenge.retrained)
        significance = gate.significance / candidates
        comparison, check = _against(challenge.finalist, champion, gate, significance)
        checks.append(check)
    return Verdict(
        decision=decide(checks),
        name=name,
        challenge=challenge,
        champion=champion,
        comparison=comparison,
        checks=checks,
    )


def _checks_alone(judgement: Judgement, gate: GateConfig) -> list[Check]:
    """What is asked of the challenger, whoever is champion."""
    evidence = judgement.problem or (
        f"loaded in a clean process, it answers {judgement.images:,} validation images as recorded"
    )
    served = Check(
        name="serves what was recorded",
        holds=not judgement.problem,
        evidence=evidence,
        decision=REJECT,
    )
    if judgement.looked is None:
        return [served]
    floor = Check(
        name="good enough",
        holds=judgement.looked.accuracy >= gate.floor,
        evidence=f"test accuracy {describe_test(judgement.looked)}, at least {gate.floor:g} asked",
        decision=REJECT,
    )
    return [served, floor]


def _against(
    finalist: Retrained, champion: Version | None, gate: GateConfig, significance: float
) -> tuple[Comparison | None, Check]:
    """The finalist's trainings against the champion's."""
    from pipeline.store import read_run

    if champion is None:
        return None, beats(gate, None, None)
    ours, theirs = list(finalist.runs.values()), _trainings_of(champion)
    run, reigning = finalist.median[1], read_run(champion.run_id)
    problem = ""
    if run.validation != reigning.validation:
        problem = (
            f"{champion} was judged on other validation images; promote to another name=, or "
            "search with its data.split_seed and data.validation_size"
        )
    right, theirs_right = _correct(ours), _correct(theirs)
    if right is None or theirs_right is None:
        problem = problem or f"the predictions of {champion} are not there any more"
    if problem or right is None or theirs_right is None:
        check = Check(name="comparable", holds=False, evidence=problem, decision=HOLD)
        return None, check
    doubt = 1 if gate.rule == "non_inferiority" else 0  # shown by what is not there: losses
    found = compare(right, theirs_right, significance, doubt=doubt)
    sizes = int(run.metrics["parameters"]), int(reigning.metrics["parameters"])
    return found, beats(gate, found, sizes)


def _trainings_of(champion: Version) -> list[Recorded]:
    """The champion's run and those of its configuration on other seeds, by their seeds."""
    from pipeline.store import read_run, search

    run = read_run(champion.run_id)
    condition = (
        f"tags.retrains = '{run.tags.get('retrains', '')}' and "
        f"tags.`promotion.model` = '{champion.name}' and attributes.status = 'FINISHED'"
    )
    found = [each for each in search(condition) if each.validation == run.validation]
    return sorted(found, key=lambda each: int(each.tags["retrained.seed"])) or [run]


def _correct(runs: Sequence[Recorded]) -> Correct | None:
    """`[seeds, n]`, whether the predictions that are there are right; None where none are."""
    from pipeline.store import read_predictions

    found = [predicted.correct for run in runs if (predicted := read_predictions(run))]
    return np.array(found) if found else None


def _record(verdict: Verdict, parent: Run) -> Version | None:
    """Writes all that was found; moves the champion last.

    Returns:
        The challenger's version; None of one that is rejected.
    """
    from pipeline.registry import CHALLENGER, delete_alias, move_champion, register, set_alias

    challenge, version = verdict.challenge, None
    if verdict.decision != REJECT:
        assert challenge.run is not None
        version = register(verdict.name, challenge.run, model_card(verdict), _tags(verdict, parent))
        set_alias(version, CHALLENGER)
        parent.log_text(model_card(verdict), "model_card.md")
    parent.log_figure(seeds_figure(challenge.retrained), "seeds")
    parent.log_text(as_json(verdict, version), "verdict.json")
    parent.log_text(as_markdown(verdict, version), "verdict.md")
    parent.describe(as_markdown(verdict, version))
    parent.set_tags({"verdict": verdict.decision})
    parent.log_metrics(_metrics(verdict))
    if version and verdict.decision == PROMOTE:
        delete_alias(version.name, CHALLENGER)
        move_champion(version, action="promote", promotion=parent.run_id, evidence=verdict.evidence)
    return version


def _tags(verdict: Verdict, parent: Run) -> dict[str, object]:
    """Of a version: where it came from, and what it is known to answer."""
    challenge = verdict.challenge
    test = challenge.judgement.looked
    return {
        "verdict": verdict.decision,
        "promotion": parent.run_id,
        "source": challenge.source.title,
        "evidence": verdict.evidence,
        SMOKE: " ".join(map(str, challenge.judgement.example)),
        **({"test_accuracy": test.accuracy, "test_look": test.look} if test else {}),
    }


def _metrics(verdict: Verdict) -> dict[str, float]:
    """Of the promotion's run, for the UI's table."""
    finalist, test = verdict.challenge.finalist, verdict.challenge.judgement.looked
    metrics: dict[str, float] = {}
    if finalist:
        objective = finalist.candidate.objective
        metrics |= {f"mean_{objective}": finalist.mean, "luck": finalist.luck}
    if found := verdict.comparison:
        metrics |= {"gain": found.gain, "gain_low": found.low, "p_value": found.p_value}
    if test:
        metrics |= {"test_accuracy": test.accuracy, "test_look": test.look}
    return metrics


def _print(
    verdict: Verdict, version: Version | None, parent: Run, overrides: Sequence[str]
) -> None:
    retrained = verdict.challenge.retrained
    console.print()
    console.print(candidates_table(retrained))
    if retrained[0].runs:
        console.print(f"\n{luck(retrained[0], of_sweep=verdict.challenge.source.is_sweep)}")
    console.print(f"\n{headline(verdict, version)}\n", style="bold")
    for line in lines(verdict):
        console.print(line)
    console.print()
    if verdict.decision == PROMOTE:
        name = f"name={verdict.name}"
        use = store_command(overrides, "pipeline.predict", "FILE.png", name)
        back = store_command(overrides, "sweeps.promote", "rollback=true", name)
        console.print(f"Use it: {use}")
        console.print(f"Take it back: {back}")
    console.print(f"See it: {parent.address or ui_command(parent.run_id, overrides)}")


# --- the ledger --------------------------------------------------------------------------


def roll_back(config: PromotionConfig, uri: str) -> None:
    """Makes the previous champion the champion again, if it still answers as at its promotion.

    Raises:
        ValueError: There is none, or it does not load, or answers otherwise; the champion stays.
    """
    from pipeline.registry import (
        deciding,
        find_version,
        move_champion,
        previous_champion,
        read_version,
    )

    name = find_version(config.name).name
    with deciding(_lock_uri(uri, config.tracking), name):
        champion, number = find_version(name), previous_champion(name)
        if number is None:
            raise ValueError(f"name={name}: {champion} has no champion before it.")
        version = read_version(name, number)
        images = _smoke(version)
        evidence = f"takes back version {champion.number}; {images} images predicted as before"
        move_champion(version, action="rollback", promotion="", evidence=evidence)
    console.print(
        f"{version} is the champion again, in place of version {champion.number}: it predicts its "
        f"{images} example images as at its promotion."
    )


def _smoke(version: Version) -> int:
    """Predicts the input example; returns how many images that are."""
    from pipeline.registry import example_of, load_served

    with console.status("starting TensorFlow for a smoke prediction"):
        start_libraries()
    from pipeline.train import initialize

    initialize(threads=1, seed=0)
    classes = load_served(version.uri)(example_of(version.uri)).argmax(axis=1)
    found = " ".join(map(str, classes))
    if found != version.tags.get(SMOKE, found):
        raise ValueError(
            f"{version} predicts {found} for its example, at its promotion "
            f"{version.tags[SMOKE]}: the champion stays."
        )
    return len(classes)


def show_history(config: PromotionConfig) -> None:
    """Prints the ledger of a model, or of all."""
    from pipeline.registry import find_version, read_ledger, registered_models

    names = [find_version(config.name).name] if config.name else registered_models()
    if not names:
        find_version(None)  # says so
    for name in names:
        table = Table(title=name, title_justify="left", box=None, pad_edge=False)
        for heading in ("when", "action", "version", "replaced", "run", "evidence"):
            table.add_column(heading)
        for move in read_ledger(name):
            table.add_row(
                f"{datetime.fromisoformat(move.at).astimezone():%Y-%m-%d %H:%M}",
                move.action if move.happened else f"{move.action}, broken off",
                str(move.version),
                str(move.replaced or ""),
                move.run_id,
                move.evidence,
            )
        console.print(table)


if __name__ == "__main__":
    run_cli(
        "promote",
        PromotionConfig,
        main,
        {"executor": {**EXECUTORS}},
        interrupted="Interrupted: the champion stands.",
    )
