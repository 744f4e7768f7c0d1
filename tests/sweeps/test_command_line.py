"""The command line of a sweep: how a mistake is told, before anything is imported or stored."""

from pathlib import Path

import pytest

from tests.commands import start


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("sweep.trails=3", "sweep.trails: no such key; did you mean sweep.trials?"),
        ("sampler=tpee", "sampler=tpee: no such option among cmaes, grid, qmc, random, tpe; did"),
        ("sweep.trials=0", "sweep.trials must be at least 1, got 0."),
        ("sweep.objective=accuracy", "sweep.objective must be one of val_accuracy, val_loss, "),
        ("sweep.name=../x", "sweep.name must be 1 to 64 of the characters"),
        ("evaluate_test=true", "evaluate_test must be false: a trial never looks, got True."),
        (
            "+experiment=strong,distorted",
            "experiment is the same in every trial, it is not searched",
        ),
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
    argument: str, told: str, tmp_path: Path
) -> None:
    ended = start("sweeps.run", "data=digits", argument, folder=tmp_path)

    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith("Error: ")
    assert told in ended.err
    assert ended.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_configuration_of_a_sweep_is_shown_without_running_it(tmp_path: Path) -> None:
    arguments = ["data=digits", "search=deep", "sweep.trials=7", "model.l2=interval(0, 1)"]

    ended = start("sweeps.run", *arguments, "--cfg", "job", folder=tmp_path)

    assert (ended.status, ended.err) == (0, "")
    assert {"sampler:", "  trials: 7", "evaluate_test: false"} <= {*ended.out.splitlines()}
    assert list(tmp_path.iterdir()) == []


def test_help_shows_the_groups_of_a_sweep(tmp_path: Path) -> None:
    ended = start("sweeps.run", "data=digits", "--help", folder=tmp_path)

    lines = {*ended.out.splitlines()}
    assert ended.status == 0
    assert {
        "search: deep, distorted, mlp, none, strong",
        "sampler: cmaes, grid, qmc, random, tpe",
    } <= lines
    assert "pruner: asha, hyperband, median, none" in lines
