"""Promotes the best model, if it is better than the champion beyond chance; the command line.

The top of a sweep is a maximum over noise. So its best configurations are trained again on fresh
seeds, and the one with the best mean is the finalist. Its trainings are compared with those of the
champion; the median one is what is registered, as the best of them would be lucky again.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline import fast_imports
from pipeline.compose import run_cli
from pipeline.config import check_name, without_password
from pipeline.pages import store_command, ui_command
from sweeps.candidates import (
    Candidate,
    NothingToPromoteError,
    Retrained,
    Retraining,
    Source,
    best_of,
    candidates_of,
    checked_data,
    find_source,
)
from sweeps.config import EXECUTORS, GateConfig, PromotionConfig
from sweeps.decision import reach_verdict
from sweeps.executors import LocalExecutor, WorkerDiedError, WorkerLostError, open_executor
from sweeps.gate import PROMOTE, REJECT
from sweeps.interruption import held_signals, interruption
from sweeps.judge import Judgement, judge
from sweeps.ledger import SMOKE, console, roll_back, show_history
from sweeps.sharing import share
from sweeps.study import HeldError, hold
from sweeps.trial import warm_up
from sweeps.verdict import (
    Challenge,
    Verdict,
    as_json,
    as_markdown,
    candidates_table,
    headline,
    lines,
    luck,
    model_card,
    seeds_figure,
)

if TYPE_CHECKING:  # or MLflow is imported
    from pipeline.data import Data
    from pipeline.registry import Version
    from pipeline.store import Store
    from pipeline.tracking import Run

POLL = 1.0  # seconds between two tries to be the only promotion of a model


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
    from pipeline.registry import deciding, lock_uri
    from pipeline.store import experiments, open_store
    from pipeline.tracking import replay_left

    source = find_source(config)
    if source.is_sweep and source.run.status != "FINISHED":
        console.print(f"Note: {source.title} is {source.run.status}: these are its best so far.")
    experiment = experiments().get(source.run.experiment_id)
    if experiment is None:
        raise NothingToPromoteError(f"the experiment of {source.title} was deleted: restore it.")
    candidates = candidates_of(source, config, experiment)
    first = candidates[0].config
    name = config.name or first.data.name
    check_name("name", name)
    _tell_if_new(name)
    command = _command(config, source, overrides)
    lock = lock_uri(uri, config.tracking)
    with _queue(name, lock):
        store = open_store(first.tracking)
        replay_left(store)  # a training that ended while the store was away is not repeated
        retraining = Retraining(store=store, name=name, seeds=config.promote.seeds)
        data = None
        if retraining.missing(candidates):
            data = checked_data(candidates[0])  # a search has one data set
        else:
            retrained = [retraining.result(candidate) for candidate in candidates]
            if _is_champion(_finalist(retrained, name, config.promote), name):
                _close(store, source, name)
                return
        parent = _open_parent(store, source, name, config, command)
        with _ending(parent, command):
            console.print(f"Promotion of {source.title}.")
            retrained = _retrain(
                retraining, candidates, data, config=config, parent=parent, command=command
            )
            finalist = _finalist(retrained, name, config.promote)
            if _is_champion(finalist, name):
                parent.describe(f"The best of {source.title} is the champion already.")
                return
            challenge = _challenge(source, retrained, finalist, command)
            with deciding(lock, name):
                verdict = reach_verdict(challenge, name, config.promote)
                version = _record(verdict, parent)
        _print(verdict, version, parent, overrides)


def _tell_if_new(name: str) -> None:
    """A name that is misspelt would begin a model of its own, with no champion to beat."""
    from pipeline.registry import registered_models

    known = registered_models()
    if known and name not in known:
        console.print(f"Note: name={name} is new; promoted so far: {', '.join(known)}.")


def _command(config: PromotionConfig, source: Source, overrides: Sequence[str]) -> str:
    given = list(overrides)
    if not config.run and not config.sweep.names:
        given.append(f"sweep.name={source.run.tags['sweep']}")
    return without_password(shlex.join(["python", "-m", "sweeps.promote", *given]))


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

    tags = {
        "kind": "promotion",
        "promotes": source.run.run_id,
        "promotion.model": name,
        "command": command,
        **{f"promote.{key}": value for key, value in vars(config.promote).items()},
    }
    if run := _find_parent(store, source, name):
        run.reopen()
        run.set_tags(tags)  # what it goes on with may differ
    else:
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
        raise PromotionFailedError(f"{reason.rstrip('.')}. Go on with: {command}") from error
    parent.end("FINISHED")


def _retrain(
    retraining: Retraining,
    candidates: Sequence[Candidate],
    data: Data | None,
    *,
    config: PromotionConfig,
    parent: Run,
    command: str,
) -> list[Retrained]:
    """Trains each candidate on each fresh seed, where that is not done.

    Args:
        retraining: Which seeds.
        candidates: What is trained.
        data: Of all of them; None where all is done.
        config: Of the promotion.
        parent: Its run.
        command: Command line that goes on with it.

    Raises:
        KeyboardInterrupt: A signal stopped it.
        OSError: The store is out of reach.
    """
    if data is not None:
        missing = retraining.missing(candidates)
        what = (
            f"{_count(candidates, 'candidate')} on {_count(retraining.seeds, 'fresh seed')} each, "
            f"{_count(missing, 'training')} to do"
        )
        with (
            held_signals(console, command) as received,
            share(data, candidates[0].config.data) as shared,
            open_executor(
                config.executor,
                partial(warm_up, shared),
                name=f"promotion of {retraining.name}",
                threads=candidates[0].config.training.threads,
                most=len(missing),
                addresses={"tracking.uri": config.tracking.uri},
            ) as executor,
            _progress(len(missing)) as show,
        ):
            console.print(f"{what}; {executor.workers} at once.")
            retraining.run(missing, parent, executor, received=received, show=show)
        if received:
            raise interruption(received[0], f"Stopped. Go on with: {command}")
    return [retraining.result(candidate) for candidate in candidates]


def _count(things: Sequence[object], what: str) -> str:
    return f"{len(things)} {what}{'' if len(things) == 1 else 's'}"


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


def _finalist(retrained: Sequence[Retrained], name: str, gate: GateConfig) -> Retrained | None:
    """The candidate with the best mean; where the smaller takes the place, of the smaller ones."""
    from pipeline.registry import version_of
    from pipeline.store import read_run

    below, champion = None, version_of(name)
    if champion and gate.rule == "non_inferiority":
        with suppress(ValueError):  # its run is gone: there is nothing to compare with
            below = read_run(champion.run_id).metrics["parameters"]
    return best_of(retrained, below=below)


def _challenge(
    source: Source, retrained: Sequence[Retrained], finalist: Retrained | None, command: str
) -> Challenge:
    """The finalist, its median run judged in a clean process."""
    judgement = Judgement(problem="a seed of each candidate failed")
    if finalist:
        config, run_id = finalist.candidate.config, finalist.median[1].run_id
        arguments = (config.tracking, config.data, run_id, config.training.threads)
        with (
            console.status("judging the challenger in a clean process"),
            LocalExecutor(1, warm_up) as executor,
        ):
            try:
                judgement = executor.submit(judge, *arguments).result()
            except WorkerLostError as error:  # not of the model's doing
                raise OSError(str(error)) from error
            except WorkerDiedError as error:
                judgement = Judgement(problem=f"loading and using it: {error}")
    return Challenge(
        source=source,
        retrained=retrained,
        finalist=finalist,
        judgement=judgement,
        command=command,
    )


def _record(verdict: Verdict, parent: Run) -> Version | None:
    """Writes all that was found; moves the champion last.

    Returns:
        The challenger's version; None of one that is rejected.
    """
    from pipeline.registry import CHALLENGER, delete_alias, move_champion, register, set_alias

    challenge, version = verdict.challenge, None
    if verdict.decision != REJECT:
        assert challenge.run is not None
        tags, is_promoted = _tags(verdict, parent), verdict.decision == PROMOTE
        card = model_card(verdict)
        version = register(verdict.name, challenge.run, card, tags, anew=is_promoted)
        set_alias(version, CHALLENGER)
        parent.log_text(card, "model_card.md")
    parent.log_figure(seeds_figure(challenge.retrained), "seeds")
    parent.log_text(as_json(verdict, version), "verdict.json")
    parent.log_text(as_markdown(verdict, version), "verdict.md")
    parent.describe(as_markdown(verdict, version))
    parent.set_tags({"verdict": verdict.decision})
    parent.rename(f"promotion of {challenge.source.title}: {verdict.decision}")
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
        use = store_command(overrides, "pipeline.predict", "images.npz", name)
        console.print(f"Use it: {use}")
        if verdict.champion:
            back = store_command(overrides, "sweeps.promote", "rollback=true", name)
            console.print(f"Take it back: {back}")
    console.print(f"See it: {parent.address or ui_command(parent.run_id, overrides)}")


if __name__ == "__main__":
    run_cli(
        "promote",
        PromotionConfig,
        main,
        {"executor": {**EXECUTORS}},
        interrupted="Interrupted: the champion stands.",
    )
