"""Where Optuna keeps the studies: a database, that may be away, of which the launcher knows all."""

import abc
import copy
import logging
from collections.abc import Callable, Container, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.trial import FrozenTrial, TrialState, create_trial

from pipeline.config import TrackingConfig
from pipeline.database import (
    LOCK_TIMEOUT,
    AwayError,
    alone,
    create_sqlite,
    lost_connection,
    patiently,
    sqlite_path,
    sqlite_uri,
)
from sweeps.config import StudyConfig

T = TypeVar("T")

SPARE = 20  # connections for all but the workers: launchers, an MLflow server, PostgreSQL's own

log = logging.getLogger(__name__)


def storage_uri(study: StudyConfig, tracking: TrackingConfig) -> str:
    """Address of the study's database; a local file by its absolute path."""
    uri = study.storage or sqlite_uri(Path(tracking.directory).absolute() / "optuna.db")
    path = sqlite_path(uri)
    return f"sqlite:///{path}" if path else uri


def open_storage(uri: str) -> RDBStorage:
    """Opens the study's database, creating it when missing; any number may do so at once."""
    path = sqlite_path(uri)
    if path is None:
        with alone(uri):
            return RDBStorage(uri)
    create_sqlite(path, lambda new: RDBStorage(new).engine.dispose())
    return RDBStorage(uri, engine_kwargs={"connect_args": {"timeout": LOCK_TIMEOUT}})


def warn_of_connections(uri: str, workers: int) -> None:
    """Says where PostgreSQL may have too few for the workers, which have one each."""
    if sqlite_path(uri) is not None:
        return
    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        most = int(connection.scalar(sqlalchemy.text("SHOW max_connections")) or 0)
    if workers + SPARE > most:
        log.warning(
            "study.storage: the server takes %d connections, and each of %d workers has one: set "
            "its max_connections to %d.",
            most,
            workers,
            workers + SPARE,
        )


class _Layer(BaseStorage):
    """Around another storage, which does what this one does not do itself."""

    _inner: BaseStorage

    def _pass_on(self, name: str, *arguments: Any, **named: Any) -> Any:
        return getattr(self._inner, name)(*arguments, **named)


def _passing_on(name: str) -> Callable[..., Any]:
    def call(self: _Layer, *arguments: Any, **named: Any) -> Any:
        return self._pass_on(name, *arguments, **named)

    return call


for _name, _method in vars(BaseStorage).items():
    if getattr(_method, "__isabstractmethod__", False):  # the others are made of these
        setattr(_Layer, _name, _passing_on(_name))
abc.update_abstractmethods(_Layer)  # type: ignore[type-abstract]


