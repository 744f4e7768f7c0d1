"""What may be promoted: the best of a sweep or a single run, each trained again on fresh seeds."""

from __future__ import annotations

import logging
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from pipeline.compose import from_settings
from pipeline.config import RunConfig, TrackingConfig
from pipeline.owner import machine
from sweeps.board import find_sweeps, load_board, objectives_of
from sweeps.config import OBJECTIVES, PromotionConfig
from sweeps.executors import Executor, WorkerDiedError
from sweeps.interruption import wait_for_ends
from sweeps.launcher import TICK, allowance
from sweeps.trial import METRICS, Outcome, Training, retrain

if TYPE_CHECKING:  # or MLflow is imported
    from pipeline.data import Data
    from pipeline.store import Recorded, Store
    from pipeline.tracking import Run

log = logging.getLogger(__name__)

_SPARE = 4  # trials read for each that is trained again: some may be of one configuration


class NothingToPromoteError(ValueError):
    """There is no finished run that could be promoted."""

    exit_status = 3


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a promotion is of.

    Attributes:
        run: The sweep's own run, or the single run.
        title: `sweep NAME` or `run NAME`.
        objective: By which its candidates are ranked.
        best: The candidates' runs, the best first.
    """

    run: Recorded
    title: str
    objective: str
    best: Sequence[Recorded]

    @property
    def is_sweep(self) -> bool:
        return self.run.tags.get("kind") == "sweep"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A run of the search whose configuration is trained again.

    Attributes:
        run: As the search recorded it.
        config: Of it, recorded where the promotion is.
        objective: By which it was ranked.
    """

    run: Recorded
    config: RunConfig
    objective: str

    @property
    def title(self) -> str:
        """Without its seed: it is trained on others."""
        if "trial" in self.run.tags:
            return f"trial {self.run.tags['trial']}"
        return re.sub(r" seed=\d+$", "", self.run.name)

    def value(self, run: Recorded) -> float:
        """The objective of one of its runs."""
        return run.metrics[METRICS[self.objective]]

    def command(self, seed: int) -> str:
        """The command line that trains it with another seed."""
        words = shlex.split(self.run.tags["command"])
        given = ["evaluate_test=false", f"seed={seed}"]
        if self.config.data.path and self.config.data.path != self.run.params.get("data.path"):
            given.append(f"data.path={self.config.data.path}")
        replaced = tuple(f"{text.partition('=')[0]}=" for text in given)
        return shlex.join([*(word for word in words if not word.startswith(replaced)), *given])


