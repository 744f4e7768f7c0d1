"""What a sweep is made of, beyond the run it repeats. The defaults stand in `conf/`."""

import math
import os
import re
from dataclasses import dataclass, fields
from typing import Any, Literal

from pipeline.config import (
    OPTIMIZERS,
    PlaceConfig,
    RunConfig,
    TrackingConfig,
    check,
    check_address,
    check_at_least,
    check_choice,
    check_name,
)

Direction = Literal["minimize", "maximize"]

# What can be optimized, and which way. Each is a metric of a run; none is of the test split.
OBJECTIVES: dict[str, Direction] = {
    "val_accuracy": "maximize",
    "val_loss": "minimize",
    "parameters": "minimize",
    "fit_seconds": "minimize",
}
QMC_TYPES = ("sobol", "halton")
FORMATS = ("table", "csv", "json")  # of a leaderboard
RULES = ("superiority", "non_inferiority")  # by which a challenger takes the place


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The search space. Defaults: `conf/search/`; read by `sweeps.space`.

    Attributes:
        space: Dotted name or config group -> what it is searched over, in Hydra's sweep grammar;
            a plain value fixes it.
        when: Dotted name -> override in the same grammar; the name is searched only in trials
            where that holds, and keeps its configured value in the others.
    """

    space: dict[str, Any]
    when: dict[str, str]

    def __post_init__(self) -> None:
        for name in self.when:
            check(name in self.space, f"search.when['{name}']", "a name of search.space", name)


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How the next trial is chosen. Defaults: `conf/sampler/`."""

    name: str


@dataclass(frozen=True, kw_only=True)
class RandomConfig(SamplerConfig):
    """Independent draws."""


@dataclass(frozen=True, kw_only=True)
class TPEConfig(SamplerConfig):
    """Tree-structured Parzen estimator (Bergstra et al. 2011), multivariate.

    Attributes:
        n_startup_trials: Random trials first.
        n_ei_candidates: Draws among which the best expected one is taken.
        group: Whether parameters that occur together are modelled together, for spaces with
            conditions.
        constant_liar: Whether running trials count as bad, so that workers spread.
        n_modelled_trials: Finished trials of one objective that are modelled: the best, and an even
            choice of the others.
    """

    n_startup_trials: int
    n_ei_candidates: int
    group: bool
    constant_liar: bool
    n_modelled_trials: int

    def __post_init__(self) -> None:
        check_at_least("sampler.n_startup_trials", self.n_startup_trials, 0)
        check_at_least("sampler.n_ei_candidates", self.n_ei_candidates, 1)
        check_at_least("sampler.n_modelled_trials", self.n_modelled_trials, 250)


@dataclass(frozen=True, kw_only=True)
class CmaEsConfig(SamplerConfig):
    """CMA-ES (Hansen 2016); what is not a number is drawn at random.

    Attributes:
        n_startup_trials: Random trials first.
        sigma0: First standard deviation, as a fraction of each range; null: a sixth.
        popsize: Trials a generation; null: from the number of parameters.
        with_margin: Keeps whole numbers from freezing (Hamano et al. 2022).
        consider_pruned_trials: Whether pruned trials are learned from, by their last value.
    """

    n_startup_trials: int
    sigma0: float | None
    popsize: int | None
    with_margin: bool
    consider_pruned_trials: bool

    def __post_init__(self) -> None:
        check_at_least("sampler.n_startup_trials", self.n_startup_trials, 0)
        if self.sigma0 is not None:
            check(0 < self.sigma0 <= 1, "sampler.sigma0", "in (0, 1] or null", self.sigma0)
        if self.popsize is not None:
            check_at_least("sampler.popsize", self.popsize, 2)


@dataclass(frozen=True, kw_only=True)
class QMCConfig(SamplerConfig):
    """A quasi-random sequence (Bergstra and Bengio 2012): covers the space evenly.

    Attributes:
        qmc_type: `sobol`, best at powers of 2, or `halton`.
        scramble: Whether the sequence is randomized by the seed of the sweep.
    """

    qmc_type: str
    scramble: bool

    def __post_init__(self) -> None:
        check_choice("sampler.qmc_type", self.qmc_type, QMC_TYPES)


@dataclass(frozen=True, kw_only=True)
class GridConfig(SamplerConfig):
    """Every combination once, in an order drawn by the seed; the sweep ends with the last.

    Attributes:
        points: Values of an interval, evenly spaced on its scale, ends included.
    """

    points: int

    def __post_init__(self) -> None:
        check_at_least("sampler.points", self.points, 2)


