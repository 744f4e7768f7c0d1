"""The plan of a sweep, shown: its space, its smallest and largest model, what it will take."""

from __future__ import annotations

import time
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np
import optuna
from rich.console import Console
from rich.progress import track
from rich.table import Table
from threadpoolctl import threadpool_limits

from pipeline import start_libraries
from pipeline.config import RunConfig
from sweeps.config import RandomConfig
from sweeps.display import duration, settings
from sweeps.plan import Plan, to_override
from sweeps.space import Values
from sweeps.study import Asker

if TYPE_CHECKING:
    from pipeline.data import Data

MOST_CORNERS = 2_000  # composed; of a larger space, so many at random
DRAWS = 32  # random trials, for the mean time
WORKER_MEMORY = 700 * 2**20  # bytes of a process with TensorFlow and MLflow, measured
RUN_DISK = 60 * 2**10  # bytes of a run without its model: rows, texts


def show(plan: Plan, console: Console) -> None:
    """Checks every corner of the space, builds the smallest and the largest model, trains nothing.

    Raises:
        ValueError: A corner is refused, or the largest model does not fit into memory.
    """
    console.print(_space_table(plan))
    corners = plan.corners(most=MOST_CORNERS)
    configs = [
        plan.trial_config(values)
        for values in track(corners, "checking the corners", console=console, transient=True)
    ]
    with console.status("starting TensorFlow"):
        start_libraries()
        from pipeline.data import load
        from pipeline.model import build_mlp
    data = load(plan.config.data)
    parameters = [_parameters(config, data) for config in configs]
    largest, smallest = int(np.argmax(parameters)), int(np.argmin(parameters))
    table = Table(box=None, pad_edge=False)
    for heading in ("", "parameters", "memory", "time, about", "disk", "settings"):
        table.add_column(heading, justify="left" if heading in ("", "settings") else "right")
    pace = _pace()
    for name, index in (("smallest", smallest), ("largest", largest)):
        count = build_mlp(configs[index].model, data).count_params()
        table.add_row(
            name,
            f"{count:,}",
            _size(count * 20),
            duration(_seconds(configs[index], data, pace)),
            _size(count * 4),
            settings(corners[index]),
        )
    which = "" if len(corners) < MOST_CORNERS else ", drawn at random,"
    console.print(f"\n{len(corners):,} corners of the space{which} compose and pass every check.\n")
    console.print(table)
    console.print(_estimate(plan, data, pace, largest=parameters[largest]))


def _space_table(plan: Plan) -> Table:
    table = Table(title="Search space", title_justify="left", box=None, pad_edge=False)
    for heading in ("name", "searched over", "when"):
        table.add_column(heading)
    for parameter in plan.space.parameters:
        when = parameter.condition.declaration if parameter.condition else "always"
        table.add_row(parameter.name, parameter.declaration, when)
    for name, value in plan.space.fixed.items():
        table.add_row(name, f"fixed: {to_override(name, value).partition('=')[2]}", "")
    return table


def _parameters(config: RunConfig, data: Data) -> int:
    from pipeline.model import count_parameters

    height, width = data.train.images.shape[1:]
    classes = len(data.class_names)
    return count_parameters(config.model, num_inputs=height * width, num_classes=classes)


def _pace() -> float:
    """Floating-point operations a second of one thread in a product of the usual size."""
    left, right = np.ones((128, 784), np.float32), np.ones((784, 512), np.float32)
    with threadpool_limits(1):
        left @ right
        start, products = time.perf_counter(), 50
        for _ in range(products):
            left @ right
        return 2 * 128 * 784 * 512 * products / (time.perf_counter() - start)


def _seconds(config: RunConfig, data: Data, pace: float) -> float:
    """All epochs: 6 operations a parameter and trained image, 2 a validated one.

    A step costs half a millisecond besides, an epoch 20 to record, a trial 1.5 s to trace, and the
    products run at four fifths of the pace of NumPy's (`tests.benchmarks.step`). A pixel of MNIST
    takes 24 ns to distort, by `augmentation=elastic` on one thread of an AMD EPYC (Zen 3).
    """
    validated = len(data.validation) if data.validation else 0
    operations = _parameters(config, data) * (6 * len(data.train) + 2 * validated)
    steps = len(data.train) / config.training.batch_size
    pixels = data.train.images.size if config.augmentation.distorts else 0
    besides = 0.5e-3 * steps + 24e-9 * pixels + 0.02
    return 1.5 + config.training.epochs * (operations / (0.8 * pace) + besides)


def _estimate(plan: Plan, data: Data, pace: float, *, largest: int) -> str:
    configs = [plan.trial_config(values) for values in _draw(plan)]
    seconds = mean(_seconds(config, data, pace) for config in configs) * plan.trials
    disk = mean(_parameters(config, data) for config in configs) * 4 + RUN_DISK
    workers = plan.workers or 1
    memory = workers * (WORKER_MEMORY + largest * 20)
    at_once = f"{workers} at once" if plan.workers else "a single worker"
    return (
        f"\n{plan.trials} trials, {at_once}: "
        f"about {duration(seconds / workers)} without pruning and early stopping; about "
        f"{_size(plan.trials * disk)} of disk, {_size(memory)} of memory."
    )


def _draw(plan: Plan) -> list[Values]:
    """Random trials."""
    asker = Asker(
        optuna.create_study(),
        plan.space,
        RandomConfig(name="random"),
        seed=0,
        known=[],
        configured=plan.configured,
    )
    return [asker.ask()[1] for _ in range(DRAWS)]


def _size(count: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
