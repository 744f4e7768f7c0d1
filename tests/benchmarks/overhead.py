"""What a run and a command cost beyond training, by part.

    MNIST_NPZ=mnist.npz python -m tests.benchmarks.overhead    # two minutes

- Commands: wall time of a help text and of a misspelt key, from the start of Python to its end.
- Starts: in one process, trials of 2 epochs of 20,000 images follow one another, as in a worker:
  seconds of a trial's first epoch beyond its second. The first is the first use of TensorFlow.
- Parts: of the third run in a process, recorded in SQLite, what each part takes.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import hydra
from rich.console import Console
from rich.table import Table

from pipeline import start_libraries
from pipeline.compose import CONF, to_config
from pipeline.config import RunConfig
from tests.benchmarks.machine import describe

ROUNDS = 5
COMMANDS = {
    "pipeline.run --help": ["pipeline.run", "--help"],
    "pipeline.run, a misspelt key": ["pipeline.run", "model.hiden_units=3"],
    "sweeps.run --help": ["sweeps.run", "--help"],
    "sweeps.run, a misspelt key": ["sweeps.run", "model.hiden_units=3"],
}
TRIALS = [  # overrides; each width is new to XLA once
    ("the first of a process", ["model.hidden_units=128", "training.compile=never"]),
    ("a width seen before", ["model.hidden_units=128", "training.compile=never"]),
    ("a new width", ["model.hidden_units=200", "training.compile=never"]),
    ("XLA, the first time", ["model.hidden_units=512", "training.compile=always"]),
    ("XLA, a width seen before", ["model.hidden_units=512", "training.compile=always"]),
    ("XLA, a new width", ["model.hidden_units=600", "training.compile=always"]),
]
IMAGES = 20_000
SHORT = ["data=mnist", "data.validation_size=5000", "training.epochs=2", "evaluate_test=false"]


def compose(images: int, *overrides: str) -> RunConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return to_config(hydra.compose("run", [*SHORT, f"data.train_size={images}", *overrides]))


def seconds_of_command(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", *arguments], check=False, capture_output=True)
    return time.perf_counter() - start


def seconds_to_start(overrides: list[str], images: int, folder: Path) -> float:
    """Of a run: its first epoch, from the start of all, beyond its second."""
    from pipeline.run import execute_run

    times = [time.perf_counter()]
    execute_run(
        compose(images, *overrides, f"tracking.directory={folder}", "tracking.figures=false"),
        "",
        on_epoch_end=lambda epoch, metrics: times.append(time.perf_counter()),
        data=_loaded(images),
    )
    first, second = (end - begin for begin, end in pairwise(times))
    return first - second


@cache
def _loaded(images: int) -> Any:
    from pipeline.data import load

    return load(compose(images).data)


class Stopwatch(ExitStack):
    """Sums the seconds of functions until it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, part: str, owner: object, *names: str) -> None:
        for name in names:
            timed = self._timed(part, getattr(owner, name))
            self.enter_context(patch.object(owner, name, timed))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: object, **settings: object) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **settings)
            finally:
                self.seconds[part] += time.perf_counter() - start

        return timed


def seconds_of_parts(images: int, folder: Path) -> dict[str, float]:
    from pipeline import evaluate, model, run, tracking, train

    with Stopwatch() as watch:
        watch.watch("build the model", model, "build_mlp", "build_optimizer")
        watch.watch("train", train, "train")
        watch.watch("record the epochs", tracking.Run, "log_metrics")
        watch.watch("evaluate", evaluate, "evaluate")
        watch.watch("record the predictions", tracking.Run, "log_predictions")
        watch.watch("record the model", tracking.Run, "log_model")
        watch.watch("whole", run, "execute_run")
        config = compose(images, f"tracking.directory={folder}", "tracking.figures=false")
        run.execute_run(config, "", data=_loaded(images))
    seconds = dict(watch.seconds)
    seconds["train"] -= seconds["record the epochs"]
    whole = seconds.pop("whole")
    return {**seconds, "create, describe and end the run": whole - sum(seconds.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description="Times what is not training.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each ({ROUNDS})")
    parser.add_argument(
        "--images", type=int, default=IMAGES, help=f"a trial trains on ({IMAGES:,})"
    )
    arguments = parser.parse_args()
    rounds, images = arguments.rounds, arguments.images
    table = Table(title="Beyond training", caption=describe(), show_header=False)
    table.add_column()
    table.add_column(justify="right")

    def section(head: str, seconds: dict[str, float]) -> None:
        table.add_section()
        table.add_row(f"[bold]{head}[/]", "[bold]s[/]")
        for name, value in seconds.items():
            table.add_row(name, f"{value:.3f}")

    commands = {
        name: median(seconds_of_command(each) for _ in range(rounds))
        for name, each in COMMANDS.items()
    }
    section("a command, to its end", commands)
    start = time.perf_counter()
    start_libraries()
    section("imports", {"TensorFlow, Keras, MLflow": time.perf_counter() - start})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _loaded(images)
        starts = {what: seconds_to_start(each, images, folder) for what, each in TRIALS}
        section("a trial, until it trains", starts)
        runs = [seconds_of_parts(images, folder) for _ in range(rounds)]
        section("a run of 2 epochs", {part: median(run[part] for run in runs) for part in runs[0]})
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