SAMPLERS: dict[str, type[SamplerConfig]] = {
    "tpe": TPEConfig,
    "random": RandomConfig,
    "cmaes": CmaEsConfig,
    "qmc": QMCConfig,
    "grid": GridConfig,
}


@dataclass(frozen=True, kw_only=True)
class PrunerConfig:
    """Which trials are stopped early; their steps are epochs. Defaults: `conf/pruner/`."""

    name: str


@dataclass(frozen=True, kw_only=True)
class NoPrunerConfig(PrunerConfig):
    """Every trial trains to its end."""


@dataclass(frozen=True, kw_only=True)
class MedianConfig(PrunerConfig):
    """Stops what is worse than the median of the others at the same epoch (Golovin et al. 2017).

    Attributes:
        n_startup_trials: Trials that are not pruned.
        n_warmup_steps: Epochs of a trial before it may be pruned.
        interval_steps: Epochs between two looks.
    """

    n_startup_trials: int
    n_warmup_steps: int
    interval_steps: int

    def __post_init__(self) -> None:
        check_at_least("pruner.n_startup_trials", self.n_startup_trials, 0)
        check_at_least("pruner.n_warmup_steps", self.n_warmup_steps, 0)
        check_at_least("pruner.interval_steps", self.interval_steps, 1)


@dataclass(frozen=True, kw_only=True)
class AshaConfig(PrunerConfig):
    """Asynchronous successive halving (Li et al. 2020).

    Attributes:
        min_resource: Epochs to the first rung.
        reduction_factor: Each rung keeps one trial in so many, for as many times the epochs.
        min_early_stopping_rate: Rungs left out at the bottom.
    """

    min_resource: int
    reduction_factor: int
    min_early_stopping_rate: int

    def __post_init__(self) -> None:
        check_at_least("pruner.min_resource", self.min_resource, 1)
        check_at_least("pruner.reduction_factor", self.reduction_factor, 2)
        check_at_least("pruner.min_early_stopping_rate", self.min_early_stopping_rate, 0)


@dataclass(frozen=True, kw_only=True)
class HyperbandConfig(PrunerConfig):
    """Hyperband (Li et al. 2018): successive halving with several first rungs.

    Attributes:
        min_resource: Epochs to the lowest rung.
        max_resource: Epochs of a whole trial.
        reduction_factor: Each rung keeps one trial in so many, for as many times the epochs.
    """

    min_resource: int
    max_resource: int
    reduction_factor: int

    def __post_init__(self) -> None:
        check_at_least("pruner.min_resource", self.min_resource, 1)
        check_at_least("pruner.max_resource", self.max_resource, self.min_resource)
        check_at_least("pruner.reduction_factor", self.reduction_factor, 2)


