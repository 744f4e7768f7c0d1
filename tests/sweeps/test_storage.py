"""What every storage of a study promises, on a file and on a server."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from sweeps.config import RandomConfig, SearchConfig
from sweeps.space import Values, build_space
from sweeps.storage import (
    OwnStorage,
    _Layer,
    open_storage,
    patient_storage,
    warn_of_connections,
)
from sweeps.study import Asker, open_study

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

SPACE = {
    "model.dropout_rate": "interval(0.0, 0.5)",
    "model.hidden_units": "tag(log, int(interval(32, 1024)))",
    "model.activation": "choice(relu, gelu)",
}


@pytest.fixture(params=["sqlite", "postgresql"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a database that is not there yet, or on a server is empty."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("new_database")())
    return f"sqlite:///{tmp_path / 'optuna.db'}"


def launcher(
    uri: str,
    layer: Callable[[BaseStorage], BaseStorage] = lambda storage: storage,
    known: Sequence[Values] = (),
) -> Asker:
    """One that has just come, with nothing but the database."""
    study = open_study("sweep", layer(patient_storage(uri, seconds=0.0)), ["maximize"])
    space = build_space(SearchConfig(space=SPACE, when={}), {}, [])
    random = RandomConfig(name="random")
    return Asker(study, space, random, seed=0, known=known, configured={})


def stored(uri: str) -> list[FrozenTrial]:
    """As another process sees them."""
    return optuna.load_study(study_name="sweep", storage=open_storage(uri)).trials


def worker(uri: str, trial: Trial) -> Trial:
    """The trial in another process."""
    study = optuna.load_study(study_name="sweep", storage=open_storage(uri))
    return Trial(study, trial._trial_id)


def interrupt(*arguments: object, **named: object) -> None:
    raise KeyboardInterrupt


def test_a_trial_that_is_asked_is_stored_whole(uri: str) -> None:
    asking = launcher(uri)

    asked = [asking.ask() for _ in range(3)]

    trials = stored(uri)
    assert [(trial.number, trial.state) for trial in trials] == [
        (number, TrialState.RUNNING) for number in range(3)
    ]
    assert [trial.params for trial in trials] == [values for _, values in asked]
    assert [trial._trial_id for trial in trials] == [trial._trial_id for trial, _ in asked]


def test_a_launcher_that_dies_while_it_asks_leaves_nothing(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = launcher(uri)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trial, "suggest_categorical", interrupt)  # the last of the three
        asking.ask()

    assert stored(uri) == []
    assert launcher(uri).ask()[0].number == 0


@pytest.mark.parametrize(
    ("values", "state"),
    [([0.9], TrialState.COMPLETE), (None, TrialState.PRUNED), (None, TrialState.FAIL)],
    ids=str,
)
def test_what_is_told_is_stored_with_what_the_worker_reported(
    uri: str, values: list[float] | None, state: TrialState
) -> None:
    asking = launcher(uri)
    trial, _ = asking.ask()
    trial.set_user_attr("run_id", "abc")
    at_work = worker(uri, trial)
    at_work.report(0.5, 1)
    at_work.report(0.7, 2)
    at_work.set_user_attr("pruned", 2)

    told = asking.tell(trial, values, state)

    (kept,) = stored(uri)
    assert (told.state, told.values) == (kept.state, kept.values)
    assert kept.state == state
    assert kept.values == (values if state != TrialState.PRUNED else [0.7])
    assert told.intermediate_values == kept.intermediate_values == {1: 0.5, 2: 0.7}
    assert told.user_attrs == kept.user_attrs == {"run_id": "abc", "pruned": 2}


def test_the_launcher_remembers_what_is_stored(uri: str) -> None:
    asking = launcher(uri)
    for number in range(6):
        trial, _ = asking.ask()
        trial.set_user_attr("number", number)
        if number % 2:
            asking.tell(trial, [number / 10], TrialState.COMPLETE)

    remembered = asking.study.get_trials()

    assert remembered == stored(uri) == launcher(uri).study.get_trials()
    running = asking.study.get_trials(states=[TrialState.RUNNING])
    assert [trial.number for trial in running] == [0, 2, 4]


def test_another_launcher_goes_on_where_one_has_died(uri: str) -> None:
    dead = launcher(uri)
    _, values = dead.ask()

    alive = launcher(uri)
    (frozen,) = alive.study.get_trials(states=[TrialState.RUNNING])
    adopted, again = alive.adopt(frozen)
    alive.tell(adopted, [0.9], TrialState.COMPLETE)
    asked, _ = alive.ask()

    assert again == values
    assert asked.number == 1
    assert [trial.state for trial in stored(uri)] == [TrialState.COMPLETE, TrialState.RUNNING]


def test_a_trial_that_somebody_else_created_is_noticed(uri: str) -> None:
    asking = launcher(uri)
    asking.ask()
    foreign = optuna.load_study(study_name="sweep", storage=open_storage(uri)).ask()

    asked, _ = asking.ask()

    assert (foreign.number, asked.number) == (1, 2)
    assert [trial.number for trial in asking.study.get_trials()] == [0, 1, 2]


class Losing(_Layer):
    """Loses the answer to its first new trial, and asks for it again."""

    def __init__(self, inner: BaseStorage) -> None:
        self._inner, self.is_first = inner, True

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        if self.is_first:
            self.is_first = False
            self._inner.create_new_trial(study_id, template_trial)
        return self._inner.create_new_trial(study_id, template_trial)


def test_a_trial_whose_answer_was_lost_is_gone_on_with_and_nothing_is_passed_over(
    uri: str,
) -> None:
    known: list[Values] = [
        {"model.dropout_rate": rate, "model.hidden_units": 64, "model.activation": "relu"}
        for rate in (0.1, 0.2, 0.3)
    ]
    asking = launcher(uri, Losing, known=known)

    asked = [asking.ask() for _ in range(3)]

    assert [values for _, values in asked] == known
    assert [trial.number for trial, _ in asked] == [0, 2, 3]
    assert [trial.number for trial in asking.study.trials] == [0, 1, 2, 3]


def test_a_finished_trial_cannot_be_told_again(uri: str) -> None:
    asking = launcher(uri)
    trial, _ = asking.ask()
    asking.tell(trial, [0.9], TrialState.COMPLETE)

    with pytest.raises(ValueError, match="Cannot tell a COMPLETE trial"):
        asking.tell(trial, [0.1], TrialState.COMPLETE)

    assert stored(uri)[0].values == [0.9]


def test_attributes_of_a_study_are_stored(uri: str) -> None:
    asking = launcher(uri)

    asking.study.set_user_attr("seconds", 1.5)

    assert launcher(uri).study.user_attrs == {"seconds": 1.5}


def test_trials_of_another_study_are_its_own(uri: str) -> None:
    asking = launcher(uri)
    asking.ask()
    storage = open_storage(uri)
    other = open_study("other", storage, ["maximize"])
    own = OwnStorage(storage, storage.get_study_id_from_name("sweep"))  # type: ignore[abstract]
    other.ask({"x": FloatDistribution(0.0, 1.0)})

    assert [trial.params for trial in own.get_all_trials(other._study_id)] == [
        trial.params for trial in other.trials
    ]


# --- connections -------------------------------------------------------------------------


def test_too_few_connections_for_the_workers_are_told(
    new_database: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_connections(new_database(), 80)
        warn_of_connections("sqlite:////nowhere.db", 1000)
        assert caplog.messages == []

        warn_of_connections(new_database(), 81)

    assert caplog.messages == [
        "study.storage: the server takes 100 connections, and each of 81 workers has one: set its "
        "max_connections to 101."
    ]
