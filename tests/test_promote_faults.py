"""Promotions that are killed, interrupted, started at once: real processes, FAULTS.md 18 to 22."""

import re
import shlex
import signal
import sqlite3
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from tests.launching import OnTerminal, Started, run, wait_until, without_escapes
from tests.passwords import dump, forms, guard, holding
from tests.promotions import PROMOTE, TINY, Bench, registry
from tests.servers import Postgresql
from tests.stores import query, seconds_until_quiet

FREE = "promote.floor=0"
WORKER = "executor.workers=1"
FIXED = ["model.dropout_rate=0", "optimizer.learning_rate=0.005", "sampler=random", "pruner=none"]
EPOCHS = 60
LONG = [*FIXED[:2], f"training.epochs={EPOCHS}", "training.early_stopping_patience=null"]


def epoch_of(folder: Path, seed: int) -> int:
    """The last one recorded of the training on a fresh seed."""
    sql = (
        "SELECT coalesce(max(latest_metrics.value), 0) FROM latest_metrics "
        "JOIN tags USING (run_uuid) WHERE latest_metrics.key = 'epoch' "
        f"AND tags.key = 'retrained.seed' AND tags.value = '{seed}'"
    )
    return int(query(folder / "mlruns" / "mlflow.db", sql)[0][0])


def trained(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Status, start and end of each training on a fresh seed."""
    sql = (
        "SELECT tags.value, status, start_time, end_time FROM runs JOIN tags USING (run_uuid) "
        "WHERE tags.key = 'retrained.seed'"
    )
    return {row[0]: row[1:] for row in query(folder / "mlruns" / "mlflow.db", sql)}


def status_of(folder: Path, kind: str = "promotion") -> list[str]:
    sql = (
        "SELECT status FROM runs JOIN tags USING (run_uuid) "
        f"WHERE tags.key = 'kind' AND tags.value = '{kind}'"
    )
    return [row[0] for row in query(folder / "mlruns" / "mlflow.db", sql)]


def champions(folder: Path) -> list[tuple[Any, ...]]:
    sql = "SELECT name, version FROM registered_model_aliases WHERE alias = 'champion'"
    return query(folder / "mlruns" / "mlflow.db", sql)


# --- killed and interrupted --------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A promotion that did not reach its verdict, and what it left."""

    status: int
    text: str
    trained: dict[str, tuple[Any, ...]]
    own: list[str]
    champions: list[tuple[Any, ...]]
    quiet: float

    @property
    def go_on(self) -> str:
        (line,) = re.findall(r"Go on with: (.*)$", self.text, re.M)
        return str(line)


@dataclass(frozen=True, kw_only=True)
class Story:
    """One promotion, started six times: the last two at once.

    Attributes:
        folder: Of it.
        killed: With -9, in its second training.
        stopped: By Ctrl-C on a terminal, in that training.
        terminated: By SIGTERM, while its worker starts.
        locked: Killed with -9 while the database is locked, the version made, no alias moved.
        both: To its end, by two at once: status and text of each, the one that did it first.
    """

    folder: Path
    killed: Ended
    stopped: Ended
    terminated: Ended
    locked: Ended
    both: list[tuple[int, str]]


def left(started: Started, folder: Path) -> Ended:
    status = started.end(limit=60)
    quiet = seconds_until_quiet(folder, limit=10.0)
    return Ended(
        status=status,
        text=without_escapes(started.text),
        trained=trained(folder),
        own=status_of(folder),
        champions=champions(folder),
        quiet=quiet,
    )


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tensorflow: None) -> Story:
    folder = tmp_path_factory.mktemp("broken")
    database = folder / "mlruns" / "mlflow.db"
    Bench(folder).sweep("slow", ("model.hidden_units=8", *LONG))
    command = [*PROMOTE, "sweep.name=slow", "promote.seeds=[1001, 1002]", FREE, WORKER]

    with Started(*command, folder=folder) as first:
        first.says("seed 1001 ")
        wait_until(lambda: epoch_of(folder, 1002) >= 3)
        first.process.kill()
        killed = left(first, folder)

    with OnTerminal(*command, folder=folder) as second:
        before = epoch_of(folder, 1002)
        wait_until(lambda: epoch_of(folder, 1002) > before)
        second.press_ctrl_c()
        stopped = left(second, folder)

    with Started(*PROMOTE, *shlex.split(stopped.go_on)[3:], folder=folder) as third:
        third.says("1 training to do")
        third.process.send_signal(signal.SIGTERM)
        terminated = left(third, folder)

    with (
        Started(*command, folder=folder) as fourth,
        closing(sqlite3.connect(database, timeout=30, isolation_level=None)) as other,
    ):
        fourth.says("seed 1002 ")
        wait_until(lambda: query(database, "SELECT version FROM model_versions"))
        other.execute("BEGIN IMMEDIATE")
        fourth.process.kill()
        fourth.end()
        other.execute("ROLLBACK")
        locked = left(fourth, folder)

    with ExitStack() as stack:
        both = [stack.enter_context(Started(*command, folder=folder)) for _ in range(2)]
        ends = [(each.end(), each.text) for each in both]
    return Story(
        folder=folder,
        killed=killed,
        stopped=stopped,
        terminated=terminated,
        locked=locked,
        both=sorted(ends, key=lambda end: "already" in end[1]),
    )


