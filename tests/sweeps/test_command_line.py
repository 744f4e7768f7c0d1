"""The command line of a sweep: how a mistake is told, before anything is imported or stored."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.compose import CONF

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def sweep(tmp_path: Path) -> Run:
    """Runs the command line in an empty folder, where TensorFlow and MLflow cannot be imported."""
    traps = tmp_path / "traps"
    traps.mkdir()
    for library in ("tensorflow", "keras", "mlflow"):
        (traps / f"{library}.py").write_text(f"raise SystemExit('{library} was imported')")
    (tmp_path / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    environment["PYTHONPATH"] = os.pathsep.join([str(traps), str(CONF.parent)])

    def sweep(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sweeps.run", "data=digits", *arguments],
            cwd=tmp_path / "empty",
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return sweep


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("sweep.trails=3", "sweep.trails: no such key; did you mean sweep.trials?"),
        ("sampler=tpee", "sampler=tpee: no such option among cmaes, grid, qmc, random, tpe; did"),
        ("sweep.trials=0", "sweep.trials must be at least 1, got 0."),
        ("sweep.objective=accuracy", "sweep.objective must be one of val_accuracy, val_loss, "),
        ("sweep.name=../x", "sweep.name must be 1 to 64 of the characters"),
        ("evaluate_test=true", "evaluate_test must be false: a trial never looks, got True."),
        ("seed=1,2", "seed=1,2: seed is the same in every trial, it is not searched."),
        ("model.dropout_rate=choice()", "model.dropout_rate=choice(): "),
        (
            "model.dropout_rate=interval(0.0, 1.0)",
            "model.dropout_rate=interval(0.0, 1.0): model.dropout_rate must be in [0, 1), got 1.0.",
        ),
        (
            "optimizer.learning_rate=tag(log, interval(0.0, 0.1))",
            "optimizer.learning_rate=tag(log, interval(0.0, 0.1)): `low > 0` must hold",
        ),
        ("model.l2=range(0, inf)", "model.l2=range(0, inf): "),
        ("model.hiden_units=range(1, 5)", "no such key; did you mean model.hidden_units?"),
        ("model.dropout_rate=interval(0.0, 0.5", "model.dropout_rate=interval(0.0, 0.5"),
    ],
)
def test_a_mistake_ends_in_one_line_before_anything_is_imported_or_written(
    argument: str, told: str, sweep: Run, tmp_path: Path
) -> None:
    ended = sweep(argument)

    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("Error: ")
    assert told in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert list((tmp_path / "empty").iterdir()) == []


def test_the_configuration_of_a_sweep_is_shown_without_running_it(
    sweep: Run, tmp_path: Path
) -> None:
    ended = sweep("search=deep", "sweep.trials=7", "model.l2=interval(0, 1)", "--cfg", "job")

    assert ended.returncode == 0
    assert ended.stderr == ""
    assert {"sampler:", "  trials: 7", "evaluate_test: false"} <= {*ended.stdout.splitlines()}
    assert list((tmp_path / "empty").iterdir()) == []


def test_help_shows_the_groups_of_a_sweep(sweep: Run) -> None:
    ended = sweep("--help")

    lines = {*ended.stdout.splitlines()}
    assert ended.returncode == 0
    assert {"search: deep, mlp", "sampler: cmaes, grid, qmc, random, tpe"} <= lines
    assert "pruner: asha, hyperband, median, none" in lines
