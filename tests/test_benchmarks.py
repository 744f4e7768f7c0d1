"""The benchmarks run, which nobody would notice otherwise until the figures are wanted."""

import re
import sys
from pathlib import Path

from tests.benchmarks import results
from tests.benchmarks.sweep import Sweep, best_so_far, draw
from tests.launching import ENVIRONMENT, run

PYTHON = [sys.executable, "-m"]


def test_a_step_is_shown_beside_its_limit_and_drawn(tmp_path: Path) -> None:
    few = ["--widths", "256", "--batches", "64", "128", "--rounds", "1", "--seconds", "0.001"]
    plot = ["--plot", str(tmp_path / "step.svg")]

    done = run(*few, *plot, folder=tmp_path, command=[*PYTHON, "tests.benchmarks.step"])

    assert done.returncode == 0, done.stderr
    rows = re.findall(r"│ +256 │ +(\d+) │ +[\d.]+ │((?: +\d+% │)+) +[\d.]+ │", done.stdout)
    assert [batch for batch, _ in rows] == ["64", "128"]
    shares = [int(share) for _, cells in rows for share in re.findall(r"\d+", cells)]
    assert len(shares) == 6
    assert 0 < min(shares)
    assert "<svg" in (tmp_path / "step.svg").read_text()


def test_what_a_run_costs_beyond_training_is_split_by_part(tmp_path: Path, mnist_npz: Path) -> None:
    environment = {**ENVIRONMENT, "MNIST_NPZ": str(mnist_npz)}

    done = run(
        *("--rounds", "1", "--images", "1000"),
        folder=tmp_path,
        command=[*PYTHON, "tests.benchmarks.overhead"],
        environment=environment,
    )

    assert done.returncode == 0, done.stderr
    seconds = {name: float(s) for name, s in re.findall(r"│ (\S.*?) +│ +(-?[\d.]+) │", done.stdout)}
    assert len(seconds) == 18
    assert min(seconds["train"], seconds["evaluate"], seconds["record the model"]) > 0
    assert list(tmp_path.iterdir()) == []


def swept(contestant: str, *finished: tuple[float, float]) -> Sweep:
    return Sweep(contestant, 9.0, 8.0, 0.0, [*finished], None, None)


def test_the_best_so_far_never_falls_and_lasts_to_the_end() -> None:
    sweep = swept("c", (2.0, 0.9), (1.0, 0.95), (4.0, 0.96))

    assert best_so_far(sweep) == ([1.0, 2.0, 4.0, 9.0], [0.95, 0.95, 0.96, 0.96])


def test_the_best_so_far_is_drawn_by_contestant(tmp_path: Path) -> None:
    turns = [swept("c", (1.0, 0.95)), swept("g", (3.0, 0.8))]

    draw([turns, turns], tmp_path / "sweep.svg")

    labels = re.findall(r"<!-- (\w: .*?) -->", (tmp_path / "sweep.svg").read_text())
    assert labels == ["c: sweeps.run", "g: Ray Tune, MLflow"]


def test_results_over_seeds_are_drawn_where_all_images_were_trained_on(tmp_path: Path) -> None:
    shared = "experiment=strong data.validation_size=0"
    measured = [
        results.Result(command, commit, whole, [1.0, 1.1], [], [400.0, 410.0], 2)
        for command, commit, whole in (
            ("experiment=notebook data.validation_size=0", "1111111", True),
            (shared, "1111111", True),
            (shared, "2222222", True),
            ("experiment=strong data.validation_size=0.1", "1111111", False),
        )
    ]

    results.draw(measured, tmp_path / "results.svg")

    drawn = re.findall(r"<!-- (.*?) -->", (tmp_path / "results.svg").read_text())
    names = [each for each in drawn if re.match("notebook|.*strong", each)]
    assert names == ["notebook", "strong (1111111)", "strong (2222222)"]
    assert {*results.PUBLISHED} <= {*drawn}


def test_a_result_is_named_without_seed_and_store() -> None:
    command = "python -m pipeline.run data=digits ++seed=3 tracking.directory='a b' +model.l2=1e-5"

    assert results.shorten(command) == "data=digits model.l2=1e-5"


def test_results_of_no_store_are_refused(tmp_path: Path) -> None:
    arguments = ("--directory", str(tmp_path / "none"))
    done = run(*arguments, folder=tmp_path, command=[*PYTHON, "tests.benchmarks.results"])

    assert done.returncode == 2
    assert done.stderr.endswith(f"error: no store in {tmp_path / 'none'}.\n")


def test_a_benchmark_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    done = run("stepp", folder=tmp_path, command=[*PYTHON, "tests.benchmarks"])

    assert done.returncode == 2
    assert "no such benchmark: stepp" in done.stderr
