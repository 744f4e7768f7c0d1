"""The settings of a sweep: their ranges, and that every option under `conf/` composes."""

from dataclasses import replace

import hydra
import pytest
from hydra.errors import HydraException

from pipeline.compose import CONF, explain, to_typed
from sweeps.config import (
    EXECUTORS,
    OBJECTIVES,
    PRUNERS,
    SAMPLERS,
    VARIANTS,
    ExecutorConfig,
    HyperbandConfig,
    SweepConfig,
)


def compose(*overrides: str) -> SweepConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return to_typed(hydra.compose("sweep", list(overrides)), SweepConfig, VARIANTS)


def error_of(*overrides: str) -> str:
    with pytest.raises(ValueError) as error:
        compose(*overrides)
    return str(error.value)


# --- what composes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "option", "expected"),
    [
        (group, option, kind)
        for group, kinds in (("sampler", SAMPLERS), ("pruner", PRUNERS), ("executor", EXECUTORS))
        for option, kind in kinds.items()
    ],
)
def test_an_option_composes_to_its_own_type(group: str, option: str, expected: type) -> None:
    section = getattr(compose(f"{group}={option}"), group)

    assert section.name == option
    assert type(section) is expected


@pytest.mark.parametrize(
    ("group", "kinds"), [("sampler", SAMPLERS), ("pruner", PRUNERS), ("executor", EXECUTORS)]
)
def test_every_type_has_its_file(group: str, kinds: dict[str, type]) -> None:
    assert {path.stem for path in (CONF / group).glob("*.yaml")} == {*kinds}


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "search").glob("*.yaml")))
def test_no_search_space_but_none_is_empty(option: str) -> None:
    space = compose(f"search={option}").search.space

    assert (space == {}) == (option == "none")


def test_by_default_a_sweep_looks_for_accuracy_and_begins_as_configured() -> None:
    sweep = compose().sweep

    assert sweep.objectives == ("val_accuracy",)
    assert sweep.directions == ("maximize",)
    assert sweep.first == [{}]
    assert not sweep.dry_run


@pytest.mark.parametrize(
    ("written", "objectives", "directions"),
    [
        ("val_loss", ("val_loss",), ("minimize",)),
        ("[val_loss]", ("val_loss",), ("minimize",)),
        ("[val_accuracy, parameters]", ("val_accuracy", "parameters"), ("maximize", "minimize")),
        ("[fit_seconds, val_accuracy]", ("fit_seconds", "val_accuracy"), ("minimize", "maximize")),
    ],
)
def test_an_objective_is_one_metric_or_several(
    written: str, objectives: tuple[str, ...], directions: tuple[str, ...]
) -> None:
    sweep = compose(f"sweep.objective={written}").sweep

    assert (sweep.objectives, sweep.directions) == (objectives, directions)


def test_no_objective_is_of_the_test_split() -> None:
    assert [name for name in OBJECTIVES if "test" in name] == []


def test_the_run_of_a_sweep_is_what_it_is_without_the_sections_of_the_sweep() -> None:
    config = compose("model.hidden_units=64", "sampler=random")

    assert config.run.model is config.model
    assert not hasattr(config.run, "sampler")


def test_hyperband_prunes_within_the_epochs_of_a_run() -> None:
    pruner = compose("pruner=hyperband", "training.epochs=17").pruner

    assert isinstance(pruner, HyperbandConfig)
    assert pruner.max_resource == 17


@pytest.mark.parametrize(("cores", "threads", "count"), [(8, 1, 8), (8, 3, 2), (2, 4, 1)])
def test_unless_told_there_are_as_many_workers_as_the_cores_allow(
    cores: int, threads: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))

    assert ExecutorConfig(name="local", workers=None).count(threads) == count
    assert ExecutorConfig(name="local", workers=5).count(threads) == 5


