"""What a trial costs the launcher and the stores as they grow.

    python -m tests.benchmarks.growth    # some five minutes, most of it to fill the stores

For 10, 100, 1,000 and 10,000 finished trials, in SQLite: opening the study, asking TPE for a trial
and telling it, recording a run of four epochs, and the leaderboard of all. Medians.
"""

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import hydra
from optuna.trial import TrialState
from rich.console import Console
from rich.table import Table

from pipeline.compose import CONF, to_typed
from pipeline.store import open_store
from pipeline.tracking import create_run
from sweeps.config import VARIANTS, SweepConfig
from sweeps.plan import Plan, build_plan
from sweeps.storage import open_storage
from sweeps.study import Asker, open_study
from tests.benchmarks.machine import describe
from tests.benchmarks.scale import SWEEP, add_finished
from tests.benchmarks.store import multiply, rank, seconds, sweep

SIZES = (10, 100, 1_000, 10_000)
ROUNDS = 9


def plan_sweep(overrides: list[str]) -> Plan:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = to_typed(hydra.compose("sweep", overrides), SweepConfig, VARIANTS)
        return build_plan(config, overrides, {})


def open_asker(plan: Plan, uri: str) -> Asker:
    study = open_study(SWEEP, open_storage(uri), ["maximize"])
    asker = Asker(study, plan.space, plan.config.sampler, seed=0, known=[], configured={})
    asker.study.get_trials(deepcopy=False)  # read once
    return asker


def of_study(plan: Plan, uri: str) -> dict[str, float]:
    """Seconds to open the study, and milliseconds to ask and tell."""
    opened = seconds(lambda: open_asker(plan, uri), 3)
    asker, spent = open_asker(plan, uri), []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        trial, _values = asker.ask()
        asker.tell(trial, [0.5], TrialState.COMPLETE)
        spent.append(time.perf_counter() - start)
    return {"open s": opened, "ask and tell ms": 1e3 * statistics.median(spent[1:])}


def record(folder: Path) -> Callable[[], None]:
    """Creates a run, records four epochs and ends it."""
    plan = plan_sweep(["data=digits", f"tracking.directory={folder}/mlruns"])
    store = open_store(plan.config.tracking)
    numbers = itertools.count()

    def main() -> None:
        run = create_run(store, f"run-{next(numbers)}", {"sweep": "growth"})
        for epoch in range(1, 5):
            run.log_metrics({"loss": 0.1, "val_accuracy": 0.9}, step=epoch)
        run.end("FINISHED")

    return main


def measure(size: int, small: Path, folder: Path) -> dict[str, float]:
    """Of stores of so many trials.

    Args:
        size: Finished trials.
        small: Has the store of a sweep of 8.
        folder: To work in.
    """
    plan = plan_sweep(["data=digits"])
    uri = f"sqlite:///{folder}/optuna.db"
    add_finished(uri, size)
    figures = of_study(plan, uri)
    shutil.copytree(small, folder / "runs")
    multiply(folder / "runs" / "mlruns" / "mlflow.db", size, each=size)
    ranked = seconds(rank(folder / "runs", "sweep.name=sweep"), ROUNDS)
    recorded = seconds(record(folder / "runs"), ROUNDS)
    return figures | {"record a run ms": 1e3 * recorded, "leaderboard s": ranked}


def main() -> None:
    parser = argparse.ArgumentParser(description="Times what may grow with a study.")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    options = parser.parse_args()
    table = Table(title="As the stores grow, medians", caption=describe())
    with tempfile.TemporaryDirectory() as name:
        small = Path(name) / "small"
        small.mkdir()
        sweep(small)
        for size in options.sizes:
            folder = Path(name) / f"{size}"
            folder.mkdir()
            figures = measure(size, small, folder)
            if not table.columns:
                for head in ("trials", *figures):
                    table.add_column(head, justify="right")
            cells = [
                f"{value:.{1 if head[-2:] == 'ms' else 2}f}" for head, value in figures.items()
            ]
            table.add_row(f"{size:,}", *cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
