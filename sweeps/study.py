"""The study in Optuna: its lock, its sampler and pruner, asking and adopting."""

import json
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import optuna
import sqlalchemy
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    SuccessiveHalvingPruner,
)
from optuna.samplers import BaseSampler, CmaEsSampler, QMCSampler, RandomSampler
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from pipeline.compose import Value
from pipeline.config import LATER, flatten
from pipeline.database import sqlite_path
from sweeps.config import (
    AshaConfig,
    CmaEsConfig,
    Direction,
    HyperbandConfig,
    MedianConfig,
    PrunerConfig,
    QMCConfig,
    SamplerConfig,
    TPEConfig,
)
from sweeps.space import Parameter, Space, Values
from sweeps.storage import OwnStorage, open_storage

IMPORTANT = 2_000  # trials from which importances are told: of 10,000 it takes seconds

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class HeldError(OSError):
    """Another launcher holds the sweep."""


class Hold:
    """A sweep or a promotion that no other process may begin."""

    def renew(self) -> None:
        """Takes it again where the server that kept it has restarted.

        Raises:
            HeldError: Another process was faster.
        """


@contextmanager
def hold(name: str, uri: str, work: str = "sweep") -> Iterator[Hold]:
    """Inside, no other launcher runs this sweep. The lock ends with the process, however it ends.

    Args:
        name: Of the sweep.
        uri: Of the database beside or in which the lock is.
        work: `sweep` or `promotion`; of each, names are their own.

    Raises:
        HeldError: Another launcher holds it; the message says which.
    """
    path = sqlite_path(uri)
    if path is None:
        with closing(_ServerHold(name, uri, work)) as held:
            yield held
    else:
        with _hold_file(name, path.parent, work):
            yield Hold()


def _held(work: str, name: str, by: str) -> str:
    what = (
        f"sweep.name={name} is being run" if work == "sweep" else f"name={name} is being promoted"
    )
    return f"{what} by {by}."


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