def test_a_promotion_that_is_killed_leaves_no_champion_and_no_process(story: Story) -> None:
    assert story.killed.status == -9
    assert story.killed.trained["1001"][0] == "FINISHED"
    assert story.killed.champions == []
    assert story.killed.quiet < 5.0


def test_ctrl_c_stops_a_promotion_and_says_how_to_go_on(story: Story) -> None:
    stopped = story.stopped

    assert stopped.status == 130
    assert stopped.go_on.startswith("python -m sweeps.promote sweep.name=slow ")
    assert {seed: run[0] for seed, run in stopped.trained.items()} == {
        "1001": "FINISHED",
        "1002": "KILLED",
    }
    assert stopped.own == ["KILLED"]
    assert "Traceback" not in stopped.text


def test_sigterm_stops_a_promotion_though_its_worker_only_starts(story: Story) -> None:
    terminated = story.terminated

    assert terminated.status == 143
    assert terminated.go_on == story.stopped.go_on
    assert terminated.own == ["KILLED"]
    assert terminated.trained["1002"][0] == "KILLED"
    assert "Traceback" not in terminated.text


def test_a_promotion_killed_between_version_and_alias_has_not_happened(story: Story) -> None:
    assert story.locked.status == -9
    assert story.locked.champions == []
    assert story.locked.own == ["RUNNING"]


def test_of_two_that_go_on_with_it_at_once_one_does_and_the_other_finds_it_done(
    story: Story,
) -> None:
    (first, said), (second, waited) = story.both

    assert (first, second) == (0, 0)
    assert "PROMOTE: digits version 1 " in said
    assert " to do; " not in said
    assert re.search(r"^Waiting: name=digits is being promoted by process \d+ on ", waited)
    assert waited.endswith("\ndigits version 1 is the champion already: nothing is changed.\n")


def test_what_was_killed_stopped_and_started_twice_is_one_version_one_line_one_run(
    story: Story,
) -> None:
    found = registry(story.folder / "mlruns" / "mlflow.db")

    assert len(found["model_versions"]) == len(found["registered_model_tags"]) == 1
    assert champions(story.folder) == [("digits", 1)]
    assert status_of(story.folder) == ["FINISHED"]


def test_trainings_that_had_finished_are_not_repeated_and_the_others_have_each_epoch_once(
    story: Story,
) -> None:
    stages = [story.killed, story.stopped, story.terminated, story.locked]
    assert len({stage.trained["1001"] for stage in stages}) == 1
    sql = (
        "SELECT count(*), count(DISTINCT step) FROM metrics JOIN tags USING (run_uuid) "
        "WHERE metrics.key = 'val_loss' AND tags.key = 'retrained.seed' GROUP BY run_uuid"
    )
    database = story.folder / "mlruns" / "mlflow.db"
    assert set(query(database, sql)) == {(EPOCHS, EPOCHS)}


def test_nothing_is_left_under_way(story: Story) -> None:
    statuses = query(story.folder / "mlruns" / "mlflow.db", "SELECT DISTINCT status FROM runs")

    assert statuses == [("FINISHED",)]
    assert list((story.folder / "mlruns" / "checkpoints").glob("*")) == []
    assert seconds_until_quiet(story.folder, limit=5.0) < 5.0


# --- PostgreSQL --------------------------------------------------------------------------