PRUNERS: dict[str, type[PrunerConfig]] = {
    "none": NoPrunerConfig,
    "median": MedianConfig,
    "asha": AshaConfig,
    "hyperband": HyperbandConfig,
}


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig:
    """Warm processes on this machine. Defaults: `conf/executor/`.

    Attributes:
        workers: Trials at once; null: as many as the processor cores allow at
            `training.threads` each.
    """

    name: str
    workers: int | None

    def __post_init__(self) -> None:
        if self.workers is not None:
            check(1 <= self.workers <= 1024, "executor.workers", "in [1, 1024]", self.workers)

    def count(self, threads: int) -> int | None:
        """Trials at once, of so many threads each; None where that is known later."""
        return self.workers or max(1, len(os.sched_getaffinity(0)) // threads)


@dataclass(frozen=True, kw_only=True)
class RayConfig(ExecutorConfig):
    """The nodes of a Ray cluster.

    Attributes:
        workers: Trials at once; null: as many as there is room for at the start.
        address: `auto`, `HOST:PORT` of its head, `ray://HOST:PORT` from outside of it; null:
            RAY_ADDRESS, else the cluster that runs on this machine, else one for this sweep.
        cpus: Processor cores of a worker, a fraction too; null: `training.threads`.
        memory: Of a worker, in GiB; null: not asked for.
        gpus: Of a worker, a fraction too.
    """

    address: str | None
    cpus: float | None
    memory: float | None
    gpus: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.address is not None:
            rule = "auto, local, HOST:PORT, ray://HOST:PORT or null"
            is_one = re.fullmatch(r"auto|local|(ray://)?[^\s/]+:\d{1,5}", self.address)
            check(bool(is_one), "executor.address", rule, self.address)
        for name in ("cpus", "memory"):
            value = getattr(self, name)
            if value is not None:
                check(0 < value < math.inf, f"executor.{name}", "positive or null", value)
        check(0 <= self.gpus < math.inf, "executor.gpus", "0 or more", self.gpus)
        whole = self.gpus < 1 or self.gpus == int(self.gpus)
        check(whole, "executor.gpus", "a whole number from 1 on", self.gpus)

    def count(self, threads: int) -> int | None:
        return self.workers

    def asked(self, threads: int) -> dict[str, float]:
        """What a worker of so many threads takes, by Ray's names of it."""
        asked = {
            "CPU": self.cpus or threads,
            "memory": int((self.memory or 0) * 2**30),
            "GPU": self.gpus,
        }
        return {name: amount for name, amount in asked.items() if amount}


EXECUTORS: dict[str, type[ExecutorConfig]] = {"local": ExecutorConfig, "ray": RayConfig}


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Where the study is kept.

    Attributes:
        storage: Address of Optuna's database; null: SQLite beside MLflow's.
    """

    storage: str | None

    def __post_init__(self) -> None:
        check(
            self.storage is None
            or bool(re.fullmatch(r"sqlite:///.*[^/.]|postgresql(\+\w+)?://.+", self.storage)),
            "study.storage",
            "null, sqlite:///FILE or postgresql+psycopg://HOST/DATABASE",
            self.storage,
        )
        if self.storage:
            check_address("study.storage", self.storage)


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What is looked for, and how long: the section `sweep`.

    Attributes:
        name: Of the sweep; the same name goes on with it. Null makes one.
        trials: Finished trials, complete or pruned, in total over all its interruptions.
        timeout: Seconds of work in total, likewise; null: no limit.
        objective: A metric of a run, or a list of them: one of `OBJECTIVES`.
        first: Configurations tried first: each maps searched names to values, and has the
            configured value of each name it leaves out.
        seed: Of the sampler.
        max_failures: Failed trials at which the sweep gives up.
        patience: Seconds to wait for a server, of the runs or of the study, that is away.
        dry_run: Whether to check and show the plan, and train nothing.
    """

    name: str | None
    trials: int
    timeout: float | None
    objective: Any
    first: list[Any]
    seed: int
    max_failures: int
    patience: float
    dry_run: bool

    def __post_init__(self) -> None:
        if self.name is not None:
            check_name("sweep.name", self.name)
        check_at_least("sweep.trials", self.trials, 1)
        if self.timeout is not None:
            check(0 < self.timeout < float("inf"), "sweep.timeout", "positive", self.timeout)
        check(
            bool(self.objectives) and len(set(self.objectives)) == len(self.objectives),
            "sweep.objective",
            "one metric, or several that differ",
            self.objective,
        )
        for objective in self.objectives:
            check_choice("sweep.objective", objective, tuple(OBJECTIVES))
        for index, given in enumerate(self.first):
            check(
                isinstance(given, dict), f"sweep.first[{index}]", "a map of names to values", given
            )
        check(0 <= self.seed < 2**32, "sweep.seed", "in [0, 2**32)", self.seed)
        check_at_least("sweep.max_failures", self.max_failures, 1)
        check_at_least("sweep.patience", self.patience, 0)

    @property
    def objectives(self) -> tuple[str, ...]:
        """The metrics optimized."""
        listed = self.objective if isinstance(self.objective, list) else [self.objective]
        return tuple(str(objective) for objective in listed)

    @property
    def directions(self) -> tuple[Direction, ...]:
        """`maximize` or `minimize`, an objective."""
        return tuple(OBJECTIVES[objective] for objective in self.objectives)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(RunConfig):
    """One sweep, whole: the run it varies, and how. Defaults: `conf/sweep.yaml`."""

    search: SearchConfig
    sampler: SamplerConfig
    pruner: PrunerConfig
    executor: ExecutorConfig
    study: StudyConfig
    sweep: BudgetConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        check(not self.evaluate_test, "evaluate_test", "false: a trial never looks", True)
        check(
            bool(self.data.validation_size),
            "data.validation_size",
            "positive: trials are judged on validation images",
            self.data.validation_size,
        )
        if self.study.storage and self.study.storage == self.tracking.uri:
            # Optuna and MLflow both keep the version of their tables in one of the same name.
            raise ValueError(
                "study.storage must be another database than tracking.uri, "
                f"got {self.study.storage} for both."
            )
        if len(self.sweep.objectives) > 1:
            check(
                self.sampler.name != "cmaes", "sampler", "another: cmaes has one objective", "cmaes"
            )

    @property
    def run(self) -> RunConfig:
        """The run alone."""
        return RunConfig(**{field.name: getattr(self, field.name) for field in fields(RunConfig)})


# Sections whose type their `name` decides.
VARIANTS: dict[str, dict[str, type]] = {
    "optimizer": {**OPTIMIZERS},
    "sampler": {**SAMPLERS},
    "pruner": {**PRUNERS},
    "executor": {**EXECUTORS},
}


@dataclass(frozen=True, kw_only=True)
class ChosenConfig:
    """Which sweeps: the section `sweep`.

    Attributes:
        name: Of one, or a list of several to compare; null: the latest.
    """

    name: Any

    def __post_init__(self) -> None:
        check(self.name != [], "sweep.name", "a name, a list of names or null", self.name)
        for name in self.names:
            check_name("sweep.name", name)
        check(len(set(self.names)) == len(self.names), "sweep.name", "without repeats", self.name)

    @property
    def names(self) -> list[str]:
        given = self.name if isinstance(self.name, list) else [self.name]
        return [str(name) for name in given if name is not None]


@dataclass(frozen=True, kw_only=True)
class LeaderboardConfig:
    """What is ranked and how it is shown. Defaults: `conf/leaderboard.yaml`.

    Attributes:
        all: Whether to list all sweeps instead.
        rows: At most; null: all.
        format: One of `FORMATS`; null: as the name of the file ends, else a table.
        out: File to write to; null: standard output.
        confidence: Of the interval around a difference that has to leave out 0, in (0, 1).
    """

    tracking: TrackingConfig
    sweep: ChosenConfig
    all: bool
    rows: int | None
    format: str | None
    out: str | None
    confidence: float

    def __post_init__(self) -> None:
        if self.rows is not None:
            check_at_least("rows", self.rows, 1)
        if self.format is not None:
            check_choice("format", self.format, FORMATS)
        check(0 < self.confidence < 1, "confidence", "in (0, 1)", self.confidence)

    @property
    def kind(self) -> str:
        """The format, also where it is not given."""
        ending = (self.out or "").rpartition(".")[2]
        return self.format or (ending if ending in FORMATS else "table")


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """How a promotion decides: the section `promote`. Defaults: `conf/promote.yaml`.

    Attributes:
        top: Trials of the sweep, the best by validation, that are trained again.
        seeds: Fresh ones, each trained with by each of these trials.
        rule: `superiority`: better than the champion; `non_inferiority`: smaller and not worse.
        significance: Chance to find a model better that is not, in (0, 0.5), shared by the
            candidates.
        margin: Accuracy that a smaller model may lack, a fraction in [0, 1).
        floor: Accuracy on the test split that every champion has, a fraction.
    """

    top: int
    seeds: list[int]
    rule: str
    significance: float
    margin: float
    floor: float

    def __post_init__(self) -> None:
        check_at_least("promote.top", self.top, 1)
        check(
            bool(self.seeds) and len(set(self.seeds)) == len(self.seeds),
            "promote.seeds",
            "a list of seeds that differ",
            self.seeds,
        )
        for seed in self.seeds:
            check(0 <= seed < 2**32, "promote.seeds", "of seeds in [0, 2**32)", seed)
        check_choice("promote.rule", self.rule, RULES)
        check(
            0 < self.significance < 0.5,
            "promote.significance",
            "in (0, 0.5)",
            self.significance,
        )
        check(0 <= self.margin < 1, "promote.margin", "in [0, 1)", self.margin)
        check(0 <= self.floor <= 1, "promote.floor", "in [0, 1]", self.floor)


@dataclass(frozen=True, kw_only=True)
class PromotionConfig:
    """What is promoted, or what else is done with the champion. Defaults: `conf/promote.yaml`.

    Attributes:
        run: Id of a single run to promote, instead of a sweep.
        name: Of the registered model; null: that of the data set, or the only one there is.
        rollback: Whether to make the previous champion the champion again instead.
        history: Whether to show the ledger instead.
        data: Where the data is now.
    """

    tracking: TrackingConfig
    executor: ExecutorConfig
    sweep: ChosenConfig
    run: str | None
    name: str | None
    rollback: bool
    history: bool
    data: PlaceConfig
    promote: GateConfig

    def __post_init__(self) -> None:
        if self.name is not None:
            check_name("name", self.name)
        check(len(self.sweep.names) < 2, "sweep.name", "one name or null", self.sweep.name)
        asked = {
            "run": self.run is not None,
            "sweep.name": bool(self.sweep.names),
            "rollback": self.rollback,
            "history": self.history,
        }
        given = [name for name, is_given in asked.items() if is_given]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} exclude each other: give one of them.")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Which stores are looked at. Defaults: `conf/doctor.yaml`.

    Attributes:
        fix: Whether to mend what is safe to mend.
        data: Where the champion's data is now.
    """

    tracking: TrackingConfig
    study: StudyConfig
    data: PlaceConfig
    fix: bool
