"""The leaderboard: its table, its records, its verdict; and its command line on real sweeps."""

import csv
import io
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from pipeline.config import TrackingConfig
from pipeline.owner import OWNER, me
from pipeline.store import Recorded
from sweeps.board import Board, Comparison, Row
from sweeps.config import ChosenConfig, LeaderboardConfig
from sweeps.leaderboard import board_records, board_table, main, sweeps_records, verdict
from tests.commands import call

LEADERBOARD = [sys.executable, "-m", "sweeps.leaderboard"]


def recorded(
    run_id: str,
    tags: Mapping[str, str],
    *,
    params: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
    seconds: float | None = 70.0,
) -> Recorded:
    return Recorded(
        run_id=run_id,
        name=run_id,
        experiment_id="1",
        parent=None,
        status="FINISHED",
        started=datetime(2024, 5, 17, 12, 30, tzinfo=UTC),
        seconds=seconds,
        params=params or {},
        metrics=metrics or {},
        tags=tags,
        artifacts="file:///nowhere",
        validation=("0123456789abcdef", 240),
    )


def sweep(name: str, objective: str = "val_accuracy") -> Recorded:
    tags = {"sweep": name, "kind": "sweep", "objective": objective, "command": f"sweep {name}"}
    counts = {"finished": 8.0, "pruned": 2.0, "failed": 1.0, "best_val_accuracy": 0.98765}
    return recorded(name, tags, params={"data.name": "digits"}, metrics=counts)


def row(
    trial: int,
    *values: float,
    rank: int | None = 1,
    of: str = "wide",
    difference: float | None = None,
    margin: float | None = None,
    seconds: float = 2.5,
    parameters: float = 669706.0,
    **settings: str,
) -> Row:
    dotted = {"units": "model.hidden_units", "rate": "optimizer.learning_rate"}
    named = {dotted.get(name, f"{name}.name"): text for name, text in settings.items()}
    tags = {"sweep": of, "trial": str(trial), "command": f"run, as trial {trial}"}
    metrics = {"epoch": 2.0, "parameters": parameters, "fit_seconds": seconds}
    found = recorded(f"run{trial}", tags, params=named, metrics=metrics)
    return Row(rank=rank, run=found, values=values, difference=difference, margin=margin)


SETTINGS = ("model.hidden_units", "optimizer.learning_rate", "optimizer.name")


def board_of(
    *rows: Row,
    sweeps: Sequence[str] = ("wide",),
    objectives: tuple[str, ...] = ("val_accuracy",),
    settings: Sequence[str] = SETTINGS,
) -> Board:
    return Board(
        sweeps=[sweep(name, ", ".join(objectives)) for name in sweeps],
        objectives=objectives,
        rows=rows,
        best=[rows[0].run],
        total=len(rows),
        images=240,
        is_paired=True,
        confidence=0.95,
        settings=settings,
    )


def rendered(table: Table) -> list[str]:
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(table)
    return [line.rstrip() for line in console.export_text().splitlines()]


FIRST = row(7, 0.98765, difference=0.0, margin=0.0, units="512", rate="0.00123")
SECOND = row(
    12, 0.9, rank=2, difference=-0.08765, margin=0.02, seconds=70.04, units="64", optimizer="adam"
)


# --- the table ---------------------------------------------------------------------------


def test_the_top_trials_are_rows_with_their_values_and_settings() -> None:
    title, headings, *rows = rendered(board_table(board_of(FIRST, SECOND), "The best"))

    assert title == "The best"
    assert headings.split()[:4] == ["rank", "trial", "val_accuracy", "behind"]
    assert headings.split()[4:7] == ["epochs", "parameters", "seconds"]
    assert headings.split()[7:] == ["hidden_units", "learning_rate", "optimizer"]
    assert rows[0].split() == ["1", "7", "0.9877", "2", "669,706", "2.5", "512", "0.00123"]
    assert rows[1].split() == ["2", "12", "0.9000", "0.0877", "±0.0200", "2", "669,706",
                               "70.0", "64", "adam"]  # fmt: skip


def test_a_front_has_a_column_for_each_objective() -> None:
    rows = (
        row(3, 0.9, 5000.0, parameters=5000.0),
        row(4, 0.8, 9000.0, parameters=9000.0, rank=None),
    )
    objectives = ("val_accuracy", "parameters")
    board = board_of(*rows, objectives=objectives, settings=())

    _, headings, first, second = rendered(board_table(board, "Pareto front"))

    assert headings.split()[:4] == ["rank", "trial", "val_accuracy", "parameters"]
    assert first.split()[:4] == ["1", "3", "0.9000", "5,000"]
    assert second.split()[:3] == ["4", "0.8000", "9,000"]
    assert "behind" not in headings


