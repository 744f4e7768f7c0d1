"""What a training step and a whole run cost, beside stock Keras and the matrix products alone.

    MNIST_NPZ=mnist.npz python -m tests.benchmarks.step    # two minutes; unset: random images

The network is the notebook's, 784-512-512-10 with dropout, RMSprop and batches of 128, one thread.

- Step: processor time, which other processes disturb less than wall time. `pipeline.train.train`
  (`+experiment=notebook`, no validation), stock `fit` (float images, one-hot labels) and the matrix
  products of both passes in NumPy take turns, an epoch each; warm-up left out.
- First batch: from the call of `fit` or `train`, the first in its process, to the end of the first
  batch, or of our first call of many. Beside it, wall time of starting Python and of imports.
- Run: `execute_run` with `+experiment=notebook`, twice in one process.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import multiprocessing
import platform
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hydra
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from pipeline import start_libraries
from pipeline.compose import CONF, to_config
from pipeline.config import RunConfig

Values = npt.NDArray[np.float64]
Function = Callable[..., Any]

ROUNDS, WARM_UP = 5, 2
BATCH, WIDTHS = 128, (784, 512, 512, 10)
STEPS = 469  # an epoch of 60,000 images
STOCK, OURS, PRODUCTS = "stock Keras fit", "pipeline.train", "NumPy matrix products alone"
FIGURES = ("digit_grid", "learning_curves", "confusion_matrix", "confident_mistakes")


def clocks() -> Values:
    """Seconds of the processor and of the wall."""
    return np.array([time.process_time(), time.perf_counter()])


def import_all(spawned: float) -> Values:
    """Wall seconds: Python's own start, then the imports of a run."""
    started = time.time()
    start_libraries()
    import pipeline.figures
    import pipeline.model  # noqa: F401

    return np.array([started - spawned, time.time() - started])


def compose(*overrides: str) -> RunConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return to_config(hydra.compose("run", ["+experiment=notebook", *overrides]))


class Stopwatch(ExitStack):
    """Times functions until it is closed: their first start, and the seconds of all calls."""

    def __init__(self) -> None:
        super().__init__()
        self.started: dict[str, Values] = {}
        self.spent: dict[str, Values] = defaultdict(lambda: np.zeros(2))

    def watch(self, part: str, owner: object, *names: str) -> None:
        for name in names:
            self.enter_context(patch.object(owner, name, self.timed(part, getattr(owner, name))))

    def timed(self, part: str, function: Function) -> Function:
        def timed(*arguments: object, **settings: object) -> Any:
            start = clocks()
            self.started.setdefault(part, start)
            result = function(*arguments, **settings)
            self.spent[part] += clocks() - start
            return result

        return timed

    @property
    def first_batch(self) -> Values:
        return self.started["batch end"] - self.started["training"]


def stock_fit(images: npt.NDArray[Any], labels: npt.NDArray[Any]) -> Function:
    """An epoch of the notebook's own code."""
    import keras

    x = images.reshape(len(images), -1).astype("float32") / 255
    y = keras.utils.to_categorical(labels, WIDTHS[-1])
    layers: list[keras.Layer] = [keras.Input(WIDTHS[:1])]
    for units in WIDTHS[1:-1]:
        layers += [keras.layers.Dense(units, activation="relu"), keras.layers.Dropout(0.2)]
    model = keras.Sequential([*layers, keras.layers.Dense(WIDTHS[-1], activation="softmax")])
    model.compile("rmsprop", "categorical_crossentropy", metrics=["accuracy"])
    return lambda: model.fit(x, y, batch_size=BATCH, verbose=0)


def matrix_products() -> None:
    """The products of an epoch: forward, then the gradients of the weights and of the inputs."""
    draw = np.random.default_rng(0).standard_normal
    units = [draw((BATCH, width), np.float32) for width in WIDTHS]
    weights = [draw(shape, np.float32) for shape in pairwise(WIDTHS)]
    outputs, gradients = [[np.empty_like(array) for array in kind] for kind in (units, weights)]
    for _ in range(STEPS):
        for i, weight in enumerate(weights):
            np.matmul(units[i], weight, out=outputs[i + 1])
        for i in reversed(range(len(weights))):
            np.matmul(units[i].T, units[i + 1], out=gradients[i])
            if i:  # the images need no gradient
                np.matmul(units[i + 1], weights[i].T, out=outputs[i])