# --- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key", "rule"),
    [
        (["sweep.trials=0"], "sweep.trials", "at least 1, got 0."),
        (["sweep.timeout=0"], "sweep.timeout", "positive, got 0.0."),
        (["sweep.timeout=inf"], "sweep.timeout", "positive, got inf."),
        (["sweep.timeout=nan"], "sweep.timeout", "positive, got nan."),
        (["sweep.max_failures=0"], "sweep.max_failures", "at least 1, got 0."),
        (["sweep.seed=-1"], "sweep.seed", "in [0, 2**32), got -1."),
        (["sweep.seed=4294967296"], "sweep.seed", "in [0, 2**32), got 4294967296."),
        (["sweep.name=../x"], "sweep.name", "1 to 64 of the characters"),
        (["sweep.name=..."], "sweep.name", "1 to 64 of the characters"),
        ([f"sweep.name={'x' * 65}"], "sweep.name", "1 to 64 of the characters"),
        (["sweep.objective=accuracy"], "sweep.objective", "one of val_accuracy, val_loss, "),
        (["sweep.objective=test_accuracy"], "sweep.objective", "one of val_accuracy, "),
        (["sweep.objective=null"], "sweep.objective", "one of val_accuracy, "),
        (["sweep.objective=[]"], "sweep.objective", "one metric, or several that differ"),
        (["sweep.objective=[val_loss,val_loss]"], "sweep.objective", "several that differ"),
        (["sampler.n_startup_trials=-1"], "sampler.n_startup_trials", "at least 0, got -1."),
        (["sampler.n_ei_candidates=0"], "sampler.n_ei_candidates", "at least 1, got 0."),
        (["sampler.n_modelled_trials=249"], "sampler.n_modelled_trials", "at least 250, got 249."),
        (["sampler=cmaes", "sampler.sigma0=0"], "sampler.sigma0", "in (0, 1] or null, got 0.0."),
        (["sampler=cmaes", "sampler.sigma0=1.1"], "sampler.sigma0", "in (0, 1] or null, got 1.1."),
        (["sampler=cmaes", "sampler.popsize=1"], "sampler.popsize", "at least 2, got 1."),
        (["sampler=cmaes", "sampler.n_startup_trials=-1"], "sampler.n_startup_trials", "at least"),
        (["sampler=qmc", "sampler.qmc_type=sobel"], "sampler.qmc_type", "one of sobol, halton"),
        (["sampler=grid", "sampler.points=1"], "sampler.points", "at least 2, got 1."),
        (["pruner=median", "pruner.n_startup_trials=-1"], "pruner.n_startup_trials", "at least 0"),
        (["pruner=median", "pruner.n_warmup_steps=-1"], "pruner.n_warmup_steps", "at least 0"),
        (["pruner=median", "pruner.interval_steps=0"], "pruner.interval_steps", "at least 1"),
        (["pruner=asha", "pruner.min_resource=0"], "pruner.min_resource", "at least 1, got 0."),
        (["pruner=asha", "pruner.reduction_factor=1"], "pruner.reduction_factor", "at least 2"),
        (
            ["pruner=asha", "pruner.min_early_stopping_rate=-1"],
            "pruner.min_early_stopping_rate",
            "at least 0, got -1.",
        ),
        (["pruner=hyperband", "pruner.min_resource=0"], "pruner.min_resource", "at least 1"),
        (["pruner=hyperband", "training.epochs=2"], "pruner.max_resource", "at least 3, got 2."),
        (["pruner=hyperband", "pruner.reduction_factor=1"], "pruner.reduction_factor", "least 2"),
        (["executor.workers=0"], "executor.workers", "in [1, 1024], got 0."),
        (["executor.workers=1025"], "executor.workers", "in [1, 1024], got 1025."),
        (["executor=ray", "executor.address=head"], "executor.address", "auto, local, HOST:PORT"),
        (["executor=ray", "executor.cpus=0"], "executor.cpus", "positive or null, got 0.0."),
        (["executor=ray", "executor.memory=inf"], "executor.memory", "positive or null, got inf"),
        (["executor=ray", "executor.gpus=1.5"], "executor.gpus", "a whole number from 1 on"),
        (["executor=ray", "executor.gpus=-1"], "executor.gpus", "0 or more, got -1.0."),
        (["study.storage=optuna.db"], "study.storage", "null, sqlite:///FILE or postgresql"),
        (["evaluate_test=true"], "evaluate_test", "false: a trial never looks, got True."),
        (["sampler.name=tpes"], "sampler.name", "one of tpe, random, cmaes, qmc, grid, got 'tpes'"),
        (["pruner.name=asa"], "pruner.name", "one of none, median, asha, hyperband, got 'asa'."),
        (["executor.name=ry"], "executor.name", "one of local"),
        (["+search.when={model.l2: 'seed=1'}"], "search.when['model.l2']", "of search.space"),
    ],
    ids=str,
)
def test_a_setting_out_of_its_range_is_refused_with_its_key_and_rule(
    overrides: list[str], key: str, rule: str
) -> None:
    told = error_of(*overrides)

    assert told.startswith(f"{key} must be ")
    assert rule in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["sweep.trials=many"], "sweep.trials"),
        (["sweep.trials=1.5"], "sweep.trials"),
        (["sweep.trials=null"], "sweep.trials"),
        (["sweep.dry_run=maybe"], "sweep.dry_run"),
        (["sweep.first=[3]"], "sweep.first"),
        (["sweep.first=3"], "sweep.first"),
        (["+sweep.first.x=3"], "sweep.first"),
        (["executor.workers=two"], "executor.workers"),
        (["+sampler.points=3"], "points"),
        (["sampler.name=grid"], "sampler"),
    ],
    ids=str,
)
def test_a_setting_of_the_wrong_type_is_refused_with_its_key(
    overrides: list[str], key: str
) -> None:
    with pytest.raises((ValueError, HydraException)) as error:
        compose(*overrides)

    assert key in explain(error.value, "sweep")


@pytest.mark.parametrize("early_stopping", ["null", "3"])
def test_a_sweep_without_validation_images_is_refused(early_stopping: str) -> None:
    told = error_of("data.validation_size=0", f"training.early_stopping_patience={early_stopping}")

    assert "data.validation_size" in told


def test_a_sweep_that_would_judge_by_nothing_says_why() -> None:
    config = compose()

    with pytest.raises(ValueError, match="validation"):
        replace(
            config,
            data=replace(config.data, validation_size=0),
            training=replace(config.training, early_stopping_patience=None),
        )


def test_cmaes_has_one_objective() -> None:
    assert compose("sampler=cmaes", "sweep.objective=[val_loss]").sweep.objectives == ("val_loss",)
    assert error_of("sampler=cmaes", "sweep.objective=[val_loss,parameters]") == (
        "sampler must be another: cmaes has one objective, got 'cmaes'."
    )


def test_the_study_and_the_runs_have_a_database_each() -> None:
    address = "postgresql+psycopg://me@127.0.0.1/one"

    assert error_of(f"study.storage={address}", f"tracking.uri={address}") == (
        f"study.storage must be another database than tracking.uri, got {address} for both."
    )