def test_the_rows_of_several_sweeps_name_theirs() -> None:
    board = board_of(FIRST, replace(row(2, 0.8, of="narrow"), rank=2), sweeps=("narrow", "wide"))

    _, headings, *rows = rendered(board_table(board, "Both"))

    assert headings.split()[:3] == ["rank", "sweep", "trial"]
    assert [line.split()[1] for line in rows] == ["wide", "narrow"]


@pytest.mark.parametrize(
    ("difference", "margin", "text"),
    [
        (0.0, 0.0, ""),
        (0.0, None, ""),
        (0.0, 0.01, "0.0000 ±0.0100"),
        (-0.0125, 0.0182, "0.0125 ±0.0182"),
        (0.0125, None, "0.0125"),
        (-0.0125, 0.0, "0.0125 ±0.0000"),
    ],
)
def test_a_row_tells_how_far_it_is_behind_and_how_sure_that_is(
    difference: float, margin: float | None, text: str
) -> None:
    later = row(1, 0.8, difference=difference, margin=margin)
    board = board_of(FIRST, later, settings=())

    _, _, _, line = rendered(board_table(board, "The best"))

    assert line.split() == ["1", "1", "0.8000", *text.split(), "2", "669,706", "2.5"]


def test_a_count_is_behind_by_a_count() -> None:
    board = board_of(
        row(1, 650.0, difference=0.0, margin=0.0, parameters=650.0),
        row(2, 6150.0, rank=2, difference=5500.0, margin=0.0, parameters=6150.0),
        objectives=("parameters",),
    )

    *_, line = rendered(board_table(board, "The best"))

    assert line.split()[2:4] == ["6,150", "5,500"]
    assert "±" not in line


# --- the records -------------------------------------------------------------------------


def test_a_record_has_every_value_as_it_is() -> None:
    first, second = board_records(board_of(FIRST, SECOND))

    assert first == {
        "rank": 1,
        "sweep": "wide",
        "trial": 7,
        "val_accuracy": 0.98765,
        "behind": 0.0,
        "margin": 0.0,
        "epochs": 2,
        "parameters": 669706,
        "seconds": 2.5,
        "model.hidden_units": 512,
        "optimizer.learning_rate": 0.00123,
        "optimizer.name": None,
        "run_id": "run7",
        "command": "run, as trial 7",
    }
    assert list(second) == list(first)
    assert (second["behind"], second["margin"], second["optimizer.name"]) == (0.08765, 0.02, "adam")


def test_a_record_of_several_objectives_has_each_and_no_difference() -> None:
    objectives = ("val_accuracy", "fit_seconds")

    (record,) = board_records(board_of(row(3, 0.9, 1.5, rank=None), objectives=objectives))

    assert (record["val_accuracy"], record["fit_seconds"]) == (0.9, 1.5)
    assert (record["rank"], record["behind"], record["margin"]) == (None, None, None)


def test_the_record_of_a_sweep_has_its_counts_and_its_best() -> None:
    (record,) = sweeps_records([sweep("wide")])

    assert record == {
        "sweep": "wide",
        "status": "FINISHED",
        "started": "2024-05-17T12:30:00+00:00",
        "seconds": 70.0,
        "data": "digits",
        "objective": "val_accuracy",
        "finished": 8,
        "pruned": 2,
        "failed": 1,
        "best": [0.98765],
        "run_id": "wide",
        "command": "sweep wide",
    }


def test_the_record_of_a_sweep_that_has_only_begun_is_empty_where_it_has_nothing() -> None:
    begun = replace(sweep("wide", "val_accuracy, parameters"), metrics={}, seconds=None)

    (record,) = sweeps_records([begun])

    assert (record["finished"], record["seconds"], record["best"]) == (0, None, [None, None])


# --- the verdict -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gain", "margin", "told"),
    [
        (0.03, 0.02, "0.0300 better than that of narrow (±0.0200): beyond the noise of the 240"),
        (0.02, 0.03, "0.0200 better than that of narrow (±0.0300): within the noise of the 240"),
        (-0.03, 0.02, "0.0300 worse than that of narrow (±0.0200): beyond the noise of the 240"),
        (-0.02, 0.03, "0.0200 worse than that of narrow (±0.0300): within the noise of the 240"),
        (0.25, 0.25, "0.2500 better than that of narrow (±0.2500): within the noise of the 240"),
    ],
)
def test_the_verdict_is_whether_the_second_is_better_beyond_noise(
    gain: float, margin: float, told: str
) -> None:
    found = Comparison(one="narrow", other="wide", gain=gain, margin=margin, trials=(8, 8))

    assert verdict(found, board_of(FIRST)) == f"The best of wide is {told} validation images."


def test_the_verdict_says_where_the_noise_is_unknown() -> None:
    found = Comparison(one="narrow", other="wide", gain=0.03, margin=None, trials=(8, 8))

    assert verdict(found, board_of(FIRST)) == (
        "The best of wide is 0.0300 better than that of narrow; how much of it is noise is "
        "unknown: predictions are not kept."
    )