def measure_steps(spawned: float, *overrides: str) -> tuple[Values, dict[str, Values]]:
    """Seconds to the first batch of stock Keras; processor milliseconds a step, by round."""
    imports = import_all(spawned)
    import keras

    from pipeline import data, model, train

    epochs = WARM_UP + ROUNDS
    config = compose(*overrides, "data.validation_size=0", f"training.epochs={epochs}")
    train.initialize(threads=1, seed=0)
    images = data.load(config.data)
    stock = stock_fit(images.train.images, images.train.labels)
    with Stopwatch() as watch:
        watch.watch("batch end", keras.callbacks.CallbackList, "on_train_batch_end")
        watch.timed("training", stock)()

    network = model.build_mlp(config.model, images)
    optimizer = model.build_optimizer(config.optimizer, steps_per_epoch=STEPS, epochs=epochs)
    times = [time.process_time()]

    def take_turns(*_: object) -> None:  # after an epoch of ours
        times.append(time.process_time())
        for other in (stock, matrix_products):
            other()
            times.append(time.process_time())

    train.train(network, optimizer, images, config.training, seed=0, on_epoch_end=take_turns)
    steps = np.diff(times).reshape(epochs, 3)[WARM_UP:] * 1e3 / STEPS
    names = (OURS, STOCK, PRODUCTS)
    return np.append(imports, watch.first_batch), dict(zip(names, steps.T, strict=True))


def measure_runs(spawned: float, *overrides: str) -> tuple[Values, dict[str, Values]]:
    """Seconds to our first batch; processor and wall seconds of each part of two runs."""
    imports = import_all(spawned)
    import keras

    from pipeline import data, evaluate, figures, model, run, tracking, train

    watches = [Stopwatch(), Stopwatch()]
    for watch in watches:
        with watch:
            watch.watch("load the data", data, "load")
            watch.watch("build the model", model, "build_mlp", "build_optimizer")
            watch.watch("figures", figures, *FIGURES)
            watch.watch("figures", tracking.Run, "log_figure")
            watch.watch("evaluate", evaluate, "evaluate")
            watch.watch("save the model", tracking.Run, "log_model")
            watch.watch("training", train, "train")
            watch.watch("create the store", tracking, "_create_database")
            watch.watch("batch end", keras.callbacks.CallbackList, "on_train_batch_end")
            config = watch.timed("compose", compose)(*overrides)
            watch.timed("record the rest", run.execute_run)(config, "")
        for part in watch.spent.keys() - {"compose", "record the rest", "batch end"}:
            watch.spent["record the rest"] -= watch.spent[part]
    spent = {part: np.ravel([watch.spent[part] for watch in watches]) for part in watch.spent}
    return np.append(imports, watches[0].first_batch), spent


def alone(measure: Function, *arguments: object) -> Any:
    """What a function returns in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, time.time(), *arguments).result()


def save_random_images(path: Path) -> None:
    draw, arrays = np.random.default_rng(0).integers, {}
    for split, size in (("train", 60_000), ("test", 10_000)):
        arrays[f"x_{split}"] = draw(0, 256, (size, 28, 28), np.uint8)
        arrays[f"y_{split}"] = draw(0, 10, size, np.uint8)
    np.savez(path, allow_pickle=False, **arrays)


def fill(table: Table, overrides: list[str]) -> None:
    def section(head: str, rows: dict[str, Values]) -> None:
        table.add_section()
        table.add_row(*(f"[bold]{cell.strip()}[/]" for cell in head.split("|")))
        for name, values in rows.items():
            table.add_row(name, *(f"{value:.2f}" for value in values))

    stock_start, steps = alone(measure_steps, *overrides)
    our_start, spent = alone(measure_runs, *overrides)
    summary = {
        name: np.append(np.quantile(ms, (0.5, 0, 1)), np.median(ms / steps[STOCK]))
        for name, ms in steps.items()
    }
    section("a step, processor ms | median | least | most | to stock", summary)
    starts = {STOCK: stock_start, OURS: our_start}
    section("to the first batch, s | Python | imports | then: processor | wall", starts)
    del spent["batch end"]
    apart = {part: spent.pop(part) for part in ("training", "create the store")}
    spent |= {"all of these": np.sum(list(spent.values()), axis=0), **apart}
    section("a run, s | first: processor | wall | second: processor | wall", spent)


def main() -> None:
    real = bool(os.environ.get("MNIST_NPZ"))
    images = "MNIST" if real else "random images of MNIST's shape (MNIST_NPZ is not set)"
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = f"{os.cpu_count()} x {cpu[1] if cpu else platform.machine()}"
    versions = [f"{name} {version(name)}" for name in ("tensorflow", "keras", "numpy", "mlflow")]
    caption = ", ".join([machine, f"Python {platform.python_version()}", *versions])
    table = Table(title=f"One thread, {images}", caption=caption, show_header=False)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"tracking.directory={folder}"]
        if not real:
            save_random_images(Path(folder, "random.npz"))
            overrides += [f"data.path={folder}/random.npz", "data.sha256=null"]
        fill(table, overrides)
    Console().print(table)


if __name__ == "__main__":
    main()
