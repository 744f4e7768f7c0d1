"""`python -m tests.chaos`: a sweep under random faults; and that its checks can fail."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.champion import PREDICTIONS, find_champion
from tests.chaos import find_tracebacks, parse
from tests.faults import draw, kinds_of
from tests.invariants import find
from tests.launching import Started, run, wait_until, workers_of
from tests.ordeal import NAME
from tests.stores import Stores, processes_in

CHAOS = [sys.executable, "-m", "tests.chaos"]
# Short waits, and few deaths of the launcher: each start takes ten seconds.
SEED = 7219
FAULTS, TRIALS = 8, 4
BROKEN = "Traceback (most recent call last):"

VALUES = "every COMPLETE trial has exactly one FINISHED run with the same value"
PAIRS = "every trial has exactly one run, which ended as it did"
EPOCHS = "every epoch is recorded once, in the run and in the study"
RUNNING = "nothing is RUNNING"
NUMBERS = "trial numbers are unique and without gaps"
BUDGET = "the number of finished trials is exactly the budget"
PARENT = "the sweep has one run of its own, FINISHED with the best value"
WHOLE = "integrity_check of both databases is ok"
LEFT_OVER = "no checkpoint and nothing spooled is left over"
PROCESSES = "no process is left"
CHAMPION = "the champion loads and gives its logged figures again"
ENDS = "the same command goes on to the end, and ends as it should"
OUTLIVED = "workers end within 5 s (of processor time) of their launcher"
TRACEBACKS = "no traceback in any output"


@dataclass(frozen=True)
class Suffered:
    """The tool, run to its end."""

    folder: Path
    done: subprocess.CompletedProcess[str]

    @property
    def budget(self) -> int:
        """Trials in the end."""
        grown = re.findall(r"from here on it is (\d+) trials", self.done.stdout)
        return int(grown[-1]) if grown else TRIALS


@pytest.fixture(scope="module")
def suffered(tmp_path_factory: pytest.TempPathFactory) -> Suffered:
    folder = tmp_path_factory.mktemp("c")  # short: below it are sockets, or no worker is forked
    few = ["--kills", str(FAULTS), "--trials", str(TRIALS), "--workers", "2", "--longest", "4"]
    given = ["--seed", str(SEED), *few, "--folder", str(folder / "o")]
    done = run(*given, folder=folder, command=CHAOS, timeout=1800)
    return Suffered(folder / "o", done)


def test_a_sweep_under_random_faults_keeps_every_invariant(suffered: Suffered) -> None:
    printed = suffered.done.stdout

    assert (suffered.done.returncode, suffered.done.stderr) == (0, ""), printed
    table = printed.partition("\nholds  invariant")[2]
    rows = dict(re.findall(r"^(?:yes|NO) +(.+?) {2,}(.+?) *$", table, re.M))
    assert list(rows) == [
        *(ENDS, VALUES, PAIRS, EPOCHS, RUNNING, NUMBERS, BUDGET, PARENT, WHOLE),
        *(LEFT_OVER, PROCESSES, CHAMPION, OUTLIVED, TRACEBACKS),
    ]
    assert not re.search("^NO", table, re.M)
    assert rows[BUDGET] == f"{suffered.budget} of {suffered.budget}"


def test_at_least_five_of_eight_faults_were_kills(suffered: Suffered) -> None:
    pattern = r"^ *\d+\.\d s  fault +(\d+): (.+?): (?:process|for|cannot)"
    happened = re.findall(pattern, suffered.done.stdout, re.M)

    assert [int(number) for number, _ in happened] == list(range(1, FAULTS + 1))
    kinds = [kind for _, kind in happened]
    assert sum(kind.startswith("kill") for kind in kinds) >= 5
    assert {"kill a worker", "kill the launcher", "kill both"} <= set(kinds)
    assert f"Seed {SEED}: {FAULTS} faults (" in suffered.done.stdout


# --- the checks can fail -----------------------------------------------------------------


@dataclass(frozen=True)
class Copied:
    """A copy of the stores that the tool left, to be spoilt."""

    folder: Path
    budget: int

    def execute(self, database: str, *statements: str) -> None:
        with closing(sqlite3.connect(self.folder / "mlruns" / database)) as connection:
            for statement in statements:
                changed = connection.execute(statement).rowcount
                assert changed != 0, statement
            connection.commit()

    @property
    def broken(self) -> set[str]:
        """Invariants that are said not to hold."""
        stores = Stores.local(self.folder)
        findings = [*find(stores, NAME, self.budget), find_champion(stores)]
        return {finding.invariant for finding in findings if finding.broken}


@pytest.fixture
def copied(suffered: Suffered, tmp_path: Path) -> Copied:
    (tmp_path / "mlruns").mkdir()
    for name in ("mlruns/mlflow.db", "mlruns/optuna.db", PREDICTIONS):
        for file in (suffered.folder / "sweep").glob(f"{name}*"):  # with what is not yet in it
            shutil.copy(file, tmp_path / name.replace(Path(name).name, file.name))
    return Copied(tmp_path, suffered.budget)


COMPLETE = "(SELECT max(number) FROM trials WHERE state = 'COMPLETE')"
FINISHED = (
    "(SELECT max(run_uuid) FROM runs JOIN tags USING (run_uuid) "
    "WHERE status = 'FINISHED' AND key = 'trial')"
)
FAILED = (  # its trial
    "(SELECT max(value) FROM tags JOIN runs USING (run_uuid) "
    "WHERE status = 'FAILED' AND key = 'trial')"
)
PROMOTED = "(SELECT max(run_id) FROM model_versions)"


def test_a_store_that_was_left_alone_breaks_nothing(copied: Copied) -> None:
    assert copied.broken == set()


@pytest.mark.parametrize(
    ("statements", "broken"),
    [
        pytest.param(
            [f"DELETE FROM runs WHERE run_uuid = {FINISHED}"],
            {VALUES, PAIRS},
            id="the run of a trial is gone",
        ),
        pytest.param(
            [f"UPDATE tags SET value = {FAILED} WHERE key = 'trial' AND run_uuid = {FINISHED}"],
            {VALUES, PAIRS},  # of a trial that failed the epochs are not compared
            id="a trial has two runs",
        ),
        pytest.param(
            [
                "UPDATE latest_metrics SET value = 0.5 "
                f"WHERE key = 'saved_val_accuracy' AND run_uuid = {FINISHED}"
            ],
            {VALUES},
            id="the value of a run was changed",
        ),
        pytest.param(
            [f"UPDATE runs SET status = 'RUNNING' WHERE run_uuid = {FINISHED}"],
            {VALUES, PAIRS, RUNNING},
            id="a run is left RUNNING",
        ),
        pytest.param(
            [f"UPDATE logged_models SET status = 1 WHERE source_run_id = {FINISHED}"],
            {PAIRS},
            id="a model is left half-way",
        ),
        pytest.param(
            [
                "INSERT INTO metrics SELECT key, value, timestamp + 1, run_uuid, step, is_nan "
                f"FROM metrics WHERE key = 'val_accuracy' AND step = 3 AND run_uuid = {FINISHED}"
            ],
            {EPOCHS},
            id="an epoch is recorded twice",
        ),
        pytest.param(
            [f"DELETE FROM metrics WHERE step = 3 AND run_uuid = {FINISHED}"],
            {EPOCHS},
            id="an epoch is not recorded",
        ),
        pytest.param(
            [
                "UPDATE runs SET status = 'KILLED' WHERE run_uuid = "
                "(SELECT run_uuid FROM tags WHERE key = 'kind' AND value = 'sweep')"
            ],
            {PARENT},
            id="the sweep's run was stopped",
        ),
        pytest.param(
            [
                "CREATE TABLE spoilt (x)",
                "INSERT INTO spoilt VALUES (NULL)",
                "PRAGMA writable_schema = ON",
                "UPDATE sqlite_schema SET sql = 'CREATE TABLE spoilt (x NOT NULL)' "
                "WHERE name = 'spoilt'",
            ],
            {WHOLE},
            id="the database is damaged",
        ),
        pytest.param(
            [
                "UPDATE latest_metrics SET value = 0.5 "
                f"WHERE key = 'saved_val_accuracy' AND run_uuid = {PROMOTED}"
            ],
            {CHAMPION},
            id="the champion was logged with another figure",
        ),
        pytest.param(
            ["DELETE FROM registered_model_aliases"], {CHAMPION}, id="there is no champion"
        ),
    ],
)
def test_spoilt_runs_are_found(copied: Copied, statements: list[str], broken: set[str]) -> None:
    copied.execute("mlflow.db", *statements)

    assert copied.broken == broken


@pytest.mark.parametrize(
    ("statement", "broken"),
    [
        pytest.param(
            "UPDATE trial_values SET value = 2.0 WHERE trial_id = "
            f"(SELECT trial_id FROM trials WHERE number = {COMPLETE})",
            {VALUES, PARENT},
            id="the value of a trial was changed",
        ),
        pytest.param(
            f"UPDATE trials SET state = 'RUNNING' WHERE number = {COMPLETE}",
            {PAIRS, RUNNING, BUDGET},
            id="a trial is left RUNNING",
        ),
        pytest.param(
            "UPDATE trials SET number = number + 1 "
            "WHERE number = (SELECT max(number) FROM trials WHERE state = 'FAIL')",
            {PAIRS, NUMBERS},
            id="a number is missing",
        ),
        pytest.param(
            "DELETE FROM trial_intermediate_values WHERE step = 3", {EPOCHS}, id="no third epoch"
        ),
    ],
)
def test_a_spoilt_study_is_found(copied: Copied, statement: str, broken: set[str]) -> None:
    copied.execute("optuna.db", statement)

    assert copied.broken >= broken
    assert copied.broken <= broken | {VALUES, PARENT}


def test_a_budget_that_is_not_met_is_found(copied: Copied) -> None:
    assert Copied(copied.folder, copied.budget + 1).broken == {BUDGET}


@pytest.mark.parametrize("name", ["checkpoints", "spool"])
def test_what_is_left_over_is_found(copied: Copied, name: str) -> None:
    (copied.folder / "mlruns" / name / "0123456789abcdef").mkdir(parents=True)

    assert copied.broken == {LEFT_OVER}


def test_a_process_that_is_left_is_found(copied: Copied) -> None:
    left = subprocess.Popen(["sleep", "60"], cwd=copied.folder)

    broken = copied.broken
    left.kill()
    left.wait()

    assert broken == {PROCESSES}


def test_a_traceback_is_found() -> None:
    whole, broken = "Sweep chaos: 0 of 4 trials", f"{BROKEN}\n  ..."

    finding = find_tracebacks({"launch-01": whole, "launch-02": broken})

    assert (finding.invariant, finding.broken) == (TRACEBACKS, ["launch-02"])


SPAWNED = "from multiprocessing.spawn import spawn_main as f; f(tracker_fd=0, pipe_handle=0)"
FORKED = "from multiprocessing import forkserver as f; f.connect_to_new_process([]); os._exit(0)"


@pytest.mark.parametrize("start", [SPAWNED, FORKED], ids=["spawned", "forked"])
def test_only_what_python_says_of_a_parent_that_was_killed_is_no_traceback_of_ours(
    start: str,
) -> None:
    said = orphaned(start)
    also = f"{said}{BROKEN}\n  ..."

    finding = find_tracebacks({"launch-01": f"Sweep chaos\n{said}Go on", "launch-02": also})

    assert said.startswith(BROKEN)
    assert finding.broken == ["launch-02"]


def orphaned(start: str) -> str:
    """What a worker says whose launcher was killed before it told it what to do."""
    ended = subprocess.run(
        [sys.executable, "-c", f"import os; {start}", "--multiprocessing-fork"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.stderr


# --- its command line --------------------------------------------------------------------


def test_a_seed_repeats_its_faults_and_another_one_does_not() -> None:
    kinds = kinds_of(small_disk=True, postgresql=True, server=True)

    assert draw(3, 50, kinds, 55.0) == draw(3, 50, kinds, 55.0)
    assert draw(3, 50, kinds, 55.0) != draw(4, 50, kinds, 55.0)
    assert {fault.kind for fault in draw(3, 500, kinds, 55.0)} == kinds.keys()


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (["--workers", "4-2"], "4-2 is no number and no range as 2-4"),
        (["--workers", "0"], "0 is no number"),
        (["--longest", "60"], "--longest must be at least 1 and less than 60"),
        (["--folder", str(Path(__file__).parent)], "is not empty"),
    ],
)
def test_a_wrong_command_line_is_refused(
    given: list[str], rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(given)

    assert rule in capsys.readouterr().err


def test_ctrl_c_ends_all_that_was_started(tmp_path: Path) -> None:
    folder = tmp_path / "sweep-under-faults"
    with Started(*CHAOS, "--folder", str(folder), folder=tmp_path) as started:
        wait_until(lambda: processes_in(folder / "sweep"))
        (launcher, *_) = sorted(processes_in(folder / "sweep"), key=psutil.Process.create_time)
        wait_until(lambda: workers_of(launcher))
        started.process.send_signal(signal.SIGINT)
        status = started.end(limit=60)

    assert status == 130
    assert "Traceback" not in started.text
    assert processes_in(folder / "sweep") == []
    assert not os.path.ismount(folder / "sweep")