@given(st.floats(-1, 1), st.floats(0, 1), st.integers(1, 99), st.integers(1, 99))
def test_every_verdict_is_consistent(gain: float, margin: float, first: int, second: int) -> None:
    found = Comparison(one="narrow", other="wide", gain=gain, margin=margin, trials=(first, second))

    text = verdict(found, board_of(FIRST))

    assert ("beyond" in text) is (abs(gain) > margin)
    assert ("better than" in text, "worse than" in text, "equal to" in text) == (
        gain > 0,
        gain < 0,
        gain == 0,
    )
    assert ("worse" in text) is (gain < 0)
    assert ("by luck" in text) is (first != second)


@pytest.mark.parametrize(
    ("trials", "told"),
    [((8, 30), "wide had 30 trials, narrow 8"), ((30, 8), "narrow had 30 trials, wide 8")],
)
def test_the_verdict_warns_where_one_had_more_trials(trials: tuple[int, int], told: str) -> None:
    found = Comparison(one="narrow", other="wide", gain=0.03, margin=0.02, trials=trials)

    assert verdict(found, board_of(FIRST)).endswith(
        f"240 validation images. {told}: more trials raise the best by luck alone."
    )


@pytest.mark.parametrize(
    ("gain", "told"), [(1000.0, "1,000 better"), (-1000.0, "1,000 worse"), (0.5, "0.5000 better")]
)
def test_the_verdict_on_what_is_not_measured_on_images_tells_of_no_noise_of_them(
    gain: float, told: str
) -> None:
    found = Comparison(one="narrow", other="wide", gain=gain, margin=0.0, trials=(8, 8))

    text = verdict(found, board_of(FIRST, objectives=("parameters",)))

    assert text == f"The best of wide is {told} than that of narrow."


# --- what is written ---------------------------------------------------------------------


def config(folder: Path, **given: Any) -> LeaderboardConfig:
    tracking = TrackingConfig(
        uri=None,
        directory=str(folder),
        experiment="all",
        run_name=None,
        system_metrics=False,
        figures=False,
    )
    default = LeaderboardConfig(
        tracking=tracking,
        sweep=ChosenConfig(name=given.pop("name", None)),
        all=False,
        rows=20,
        format="table",
        out=None,
        confidence=0.95,
    )
    return replace(default, **given)