class _PatientStorage(_Layer):
    """A storage on a server, which may restart meanwhile.

    Args:
        uri: Of the database.
        seconds: To wait for it, at most.
        stop: Asked every second whether to give up.
    """

    def __init__(self, uri: str, seconds: float, stop: Callable[[], bool]) -> None:
        self._uri, self._seconds, self._stop = uri, seconds, stop
        self._inner = self._wait(lambda: get_storage(open_storage(uri)))

    def _pass_on(self, name: str, *arguments: Any, **named: Any) -> Any:
        return self._wait(lambda: getattr(self._inner, name)(*arguments, **named))

    def _wait(self, call: Callable[[], T]) -> T:
        try:
            return patiently(
                call, lost_connection, self._uri, seconds=self._seconds, stop=self._stop
            )
        except AwayError:
            self._seconds = 0.0  # once in vain, it waits no more
            raise

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """Of a trial that was just created, the inner storage knows without asking."""
        name = "get_trial_id_from_study_id_trial_number"
        return int(self._pass_on(name, study_id, trial_number))

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Of an answer that was lost with the connection, the second try says that it was told.

        Likewise of a trial that waited, which this process alone takes up: it has it already.
        """
        lost: list[Exception] = []

        def tell() -> bool:
            try:
                did = self._inner.set_trial_state_values(trial_id, state, values)
                return did or bool(lost)
            except UpdateFinishedTrialError:
                if not lost:
                    raise
                return True
            except Exception as error:
                lost.append(error)
                raise

        return self._wait(tell)


def patient_storage(
    uri: str, seconds: float, stop: Callable[[], bool] = lambda: False
) -> BaseStorage:
    """Likewise, for a sweep that goes on when a server restarts.

    Args:
        uri: Of the database.
        seconds: To wait for it, at most.
        stop: Asked every second whether to give up.

    Raises:
        AwayError: Here, and from each method: it is still away.
    """
    if sqlite_path(uri):
        return get_storage(open_storage(uri))
    return _PatientStorage(uri, seconds, stop)  # type: ignore[abstract]


class OwnStorage(_Layer):
    """Remembers the trials of one study, of which this process alone asks and tells.

    Optuna reads every trial that is not finished from the database, four times for each that it
    asks, and writes what it draws one by one: with many workers, most of what a launcher does. Here
    a new trial is a draft, in memory alone, until it is kept whole; and what workers report is read
    when it is asked for.

    Args:
        inner: Has the study.
        study_id: In it.

    Attributes:
        strays: Trials that are there twice, as the answer was lost with the connection.
    """

    def __init__(self, inner: BaseStorage, study_id: int) -> None:
        self._inner, self._study_id, self.strays = inner, study_id, 0
        self._load()

    def _load(self) -> None:
        trials = self._inner.get_all_trials(self._study_id, deepcopy=True)
        self._trials = {trial._trial_id: trial for trial in trials}  # in the order of the numbers

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Begins a draft, and returns what it goes by: no id of the database's."""
        draft = template_trial or create_trial(state=TrialState.RUNNING)
        draft.datetime_start = draft.datetime_start or datetime.now()
        draft.number = len(self._trials)
        draft._trial_id = -1 - draft.number
        self._trials[draft._trial_id] = draft
        return draft._trial_id

    def keep(self, trial_id: int) -> int:
        """Has the database know of a draft, all at once; returns its id there."""
        if not _is_draft(trial_id):
            return trial_id
        draft = self._trials.pop(trial_id)
        trial_id = self._inner.create_new_trial(self._study_id, draft)
        at_number = self._inner.get_trial_id_from_study_id_trial_number
        if at_number(self._study_id, draft.number) == trial_id:
            draft._trial_id = trial_id
            self._trials[trial_id] = draft
            return trial_id
        self._load()  # another came before it: of a call whose answer was lost, or a stranger's
        for first in self._trials.values():
            same = (first.params, first.datetime_start) == (draft.params, draft.datetime_start)
            if same and first.number == draft.number:
                self.strays += 1
                return first._trial_id
        return trial_id

    def read(self, trial_id: int) -> None:
        """Learns what a worker has reported of a trial."""
        self._trials[trial_id] = self._inner.get_trial(trial_id)

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        if not _is_draft(trial_id):
            self._inner.set_trial_param(trial_id, param_name, param_value_internal, distribution)
        trial = self._trials[trial_id]
        trial.distributions = {**trial.distributions, param_name: distribution}
        trial.params[param_name] = distribution.to_external_repr(param_value_internal)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        if not _is_draft(trial_id):
            did = self._inner.set_trial_state_values(trial_id, state, values)
            self.read(trial_id)
            return did
        self._trials[trial_id].state = state
        return True

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        if not _is_draft(trial_id):
            self._inner.set_trial_user_attr(trial_id, key, value)
        self._trials[trial_id].user_attrs[key] = value

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        if not _is_draft(trial_id):
            self._inner.set_trial_system_attr(trial_id, key, value)
        self._trials[trial_id].system_attrs[key] = value

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return copy.deepcopy(self._trials[trial_id])

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        if study_id != self._study_id:
            return self._inner.get_all_trials(study_id, deepcopy, states)
        found = list(self._trials.values())
        if states is not None:
            found = [trial for trial in found if trial.state in states]
        return copy.deepcopy(found) if deepcopy else found


def _is_draft(trial_id: int) -> bool:
    return trial_id < 0
