"""The launcher's loop: asks, has trials executed, tells, shows."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import optuna
from optuna.trial import Trial, TrialState

from pipeline import fast_imports
from pipeline.config import without_password
from pipeline.database import AwayError, lost_connection, patiently
from pipeline.owner import machine
from sweeps.config import NoPrunerConfig
from sweeps.display import SHOWN, Display, Running, trial_name
from sweeps.executors import Executor, WorkerDiedError, WorkerLostError
from sweeps.interruption import wait_for_ends
from sweeps.parent import logarithms
from sweeps.plan import Plan
from sweeps.space import Values
from sweeps.study import Asker, Hold
from sweeps.trial import Job, Outcome, objective_values, run_trial

if TYPE_CHECKING:  # or MLflow is imported
    from pipeline.tracking import Run

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_DEATHS = 2  # a trial that killed so many workers is not tried again
MAX_LOSSES = 10  # likewise, of workers that were lost with their machines
TOLD = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
PUBLISH_AFTER = 300  # seconds until a sweep that still runs has its first report
TICK = 0.5  # seconds between two looks at the running trials
RECORD = 1.0  # seconds between two records of how far the sweep is
RENEW = 5.0  # seconds between two looks whether the sweep is still held


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Room for one trial at a time: there are as many as workers.

    Attributes:
        number: From 1.
        since: When it became free, as of `time.monotonic`.
        is_first: Whether a worker may have to start for its next trial.
    """

    number: int
    since: float
    is_first: bool


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A trial under way.

    Attributes:
        trial: In the study.
        values: What is searched in it.
        run: In MLflow.
        job: What a worker was given.
        slot: That it takes.
    """

    trial: Trial
    values: Values
    run: Run
    job: Job
    slot: Slot


@dataclass(kw_only=True)
class Launcher:
    """One sweep that is being run. It alone asks the study and tells it.

    Attributes:
        plan: The sweep.
        study: In Optuna, of the sweep's name.
        storage: Address of its database.
        parent: The sweep's run in MLflow.
        executor: Executes trials.
        display: Shows them.
        received: Signals that tell to stop; grows meanwhile.
        held: The sweep, by this process.
        publish: Records on the sweep's run what came out so far.
    """

    plan: Plan
    study: optuna.Study
    storage: str
    parent: Run
    executor: Executor
    display: Display
    received: list[int]
    held: Hold
    publish: Callable[[], Any]
    flights: dict[Future[Outcome], Flight] = field(default_factory=dict)
    overheads: list[float] = field(default_factory=list)
    broken: str = ""
    is_prepared: bool = False
    next_look: float = 0.0
    next_record: float = 0.0
    next_publication: float = field(default_factory=lambda: time.monotonic() + PUBLISH_AFTER)
    next_renewal: float = 0.0
    recorded: int = 0
    asked: set[int] = field(default_factory=set)  # trials, by this launcher or taken up
    new: set[int] = field(default_factory=set)  # of which there can be no run yet
    first_looks: dict[str, tuple[float, int]] = field(default_factory=dict)
    behind: dict[str, Run] = field(default_factory=dict)  # of which the store does not know all

    def __post_init__(self) -> None:
        config = self.plan.config
        self.asker = Asker(
            self.study,
            self.plan.space,
            config.sampler,
            seed=config.sweep.seed,
            known=self.plan.known,
            configured=self.plan.configured,
        )
        self.study = self.asker.study
        self.progress = self.display.progress
        self.started = time.monotonic()
        self.seconds_before: float = self.study.user_attrs.get("seconds", 0.0)

    # --- the loop ------------------------------------------------------------------------

    def run(self) -> None:
        """Runs trials until the budget is reached or there is a reason to stop."""
        self.parent.reopen()
        with self.display:
            waiting = self.take_up()
            try:
                self.fly(waiting)
            except AwayError as error:
                self.broken = str(error)
            self.land()
        try:
            self.record()
            self.end(waiting)
            self.study.set_user_attr("seconds", self.seconds())
        except AwayError as error:  # a signal, or what broke before, is still the reason
            self.broken = self.broken or str(error)

    def fly(self, waiting: list[tuple[Trial, Values]]) -> None:
        """The loop.

        Args:
            waiting: Trials that were asked before; those left over at the end were not needed.

        Raises:
            AwayError: A server is away, for longer than there is patience.
            HeldError: It restarted, and another launcher was faster to hold the sweep.
        """
        now = time.monotonic()
        free = [
            Slot(number=i, since=now, is_first=True) for i in range(self.executor.workers, 0, -1)
        ]
        while not self.must_stop():
            while free and self.may_ask() and not self.has_failed:
                trial, values = waiting.pop(0) if waiting else self.ask(free[-1])
                if self.submit(trial, values, free[-1]):
                    free.pop()
            if not self.flights:
                break
            if time.monotonic() >= self.next_record:
                self.record()
            if not self.may_ask():
                self.prepare()
            done, _ = wait(self.flights, timeout=TICK, return_when=FIRST_COMPLETED)
            for future in done:
                flight = self.flights.pop(future)
                free.append(replace(flight.slot, since=time.monotonic(), is_first=False))
                if self.settle(flight, future):
                    waiting.append((flight.trial, flight.values))
            if time.monotonic() >= self.next_publication and not self.must_stop():
                self.publish_early()
            if self.display.is_live and time.monotonic() >= self.next_look:
                self.look()
            if time.monotonic() >= self.next_renewal:
                self.renew()

    def ask(self, slot: Slot) -> tuple[Trial, Values]:
        trial, values = self.asker.ask({"worker": slot.number})
        self.asked.add(trial.number)
        self.new.add(trial.number)
        return trial, values

    def renew(self) -> None:
        """Holds the sweep, and has the store know what it could not be told."""
        uri, patience = self.storage, self.plan.config.sweep.patience
        patiently(self.held.renew, lost_connection, uri, seconds=patience, stop=self.is_told)
        self.catch_up()
        self.next_renewal = time.monotonic() + RENEW

    def catch_up(self) -> bool:
        """Tells the store what it is behind with, if it is there; returns whether it knows all."""
        for run in [*self.behind.values(), self.parent]:
            try:
                knows_all = run.catch_up()
            except Exception as error:  # it refuses that run: the doctor tells
                log.warning("run %s is refused: %s", run.name, without_password(str(error)))
                knows_all = True
            if knows_all:
                self.behind.pop(run.run_id, None)
        return not self.behind and self.parent.spool.is_empty

    def patiently(self, call: Callable[[], T]) -> T:
        """Calls until MLflow's store is there."""
        from pipeline.store import impatient, is_away

        uri = self.parent.store.uri
        away = partial(is_away, uri=uri)
        with impatient():
            return patiently(
                call, away, uri, seconds=self.plan.config.sweep.patience, stop=self.is_told
            )

    def is_told(self) -> bool:
        """Whether a signal told to stop."""
        return bool(self.received)

    def end(self, waiting: list[tuple[Trial, Values]]) -> None:
        """Ends what was asked and is not under way.

        Args:
            waiting: Trials for which no time or budget was left; they are gone on with later.
        """
        from pipeline.store import is_away

        for trial, values in waiting:
            try:
                self.run_of(trial, values).end("KILLED")
            except Exception as error:  # who goes on with the sweep reopens its run
                if not is_away(error, self.parent.store.uri):
                    raise
        if self.broken or self.received:
            return
        for frozen in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if frozen.number not in self.asked:  # the answer was lost with the connection
                trial, values = self.asker.adopt(frozen)
                stray = Outcome(state="FAIL", reason="it was asked as the database restarted.")
                self.tell(trial, self.run_of(trial, values), stray, seconds=0.0)

    def tell_all(self) -> None:
        """Waits until the store knows all.

        Raises:
            AwayError: It is away, for longer than there is patience.
        """
        for run in [*self.behind.values(), self.parent]:
            self.replay(run)
            self.behind.pop(run.run_id, None)

    def replay(self, run: Run) -> None:
        """Waits until the store knows all of a run, of which the spool may have the end."""
        from pipeline.tracking import replay_patiently

        replay_patiently(run, seconds=self.plan.config.sweep.patience, stop=self.is_told)

    def record(self) -> None:
        """Records how far the sweep is, where that changed: while the workers are busy."""
        step = self.progress.finished + self.progress.failed
        if step != self.recorded:
            self.recorded = step
            self.study.set_user_attr("seconds", self.seconds())
            self.parent.log_metrics(self.progress.metrics, step=step)
            self.next_record = time.monotonic() + RECORD

    def prepare(self) -> None:
        """Imports what the end of the sweep needs, while the last trials run."""
        if not self.is_prepared:
            self.is_prepared = True
            with fast_imports():
                import sklearn.ensemble  # noqa: F401 (of the importances)

                import sweeps.report  # noqa: F401

    def publish_early(self) -> None:
        """Spends a hundredth of the time on it, at most."""
        start = time.monotonic()
        self.publish()
        self.next_publication = time.monotonic() + 99 * (time.monotonic() - start)

    def must_stop(self) -> bool:
        return bool(self.received or self.broken or self.is_over or self.has_failed)

    @property
    def is_over(self) -> bool:
        """Whether the time of the sweep is up."""
        timeout = self.plan.config.sweep.timeout
        return timeout is not None and self.seconds() >= timeout

    @property
    def has_failed(self) -> bool:
        return self.progress.failed >= self.plan.config.sweep.max_failures

    def seconds(self) -> float:
        """Of work on the sweep, over all its interruptions."""
        return self.seconds_before + time.monotonic() - self.started

    def may_ask(self) -> bool:
        started = self.progress.finished + len(self.flights)
        return self.plan.needs_more(started, self.progress.failed)

    def take_up(self) -> list[tuple[Trial, Values]]:
        """Trials that an earlier launcher asked and did not tell."""
        waiting = []
        self.tidy()
        for frozen in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            trial, values = self.asker.adopt(frozen)
            self.asked.add(trial.number)
            run = self.run_of(trial, values)
            self.replay(run)
            if outcome := self.recorded_outcome(run):
                self.tell(trial, run, outcome, seconds=run.metrics["fit_seconds"])
            else:
                run.reopen()
                waiting.append((trial, values))
        return waiting

    def recorded_outcome(self, run: Run) -> Outcome | None:
        """Of a run of which all is done but the telling."""
        if run.status != "FINISHED":
            return None
        metrics = run.metrics
        values = objective_values(self.plan.config.sweep.objectives, metrics)
        return Outcome(state="COMPLETE", values=values, epochs=int(metrics["epoch"]))

    def tidy(self) -> None:
        """Deletes checkpoints of trials that were told, which a kill may have left."""
        for trial in self.study.get_trials(deepcopy=False, states=TOLD):
            if run_id := trial.user_attrs.get("run_id"):
                shutil.rmtree(self.checkpoints / run_id, ignore_errors=True)

    def land(self) -> None:
        """Stops what is under way, and leaves it to be gone on with."""
        if self.flights:
            self.executor.interrupt()
            done, running = wait_for_ends(self.flights, self.received)
            for future in done:  # one that is told is no longer ours to end
                try:
                    self.settle(self.flights.pop(future), future)
                except AwayError as error:  # a later launcher tells it, as its run has ended
                    self.broken = self.broken or str(error)
            self.executor.stop(grace=0)
            for future in running:
                self.flights.pop(future).run.end("KILLED")

    def abandon(self, status: str, error: str = "") -> None:
        """Ends what can be ended when this launcher failed; a later one takes up the rest."""
        with suppress(Exception):  # what failed may be the store, or the cluster
            self.executor.stop(grace=0)
        with suppress(Exception):
            for flight in self.flights.values():
                flight.run.end("KILLED")
            self.parent.end(status, error=error)

    # --- one trial -----------------------------------------------------------------------

    def submit(self, trial: Trial, values: Values, slot: Slot) -> bool:
        """Has a worker execute the trial; returns whether its configuration is accepted."""
        config, run = self.plan.config, self.patiently(partial(self.run_of, trial, values))
        self.behind.pop(run.run_id, None)  # its worker's from now on
        try:
            run_config = self.plan.trial_config(values)
        except ValueError as error:  # values that are refused together only
            self.tell(trial, run, Outcome(state="FAIL", reason=str(error)), seconds=0.0)
            return False
        is_baseline = trial.number == self.plan.baseline
        job = Job(
            config=run_config,
            command=self.plan.command(values, "evaluate_test=false"),
            run=run,
            checkpoint=self.checkpoints / run.run_id / "training.npz",
            objectives=config.sweep.objectives,
            home=machine(),
            storage=self.storage,
            study=self.study.study_name,
            trial_id=trial._trial_id,
            pruner=NoPrunerConfig(name="none") if is_baseline else config.pruner,
            patience=config.sweep.patience,
            constants=logarithms(self.plan, values),
        )
        job.checkpoint.parent.mkdir(parents=True, exist_ok=True)  # a worker sees it, or has its own
        if trial.user_attrs.get("worker") != slot.number:  # it is tried again
            trial.set_user_attr("worker", slot.number)
        flight = Flight(trial=trial, values=values, run=run, job=job, slot=slot)
        self.flights[self.executor.submit(run_trial, job)] = flight
        return True

    def run_of(self, trial: Trial, values: Values) -> Run:
        """The trial's one run: that of an earlier try, or a new one."""
        from pipeline.tracking import Run, create_run, find_run

        name = trial_name(trial.number, values)
        if run_id := trial.user_attrs.get("run_id"):
            run = Run(run_id=run_id, name=name, store=self.parent.store)
            if run.status != "DELETED":
                return run
        tags = {"sweep": self.study.study_name, "trial": trial.number}
        store, parent, is_new = self.parent.store, self.parent, trial.number in self.new
        self.new.discard(trial.number)  # of what was tried once, the answer may have been lost
        found = None if is_new else find_run(store, tags, parent=parent)
        run = found or create_run(store, name, tags, parent=parent)
        trial.set_user_attr("run_id", run.run_id)
        return run

    @property
    def checkpoints(self) -> Path:
        """Has a folder a trial under way, named after its run."""
        return Path(self.plan.config.tracking.directory).absolute() / "checkpoints"

    def settle(self, flight: Flight, future: Future[Outcome]) -> bool:
        """Does what follows from the end of a trial; returns whether it is to be tried again."""
        run, seconds = flight.run, time.monotonic() - flight.slot.since
        try:
            outcome = future.result()
        except WorkerDiedError as error:
            last = self.outcome_of_death(flight, error)
            if last is None:
                return True
            outcome = last
        if outcome.state == "STOPPED":
            run.end("KILLED")
            return not self.must_stop()  # somebody stopped the worker alone
        if outcome.state == "BROKEN":
            self.broken = outcome.reason
            with suppress(Exception):  # what is broken may be the store
                run.end("FAILED", error=outcome.reason)
        else:
            if outcome.state == "COMPLETE" and not flight.slot.is_first:
                self.overheads.append(seconds - outcome.seconds)
            self.progress.seconds.append(seconds)
            self.tell(flight.trial, run, outcome, seconds=seconds)
        if not run.spool.is_empty:
            self.behind[run.run_id] = run
        return False

    def outcome_of_death(self, flight: Flight, error: WorkerDiedError) -> Outcome | None:
        """What becomes of a trial whose worker died; None: it is tried again."""
        number, run = flight.trial.number, flight.run
        if self.must_stop():
            return Outcome(state="STOPPED")
        self.replay(run)
        if outcome := self.patiently(partial(self.recorded_outcome, run)):
            return outcome
        kind, most = allowance(error)
        count = flight.trial.user_attrs.get(kind, 0) + 1
        if count < most:
            log.warning("trial %d: %s It is tried again.", number, error)
            flight.trial.set_user_attr(kind, count)
            self.patiently(run.reopen)
            return None
        return Outcome(state="FAIL", reason=f"{error} {count} workers died in this trial.")

    def tell(self, trial: Trial, run: Run, outcome: Outcome, *, seconds: float) -> None:
        """Ends the trial, once its run has ended."""
        if outcome.state == "FAIL":
            run.end("FAILED", error=outcome.reason)
            trial.set_user_attr("reason", outcome.reason)
            if not outcome.epochs and (constants := logarithms(self.plan, trial.params)):
                run.log_metrics(constants)  # which a worker records with its first epoch
        elif outcome.state == "PRUNED":
            run.end("KILLED")
        trial.set_user_attr("seconds", seconds)
        trial.set_user_attr("epochs", outcome.epochs)
        values = outcome.values or None
        frozen = self.asker.tell(trial, values, TrialState[outcome.state])
        shutil.rmtree(self.checkpoints / run.run_id, ignore_errors=True)
        self.progress.add(frozen)
        self.display.print_trial(frozen, outcome.reason, seconds)

    def look(self) -> None:
        """Shows how far the running trials are; spends a tenth of the time on it, at most."""
        start = time.monotonic()
        flights = list(self.flights.values())
        with suppress(Exception):  # a look is not worth a sweep
            self.display.show([self.running(flight) for flight in flights[:SHOWN]], len(flights))
        self.next_look = time.monotonic() + 9 * (time.monotonic() - start)

    def running(self, flight: Flight) -> Running:
        metrics = flight.run.known_metrics
        epoch = int(metrics.get("epoch", 0))
        return Running(
            number=flight.trial.number,
            values=flight.values,
            epoch=epoch,
            epochs=flight.job.config.training.epochs,
            value=metrics.get(self.plan.config.sweep.objectives[0]),
            pace=self.pace(flight.run.run_id, epoch),
        )

    def pace(self, run_id: str, epoch: int) -> float | None:
        """Seconds an epoch since one was first seen: before, a worker may have had to start."""
        if not epoch:
            return None
        now = time.monotonic()
        first_look, first_epoch = self.first_looks.setdefault(run_id, (now, epoch))
        return (now - first_look) / (epoch - first_epoch) if epoch > first_epoch else None


def allowance(error: WorkerDiedError) -> tuple[str, int]:
    """What a worker's end is counted as, and how many of these are too many for one training."""
    if isinstance(error, WorkerLostError):
        return "losses", MAX_LOSSES
    return "deaths", MAX_DEATHS
