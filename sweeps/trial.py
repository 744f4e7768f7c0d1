"""What a worker executes: one trial, or one training of a promotion, as one run."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from optuna.exceptions import StorageInternalError
from optuna.samplers import RandomSampler

from pipeline import start_libraries
from pipeline.config import DataConfig, RunConfig, without_password
from pipeline.endings import StopRun
from pipeline.owner import machine
from sweeps.config import PrunerConfig
from sweeps.elsewhere import settle_in, tell_all
from sweeps.sharing import Shared
from sweeps.storage import patient_storage
from sweeps.study import build_pruner

if TYPE_CHECKING:  # or TensorFlow is imported, which the launcher does without
    from pipeline.data import Data, Split
    from pipeline.tracking import Run
    from pipeline.train import EpochHook, Metrics

log = logging.getLogger(__name__)

_NARROW = 8  # hidden units of a rehearsal

# Metric of a run that an objective is.
METRICS = {"val_accuracy": "saved_val_accuracy", "val_loss": "saved_val_loss"}


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run, as it is sent to a worker.

    Attributes:
        config: Of the run.
        command: Command line that repeats it.
        run: To record in.
        checkpoint: File that keeps the training after each epoch.
        objectives: What its outcome tells.
        home: The launcher's machine.
        patience: Seconds to wait for a server, of the runs or the study, that is away.
        constants: Metrics of the whole run that are known beforehand.
    """

    config: RunConfig
    command: str
    run: Run
    checkpoint: Path
    objectives: tuple[str, ...]
    home: str
    patience: float
    constants: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Job(Training):
    """A trial, as it is sent to a worker.

    Attributes:
        storage: Address of the study's database.
        study: Name of the study.
        trial_id: Of the trial in that database.
        pruner: Decides, with the study, whether the trial goes on.
    """

    storage: str
    study: str
    trial_id: int
    pruner: PrunerConfig


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended.

    Attributes:
        state: `COMPLETE`, `PRUNED` or `FAIL` as in Optuna; `STOPPED` by a signal; `BROKEN` when
            something else than the trial failed: a full disk, a database out of reach.
        values: One an objective, when complete.
        reason: In one line, when it failed or is broken.
        epochs: Whole ones.
        seconds: Spent on building and fitting the model alone, when complete.
    """

    state: str
    values: tuple[float, ...] = ()
    reason: str = ""
    epochs: int = 0
    seconds: float = 0.0


def warm_up(shared: Shared | None = None) -> None:
    """What a worker does before its first trial.

    Args:
        shared: A data set that its trials may need; None: there is none.
    """
    start_libraries()
    _shared[:] = [shared] if shared else []


def rehearse(config: RunConfig) -> None:
    """Does what the first trial of a worker would wait for, while the launcher opens the stores.

    It loads the data, and trains a narrow network on some of it: programs serve any width. What
    fails is for the trials to tell.
    """
    if _loaded:  # a worker that has rehearsed, or done a trial
        return
    from pipeline.evaluate import evaluate
    from pipeline.model import build_mlp, build_optimizer
    from pipeline.train import STEPS_PER_CALL, initialize, steps_per_epoch, train

    try:
        initialize(threads=config.training.threads, seed=config.seed)
        data, epochs = _load(config.data), config.training.epochs
        steps = steps_per_epoch(len(data.train), config.training)
        rows = STEPS_PER_CALL * config.training.batch_size
        validation = data.validation and _first(data.validation, rows)
        data = replace(data, train=_first(data.train, rows), validation=validation)
        model = build_mlp(replace(config.model, hidden_units=_NARROW), data)
        optimizer = build_optimizer(
            config.optimizer,
            steps_per_epoch=steps,
            epochs=epochs,
            ema_momentum=config.training.ema_momentum,
        )
        train(
            model,
            optimizer,
            data,
            replace(config.training, epochs=1, compile="never"),
            seed=config.seed,
            augmentation=config.augmentation,
            on_epoch_end=lambda epoch, metrics: None,
        )
        if data.validation:
            evaluate(model, data.validation)
    except Exception as error:
        log.debug("no rehearsal: %s", _reason(error))


def _first(split: Split, rows: int) -> Split:
    return replace(split, images=split.images[:rows], labels=split.labels[:rows])


def run_trial(job: Job) -> Outcome:
    """Trains one configuration, reports each epoch to the study, and stops when it is pruned."""
    return _run_here(job, lambda: reporter(job))


def retrain(job: Training) -> Outcome:
    """Trains one configuration to its end."""
    return _run_here(job, lambda: lambda epoch, metrics: None)


def _run_here(job: Training, open_report: Callable[[], EpochHook]) -> Outcome:
    """Also where the launcher does not see what is left on this machine."""
    if job.home == machine():
        return _run(job, open_report)
    try:
        job = settle_in(job)
        outcome = _run(job, open_report)
        if outcome.state in ("COMPLETE", "PRUNED", "FAIL"):
            tell_all(job)
    except KeyboardInterrupt:
        return Outcome(state="STOPPED")
    except Exception as error:
        return Outcome(state="BROKEN", reason=_reason(error))
    return outcome


def _run(job: Training, open_report: Callable[[], EpochHook]) -> Outcome:
    from pipeline.run import execute_run
    from pipeline.store import STORE_ERRORS

    epochs = 0
    try:
        report = open_report()

        def on_epoch_end(epoch: int, metrics: Metrics) -> None:
            nonlocal epochs
            epochs = epoch
            report(epoch, metrics)

        result = execute_run(
            job.config,
            job.command,
            on_epoch_end=on_epoch_end,
            data=_load(job.config.data),
            into=job.run,
            checkpoint=job.checkpoint,
            constants=job.constants,
        )
    except StopRun:
        return Outcome(state="PRUNED", epochs=epochs)
    except KeyboardInterrupt:
        return Outcome(state="STOPPED")
    except (*STORE_ERRORS, StorageInternalError) as error:
        return Outcome(state="BROKEN", reason=_reason(error))
    except Exception as error:  # of this configuration: diverged, too large, refused by a library
        return Outcome(state="FAIL", reason=_reason(error), epochs=epochs)
    values = objective_values(job.objectives, result.metrics)
    seconds = result.training_seconds
    return Outcome(state="COMPLETE", values=values, epochs=epochs, seconds=seconds)


def objective_values(objectives: tuple[str, ...], metrics: Metrics) -> tuple[float, ...]:
    """The objectives among the metrics of a finished run."""
    return tuple(metrics[METRICS.get(name, name)] for name in objectives)


def _reason(error: Exception) -> str:
    text = " ".join(without_password(str(error)).split()) or "no reason given"
    known = isinstance(error, ValueError | ArithmeticError)
    return (text if known else f"{type(error).__name__}: {text}")[:500]


def reporter(job: Job) -> EpochHook:
    """Reports the objective of each epoch, where it is one metric of an epoch."""
    objective = job.objectives[0]
    if len(job.objectives) > 1 or objective not in METRICS:
        return lambda epoch, metrics: None
    study = _open_study(job.storage, job.study, job.pruner, job.patience)
    trial = optuna.trial.Trial(study, job.trial_id)
    reported = study._storage.get_trial(job.trial_id).intermediate_values
    was_pruned = "pruned" in trial.user_attrs  # but its launcher was killed before it was told

    def report(epoch: int, metrics: Metrics) -> None:
        if epoch not in reported:
            trial.report(metrics[objective], epoch)
        if was_pruned or (epoch < job.config.training.epochs and trial.should_prune()):
            # Asked again, successive halving answers no: it has noted the rung as completed.
            trial.set_user_attr("pruned", epoch)
            raise StopRun

    return report


def _open_study(storage: str, name: str, pruner: PrunerConfig, patience: float) -> optuna.Study:
    return optuna.load_study(
        study_name=name,
        storage=_open_storage(storage, patience),
        sampler=RandomSampler(),  # asks nothing
        pruner=build_pruner(pruner),
    )


# Once a worker, of which each has one connection.
_open_storage = functools.lru_cache(maxsize=1)(patient_storage)


_shared: list[Shared] = []  # one at most
_loaded: dict[str, Data] = {}  # likewise


def _load(config: DataConfig) -> Data:
    """The data of the last trial, or what is shared, when it is the same."""
    from pipeline.data import load

    key = repr(config)
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = _open_shared(config) or load(config)
    return _loaded[key]


def _open_shared(config: DataConfig) -> Data | None:
    for shared in _shared:
        if shared.config == config:
            try:
                return shared.open()
            except OSError as error:
                log.debug("the images are loaded here: %s", error)
    return None