@contextmanager
def _hold_file(name: str, folder: Path, work: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = folder / f".{work}-{name}.lock", folder / f".{work}-{name}.holder"
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        time.sleep(0.2)  # who has just taken it writes its name
        by = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise HeldError(_held(work, name, by)) from None
    with held:
        new = holder.with_suffix(f".{os.getpid()}.tmp")
        new.write_text(_me(), encoding="utf-8")
        new.replace(holder)
        yield


class _ServerHold(Hold):
    """An advisory lock of PostgreSQL, whose connection says in its name who holds it."""

    def __init__(self, name: str, uri: str, work: str) -> None:
        self._held_by = partial(_held, work, name)
        words = ["digit-sweeps", name] if work == "sweep" else ["digit-sweeps", work, name]
        self._key = {"key": " ".join(words)}
        self._engine = sqlalchemy.create_engine(
            uri,
            poolclass=sqlalchemy.NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args={"application_name": _me(), "keepalives_idle": 30},  # seconds
        )
        self._take()

    def _take(self) -> None:
        self._connection = self._engine.connect()
        if not self._ask("SELECT pg_try_advisory_lock(0, hashtext(:key))"):
            by = self._ask(
                "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid) "
                "WHERE locktype = 'advisory' AND classid = 0 AND granted "
                "AND pg_locks.database = "
                "(SELECT oid FROM pg_database WHERE datname = current_database()) "
                "AND objid = hashtext(:key)::bit(32)::bigint::oid"
            )
            self._connection.close()
            raise HeldError(self._held_by(by or "another process"))

    def _ask(self, question: str) -> Any:
        return self._connection.scalar(sqlalchemy.text(question), self._key)

    def renew(self) -> None:
        with suppress(sqlalchemy.exc.SQLAlchemyError):
            self._ask("SELECT :key")
            return
        with suppress(sqlalchemy.exc.SQLAlchemyError):
            self._connection.close()
        self._take()

    def close(self) -> None:
        with suppress(sqlalchemy.exc.SQLAlchemyError):
            # Now, not when the server notices that the connection is closed.
            self._ask("SELECT pg_advisory_unlock(0, hashtext(:key))")
            self._connection.close()


def find_study(name: str, uri: str) -> optuna.Study | None:
    """The study of that name, if there is one."""
    path = sqlite_path(uri)
    if path and not path.exists():
        return None
    try:
        return optuna.load_study(study_name=name, storage=open_storage(uri))
    except KeyError:
        return None


def open_study(name: str, storage: BaseStorage, directions: Sequence[Direction]) -> optuna.Study:
    """Creates a study or opens the one of that name, whose directions may be others."""
    return optuna.create_study(
        study_name=name, storage=storage, directions=list(directions), load_if_exists=True
    )


def check_identity(study: optuna.Study, identity: Mapping[str, str]) -> None:
    """Refuses to go on with a study of something else.

    Args:
        study: New, or opened again.
        identity: All that must not change: the space, the objectives, the data, the settings.

    Raises:
        ValueError: It changed; the message shows how.
    """
    if "identity" not in study.user_attrs:
        study.set_user_attr("key", uuid4().hex)  # of this study, among all of its name
        study.set_user_attr("identity", json.dumps(dict(identity)))
    later = {name: value for name, value in flatten(LATER) if name in identity}
    before = {**later, **json.loads(study.user_attrs["identity"])}
    names = [name for name in {**before, **identity} if before.get(name) != identity.get(name)]
    if names:
        missing = "(none)"
        changes = "; ".join(
            f"{name}: {before.get(name, missing)} -> {identity.get(name, missing)}"
            for name in names
        )
        raise ValueError(
            f"sweep.name={study.study_name} was started differently: {changes}. "
            "Give the new one another name."
        )


def build_pruner(config: PrunerConfig) -> BasePruner:
    match config:
        case MedianConfig():
            return MedianPruner(
                config.n_startup_trials, config.n_warmup_steps, config.interval_steps
            )
        case AshaConfig():
            return SuccessiveHalvingPruner(
                config.min_resource, config.reduction_factor, config.min_early_stopping_rate
            )
        case HyperbandConfig():
            return HyperbandPruner(
                config.min_resource, config.max_resource, config.reduction_factor
            )
    return NopPruner()


class _CmaEs(CmaEsSampler):
    """Models the names that every trial has: Optuna's own fails on solutions of several lengths.

    Args:
        always: Those names.
        settings: Of Optuna's.
    """

    def __init__(self, always: Set[str], **settings: Any) -> None:
        super().__init__(**settings)
        self._always = always

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        found = super().infer_relative_search_space(study, trial)
        return {name: spread for name, spread in found.items() if name in self._always}


class _QMC(QMCSampler):
    """Takes the point of the trial's number: Optuna's own takes the next one at every draw."""

    _number = 0

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._number = trial.number
        return super().sample_relative(study, trial, search_space)

    def _find_sample_id(
        self, study: optuna.Study, search_space: dict[str, BaseDistribution]
    ) -> int:
        return self._number


def build_sampler(
    config: SamplerConfig, *, always: Set[str], sweep_seed: int, seed: int
) -> BaseSampler:
    """A sampler without a past: all it knows, it reads from the study.

    Args:
        config: Which one.
        always: Names that are searched in every trial.
        sweep_seed: Of what all trials of a sweep share: the sequence of `qmc`.
        seed: Of this draw.
    """
    match config:
        case TPEConfig():
            from sweeps.fast_tpe import FastTPESampler

            return FastTPESampler(
                n_modelled_trials=config.n_modelled_trials,
                n_startup_trials=config.n_startup_trials,
                n_ei_candidates=config.n_ei_candidates,
                multivariate=True,
                group=config.group,
                constant_liar=config.constant_liar,
                seed=seed,
            )
        case CmaEsConfig():
            return _CmaEs(
                always,
                n_startup_trials=config.n_startup_trials,
                sigma0=config.sigma0,
                popsize=config.popsize,
                with_margin=config.with_margin,
                consider_pruned_trials=config.consider_pruned_trials,
                independent_sampler=RandomSampler(seed),
                warn_independent_sampling=False,
                seed=seed,
            )
        case QMCConfig():
            return _QMC(
                qmc_type=config.qmc_type,
                scramble=config.scramble,
                seed=sweep_seed,
                independent_sampler=RandomSampler(seed),
                warn_asynchronous_seeding=False,
                warn_independent_sampling=False,
            )
    return RandomSampler(seed)


class SeededSampler(BaseSampler):
    """A sampler whose draws are seeded by the sweep, the trial and, drawn alone, the parameter.

    So what a launcher that died half-way in asking had not yet drawn comes out as it would have.

    Args:
        config: Which one.
        space: What is searched.
        seed: Of the sweep.
    """

    def __init__(self, config: SamplerConfig, space: Space, seed: int) -> None:
        self._config, self._seed = config, seed
        self._always = {each.name for each in space.parameters if each.condition is None}
        self._known: dict[str, BaseDistribution] = {}
        if isinstance(config, TPEConfig) and len(self._always) == len(space.parameters):
            # What all trials have in common, Optuna would look for in all of them at each draw.
            self._config = replace(config, group=False)
            spreads = {each.name: each.distribution for each in space.parameters}
            self._known = {
                n: spread for n, spread in sorted(spreads.items()) if not spread.single()
            }

    def _of(self, trial: FrozenTrial, name: str = "") -> BaseSampler:
        state = np.random.SeedSequence([self._seed, trial.number, *name.encode()])
        seed = int(state.generate_state(1)[0])
        return build_sampler(self._config, always=self._always, sweep_seed=self._seed, seed=seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        self._relative = self._of(trial)  # which keeps what it infers
        if self._known:
            return self._known
        return self._relative.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._relative.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        sampler = self._of(trial, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)


class Asker:
    """Asks a study for trials, each with a value for each parameter that is searched in it.

    Args:
        study: Of which this process alone asks and tells, from now on by this.
        space: What is searched.
        sampler: How.
        seed: Of the sweep.
        known: Configurations that come first, in this order.
        configured: Value of each name that a condition looks at, where it is not searched.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: Space,
        sampler: SamplerConfig,
        *,
        seed: int,
        known: Sequence[Values],
        configured: Values,
    ) -> None:
        self._storage = OwnStorage(study._storage, study._study_id)  # type: ignore[abstract]
        self.study = optuna.load_study(
            study_name=study.study_name,
            storage=self._storage,
            sampler=SeededSampler(sampler, space, seed),
        )
        self.space, self.known, self.configured = space, known, configured

    def ask(self, attributes: Mapping[str, Any] | None = None) -> tuple[Trial, Values]:
        """A new trial, which the database has whole or not at all.

        Args:
            attributes: Of the trial, for its user.
        """
        number = len(self.study.get_trials(deepcopy=False)) - self._storage.strays
        if number < len(self.known):
            waiting = self.study.get_trials(deepcopy=False, states=[TrialState.WAITING])
            if not waiting:
                self.study.enqueue_trial(self.known[number])
        draft = self.study.ask()
        values = self._suggest(draft)
        for name, value in (attributes or {}).items():
            draft.set_user_attr(name, value)
        return Trial(self.study, self._storage.keep(draft._trial_id)), values

    def tell(self, trial: Trial, values: Sequence[float] | None, state: TrialState) -> FrozenTrial:
        """Ends a trial, of which a worker may have reported epochs."""
        if state == TrialState.PRUNED:  # its value is the last that was reported
            self._storage.read(trial._trial_id)
        return self.study.tell(trial, values, state=state)

    def adopt(self, frozen: FrozenTrial) -> tuple[Trial, Values]:
        """Takes up a trial that an earlier launcher asked."""
        trial = Trial(self.study, frozen._trial_id)
        return trial, self._suggest(trial)

    def _suggest(self, trial: Trial) -> Values:
        return self.space.assign(partial(suggest, trial), self.configured)


def suggest(trial: Trial, parameter: Parameter) -> Value:
    """Draws a value, unless the trial has it."""
    name, spread = parameter.name, parameter.distribution
    if isinstance(spread, CategoricalDistribution):
        return trial.suggest_categorical(name, spread.choices)
    if isinstance(spread, FloatDistribution):
        return trial.suggest_float(name, spread.low, spread.high, step=spread.step, log=spread.log)
    return trial.suggest_int(name, spread.low, spread.high, step=spread.step, log=spread.log)


def best_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The best complete trial, the first of equals; of several objectives, the Pareto front."""
    with suppress(ValueError):  # no trial is complete
        return [study.best_trial] if len(study.directions) == 1 else list(study.best_trials)
    return []


def sample(study: optuna.Study, most: int) -> optuna.Study:
    """A study with at most so many of the complete trials, evenly, the best among them."""
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if len(complete) <= most:
        return study
    best = best_trials(study)[: most // 2]
    kept = {trial.number: trial for trial in [*spread(complete, most - len(best)), *best]}
    some = optuna.create_study(directions=study.directions)
    some.add_trials([kept[number] for number in sorted(kept)])
    return some


def of_first_objective(study: optuna.Study) -> optuna.Study:
    """The study with its first objective alone, as Optuna's plots of one want it."""
    if len(study.directions) == 1:
        return study
    alone = optuna.create_study(direction=study.directions[0])
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished():
            alone.add_trial(
                create_trial(
                    state=trial.state,
                    value=trial.values[0] if trial.values else None,
                    params=trial.params,
                    distributions=trial.distributions,
                )
            )
    return alone


def spread(trials: Sequence[FrozenTrial], most: int) -> Sequence[FrozenTrial]:
    """At most so many of the trials, evenly, the last among them."""
    step = max(1, -(-len(trials) // most))
    return trials[::-1][::step][::-1]


def importances(study: optuna.Study) -> dict[str, float]:
    """Share of each parameter in the variance of the first objective; empty where unknown."""
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    if len({trial.values[0] for trial in complete}) < 3:
        return {}
    # Of one objective, Optuna knows the direction; of a target, that less is better.
    sign = -1 if study.directions[0] == StudyDirection.MAXIMIZE else 1
    everywhere = set.intersection(*(set(trial.params) for trial in complete))
    varied = [name for name in everywhere if len({trial.params[name] for trial in complete}) > 1]
    if not varied:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.importance.get_param_importances(
            sample(study, IMPORTANT),
            params=sorted(varied),
            target=(lambda trial: sign * trial.values[0]) if len(study.directions) > 1 else None,
        )
