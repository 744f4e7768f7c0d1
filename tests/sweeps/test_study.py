"""The study: its storage, who holds it, what is asked of it, also after the asking one died."""

import functools
import itertools
import math
import multiprocessing
import os
import queue
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from pipeline.compose import CONF
from pipeline.config import LATER, flatten
from pipeline.database import LockedError
from sweeps import storage as storage_module
from sweeps.config import PRUNERS, SAMPLERS, PrunerConfig, SamplerConfig, SearchConfig, StudyConfig
from sweeps.space import Space, Values, build_space
from sweeps.storage import open_storage, storage_uri
from sweeps.study import (
    Asker,
    HeldError,
    best_trials,
    build_pruner,
    check_identity,
    find_study,
    hold,
    open_study,
    suggest,
)
from tests.stores import locked

Databases = Callable[[], str]

PROCESSES = 4
ROUNDS = 20
RACES = 20
TRIALS = 9  # of a sweep, of which a sampler has learned from the fifth on
SERVERS = ("sqlite", "postgresql")

spawn = multiprocessing.get_context("spawn")


pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture
def new_address(request: pytest.FixtureRequest, tmp_path: Path) -> Databases:
    """Addresses of databases that are not there yet, or on a server are empty."""
    if request.param == "postgresql":
        on_server: Databases = request.getfixturevalue("new_database")
        return on_server
    folders = itertools.count()
    return lambda: f"sqlite:///{tmp_path / str(next(folders)) / 'optuna.db'}"


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'optuna.db'}"


# --- the storage -------------------------------------------------------------------------


def open_storages(uris: list[str], start: Barrier) -> None:
    """In a process of its own: opens each storage at the same time as the others do."""
    for uri in uris:
        start.wait(timeout=120)
        open_study("sweep", open_storage(uri), ["maximize"])