@dataclass(frozen=True, kw_only=True)
class Retrained:
    """A candidate and its runs on fresh seeds.

    Attributes:
        candidate: What was trained.
        runs: By seed, those that finished.
        failures: By seed, why the others did not.
    """

    candidate: Candidate
    runs: Mapping[int, Recorded]
    failures: Mapping[int, str]

    @property
    def values(self) -> list[float]:
        """The objective, a seed."""
        return [self.candidate.value(run) for run in self.runs.values()]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None of a single one."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def luck(self) -> float:
        """What the search's value was better by than the mean of fresh seeds."""
        difference = self.candidate.value(self.candidate.run) - self.mean
        return difference if OBJECTIVES[self.candidate.objective] == "maximize" else -difference

    @property
    def median(self) -> tuple[int, Recorded]:
        """Seed and run in the middle, of two the worse: the best would be lucky again."""
        sign = 1 if OBJECTIVES[self.candidate.objective] == "maximize" else -1
        ordered = sorted(self.runs.items(), key=lambda item: sign * self.candidate.value(item[1]))
        return ordered[(len(ordered) - 1) // 2]


def best_of(retrained: Sequence[Retrained], *, below: float | None = None) -> Retrained | None:
    """The candidate with the best mean, among those of which no seed failed.

    Args:
        retrained: All candidates.
        below: Number of parameters; where there are candidates with fewer, it is among these.
    """
    whole = [found for found in retrained if found.runs and not found.failures]
    if below is not None:
        small = [found for found in whole if found.candidate.run.metrics["parameters"] < below]
        whole = small or whole
    if not whole:
        return None
    sign = 1 if OBJECTIVES[whole[0].candidate.objective] == "maximize" else -1
    return max(whole, key=lambda found: sign * found.mean)


# --- finding -----------------------------------------------------------------------------


def find_source(config: PromotionConfig) -> Source:
    """The sweep or the run that is asked for.

    Raises:
        NothingToPromoteError: There is none, or nothing in it finished.
    """
    from pipeline.store import read_run

    try:
        run = read_run(config.run) if config.run else find_sweeps(config.sweep.names)[0]
        if run.tags.get("kind") == "sweep":
            return _of_sweep(run, config.promote.top)
        return _of_run(run)
    except ValueError as error:
        raise NothingToPromoteError(str(error)) from error


def _of_sweep(sweep: Recorded, top: int) -> Source:
    objectives = objectives_of(sweep)
    objective = next((each for each in objectives if each in METRICS), "val_accuracy")
    is_ranked = objectives == (objective,)
    rows = load_board([sweep], limit=_SPARE * top if is_ranked else None).rows
    best = _distinct(row.run for row in rows)
    if not is_ranked:  # by several objectives, or by their size or time
        is_more = OBJECTIVES[objective] == "maximize"
        best.sort(key=lambda run: run.metrics[METRICS[objective]], reverse=is_more)
    return Source(
        run=sweep,
        title=f"sweep {sweep.tags['sweep']}",
        objective=objective,
        best=best[:top],
    )


def _distinct(runs: Iterable[Recorded]) -> list[Recorded]:
    """One of each configuration, the first: a sweep may have tried one twice."""
    found: dict[frozenset[tuple[str, str]], Recorded] = {}
    for run in runs:
        found.setdefault(frozenset(run.params.items()), run)
    return list(found.values())


def _of_run(run: Recorded) -> Source:
    from pipeline.store import search

    if not any(search(f"attributes.run_id = '{run.run_id}'", limit=1)):
        raise NothingToPromoteError(f"run={run.run_id} ({run.name}) was deleted: restore it.")
    if run.tags.get("kind"):
        raise NothingToPromoteError(
            f"run={run.run_id} is a {run.tags['kind']}: give a run that trained a model."
        )
    if run.status != "FINISHED":
        reason = f" ({run.tags['error']})" if "error" in run.tags else ""
        raise NothingToPromoteError(
            f"run={run.run_id} ({run.name}) is {run.status}{reason}: only a FINISHED "
            "run can be promoted."
        )
    if run.validation is None or METRICS["val_accuracy"] not in run.metrics:
        raise NothingToPromoteError(
            f"run={run.run_id} ({run.name}) was judged on no validation images."
        )
    return Source(run=run, title=f"run {run.name}", objective="val_accuracy", best=[run])


def candidates_of(source: Source, config: PromotionConfig, experiment: str) -> list[Candidate]:
    """The configurations to train again.

    Raises:
        ValueError: One cannot be read, or a seed is not fresh.
    """
    tracking = replace(config.tracking, experiment=experiment, figures=False)
    return [_candidate(run, source.objective, config, tracking) for run in source.best]


def _candidate(
    run: Recorded, objective: str, config: PromotionConfig, tracking: TrackingConfig
) -> Candidate:
    from pipeline.store import read_settings

    settings = read_settings(run)
    try:
        found = from_settings(settings)
    except ValueError as error:
        raise ValueError(
            f"run={run.run_id} ({run.name}) cannot be trained again: {error}"
        ) from error
    if found.seed in config.promote.seeds:
        raise ValueError(
            f"promote.seeds must be fresh, got {found.seed}, which {run.name} was searched with."
        )
    data = replace(found.data, path=config.data.path) if config.data.path else found.data
    found = replace(found, data=data, tracking=tracking, evaluate_test=False)
    return Candidate(run=run, config=found, objective=objective)


def checked_data(candidate: Candidate) -> Data:
    """Loads the data, which must be what the search had: told now, not after all trainings.

    Raises:
        ValueError: It is not, or it is refused.
        OSError: It cannot be read or downloaded.
    """
    from pipeline.data import load

    data, run = load(candidate.config.data), candidate.run
    validation = data.validation and (data.validation.digest[:16], len(data.validation))
    if validation != run.validation or data.digest != run.tags.get("data.sha256", data.digest):
        raise ValueError(
            f"{data.source} is not what {run.name} was searched on: set data.path to where that is."
        )
    return data


# --- training again ----------------------------------------------------------------------


@dataclass(kw_only=True)
class Retraining:
    """Trainings of candidates on fresh seeds that are being run.

    Each is one run whatever happens: one that finished is used, one that was interrupted goes on.

    Attributes:
        store: Where they are recorded.
        name: Of the registered model: of another, the trainings are others.
        seeds: Fresh ones.
    """

    store: Store
    name: str
    seeds: Sequence[int]
    flights: dict[Future[Outcome], tuple[Candidate, int, Training]] = field(default_factory=dict)
    deaths: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: dict[tuple[str, int], str] = field(default_factory=dict)
    is_landing: bool = False

    def missing(self, candidates: Sequence[Candidate]) -> list[tuple[Candidate, int]]:
        """What is still to be trained."""
        pairs = [(candidate, seed) for candidate in candidates for seed in self.seeds]
        runs = [self._find(*pair) for pair in pairs]
        return [
            pair
            for pair, run in zip(pairs, runs, strict=True)
            if run is None or run.status != "FINISHED"
        ]

    def result(self, candidate: Candidate) -> Retrained:
        """Its runs, once none is missing but those that failed.

        Raises:
            ValueError: They were judged on other images than the search.
        """
        from pipeline.store import read_run

        runs, failures = {}, {}
        for seed in self.seeds:
            if reason := self.failures.get((candidate.run.run_id, seed)):
                failures[seed] = reason
            elif found := self._find(candidate, seed):
                runs[seed] = read_run(found.run_id)
        if any(run.validation != candidate.run.validation for run in runs.values()):
            raise ValueError(
                f"the validation images are not those of {candidate.run.name}; set data.path to "
                "the data it was searched on."
            )
        return Retrained(candidate=candidate, runs=runs, failures=failures)

    def run(
        self,
        missing: Sequence[tuple[Candidate, int]],
        parent: Run,
        executor: Executor,
        *,
        received: Sequence[int],
        show: Callable[[str], None],
    ) -> None:
        """Trains what is missing, until it is done or there is a reason to stop.

        Args:
            missing: Candidates and seeds.
            parent: The promotion's run, under which each is nested.
            executor: Trains.
            received: Signals that tell to stop; grows meanwhile.
            show: Called with a line when a training has ended.

        Raises:
            OSError: The store is out of reach.
        """
        waiting = list(missing)
        try:
            while (waiting or self.flights) and not received:
                while waiting and len(self.flights) < executor.workers:
                    self._submit(parent, executor, *waiting.pop(0))
                done, _ = wait(self.flights, timeout=TICK, return_when=FIRST_COMPLETED)
                for future in done:
                    waiting[:0] = self._settle(future, show)
        finally:
            self._land(executor, received, show)

    def _submit(self, parent: Run, executor: Executor, candidate: Candidate, seed: int) -> None:
        from pipeline.tracking import create_run

        run = self._find(candidate, seed)
        if run is None:
            name = f"{candidate.title} seed={seed}"
            run = create_run(self.store, name, self._tags(candidate, seed), parent=parent)
        else:
            parent.adopt([run.run_id])
            run.reopen()
        folder = Path(candidate.config.tracking.directory).absolute() / "checkpoints" / run.run_id
        folder.mkdir(parents=True, exist_ok=True)  # a worker sees it, or has its own
        job = Training(
            config=replace(candidate.config, seed=seed),
            command=candidate.command(seed),
            run=run,
            checkpoint=folder / "training.npz",
            objectives=(candidate.objective,),
            home=machine(),
            patience=0.0,
        )
        self.flights[executor.submit(retrain, job)] = candidate, seed, job

    def _settle(
        self, future: Future[Outcome], show: Callable[[str], None]
    ) -> list[tuple[Candidate, int]]:
        """Does what follows from the end of a training; returns what is to be tried again."""
        candidate, seed, job = self.flights.pop(future)
        run, title = job.run, f"{candidate.title}  seed {seed}"
        try:
            outcome = future.result()
        except WorkerDiedError as error:
            kind, most = allowance(error)
            self.deaths[run.run_id, kind] += 1
            deaths = self.deaths[run.run_id, kind]
            if self.is_landing:
                outcome = Outcome(state="STOPPED")
            elif deaths < most:
                log.warning("%s: %s It is tried again.", title, error)
                return [(candidate, seed)]
            else:
                reason = f"{error} {deaths} workers died in this training."
                outcome = Outcome(state="FAIL", reason=reason)
        if outcome.state == "STOPPED":
            run.end("KILLED")
            return [(candidate, seed)]  # unless it is stopping, somebody stopped the worker alone
        if outcome.state == "BROKEN":
            with suppress(Exception):  # what is broken may be the store
                run.end("FAILED", error=outcome.reason)
            raise OSError(outcome.reason)
        if outcome.state == "FAIL":
            run.end("FAILED", error=outcome.reason)
            self.failures[candidate.run.run_id, seed] = outcome.reason
            show(f"{title}  failed: {outcome.reason}")
        elif not run.catch_up(at_once=True):  # what follows reads it from the store
            raise OSError(f"the tracking store is away; {title} is kept in {run.spool.folder}.")
        else:
            show(f"{title}  {candidate.objective} {outcome.values[0]:.4f}")
        shutil.rmtree(job.checkpoint.parent, ignore_errors=True)
        return []

    def _land(
        self, executor: Executor, received: Sequence[int], show: Callable[[str], None]
    ) -> None:
        """Stops what is under way, and leaves it to be gone on with."""
        if not self.flights:
            return
        self.is_landing = True
        executor.interrupt()
        done, running = wait_for_ends(self.flights, received)
        for future in done:
            with suppress(Exception):
                self._settle(future, show)
        executor.stop(grace=0)
        for future in running:
            _, _, job = self.flights.pop(future)
            with suppress(Exception):
                job.run.end("KILLED")

    def _find(self, candidate: Candidate, seed: int) -> Run | None:
        from pipeline.tracking import find_run

        return find_run(self.store, self._tags(candidate, seed))

    def _tags(self, candidate: Candidate, seed: int) -> dict[str, object]:
        """By which a training is found again."""
        return {
            "retrains": candidate.run.run_id,
            "retrained.seed": seed,
            "promotion.model": self.name,
        }
