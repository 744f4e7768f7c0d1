"""How many workers one launcher keeps busy: they sleep instead of training.

    python -m tests.benchmarks.scale                           # 64, 256 and 1,000; see --help
    python -m tests.benchmarks.scale --on ray --workers 64 --epochs 10

`python -m sweeps.run`, with its study in PostgreSQL and its runs behind an MLflow server of one
process. What is simulated is the training: a trial sleeps, half to one and a half times
`--seconds`. Workers are threads of the launcher, or with `--on ray` what they always are there,
processes of a node of this machine, which report `--epochs` epochs to the study.

"to begin": until all workers have a trial. "s a trial": of the processor, by the launcher and by
each server. "ask": of Optuna. "connections": to the study's database, at most. "idle": share of the
time between a worker's first and last trial in which it had none. "beyond ideal": share of the
sweep's time that a launcher would have saved that takes none.
"""

import argparse
import heapq
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.metadata import version
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna
import psutil
import sqlalchemy
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial
from rich.console import Console
from rich.table import Table

import sweeps.launcher
import sweeps.study
import sweeps.sweep
from pipeline.config import RunConfig
from sweeps.config import ExecutorConfig
from sweeps.executors import Executor
from sweeps.storage import open_storage
from sweeps.trial import Job, Outcome, reporter
from tests.commands import call
from tests.launching import ENVIRONMENT
from tests.servers import MLflowServer, Postgresql

SWEEP = "scale"
SPACE: dict[str, BaseDistribution] = {
    "model.hidden_units": IntDistribution(32, 1024, log=True),
    "model.dropout_rate": FloatDistribution(0.0, 0.5),
    "optimizer.learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
}
HEADS = {
    "workers": 0,
    "finished before": 0,
    "trials": 0,
    "wall s": 1,
    "trials a second": 2,
    "to begin s": 1,
    "launcher s a trial": 4,
    "PostgreSQL s a trial": 4,
    "MLflow s a trial": 4,
    "ask ms": 1,
    "ask 95 % ms": 1,
    "connections": 0,
    "idle %": 2,
    "beyond ideal %": 2,
}


# --- trials that sleep -------------------------------------------------------------------


def seconds_of(trial_id: int) -> float:
    """How long a trial takes, in units of `--seconds`: the same in every run."""
    return random.Random(trial_id).uniform(0.5, 1.5)


def value_of(units: int, dropout: float, rate: float) -> float:
    """Something to learn: the best network is wide, without dropout, with a rate of 0.001."""
    return float(1 - 0.1 * (np.log10(rate) + 3) ** 2 - 0.1 * dropout - 1 / units)


def sleep(job: Job, unit: float, epochs: int) -> Outcome:
    """In place of `sweeps.trial.run_trial`."""
    seconds = unit * seconds_of(job.trial_id)
    model, rate = job.config.model, job.config.optimizer.learning_rate
    value = value_of(model.hidden_units, model.dropout_rate, rate)
    report = reporter(job) if epochs else None
    for epoch in range(1, epochs + 1):
        time.sleep(seconds / epochs)
        if report:
            report(epoch, {"val_accuracy": value})
    if not epochs:
        time.sleep(seconds)
    return Outcome(state="COMPLETE", values=(value,), epochs=epochs, seconds=seconds)


def rest(config: RunConfig) -> None:
    """In place of `sweeps.trial.rehearse`."""


class Thread:
    """A worker that is a thread of this process; as `sweeps.executors.Worker`."""

    is_alive = True

    def when_placed(self, tell: Callable[[], None]) -> None:
        tell()

    def exchange(self, request: bytes) -> bytes:
        function, arguments = ForkingPickler.loads(request)
        return bytes(ForkingPickler.dumps((True, function(*arguments))))

    def interrupt(self) -> None:
        pass

    def end(self, deadline: float) -> None:
        pass


def open_threads(config: ExecutorConfig, *_: object, most: int, **__: object) -> Executor:
    """In place of `sweeps.executors.open_executor`."""
    return Executor(min(config.workers or 1, most), Thread)


# --- one sweep ---------------------------------------------------------------------------