RUNS, STUDIES = "hush7f3a@:/ é", "mute9c1e'%&"
MANY = [FREE] * 200  # a command line that a model card has no room for


@dataclass(frozen=True)
class Remote:
    """A sweep and three promotions at once of it, by an address with a password."""

    folder: Path
    uri: str
    studies: str
    ends: list[int]
    texts: list[str]

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        engine = sqlalchemy.create_engine(self.uri, poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sqlalchemy.text(sql))]


@pytest.fixture(scope="module")
def remote(postgresql: Postgresql, tmp_path_factory: pytest.TempPathFactory) -> Remote:
    folder = tmp_path_factory.mktemp("remote")
    uri, studies = postgresql.new_database(), postgresql.new_database()
    secret, storage = guard(uri, "clara", RUNS), guard(studies, "dora", STUDIES)
    swept = run(
        *TINY,
        *FIXED,
        "model.hidden_units=choice(4, 64)",
        "sweep.first=[{model.hidden_units: 4}, {model.hidden_units: 64}]",
        "sweep.trials=2",
        "sweep.name=pair",
        WORKER,
        f"tracking.uri={secret}",
        f"study.storage={storage}",
        folder=folder,
    )
    assert swept.returncode == 0, swept.stderr
    found = Remote(folder, uri, studies, [], [swept.stdout, swept.stderr])
    ((small,),) = found.query("SELECT run_uuid FROM tags WHERE key = 'trial' AND value = '0'")
    common = ["promote.seeds=[1001]", WORKER, f"tracking.uri={secret}"]
    best = [*PROMOTE, "sweep.name=pair", "promote.top=1", *common, *MANY]
    commands = [best, best, [*PROMOTE, f"run={small}", *common, *MANY]]
    with ExitStack() as stack:
        started = [stack.enter_context(Started(*each, folder=folder)) for each in commands]
        found.ends.extend(each.end(limit=240) for each in started)
        found.texts.extend(each.text for each in started)
    for what in ("history=true", "rollback=true"):
        done = run(what, f"tracking.uri={secret}", folder=folder, command=PROMOTE)
        found.ends.append(done.returncode)
        found.texts.extend([done.stdout, done.stderr])
    return found


def test_promotions_at_once_on_postgresql_come_one_after_the_other(remote: Remote) -> None:
    assert remote.ends[:4] == [0, 0, 0, 0], remote.texts
    said = remote.texts[2:4]
    assert sum("is the champion already: nothing is changed." in text for text in said) == 1
    versions = remote.query("SELECT version FROM model_versions ORDER BY version")
    assert versions == [(1,), (2,)]
    verdicts = [path.read_text(encoding="utf-8") for path in remote.folder.rglob("verdict.json")]
    assert len(verdicts) == 2
    assert sum('"champion": null' in text for text in verdicts) == 1
    assert remote.query("SELECT DISTINCT status FROM runs") == [("FINISHED",)]


def test_a_card_has_what_the_database_has_room_for(remote: Remote) -> None:
    lengths = remote.query("SELECT length(description) FROM model_versions")

    assert [length for (length,) in lengths] == [5000, 5000]


def test_a_rollback_on_postgresql_takes_the_only_move_back_that_has_one_before(
    remote: Remote,
) -> None:
    """Who came first is a matter of luck: the small network is promoted, or held."""
    moves = remote.query("SELECT key FROM registered_model_tags WHERE value LIKE '%\"promote\"%'")
    aliases = remote.query("SELECT version FROM registered_model_aliases WHERE alias = 'champion'")

    assert len(moves) in (1, 2)
    assert remote.ends[4] == {1: 1, 2: 0}[len(moves)]
    assert aliases == [(1,)]


@pytest.mark.parametrize("password", [RUNS, STUDIES])
def test_a_password_is_in_no_table_no_file_and_no_output(remote: Remote, password: str) -> None:
    dumped = dump(remote.uri) + dump(remote.studies)
    files = [path for path in remote.folder.rglob("*") if path.is_file()]
    texts = [text.encode() for text in (dumped, *remote.texts)]

    assert "promotion.model" in dumped
    assert "clara:***@127.0.0.1" in dumped
    assert "dora:***@127.0.0.1" in dumped
    assert len(files) > 20
    assert holding(remote.folder, password) == []
    assert [text for text in texts if any(form in text for form in forms(password))] == []