def test_all_sweeps_are_listed_the_latest_first(
    swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(config(swept / "mlruns", all=True), [])

    headings, wide, narrow = capsys.readouterr().out.splitlines()
    counts = [
        "sweep",
        "started",
        "status",
        "data",
        "finished",
        "pruned",
        "failed",
        "elapsed",
        "best",
    ]
    assert headings.split() == counts
    assert [line.split()[0] for line in (wide, narrow)] == ["wide", "narrow"]
    assert wide.split()[3:6] == ["finished", "digits", "8"]
    assert wide.split()[-2] == "val_accuracy"


def test_all_sweeps_as_json_have_what_repeats_them(
    swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(config(swept / "mlruns", all=True, format="json", rows=1), [])

    (record,) = json.loads(capsys.readouterr().out)
    assert (record["sweep"], record["finished"], record["failed"]) == ("wide", 8, 0)
    assert record["command"].startswith("python -m sweeps.run data=digits ")


def test_all_sweeps_as_csv_have_a_number_for_the_best(
    swept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(config(swept / "mlruns", all=True, format="csv"), [])

    wide, narrow = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert 1 >= float(wide["best"]) > float(narrow["best"]) > 0


def test_a_table_in_a_file_is_cut_nowhere(swept: Path, tmp_path: Path) -> None:
    for path in (swept / "mlruns").glob("mlflow.db*"):
        shutil.copy(path, tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    names = [f"model.another_long_setting_{number}" for number in range(20)]
    for found in client.search_runs([experiment.experiment_id], "tags.trial != '-1'"):
        for name in names:
            client.log_param(found.info.run_id, name, found.info.run_id)

    main(config(tmp_path, out=str(tmp_path / "table.txt")), [])

    text = (tmp_path / "table.txt").read_text()
    assert "…" not in text
    assert {name.rpartition(".")[2] for name in names} <= {*text.split()}


# --- the command line --------------------------------------------------------------------


def test_the_latest_sweep_is_a_table(swept: Path) -> None:
    ended = call(folder=swept, command=LEADERBOARD)

    lines = ended.stdout.splitlines()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert lines[0].endswith("complete trials of wide")
    assert lines[1].split()[:4] == ["rank", "trial", "val_accuracy", "behind"]
    assert lines[1].split()[-3:] == ["hidden_units", "dropout_rate", "learning_rate"]
    assert lines[2].split()[0] == "1"
    assert "noise of the 240 validation images (95%, paired)" in ended.stdout
    assert lines[-1].startswith("See it: python -m pipeline.ui run=")


def test_two_sweeps_end_with_a_verdict(swept: Path, tmp_path: Path) -> None:
    directory = f"tracking.directory={swept / 'mlruns'}"

    ended = call("sweep.name=[narrow,wide]", directory, folder=tmp_path, command=LEADERBOARD)

    *_, told, see_narrow, see_wide = ended.stdout.splitlines()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert told.startswith("The best of wide is 0.")
    assert " better than that of narrow (±" in told
    assert told.endswith("): beyond the noise of the 240 validation images.")
    assert see_narrow.endswith(directory)
    assert see_wide.endswith(directory)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def owners() -> dict[str, str]:
    """As `me`: this process, one of this machine that has ended, one that cannot be seen."""
    with subprocess.Popen(["true"]) as ended:
        gone = f"{platform.node()} {ended.pid} 1 {me().split()[-1]}"
    return {"alive": me(), "gone": gone, "elsewhere": "another 1 1 1"}


@pytest.mark.parametrize(
    ("status", "owner", "told"),
    [
        ("RUNNING", "alive", "wide is RUNNING, finished trials: 8."),
        ("RUNNING", "elsewhere", "wide is RUNNING, finished trials: 8."),
        (
            "RUNNING",
            "gone",
            "wide is RUNNING, finished trials: 8; its process is gone, "
            "see python -m sweeps.doctor.",
        ),
        (
            "KILLED",
            "gone",
            "wide is KILLED, finished trials: 8. Go on with: python -m sweeps.run data=digits "
            "'model.hidden_units=tag(log, int(interval(64, 512)))' training.epochs=6 "
            "pruner.min_resource=2 sweep.trials=8 sweep.name=wide",
        ),
    ],
)
def test_that_a_sweep_is_not_over_is_told_under_the_table(
    status: str, owner: str, told: str, *, swept: Path, tmp_path: Path, owners: dict[str, str]
) -> None:
    shutil.copytree(swept / "mlruns", tmp_path / "mlruns")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}")
    experiments = [each.experiment_id for each in client.search_experiments()]
    (wide,) = client.search_runs(experiments, "tags.kind = 'sweep' and tags.sweep = 'wide'")
    client.update_run(wide.info.run_id, status)
    client.set_tag(wide.info.run_id, OWNER, owners[owner])

    shown = call("sweep.name=[narrow,wide]", folder=tmp_path, command=LEADERBOARD).stdout

    assert [line for line in shown.splitlines() if " finished trials: " in line] == [told]


def test_a_csv_file_has_every_complete_trial(swept: Path, tmp_path: Path) -> None:
    out = tmp_path / "trials.csv"
    overrides = ["sweep.name=narrow", "format=csv", "rows=null", f"out={out}"]

    ended = call(*overrides, folder=swept, command=LEADERBOARD)

    rows = list(csv.DictReader(out.read_text().splitlines()))
    accuracies = [float(row["val_accuracy"]) for row in rows]
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert len(rows) >= 2
    assert accuracies == sorted(accuracies, reverse=True)
    assert {row["sweep"] for row in rows} == {"narrow"}
    assert {int(row["model.hidden_units"]) for row in rows} <= set(range(4, 9))
    assert all(row["command"].startswith("python -m pipeline.run data=digits ") for row in rows)


def test_a_json_file_has_the_best_trials_of_each_sweep_asked_for(
    swept: Path, tmp_path: Path
) -> None:
    out = tmp_path / "trials.json"
    overrides = ["sweep.name=[wide,narrow]", "format=json", f"out={out}"]

    ended = call(*overrides, folder=swept, command=LEADERBOARD)

    records = json.loads(out.read_text())
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert (records[0]["rank"], records[0]["behind"]) == (1, 0.0)
    assert {record["sweep"] for record in records} == {"wide", "narrow"}
    assert all(isinstance(record["optimizer.learning_rate"], float) for record in records)
    assert all(isinstance(record["model.hidden_units"], int) for record in records)


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("sweep.name=wyde", "sweep.name=wyde: no such sweep; did you mean wide?"),
        ("tracking.directory=none", "no runs are recorded in {folder}/none/mlflow.db: run python"),
        ("confidence=1", "confidence must be in (0, 1), got 1.0."),
        ("format=xml", "format must be one of table, csv, json, got 'xml'."),
    ],
)
def test_a_mistake_is_told_in_one_line(argument: str, told: str, swept: Path) -> None:
    before = sorted(swept.iterdir())

    ended = call(argument, folder=swept, command=LEADERBOARD)

    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("Error: " + told.format(folder=swept))
    assert ended.stderr.count("\n") == 1
    assert sorted(swept.iterdir()) == before