def add_finished(uri: str, count: int) -> None:
    """Fills the study with trials that were finished before."""
    storage = open_storage(uri)
    study = sweeps.study.open_study(SWEEP, storage, ["maximize"])
    draws = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    for _ in range(count):
        params = draws.ask(SPACE).params
        value = value_of(*params.values())
        study.add_trial(
            optuna.create_trial(
                params=params,
                distributions=SPACE,
                value=value,
                intermediate_values=dict.fromkeys(range(1, 11), value),
                user_attrs={"worker": 0, "seconds": 1.0, "epochs": 10},
            )
        )
    storage.engine.dispose()


def processor_of(tree: psutil.Process | None) -> float:
    """Seconds that a process and its descendants have used, the ended ones included."""
    if tree is None:
        return 0.0
    used = 0.0
    for process in [tree, *tree.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            used += sum(process.cpu_times())
    return used


@contextmanager
def counting_connections(uri: str) -> Iterator[list[int]]:
    """Looks every second, from another database of the server."""
    server, _, database = uri.rpartition("/")
    sql = sqlalchemy.text("SELECT count(*) FROM pg_stat_activity WHERE datname = :name")
    engine = sqlalchemy.create_engine(f"{server}/postgres", poolclass=sqlalchemy.NullPool)
    counts, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(1.0):
            with engine.connect() as connection:
                counts.append(connection.scalar(sql, {"name": database}) or 0)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield counts
    finally:
        ended.set()
        thread.join()


def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def call_timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        spent.append(time.perf_counter() - start)
        return result

    return call_timed


def ideal(durations: Sequence[float], workers: int) -> float:
    """Seconds that so many workers need for trials in this order, without a launcher."""
    free = [0.0] * workers
    for seconds in durations:
        heapq.heappushpop(free, free[0] + seconds)
    return max(free)


def figures(trials: Sequence[FrozenTrial], unit: float) -> dict[str, float]:
    """What the trials of the sweep tell."""
    begun = [trial.datetime_start.timestamp() for trial in trials if trial.datetime_start]
    ended = [trial.datetime_complete.timestamp() for trial in trials if trial.datetime_complete]
    slept = [unit * seconds_of(trial._trial_id) for trial in trials]
    lanes: dict[int, list[int]] = {}
    for index, trial in enumerate(trials):
        lanes.setdefault(trial.user_attrs["worker"], []).append(index)
    firsts = [min(begun[index] for index in lane) for lane in lanes.values()]
    lasts = [max(ended[index] for index in lane) for lane in lanes.values()]
    held, wall = sum(lasts) - sum(firsts), max(ended) - min(begun)
    return {
        "workers": len(lanes),
        "trials": len(trials),
        "wall s": wall,
        "trials a second": len(trials) / wall,
        "to begin s": max(firsts) - min(begun),
        "idle %": 100 * (1 - sum(slept) / held),
        "beyond ideal %": 100 * (1 - ideal(slept, len(lanes)) / wall),
    }


def run_row(row: dict[str, Any], folder: str) -> dict[str, float]:
    """Runs a sweep in this process, and takes its figures."""
    asks: list[float] = []
    used: list[float] = []
    servers = [row["postgresql"] and psutil.Process(row["postgresql"])]
    servers.append(row["mlflow"] and psutil.Process(row["mlflow"]))
    run, ask = sweeps.launcher.Launcher.run, sweeps.study.Asker.ask

    def measured(launcher: sweeps.launcher.Launcher) -> None:
        before = [time.process_time(), *map(processor_of, servers)]
        run(launcher)
        after = [time.process_time(), *map(processor_of, servers)]
        used.extend(np.subtract(after, before))

    with ExitStack() as stack:
        trial = partial(sleep, unit=row["seconds"], epochs=row["epochs"])
        stack.enter_context(patch.object(sweeps.launcher, "run_trial", trial))
        stack.enter_context(patch.object(sweeps.sweep, "rehearse", rest))
        stack.enter_context(patch.object(sweeps.launcher.Launcher, "run", measured))
        stack.enter_context(patch.object(sweeps.study.Asker, "ask", timed(ask, asks)))
        if row["on"] == "threads":
            stack.enter_context(patch.object(sweeps.sweep, "open_executor", open_threads))
        counts = stack.enter_context(counting_connections(row["study"]))
        ended = call(*row["arguments"], folder=Path(folder))
    if ended.returncode:
        sys.exit(ended.stderr + ended.stdout[-2000:])
    study = optuna.load_study(study_name=SWEEP, storage=row["study"])
    told = figures(study.trials[row["finished"] :], row["seconds"])
    each = [seconds / told["trials"] for seconds in used]
    return told | {
        "finished before": row["finished"],
        **dict(zip((name for name in HEADS if "s a trial" in name), each, strict=True)),
        "ask ms": 1000 * median(asks),
        "ask 95 % ms": 1000 * quantiles(asks, n=20)[-1],
        "connections": max(counts),
    }


def measure(options: argparse.Namespace, workers: int, finished: int) -> dict[str, float]:
    """Starts servers and, in a process of its own, the sweep; exits if that fails."""
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgresql = stack.enter_context(Postgresql(connections=options.connections))
        study, runs = (postgresql.new_database() for _ in range(2))
        mlflow = stack.enter_context(MLflowServer(base / "server", runs))
        add_finished(study, finished)
        row = {
            "on": options.on,
            "seconds": options.seconds,
            "epochs": options.epochs if options.on == "ray" else 0,
            "finished": finished,
            "study": study,
            "postgresql": postgresql.process,
            "mlflow": mlflow.process and mlflow.process.pid,
            "arguments": [
                *("data=digits", f"sweep.name={SWEEP}", f"sampler={options.sampler}"),
                f"sweep.trials={finished + options.rounds * workers}",
                f"executor.workers={workers}",
                *(
                    ["executor=ray", "executor.cpus=0.001", "pruner=none"]
                    if options.on == "ray"
                    else ()
                ),
                *(f"study.storage={study}", "tracking=server", f"tracking.uri={mlflow.uri}"),
            ],
        }
        code = "import sys; from tests.benchmarks import scale; scale.print_row(*sys.argv[1:])"
        command = [sys.executable, "-c", code, json.dumps(row), str(base)]
        # Workers that are processes import this module.
        ended = subprocess.run(
            command, check=False, capture_output=True, text=True, env=ENVIRONMENT
        )
        if ended.returncode:
            sys.exit(f"{row}\n{ended.stdout}\n{ended.stderr}")
        return dict(json.loads(ended.stdout.splitlines()[-1]))


def print_row(row: str, folder: str) -> None:
    print(json.dumps(run_row(json.loads(row), folder)))


def build_table(rows: Sequence[dict[str, float]], title: str) -> Table:
    versions = [f"{name} {version(name)}" for name in ("optuna", "mlflow", "ray")]
    caption = ", ".join([f"{os.cpu_count()} processors", platform.platform(), *versions])
    table = Table(title=title, caption=caption)
    for head in HEADS:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*(f"{row[head]:.{places}f}" for head, places in HEADS.items()))
    return table


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description="Has one launcher keep many workers busy.")
    parser.add_argument("--workers", type=numbers, default=[64, 256, 1000])
    parser.add_argument("--finished", type=numbers, default=[0], help="trials before the sweep")
    parser.add_argument("--rounds", type=int, default=10, help="trials a worker")
    parser.add_argument("--seconds", type=float, default=30.0, help="a trial, on average")
    parser.add_argument("--sampler", default="tpe")
    parser.add_argument("--on", choices=("threads", "ray"), default="threads")
    parser.add_argument("--epochs", type=int, default=10, help="that a trial reports, on ray")
    parser.add_argument("--connections", type=int, default=100, help="that PostgreSQL takes")
    options = parser.parse_args()
    rows = [
        measure(options, workers, finished)
        for workers in options.workers
        for finished in options.finished
    ]
    title = f"trials of {options.seconds:g} s, sampler={options.sampler}, on {options.on}"
    Console(width=200).print(build_table(rows, title))


if __name__ == "__main__":
    main()
