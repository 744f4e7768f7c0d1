"""What the doctor finds, and the stores it looks at."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial

from pipeline.config import PlaceConfig, TrackingConfig, check_name
from pipeline.database import sqlite_path
from sweeps.storage import open_storage
from sweeps.study import HeldError, hold
from sweeps.trial import METRICS

if TYPE_CHECKING:  # or MLflow is imported
    from pipeline.outline import Outline

OK, WRONG, MENDED, NOTE = "ok", "wrong", "mended", "note"

PARENT = "mlflow.parentRunId"
TAGS = (
    *("sweep", "trial", "kind", "study", "objective", "command"),
    *("promotion.model", "owner", PARENT),
)
VALUES = (*METRICS.values(), "parameters", "fit_seconds", "epoch")
SHOWN = 5  # of many of a kind


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of what was found.

    Attributes:
        state: OK, WRONG, MENDED or NOTE, which is nothing wrong.
        text: What was found.
        todo: What to do about it.
        mend: Does it, where that is safe, and says what it did.
    """

    state: str
    text: str
    todo: str = ""
    mend: Callable[[], str] | None = None


def wrong(text: str, todo: str = "", mend: Callable[[], str] | None = None) -> Finding:
    return Finding(state=WRONG, text=text, todo=todo, mend=mend)


def note(text: str, todo: str = "") -> Finding:
    return Finding(state=NOTE, text=text, todo=todo)


# Yields findings; returns what is said where none of them is wrong.
Check = Generator[Finding, None, str]


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """A study as Optuna has it.

    Attributes:
        name: Of the sweep too.
        key: That tells it from others of its name; the sweep's run has it too.
        recorded: Address of the store that has its runs; empty where an older version began it.
        trials: All of them.
    """

    name: str
    key: str
    recorded: str
    trials: Sequence[FrozenTrial]


@dataclass(kw_only=True)
class Stores:
    """The stores that are looked at.

    Attributes:
        tracking: As configured.
        data: Likewise.
        uri: Of MLflow's store.
        storage: Of Optuna's.
        overrides: Of the command line.
        is_open: Whether MLflow's store can be read.
        has_studies: Whether Optuna's is there, and can be.
        behind: Runs whose spool has something to tell, found first.
    """

    tracking: TrackingConfig
    data: PlaceConfig
    uri: str
    storage: str
    overrides: Sequence[str]
    is_open: bool = False
    has_studies: bool = False
    behind: set[str] = field(default_factory=set)

    @property
    def directory(self) -> Path:
        return Path(self.tracking.directory).absolute()

    @property
    def databases(self) -> list[Path]:
        """Those that are files, MLflow's first."""
        paths = map(sqlite_path, (self.uri, self.storage))
        return [path for path in paths if path and path.exists()]

    @cached_property
    def runs(self) -> dict[str, Outline]:
        """Every run by its id, deleted ones too."""
        from pipeline.outline import read_outlines

        return read_outlines(self.uri, TAGS, VALUES)

    @cached_property
    def studies(self) -> list[StudyRecord]:
        """Every study; read before the runs, a trial that ended has a run that did."""
        if not self.has_studies:
            return []
        storage = open_storage(self.storage)
        try:
            names = optuna.get_all_study_names(storage)
            found = [optuna.load_study(study_name=name, storage=storage) for name in names]
            return [
                StudyRecord(
                    name=study.study_name,
                    key=study.user_attrs.get("key", ""),
                    recorded=study.user_attrs.get("recorded", ""),
                    trials=study.get_trials(deepcopy=False),
                )
                for study in found
            ]
        finally:
            storage.remove_session()
            storage.engine.dispose()

    def read(self) -> None:
        """Reads both again."""
        self.__dict__.pop("studies", None)
        self.forget()
        _ = self.studies, self.runs

    def forget(self) -> None:
        """Has the runs read again when they are needed: some were changed."""
        self.__dict__.pop("runs", None)

    def lock_of(self, tags: Mapping[str, str]) -> tuple[str, str, str] | None:
        """Name, address and work of what is held while a run with these tags has an owner."""
        if _is_name(tags.get("sweep", "")):
            return tags["sweep"], self.storage, "sweep"
        if _is_name(tags.get("promotion.model", "")):
            from pipeline.registry import lock_uri

            return tags["promotion.model"], lock_uri(self.uri, self.tracking), "promotion"
        return None

    def holder(self, tags: Mapping[str, str]) -> str:
        """Who is at work on the sweep or promotion of a run, in words; empty: nobody."""
        lock = self.lock_of(tags)
        if lock is None or not _may_be_held(*lock):
            return ""
        try:
            with hold(*lock):
                return ""
        except HeldError as error:
            return str(error)

    @contextmanager
    def alone(self, tags: Mapping[str, str]) -> Iterator[None]:
        """Inside, nobody begins to work on the sweep or promotion of a run.

        Raises:
            HeldError: Somebody does.
        """
        with ExitStack() as stack:
            if lock := self.lock_of(tags):
                stack.enter_context(hold(*lock))
            yield


def _is_name(text: str) -> bool:
    """Whether it may become a path: a tag may have been set by anyone."""
    try:
        check_name("name", text)
    except ValueError:
        return False
    return True


def _may_be_held(name: str, uri: str, work: str) -> bool:
    """Whether there is a lock to try, which otherwise would be created."""
    path = sqlite_path(uri)
    if path is None:
        return sqlalchemy.make_url(uri).get_backend_name() == "postgresql"
    return path.with_name(f".{work}-{name}.lock").exists()


# --- words -------------------------------------------------------------------------------


def count(number: int, what: str) -> str:
    """`1 run`, `3 runs`, `2 entries`."""
    if number == 1:
        return f"1 {what}"
    return f"{number:,} {what[:-1]}ies" if what.endswith("y") else f"{number:,} {what}s"


def few(things: Collection[object]) -> str:
    """The first ones, and how many more."""
    shown = [str(thing) for thing in things][:SHOWN]
    more = len(things) - len(shown)
    if more:
        return f"{', '.join(shown)} and {more:,} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def trials(numbers: Collection[int]) -> str:
    """`trial 3`, `trials 3, 4 and 7`."""
    return f"trial{'' if len(numbers) == 1 else 's'} {few(sorted(numbers))}"


def size(bytes_: float) -> str:
    """`4.2 MB`"""
    for unit in ("bytes", "kB", "MB", "GB"):
        if bytes_ < 1000 or unit == "GB":
            break
        bytes_ /= 1000
    return f"{bytes_:.3g} {unit}" if bytes_ < 1000 else f"{bytes_:,.0f} {unit}"


def short_path(path: Path) -> str:
    """A path as a user would write it: inside the working directory, from there."""
    inside = path.is_relative_to(Path.cwd())
    return str(path.relative_to(Path.cwd()) if inside else path)


def process_of(owner: str | None) -> str:
    """The owner of a run, in words."""
    named = re.fullmatch(r"(\S+) (\d+) .*", owner or "")
    return f"process {named[2]} on {named[1]}" if named else "a process that is not recorded"


def reason(error: BaseException) -> str:
    """Why, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
