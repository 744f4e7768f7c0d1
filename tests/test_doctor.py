"""The doctor from the command line: of a healthy store, and of a sweep that was killed."""

import re
import sys
from pathlib import Path

from tests.commands import call
from tests.launching import SWEEP, Started, wait_until
from tests.promotions import Bench
from tests.stores import dump, epochs, parent_of, runs_of, seconds_until_quiet
from tests.visits import fix, visit

DOCTOR = [sys.executable, "-m", "sweeps.doctor"]


def test_a_healthy_store_ends_with_0_and_a_line_a_check(swept: Path, tmp_path: Path) -> None:
    Bench(swept).copy(tmp_path)
    before = dump(tmp_path)

    seen = call(command=DOCTOR, folder=tmp_path)

    assert (seen.returncode, seen.stderr) == (0, "")
    assert re.findall(r"^(\S+) +ok ", seen.stdout, re.M) == [
        *("databases", "disk", "spool", "runs", "trials", "left-overs", "champion")
    ]
    assert dump(tmp_path) == before


def test_a_killed_sweep_is_told_mended_and_can_be_gone_on_with(tmp_path: Path) -> None:
    command = [
        *("data=digits", "model.hidden_units=16", "sampler=random", "training.epochs=300"),
        *("training.early_stopping_patience=null", "sweep.trials=2", "executor.workers=1"),
        "sweep.name=killed",
    ]
    with Started(*SWEEP, *command, folder=tmp_path) as started:
        wait_until(lambda: epochs(tmp_path, 0) > 3)
        running = visit(tmp_path)
        started.process.kill()
    assert seconds_until_quiet(tmp_path, limit=5.0) < 5.0
    for cut_short in (tmp_path / "mlruns" / "checkpoints").glob("*/*.tmp"):
        cut_short.unlink()  # by a kill at that moment: not what is tested here

    seen = call(command=DOCTOR, folder=tmp_path)
    mended, after = fix(tmp_path), visit(tmp_path)

    assert running.error == ""
    assert f"sweep.name=killed is being run by process {started.process.pid} on " in running.text
    assert seen.returncode == 1
    assert seen.stderr == "Error: 1 thing is wrong: runs; fix=true mends it.\n"
    assert re.search(
        r"^runs +wrong +sweep killed: its own run and the run of trial 0 are RUNNING, and process "
        rf"{started.process.pid} on \S+ and process \d+ on \S+ are gone *$",
        seen.stdout,
        re.M,
    )
    assert mended.of("mended")["runs"][0].endswith(": ended 2 runs as KILLED")
    assert {run.status for run in runs_of(tmp_path, "killed")} == {"KILLED"}
    assert (mended.error, after.error) == ("", "")
    assert after.of("note")["trials"] == ["sweep killed: interrupted in trial 0"]
    go_on = parent_of(tmp_path, "killed").tags["command"]
    assert f"trials: go on with: {go_on}\n" in after.text
    assert list((tmp_path / "mlruns" / "checkpoints").glob("*/training.npz"))