def open_at_once(uris: list[str]) -> list[int | None]:
    """Opens the storages one after another, each in all processes at once; their exit codes."""
    arguments = (uris, spawn.Barrier(PROCESSES))
    processes = [spawn.Process(target=open_storages, args=arguments) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("new_address", SERVERS, indirect=True)
def test_a_storage_is_first_used_by_several_processes_at_once(new_address: Databases) -> None:
    uris = [new_address() for _ in range(ROUNDS)]

    assert open_at_once(uris) == [0] * PROCESSES

    for uri in uris:
        assert optuna.get_all_study_names(open_storage(uri)) == ["sweep"]


def test_a_local_storage_is_whole_in_wal_mode_and_alone_in_its_folder(
    uri: str, tmp_path: Path
) -> None:
    open_storage(uri).engine.dispose()

    with closing(sqlite3.connect(tmp_path / "optuna.db")) as database:
        (mode,) = database.execute("PRAGMA journal_mode").fetchone()
        (integrity,) = database.execute("PRAGMA integrity_check").fetchone()
    assert (mode, integrity) == ("wal", "ok")
    assert {path.name for path in tmp_path.iterdir()} == {"optuna.db", ".create.lock"}


def test_a_study_is_kept_beside_the_runs_unless_it_has_an_address(
    configure: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracking = configure("data=digits").tracking

    assert storage_uri(StudyConfig(storage=None), tracking) == (
        f"sqlite:///{tmp_path / 'mlruns' / 'optuna.db'}"
    )
    assert storage_uri(StudyConfig(storage="sqlite:///mine.db"), tracking) == (
        f"sqlite:///{tmp_path / 'mine.db'}"
    )
    assert storage_uri(StudyConfig(storage="postgresql+psycopg://host/db"), tracking) == (
        "postgresql+psycopg://host/db"
    )


def lock_database(path: Path, seconds: float, locked: Any) -> None:
    """In a process of its own: nobody else writes for a while."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("BEGIN IMMEDIATE")
        locked.set()
        time.sleep(seconds)
        database.rollback()


def test_a_database_that_another_process_locks_for_a_while_is_waited_for(
    uri: str, tmp_path: Path
) -> None:
    study = open_study("sweep", open_storage(uri), ["maximize"])
    trial, locked = study.ask(), spawn.Event()
    process = spawn.Process(target=lock_database, args=(tmp_path / "optuna.db", 8.0, locked))
    process.start()
    assert locked.wait(timeout=60)
    began = time.monotonic()

    study.tell(trial, 0.9)

    assert 6 < time.monotonic() - began < 20
    assert [told.state for told in study.trials] == [TrialState.COMPLETE]
    process.join()


def test_a_database_that_stays_locked_is_told_after_one_wait_also_where_a_trial_is_asked(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna itself would wait five times."""
    monkeypatch.setattr(storage_module, "LOCK_TIMEOUT", 2)
    study = open_study("sweep", open_storage(uri), ["maximize"])
    began = time.monotonic()

    with locked(tmp_path / "optuna.db"), pytest.raises(LockedError) as refusal:
        study.ask()

    assert 1.9 < time.monotonic() - began < 8
    assert str(refusal.value).startswith(f"{tmp_path / 'optuna.db'} was locked by another process")
    assert study.ask().number == 0


# --- holding a sweep ---------------------------------------------------------------------


def hold_until_killed(name: str, uri: str, holding: Any) -> None:
    with hold(name, uri):
        holding.set()
        time.sleep(600)


@contextmanager
def holder(name: str, uri: str) -> Iterator[BaseProcess]:
    """Another process that holds the sweep."""
    holding = spawn.Event()
    process = spawn.Process(target=hold_until_killed, args=(name, uri, holding))
    process.start()
    try:
        assert holding.wait(timeout=60)
        yield process
    finally:
        process.kill()
        process.join()


def can_hold(name: str, uri: str) -> bool:
    try:
        with hold(name, uri):
            return True
    except HeldError:
        return False


def can_soon_hold(name: str, uri: str) -> bool:
    """Within 5 seconds: a server has to notice that its client is gone."""
    end = time.monotonic() + 5
    while not (held := can_hold(name, uri)) and time.monotonic() < end:
        time.sleep(0.05)
    return held


@pytest.mark.parametrize("new_address", SERVERS, indirect=True)
def test_a_sweep_that_another_process_holds_is_refused_and_the_holder_named(
    new_address: Databases,
) -> None:
    uri = new_address()
    with holder("mine", uri) as process:
        expected = (
            f"sweep.name=mine is being run by process {process.pid} on {socket.gethostname()}."
        )

        with pytest.raises(HeldError) as refusal, hold("mine", uri):
            pass

        assert str(refusal.value) == expected
        assert can_hold("yours", uri)


@pytest.mark.parametrize("new_address", SERVERS, indirect=True)
def test_a_sweep_is_free_again_when_its_holder_is_killed(new_address: Databases) -> None:
    uri = new_address()
    with holder("mine", uri) as process:
        process.kill()
        process.join()

        assert can_soon_hold("mine", uri)


@pytest.mark.parametrize("new_address", SERVERS, indirect=True)
def test_a_sweep_is_free_again_when_its_holder_has_ended(new_address: Databases) -> None:
    uri = new_address()
    with pytest.raises(ZeroDivisionError), hold("mine", uri):
        raise ZeroDivisionError

    assert can_hold("mine", uri)


@pytest.mark.parametrize("new_address", SERVERS, indirect=True)
def test_sweeps_of_one_name_in_two_databases_do_not_meet(new_address: Databases) -> None:
    one, other = new_address(), new_address()
    with holder("mine", one), holder("mine", other) as process:
        with pytest.raises(HeldError) as refusal, hold("mine", other):
            pass

        assert f"process {process.pid} " in str(refusal.value)


def compete(uri: str, start: Barrier, outcomes: Any) -> None:
    """In a process of its own: starts the same sweep again and again, at once with another one."""
    for number in range(RACES):
        start.wait(timeout=120)
        try:
            with hold("mine", uri):
                outcomes.put((number, "won", os.getpid()))
                start.wait(timeout=120)  # until the other one has tried
        except HeldError as error:
            outcomes.put((number, "lost", str(error)))
            start.wait(timeout=120)


@pytest.mark.parametrize("new_address", SERVERS, indirect=True)
def test_of_two_that_start_a_sweep_at_once_one_wins_and_the_other_is_told_which(
    new_address: Databases,
) -> None:
    outcomes: queue.Queue[tuple[int, str, Any]] = spawn.Queue()  # type: ignore[assignment]
    arguments = (new_address(), spawn.Barrier(2), outcomes)
    processes = [spawn.Process(target=compete, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    ended = sorted((outcomes.get(timeout=120) for _ in range(2 * RACES)), key=lambda each: each[:2])
    for process in processes:
        process.join()

    assert [end[:2] for end in ended] == [
        (number, result) for number in range(RACES) for result in ("lost", "won")
    ]
    for lost, won in zip(ended[::2], ended[1::2], strict=True):
        assert f"is being run by process {won[2]} on " in lost[2]


# --- the study ---------------------------------------------------------------------------

IDENTITY = {"sweep.objective": "val_accuracy", "data": "abc", "training.epochs": "20"}


def test_a_study_that_is_not_there_is_not_created_by_looking_for_it(
    uri: str, tmp_path: Path
) -> None:
    assert find_study("mine", uri) is None
    assert list(tmp_path.iterdir()) == []

    open_study("yours", open_storage(uri), ["maximize"])

    assert find_study("mine", uri) is None
    assert optuna.get_all_study_names(open_storage(uri)) == ["yours"]


@pytest.mark.parametrize("new_address", SERVERS, indirect=True)
def test_a_study_is_found_with_its_trials_by_its_name(new_address: Databases) -> None:
    uri = new_address()
    study = open_study("mine", open_storage(uri), ["minimize", "maximize"])
    study.tell(study.ask(), [0.1, 0.9])

    again = open_study("mine", open_storage(uri), ["minimize", "maximize"])
    found = find_study("mine", uri)

    assert found is not None
    assert [trial.values for trial in found.trials] == [[0.1, 0.9]]
    assert found.trials == again.trials
    assert [direction.name for direction in found.directions] == ["MINIMIZE", "MAXIMIZE"]


def test_the_same_identity_is_accepted_again_and_again(uri: str) -> None:
    study = open_study("mine", open_storage(uri), ["maximize"])

    for _ in range(2):
        check_identity(study, dict(reversed(IDENTITY.items())))
        check_identity(open_study("mine", open_storage(uri), ["maximize"]), IDENTITY)


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({**IDENTITY, "data": "abd"}, "data: abc -> abd"),
        ({**IDENTITY, "model.l2": "0.1"}, "model.l2: (none) -> 0.1"),
        ({"sweep.objective": "val_accuracy", "data": "abc"}, "training.epochs: 20 -> (none)"),
        (
            {**IDENTITY, "sweep.objective": "val_loss", "data": ""},
            "sweep.objective: val_accuracy -> val_loss; data: abc -> ",
        ),
    ],
)
def test_another_identity_is_refused_with_the_difference(
    uri: str, changed: dict[str, str], difference: str
) -> None:
    study = open_study("mine", open_storage(uri), ["maximize"])
    check_identity(study, IDENTITY)

    with pytest.raises(ValueError) as refusal:
        check_identity(study, changed)

    assert str(refusal.value) == (
        f"sweep.name=mine was started differently: {difference}. Give the new one another name."
    )
    check_identity(study, IDENTITY)


LATER_SETTINGS = dict(flatten(LATER))


def test_a_sweep_of_a_version_that_had_fewer_settings_goes_on_as_it_was(uri: str) -> None:
    study = open_study("mine", open_storage(uri), ["maximize"])
    check_identity(study, IDENTITY)

    check_identity(study, {**IDENTITY, **LATER_SETTINGS})

    with pytest.raises(ValueError, match=r"training\.ema_momentum: 0\.0 -> 0\.9"):
        check_identity(study, {**IDENTITY, **LATER_SETTINGS, "training.ema_momentum": "0.9"})


def test_what_a_later_setting_is_searched_over_may_not_change(uri: str) -> None:
    study = open_study("mine", open_storage(uri), ["maximize"])
    space = "search.space['training.ema_momentum']"
    check_identity(study, {**IDENTITY, space: "interval(0, 0.9)"})

    check_identity(study, {**IDENTITY, space: "interval(0, 0.9)"})

    with pytest.raises(ValueError, match=r"training\.ema_momentum"):
        check_identity(study, {**IDENTITY, **LATER_SETTINGS})


def test_the_best_trials_are_the_best_one_or_the_pareto_front_or_none(uri: str) -> None:
    storage = open_storage(uri)
    one = open_study("one", storage, ["maximize"])
    two = open_study("two", storage, ["maximize", "minimize"])
    assert best_trials(one) == best_trials(two) == []

    for accuracy, parameters in [(0.9, 10), (0.8, 5), (0.7, 7)]:
        one.tell(one.ask(), accuracy)
        two.tell(two.ask(), [accuracy, parameters])

    assert [trial.number for trial in best_trials(one)] == [0]
    assert [trial.number for trial in best_trials(two)] == [0, 1]


# --- asking ------------------------------------------------------------------------------

CATEGORICAL = {
    "model.activation": "choice(relu, gelu, silu)",
    "model.batch_normalization": "choice(true, false)",
    "optimizer": "choice(rmsprop, adam, sgd)",
}
MIXED = {
    "model.hidden_units": "tag(log, int(interval(32, 1024)))",
    "model.hidden_layers": "range(1, 5)",
    "optimizer.learning_rate": "tag(log, interval(1e-4, 1e-2))",
    "optimizer.schedule": "choice(constant, cosine)",
    "optimizer.warmup_epochs": "range(0.0, 2.1, 0.5)",
}


@functools.cache
def space_of(name: str) -> Space:
    """One of the spaces that come with the product, or of the test's own."""
    own: dict[str, dict[str, Any]] = {
        "categorical": {"space": CATEGORICAL, "when": {}},
        "mixed": {
            "space": MIXED,
            "when": {"optimizer.warmup_epochs": "optimizer.schedule=cosine"},
        },
    }
    path = CONF / "search" / f"{name}.yaml"
    search = own.get(name) or yaml.safe_load(path.read_text(encoding="utf-8"))
    return build_space(SearchConfig(**search), {}, [])


def sampler_of(name: str, **changes: object) -> SamplerConfig:
    settings = yaml.safe_load((CONF / "sampler" / f"{name}.yaml").read_text(encoding="utf-8"))
    return SAMPLERS[name](**{**settings, **changes})


def asker(study: optuna.Study, space: Space, sampler: SamplerConfig, **given: Any) -> Asker:
    return Asker(study, space, sampler, **{"seed": 3, "known": [], "configured": {}, **given})


def value_of(values: Values) -> float:
    """What a trial comes to: a smooth function of its numbers, with a bump for each choice."""
    return sum(
        math.sin(value) if isinstance(value, int | float) else len(str(value)) / 10
        for value in values.values()
    )


@pytest.mark.parametrize("space", ["mlp", "deep", "categorical"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_a_sampler_asks_lies_in_the_space(uri: str, sampler: str, space: str) -> None:
    searched = space_of(space)
    study = open_study("sweep", open_storage(uri), ["maximize"])
    asking = asker(study, searched, sampler_of(sampler))
    asked: list[Values] = []

    for _ in range(15):
        trial, values = asking.ask()
        asking.tell(trial, [value_of(values)], TrialState.COMPLETE)
        asked.append(values)

    assert [trial.number for trial in study.trials] == list(range(15))
    assert [trial.params for trial in study.trials] == asked
    for values in asked:
        drawn = searched.assign(lambda parameter, v=values: v[parameter.name], {})  # type: ignore[misc]
        assert drawn == values
        assert all(p.contains(values[p.name]) for p in searched.parameters if p.name in values)
    assert len({tuple(values.items()) for values in asked}) > 5


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_several_objectives_can_be_asked_for(uri: str, sampler: str) -> None:
    study = open_study("sweep", open_storage(uri), ["maximize", "minimize"])
    asking = asker(study, space_of("deep"), sampler_of(sampler))

    for _ in range(15):
        trial, values = asking.ask()
        asking.tell(trial, [value_of(values), len(values)], TrialState.COMPLETE)

    assert len(study.trials) == 15


@dataclass(frozen=True, kw_only=True)
class Sweeping:
    """A sweep of one worker, whose launcher lives for a trial, or dies while it asks.

    Attributes:
        uri: Of its storage, which each launcher opens anew.
        space: Searched.
        sampler: Of it.
        known: Configurations that come first.
    """

    uri: str
    space: Space
    sampler: SamplerConfig
    known: Sequence[Values] = ()

    def launcher(self) -> Asker:
        study = open_study("sweep", open_storage(self.uri), ["maximize"])
        return asker(study, self.space, self.sampler, known=self.known)

    def go_on(self, asking: Asker) -> None:
        """Adopts the trial that is under way, or asks for one, and tells its value.

        Every third one fails, every fourth is pruned: samplers tell them apart.
        """
        running = asking.study.get_trials(states=[TrialState.RUNNING])
        trial, values = asking.adopt(running[0]) if running else asking.ask()
        trial.report(value_of(values), step=1)
        if trial.number % 3 == 2:
            asking.tell(trial, None, TrialState.FAIL)
        elif trial.number % 4 == 3:
            asking.tell(trial, None, TrialState.PRUNED)
        else:
            asking.tell(trial, [value_of(values)], TrialState.COMPLETE)

    def die_asking(self, suggested: int) -> None:
        """A launcher of an older version, which wrote each parameter as it was suggested, dies."""
        study = open_study("sweep", open_storage(self.uri), ["maximize"])
        study.sampler = self.launcher().study.sampler
        trial = study.ask()
        for parameter in self.space.parameters[:suggested]:
            suggest(trial, parameter)

    @property
    def trials(self) -> list[tuple[int, TrialState, Values, list[float] | None]]:
        study = self.launcher().study
        return [(trial.number, trial.state, trial.params, trial.values) for trial in study.trials]


def sweeping(folder: Path, sampler: str, space: str, **given: Any) -> Sweeping:
    settings = {"n_startup_trials": 3} if sampler in ("tpe", "cmaes") else {}
    return Sweeping(
        uri=f"sqlite:///{folder / 'optuna.db'}",
        space=space_of(space),
        sampler=sampler_of(sampler, **settings),
        **given,
    )


@functools.cache
def undisturbed(folder: Path, sampler: str, space: str) -> Any:
    """The trials of a sweep of one launcher; asked for once a sampler and space."""
    sweep = sweeping(folder, sampler, space)
    asking = sweep.launcher()
    for _ in range(TRIALS):
        sweep.go_on(asking)
    return sweep.trials


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    """What sweeps come to that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return lambda sampler, space: undisturbed(folder / f"{sampler}-{space}", sampler, space)


EACH = pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "qmc"])


@pytest.mark.parametrize("space", ["mlp", "mixed"])
@EACH
def test_a_sweep_is_the_same_when_each_trial_has_a_launcher_of_its_own(
    tmp_path: Path, expected: Callable[[str, str], Any], sampler: str, space: str
) -> None:
    sweep = sweeping(tmp_path, sampler, space)

    for _ in range(TRIALS):
        sweep.go_on(sweep.launcher())

    assert sweep.trials == expected(sampler, space)


@EACH
@pytest.mark.parametrize("suggested", [0, 2])
def test_a_sweep_is_the_same_when_launchers_die_while_they_ask(
    tmp_path: Path, expected: Callable[[str, str], Any], sampler: str, suggested: int
) -> None:
    sweep = sweeping(tmp_path, sampler, "mixed")

    for _ in range(TRIALS):
        sweep.die_asking(suggested)
        sweep.go_on(sweep.launcher())

    assert sweep.trials == expected(sampler, "mixed")


@EACH
def test_a_trial_that_is_adopted_keeps_its_values(uri: str, sampler: str) -> None:
    study = open_study("sweep", open_storage(uri), ["maximize"])
    asking = asker(study, space_of("mixed"), sampler_of(sampler))
    for _ in range(5):
        trial, values = asking.ask()
        asking.tell(trial, [value_of(values)], TrialState.COMPLETE)
    asked = [asking.ask() for _ in range(2)]

    again = open_study("sweep", open_storage(uri), ["maximize"])
    adopting = asker(again, space_of("mixed"), sampler_of(sampler))
    adopted = [adopting.adopt(frozen) for frozen in again.get_trials(states=[TrialState.RUNNING])]

    assert [(trial.number, values) for trial, values in adopted] == [
        (trial.number, values) for trial, values in asked
    ]


def test_another_seed_asks_other_trials(uri: str) -> None:
    first = []
    for seed in (0, 1):
        study = open_study(f"seed {seed}", open_storage(uri), ["maximize"])
        first.append(asker(study, space_of("mlp"), sampler_of("random"), seed=seed).ask()[1])

    assert first[0] != first[1]


# --- known configurations ----------------------------------------------------------------

KNOWN: list[Values] = [
    {
        "model.hidden_units": 512,
        "model.hidden_layers": 2,
        "optimizer.learning_rate": 1e-3,
        "optimizer.schedule": "constant",
    },
    {
        "model.hidden_units": 33,
        "model.hidden_layers": 4,
        "optimizer.learning_rate": 1e-2,
        "optimizer.schedule": "cosine",
        "optimizer.warmup_epochs": 1.5,
    },
]


@EACH
def test_known_configurations_come_first_in_their_order(tmp_path: Path, sampler: str) -> None:
    sweep = sweeping(tmp_path, sampler, "mixed", known=KNOWN)

    for _ in range(5):
        sweep.go_on(sweep.launcher())

    assert [params for _, _, params, _ in sweep.trials[:2]] == KNOWN
    assert [number for number, _, _, _ in sweep.trials] == list(range(5))
    assert all(params not in KNOWN for _, _, params, _ in sweep.trials[2:])


@EACH
def test_known_configurations_come_once_when_a_launcher_died_between_them(
    tmp_path: Path, sampler: str
) -> None:
    whole = sweeping(tmp_path / "whole", sampler, "mixed", known=KNOWN)
    disturbed = sweeping(tmp_path / "disturbed", sampler, "mixed", known=KNOWN)

    for number in range(5):
        whole.go_on(whole.launcher())
        dying = open_study("sweep", open_storage(disturbed.uri), ["maximize"])
        for known in KNOWN[number : number + 1]:
            dying.enqueue_trial(known)
        disturbed.go_on(disturbed.launcher())

    assert disturbed.trials == whole.trials


def test_known_configurations_are_asked_by_several_workers_at_once(tmp_path: Path) -> None:
    sweep = sweeping(tmp_path, "tpe", "mixed", known=KNOWN)
    asking = sweep.launcher()

    asked = [asking.ask() for _ in range(4)]

    assert [trial.number for trial, _ in asked] == [0, 1, 2, 3]
    assert [values for _, values in asked[:2]] == KNOWN


# --- pruners -----------------------------------------------------------------------------


def pruner_of(name: str, **changes: object) -> PrunerConfig:
    settings = yaml.safe_load((CONF / "pruner" / f"{name}.yaml").read_text(encoding="utf-8"))
    if name == "hyperband":
        settings["max_resource"] = 30
    return PRUNERS[name](**{**settings, **changes})


def pruned_after(uri: str, config: PrunerConfig, *, trials: int, epochs: int = 30) -> int | None:
    """The epoch in which a trial is stopped that is worse than all those before it."""
    study = open_study("sweep", open_storage(uri), ["maximize"])
    study.pruner = build_pruner(config)
    for number in range(trials):
        assert stopped_after(study, 0.5 + number / 100, epochs) is None
    return stopped_after(study, 0.1, epochs)


def stopped_after(study: optuna.Study, value: float, epochs: int) -> int | None:
    """The epoch in which a trial is stopped that has the same value in each."""
    trial = study.ask()
    for epoch in range(1, epochs + 1):
        trial.report(value, epoch)
        if trial.should_prune():
            study.tell(trial, state=TrialState.PRUNED)
            return epoch
    study.tell(trial, value)
    return None


@pytest.mark.parametrize(
    ("config", "trials", "epoch"),
    [
        (pruner_of("none"), 9, None),
        (pruner_of("median", n_warmup_steps=0), 9, 1),
        (pruner_of("median", n_startup_trials=5), 4, None),
        (pruner_of("median", n_warmup_steps=10, interval_steps=3), 9, 10),
        (pruner_of("asha"), 9, 3),
        (pruner_of("asha", min_resource=5), 9, 5),
        (pruner_of("asha", min_early_stopping_rate=1), 9, 9),
        (pruner_of("asha", reduction_factor=2, min_resource=1), 9, 1),
    ],
)
def test_a_hopeless_trial_is_stopped_when_its_pruner_says_so(
    uri: str, config: PrunerConfig, trials: int, epoch: int | None
) -> None:
    assert pruned_after(uri, config, trials=trials) == epoch


def test_hyperband_stops_hopeless_trials_at_one_of_its_rungs(uri: str) -> None:
    assert pruned_after(uri, pruner_of("hyperband"), trials=20) in (3, 9, 27)
