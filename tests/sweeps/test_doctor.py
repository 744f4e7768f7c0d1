"""The doctor on copies of a real store, each spoilt in another way."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import mlflow
import psutil
import pytest
import sqlalchemy
from filelock import FileLock

from pipeline.owner import OWNER, me
from pipeline.store import RESERVE_BYTES, open_store, read_run
from pipeline.tracking import Run, create_run
from sweeps.storage import open_storage
from sweeps.study import hold, open_study
from tests.invariants import check_invariants
from tests.promotions import Bench, command, folder_of_model
from tests.stores import dump, runs_of, trials_of
from tests.visits import fix, visit

NewDatabase = Callable[[], str]
Need = Callable[[object, str], None]


@pytest.fixture
def folder(swept: Path, tmp_path: Path) -> Path:
    """A store of two real sweeps, to be spoilt."""
    Bench(swept).copy(tmp_path)
    return tmp_path


def execute(folder: Path, name: str, sql: str, *values: object) -> None:
    with closing(sqlite3.connect(folder / "mlruns" / name, timeout=30)) as database:
        assert database.execute(sql, values).rowcount
        database.commit()


def trial_of(folder: Path, state: str, sweep: str = "wide") -> tuple[int, str]:
    """Number and run of a trial that ended so."""
    for trial in trials_of(folder, sweep):
        if trial.state.name == state:
            return trial.number, trial.user_attrs["run_id"]
    raise AssertionError(f"no trial of {sweep} is {state}")


@pytest.fixture(scope="module")
def dead() -> str:
    """The owner that a run has whose process is gone."""
    code = "from pipeline.owner import me; print(me())"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


# --- a healthy store ---------------------------------------------------------------------


def test_a_healthy_store_is_fine_and_stays_as_it_is(folder: Path) -> None:
    before, files = dump(folder), files_of(folder)

    seen = visit(folder)

    assert seen.error == ""
    assert seen.of("ok").keys() == {
        *("databases", "disk", "spool", "runs", "trials", "left-overs", "champion")
    }
    assert seen.of("ok")["trials"] == ["16 trials of 2 sweeps and their runs agree"]
    assert len(seen.text.splitlines()) == 8
    assert (dump(folder), files_of(folder)) == (before, files)


def test_mending_a_healthy_store_changes_nothing(folder: Path) -> None:
    before, files = dump(folder), files_of(folder)

    seen = fix(folder)

    assert (seen.error, seen.of("mended")) == ("", {})
    assert (dump(folder), files_of(folder)) == (before, files)


def files_of(folder: Path) -> set[str]:
    """All but what SQLite has beside a database that is open."""
    return {str(path) for path in folder.rglob("*") if not re.search(r"\.db-(wal|shm)$", path.name)}


def test_without_a_store_nothing_is_created_and_one_line_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no runs are recorded in .*mlflow\.db: run "):
        visit(tmp_path)

    assert list(tmp_path.iterdir()) == []


# --- databases ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlflow.db", "optuna.db"])
def test_a_damaged_page_is_found(name: str, folder: Path) -> None:
    path = folder / "mlruns" / name
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = database.execute("PRAGMA page_size").fetchone()
    with path.open("r+b") as file:
        for number in range(5, path.stat().st_size // page, 3):
            file.seek(number * page)
            file.write(b"\xff" * 64)

    seen = fix(folder)

    assert any(f"{path} is damaged: " in line for line in seen.wrong)
    assert f"databases: stop what uses it, keep a copy of {path}" in seen.text
    assert f"sqlite3 {path} .recover" in seen.text
    assert "wrong: " in seen.error


def test_a_file_that_is_no_database_is_found_and_left_alone(folder: Path) -> None:
    path = folder / "mlruns" / "mlflow.db"
    for each in path.parent.glob("mlflow.db*"):
        each.unlink()
    path.write_bytes(b"")

    seen = fix(folder)

    assert seen.wrong == [f"databases: {path} is empty, or something else: it has no table runs"]
    assert seen.of("note")["trials"] == ["not looked at: the store is not open"]
    assert path.stat().st_size == 0


def test_wal_is_set_again(folder: Path) -> None:
    path = folder / "mlruns" / "optuna.db"
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA journal_mode=DELETE").fetchone() == ("delete",)

    seen, mended, after = visit(folder), fix(folder), visit(folder)

    assert [line.partition(" has ")[2] for line in seen.wrong] == [
        "journal_mode=delete: readers and writers wait for each other"
    ]
    assert seen.error == "1 thing is wrong: databases; fix=true mends it."
    assert mended.of("mended")["databases"][0].endswith(": set WAL")
    assert (mended.error, after.error, after.of("note")) == ("", "", {})


def test_a_lock_that_another_process_does_not_let_go_is_found(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "mlruns" / "optuna.db")) as database:
        database.execute("BEGIN IMMEDIATE")
        seen = visit(folder)
    after = visit(folder)

    assert "optuna.db has been locked for 5 s by another process" in seen.wrong[0]
    assert after.error == ""


def test_a_server_that_is_away_is_told_and_what_waits_for_it_too(folder: Path, dead: str) -> None:
    uri = "http://127.0.0.1:9"
    spool = spooled(folder, dead, uri=uri)

    seen = fix(folder, f"tracking.uri={uri}")

    assert seen.wrong == [f"databases: tracking.uri: no server answers at {uri}."]
    assert "the store has yet to be told 2 entries" in seen.of("note")["spool"][0]
    assert (spool / "journal.jsonl").exists()


def test_databases_on_a_server_are_looked_at_and_not_created(
    tmp_path: Path, new_database: NewDatabase, dead: str
) -> None:
    tracking, study = new_database(), new_database()
    stores = [f"tracking.uri={tracking}", f"study.storage={study}"]
    with pytest.raises(FileNotFoundError, match="no runs are recorded in postgresql"):
        visit(tmp_path, *stores)
    assert tables_of(tracking) == tables_of(study) == []
    store = open_store(Bench(tmp_path, tracking).configure().tracking)
    run = create_run(store, "trial-000", {"sweep": "far", "trial": 0})
    run.set_tags({OWNER: dead})

    without = visit(tmp_path, *stores)
    open_study("far", open_storage(study), ["maximize"])
    with hold("far", study):
        held = fix(tmp_path, *stores)
    mended, after = fix(tmp_path, *stores), visit(tmp_path, *stores)

    assert without.of("wrong").keys() == {"runs"}
    assert tables_of(study) != []
    assert (held.error, held.of("mended")) == ("", {})
    assert f"is being run by process {os.getpid()} on " in held.of("note")["runs"][0]
    assert mended.of("mended").keys() == {"runs"}
    assert (after.error, run.status) == ("", "KILLED")


def tables_of(uri: str) -> list[str]:
    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        return sqlalchemy.inspect(connection).get_table_names()


# --- disks -------------------------------------------------------------------------------


def test_a_reserve_that_is_gone_is_filled(folder: Path) -> None:
    reserve = folder / "mlruns" / ".reserve"
    reserve.unlink()

    seen, mended, after = visit(folder), fix(folder), visit(folder)

    assert seen.of("wrong").keys() == {"disk"}
    assert mended.of("mended")["disk"][0].endswith(": filled it")
    assert reserve.stat().st_size == RESERVE_BYTES
    assert after.error == ""


def test_little_room_is_found(folder: Path, tmp_path: Path, need: Need) -> None:
    need(os.geteuid() == 0, "root, to mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk), "-o", "size=64m"], check=True)
    try:
        Bench(folder).copy(disk)
        seen = visit(disk)
    finally:
        Bench(folder).connect()  # nothing of the disk stays open
        subprocess.run(["umount", "--lazy", str(disk)], check=True)

    (line,) = seen.wrong
    assert re.match(rf"disk: \d\d\.?\d? MB left where {disk}/mlruns is, less than 1\d\d MB", line)


# --- the spool ---------------------------------------------------------------------------


def spooled(folder: Path, owner: str, uri: str = "") -> Path:
    """A spool that a process left: a tag and the end of a run, which is RUNNING in the store."""
    store = open_store(Bench(folder).configure().tracking)
    run = create_run(store, "cut off", {})
    spool = store.spools / run.run_id
    about = {
        "run_id": run.run_id,
        "name": "cut off",
        "experiment_id": store.experiment_id,
        "uri": uri or store.uri,
    }
    run.spool.add({"kind": "tags", "tags": {"told": "late"}}, about)
    run.spool.add({"kind": "end", "status": "FINISHED", "time": 1_700_000_000_000}, about)
    (spool / "run.json").write_text(json.dumps({**about, "owner": owner}), encoding="utf-8")
    return spool


def test_what_a_dead_process_could_not_tell_is_told(folder: Path, dead: str) -> None:
    spool = spooled(folder, dead)

    seen, mended, after = visit(folder), fix(folder), visit(folder)

    (line,) = seen.wrong  # the run is RUNNING too, but its end is in the spool
    assert f"run cut off ({spool.name}): the store has yet to be told 2 entries, and" in line
    assert mended.of("mended")["spool"][0].endswith(": told 2 entries")
    assert (mended.error, after.error) == ("", "")
    run = read_run(spool.name)
    assert (run.status, run.tags["told"]) == ("FINISHED", "late")
    assert not spool.exists()


def test_a_run_whose_process_was_killed_before_it_had_an_end_to_tell_is_ended(
    folder: Path, dead: str
) -> None:
    run = running(folder, dead)
    run.spool.add({"kind": "tags", "tags": {"told": "late"}}, run._about)
    about = run.spool.folder / "run.json"
    about.write_text(json.dumps(run.spool.about | {"owner": dead}), encoding="utf-8")

    mended, after = fix(folder), visit(folder)

    assert mended.of("mended").keys() == {"spool", "runs"}
    assert (mended.error, after.error) == ("", "")
    assert (run.status, run.tags["told"]) == ("KILLED", "late")


@pytest.mark.parametrize("owner", [me(), "elsewhere 1 1"], ids=["alive", "elsewhere"])
def test_what_a_process_that_may_live_is_to_tell_is_left_to_it(owner: str, folder: Path) -> None:
    spool = spooled(folder, owner)
    before = dump(folder)

    mended = fix(folder)

    assert mended.error == ""
    assert "has yet to be told 2 entries" in mended.of("note")["spool"][0]
    assert spool.exists()
    assert dump(folder) == before


def test_what_is_of_another_store_or_refused_is_told(folder: Path, dead: str) -> None:
    other = spooled(folder, dead, uri="http://127.0.0.1:9")
    refused = spooled(folder, dead)
    execute(folder, "mlflow.db", "DELETE FROM runs WHERE run_uuid = ?", refused.name)

    seen = fix(folder)

    lines = {
        name: line for name in (other.name, refused.name) for line in seen.wrong if name in line
    }
    assert "it is of another store, http://127.0.0.1:9" in lines[other.name]
    assert "cannot be mended: " in lines[refused.name]
    assert seen.error == "2 things are still wrong: spool."
    assert other.exists()
    assert refused.exists()


# --- runs under way ----------------------------------------------------------------------


def running(folder: Path, owner: str, **tags: str) -> Run:
    run = create_run(open_store(Bench(folder).configure().tracking), "single", tags)
    run.set_tags({OWNER: owner})
    return run


def test_a_run_whose_process_is_gone_is_ended(folder: Path, dead: str) -> None:
    run = running(folder, dead)
    host, process, *_ = dead.split()

    seen, mended, after = visit(folder), fix(folder), visit(folder)

    assert seen.wrong == [
        f"runs: run single ({run.run_id}) is RUNNING, and process {process} on {host} is gone"
    ]
    assert "\nruns: fix=true ends it as KILLED\n" in seen.text
    assert mended.of("mended")["runs"][0].endswith(": ended 1 run as KILLED")
    assert (mended.error, after.error) == ("", "")
    assert run.status == "KILLED"
    assert run.tags["error"] == f"process {process} on {host} is gone, and left it RUNNING."


@pytest.mark.parametrize(
    ("owner", "noted"),
    [(me(), 0), ("elsewhere 12 1700000000", 1), ("of an older version", 1)],
    ids=["alive", "elsewhere", "older"],
)
def test_a_run_whose_process_lives_or_is_not_seen_is_left_alone(
    owner: str, noted: int, folder: Path
) -> None:
    run = running(folder, owner)
    before = dump(folder)

    mended = fix(folder)

    assert mended.error == ""
    assert len(mended.of("note").get("runs", [])) == noted
    assert run.status == "RUNNING"
    assert dump(folder) == before


@pytest.mark.parametrize(
    ("tags", "work"),
    [({"sweep": "wide"}, "sweep"), ({"promotion.model": "digits"}, "promotion")],
)
def test_a_run_of_what_is_held_is_left_alone(
    tags: dict[str, str], work: str, folder: Path, dead: str
) -> None:
    run = running(folder, dead, **tags)
    name = next(iter(tags.values()))
    storage = f"sqlite:///{folder / 'mlruns' / 'optuna.db'}"

    with hold(name, storage, work):
        held = fix(folder)
    free = fix(folder)

    assert (held.error, held.of("mended")) == ("", {})
    assert f"by process {os.getpid()} on " in held.of("note")["runs"][0]
    assert free.of("mended")["runs"]
    assert run.status == "KILLED"


def test_the_runs_of_a_sweep_are_owned_by_its_launcher_wherever_its_lock_is(
    folder: Path, dead: str
) -> None:
    parent = running(folder, me(), sweep="far", kind="sweep")
    store = parent.store
    child = create_run(store, "trial-000", {"sweep": "far", "trial": 0}, parent=parent)
    child.set_tags({OWNER: dead})

    assert fix(folder).error == ""
    assert child.status == "RUNNING"


def test_what_others_wrote_into_tags_becomes_no_path_and_no_escape(folder: Path, dead: str) -> None:
    odd = running(folder, dead, sweep="../../escaped\x1b[31m", kind="sweep", trial="first")
    before = files_of(folder.parent)

    mended = fix(folder)

    assert len(mended.of("mended")["runs"]) == 1
    assert (odd.status, visit(folder).error) == ("KILLED", "")
    assert "\x1b" not in mended.text
    assert files_of(folder.parent) == before


# --- trials and their runs ---------------------------------------------------------------


def test_a_deleted_run_is_told_and_restored(folder: Path) -> None:
    number, run_id = trial_of(folder, "COMPLETE")
    mlflow.MlflowClient().delete_run(run_id)

    seen = visit(folder)
    mlflow.MlflowClient().restore_run(run_id)

    assert seen.wrong == [f"trials: sweep wide: the run of trial {number} was deleted"]
    assert f"/mlflow.db mlflow runs restore --run-id {run_id}\n" in seen.text
    assert visit(folder).error == ""


def test_trials_whose_run_is_gone_for_good_are_told(folder: Path) -> None:
    runs = [trial_of(folder, state) for state in ("COMPLETE", "PRUNED")]
    for _, run_id in runs:
        execute(folder, "mlflow.db", "DELETE FROM runs WHERE run_uuid = ?", run_id)

    first, second = sorted(number for number, _ in runs)
    assert visit(folder).wrong == [
        f"trials: sweep wide: no run is recorded of trials {first} and {second}"
    ]


def test_a_value_that_differs_from_the_recorded_one_is_told(folder: Path) -> None:
    number, run_id = trial_of(folder, "COMPLETE")
    sql = "UPDATE latest_metrics SET value = 0.5 WHERE key = 'saved_val_accuracy' AND run_uuid = ?"
    execute(folder, "mlflow.db", sql, run_id)
    (value,) = trials_of(folder, "wide")[number].values

    seen = visit(folder)

    assert seen.wrong == [
        f"trials: sweep wide: trial {number}: {value:.6g} in the study, 0.5 in its run"
    ]
    assert f"python -m pipeline.repeat run={run_id}" in seen.text


def test_each_of_several_objectives_is_compared(folder: Path) -> None:
    runs = {run.run_id: run for run in runs_of(folder, "wide")}
    (parent,) = [run for run in runs.values() if run.tags.get("kind") == "sweep"]
    sql = "UPDATE tags SET value = ? || ', parameters' WHERE key = 'objective' AND run_uuid = ?"
    execute(folder, "mlflow.db", sql, "val_accuracy", parent.run_id)
    complete = [trial for trial in trials_of(folder, "wide") if trial.state.name == "COMPLETE"]
    for trial in complete:
        execute(
            folder,
            "optuna.db",
            "INSERT INTO trial_values (trial_id, objective, value, value_type) "
            "VALUES (?, 1, ?, 'FINITE')",
            trial._trial_id,
            runs[trial.user_attrs["run_id"]].metrics["parameters"],
        )
    sql = (
        "INSERT INTO study_directions (direction, study_id, objective) "
        "SELECT 'MINIMIZE', study_id, 1 FROM studies WHERE study_name = 'wide'"
    )
    execute(folder, "optuna.db", sql)

    fine = visit(folder)
    sql = "UPDATE trial_values SET value = 7 WHERE objective = 1 AND trial_id = ?"
    execute(folder, "optuna.db", sql, complete[0]._trial_id)

    assert fine.error == ""
    (line,) = visit(folder).wrong
    assert re.search(
        rf"trial {complete[0].number}: 0\.\d+, 7 in the study, 0\.\d+, \d+ in its", line
    )


@pytest.mark.parametrize(
    ("state", "status", "right"),
    [
        ("COMPLETE", "RUNNING", "FINISHED"),
        ("COMPLETE", "KILLED", "FINISHED"),
        ("PRUNED", "RUNNING", "KILLED"),
        ("PRUNED", "FAILED", "KILLED"),
    ],
)
def test_a_run_ends_as_its_trial_did(
    state: str, status: str, right: str, folder: Path, dead: str
) -> None:
    number, run_id = trial_of(folder, state)
    execute(folder, "mlflow.db", "UPDATE runs SET status = ? WHERE run_uuid = ?", status, run_id)
    sql = "UPDATE tags SET value = ? WHERE key = 'owner' AND run_uuid = ?"
    execute(folder, "mlflow.db", sql, dead, run_id)

    seen, mended, after = visit(folder), fix(folder), visit(folder)

    assert seen.wrong == [f"trials: sweep wide: trial {number}: {state}, its run {status}"]
    assert mended.of("mended")["trials"][0].endswith(": ended 1 run as its trial did")
    assert (mended.error, after.error) == ("", "")
    assert read_run(run_id).status == right
    check_invariants(folder, "wide", 8)


def test_a_failed_trial_gives_its_run_the_reason(folder: Path, dead: str) -> None:
    number, run_id = trial_of(folder, "PRUNED")
    trial = trials_of(folder, "wide")[number]
    execute(
        folder, "optuna.db", "UPDATE trials SET state = 'FAIL' WHERE trial_id = ?", trial._trial_id
    )
    execute(
        folder,
        "optuna.db",
        "INSERT INTO trial_user_attributes (trial_id, key, value_json) "
        "VALUES (?, 'reason', '\"it fell\"')",
        trial._trial_id,
    )

    assert fix(folder).error == ""
    assert (read_run(run_id).status, read_run(run_id).tags["error"]) == ("FAILED", "it fell")


def test_a_run_without_its_model_is_told_and_does_not_become_finished(folder: Path) -> None:
    number, run_id = trial_of(folder, "COMPLETE")
    sql = "UPDATE logged_models SET status = 3 WHERE source_run_id = ?"
    execute(folder, "mlflow.db", sql, run_id)
    sql = "UPDATE runs SET status = 'KILLED' WHERE run_uuid = ?"
    execute(folder, "mlflow.db", sql, run_id)

    mended = fix(folder)

    assert mended.wrong == [
        f"trials: sweep wide: trial {number} COMPLETE, and its run has no model"
    ]
    assert read_run(run_id).status == "KILLED"


def test_runs_of_no_trial_and_second_runs_of_one_are_told(folder: Path) -> None:
    number, run_id = trial_of(folder, "COMPLETE")
    parent = str(read_run(run_id).parent)
    store = open_store(Bench(folder).configure().tracking)
    strays = []
    for trial in (number, 99):
        tags = {"sweep": "wide", "trial": trial, "mlflow.parentRunId": parent}
        strays.append(create_run(store, f"stray-{trial}", tags))
        strays[-1].end("KILLED")

    assert visit(folder).wrong == [
        f"trials: sweep wide: 1 run of {what}: stray-{trial} ({run_id})"
        for what, trial, run_id in (
            ("a trial that has another", number, strays[0].run_id),
            ("no trial", 99, strays[1].run_id),
        )
    ]


def test_what_disagrees_in_a_sweep_that_is_being_run_is_left_alone(folder: Path) -> None:
    _, run_id = trial_of(folder, "PRUNED")
    sql = "UPDATE runs SET status = 'FAILED' WHERE run_uuid = ?"
    execute(folder, "mlflow.db", sql, run_id)
    before = dump(folder)

    with hold("wide", f"sqlite:///{folder / 'mlruns' / 'optuna.db'}"):
        mended = fix(folder)

    assert (mended.error, mended.of("mended")) == ("", {})
    assert dump(folder) == before


def test_studies_that_are_kept_elsewhere_are_missed(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.db"
    with closing(sqlite3.connect(folder / "mlruns" / "optuna.db")) as database:
        database.execute("VACUUM INTO ?", (str(moved),))
    for path in (folder / "mlruns").glob("optuna.db*"):
        path.unlink()

    missed = visit(folder)
    found = fix(folder, f"study.storage=sqlite:///{moved}")

    assert [line.partition(" recorded")[0] for line in missed.wrong] == ["trials: 2 sweeps"]
    assert "set study.storage to where they are" in missed.text
    assert not (folder / "mlruns" / "optuna.db").exists()
    assert found.of("mended").keys() == {"databases"}  # VACUUM INTO leaves no WAL
    assert found.error == ""


def test_a_study_that_was_deleted_is_a_note(folder: Path) -> None:
    storage = open_storage(f"sqlite:///{folder / 'mlruns' / 'optuna.db'}")
    storage.delete_study(storage.get_study_id_from_name("wide"))
    storage.remove_session()
    storage.engine.dispose()

    seen = visit(folder)

    assert seen.error == ""
    assert seen.of("note")["trials"] == ["no study is kept of wide"]


# --- left behind -------------------------------------------------------------------------


def test_what_killed_processes_left_is_deleted(folder: Path, dead: str) -> None:
    mlruns = folder / "mlruns"
    _, ended = trial_of(folder, "COMPLETE")
    process = next(number for number in range(2, 99999) if not psutil.pid_exists(number))
    left = [
        mlruns / "checkpoints" / ended / "training.npz",
        mlruns / f".sweep-wide.{process}.tmp",
        mlruns / "tmpabcd1234" / "mlflow.db",
        mlruns / "spool" / "0123" / "run.json",
    ]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"owner": dead}), encoding="utf-8")

    seen, mended, after = visit(folder), fix(folder), visit(folder)

    assert len(seen.wrong) == 4
    assert seen.error == "4 things are wrong: left-overs; fix=true mends 4 of them."
    assert len(mended.of("mended")["left-overs"]) == 4
    assert (mended.error, after.error) == ("", "")
    assert not any(path.exists() for path in (*left, *(path.parent for path in left[2:])))


def test_what_may_still_be_somebodys_is_kept(folder: Path) -> None:
    mlruns = folder / "mlruns"
    trial, run_id = trial_of(folder, "PRUNED")
    sql = "UPDATE trials SET state = 'RUNNING' WHERE number = ? AND study_id = 2"
    execute(folder, "optuna.db", sql, trial)
    kept = [
        mlruns / "checkpoints" / run_id / "training.npz",  # the trial goes on from it
        mlruns / "checkpoints" / ("0" * 32) / "training.npz",  # perhaps of another store
        mlruns / f".sweep-wide.{os.getppid()}.tmp",
        mlruns / "tmpabcd1234" / "mine.txt",
        mlruns / "tmpdcba1234" / "mlflow.db",  # is just being created
    ]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("here", encoding="utf-8")

    with FileLock(mlruns / ".create.lock"):
        mended = fix(folder)

    assert (mended.error, mended.of("mended")) == ("", {})
    assert all(path.exists() for path in kept)
    assert [line.partition(" is ")[2] for line in mended.of("note")["left-overs"]] == [
        "of no run of this store"
    ]


# --- champions ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def promoted(tmp_path_factory: pytest.TempPathFactory, tensorflow: None) -> Bench:
    """A store with a champion of digits."""
    bench = Bench(tmp_path_factory.mktemp("promoted"))
    run = bench.train("model.hidden_units=64")
    command(bench, f"run={run.run_id}", "promote.seeds=[1001]", "promote.floor=0.5")
    return bench


def test_the_champion_answers_as_recorded(promoted: Bench) -> None:
    before = dump_of_mlflow(promoted.folder)

    seen = visit(promoted.folder)

    assert seen.error == ""
    assert seen.of("ok")["champion"] == [
        "digits version 1 answers as recorded: 5 example images and 575 validation images"
    ]
    assert dump_of_mlflow(promoted.folder) == before


def dump_of_mlflow(folder: Path) -> list[str]:
    with closing(sqlite3.connect(folder / "mlruns" / "mlflow.db")) as database:
        return list(database.iterdump())


def champion_file(bench: Bench) -> Path:
    (run,) = mlflow.MlflowClient().search_model_versions("name='digits'")
    return folder_of_model(bench, str(run.run_id)) / "data" / "model.keras"


def test_a_champion_whose_file_was_changed_is_told_with_the_way_out(
    promoted: Bench, tmp_path: Path
) -> None:
    bench = promoted.copy(tmp_path)
    with champion_file(bench).open("ab") as file:
        file.write(b"!")

    seen = fix(bench.folder)

    assert seen.wrong == [
        "champion: digits version 1, the champion: its file is not what was promoted"
    ]
    assert "champion: there is no champion before it; promote another: python -m " in seen.text


def test_a_champion_that_answers_otherwise_is_told(promoted: Bench, tmp_path: Path) -> None:
    bench = promoted.copy(tmp_path)
    with bench.edit() as database:
        sql = "UPDATE model_version_tags SET value = '0 0 0 0 0' WHERE key = 'smoke'"
        assert database.execute(sql).rowcount

    assert "it predicts " in visit(bench.folder).wrong[0]


def test_a_sweep_whose_runs_another_store_has_is_a_note(folder: Path) -> None:
    uri = f"sqlite:///{folder / 'mlruns' / 'optuna.db'}"
    study = open_study("elsewhere", open_storage(uri), ["maximize"])
    study.set_user_attr("recorded", "http://127.0.0.1:9")
    study.tell(study.ask(), 0.5)

    seen = visit(folder)

    assert seen.wrong == []
    assert "sweep elsewhere: its runs are in http://127.0.0.1:9" in seen.text
