"""What a training step costs, beside stock Keras and the matrix products alone.

    python -m tests.benchmarks.step    # some ten minutes; see --help

The network is the notebook's, 784-width-width-10 with dropout 0.2 and RMSprop, on one thread and
random images. `fit` is the notebook's own code (float images, one-hot labels); ours is
`pipeline.train`, with XLA and without. The limit: the matrix products of both passes alone, by the
faster of NumPy's BLAS and TensorFlow's kernels. Median processor time of five epochs, after two
that warm up; one after the other in one process.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

import hydra
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from pipeline import start_libraries
from pipeline.compose import CONF, to_config
from tests.benchmarks.machine import describe

WIDTHS, BATCHES = (64, 128, 256, 512, 1024, 2048), (64, 128, 256, 512, 1024)
ROUNDS, WARM_UP = 5, 2
SECONDS = 0.3  # of an epoch of products, about
PIXELS, CLASSES = 784, 10
FIT, XLA, PLAIN = "fit", "ours, XLA", "ours, no XLA"
NUMPY, TENSORFLOW = "NumPy", "TensorFlow"

Epoch = Callable[[], object]


def stock_fit(images: npt.NDArray[Any], labels: npt.NDArray[Any], width: int, batch: int) -> Epoch:
    """An epoch of the notebook's own code."""
    import keras

    x = images.reshape(len(images), -1).astype("float32") / 255
    y = keras.utils.to_categorical(labels, CLASSES)
    layers: list[keras.Layer] = [keras.Input((PIXELS,))]
    for _ in range(2):
        layers += [keras.layers.Dense(width, activation="relu"), keras.layers.Dropout(0.2)]
    model = keras.Sequential([*layers, keras.layers.Dense(CLASSES, activation="softmax")])
    model.compile("rmsprop", "categorical_crossentropy", metrics=["accuracy"])
    return lambda: model.fit(x, y, batch_size=batch, verbose=0)


def products(width: int, batch: int) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """The factors of a step: forward, then the gradients of the weights and of the inputs."""
    draw = np.random.default_rng(0).standard_normal
    sizes = (PIXELS, width, width, CLASSES)
    units = [draw((batch, size), np.float32) for size in sizes]
    weights = [draw(shape, np.float32) for shape in pairwise(sizes)]
    forward = [(units[i], weights[i]) for i in range(3)]
    of_weights = [(units[i].T, units[i + 1]) for i in range(3)]
    of_inputs = [(units[i + 1], weights[i].T) for i in (1, 2)]  # the images need none
    return [*forward, *of_weights, *of_inputs]


def numpy_products(width: int, batch: int, steps: int) -> Epoch:
    factors = [
        (a, b, np.empty((a.shape[0], b.shape[1]), np.float32)) for a, b in products(width, batch)
    ]

    def epoch() -> None:
        for _ in range(steps):
            for a, b, out in factors:
                np.matmul(a, b, out=out)

    return epoch


def tensorflow_products(width: int, batch: int, steps: int) -> Epoch:
    import tensorflow as tf

    def stored(array: npt.NDArray[Any]) -> tuple[tf.Tensor, bool]:
        """As it lies in memory, and whether it is to be transposed."""
        transposed = not array.flags.c_contiguous
        return tf.constant(array.T if transposed else array), transposed

    factors = [(*stored(a), *stored(b)) for a, b in products(width, batch)]

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def step() -> list[tf.Tensor]:
        return [tf.linalg.matmul(a, b, across, down) for a, across, b, down in factors]

    def epoch() -> None:
        for _ in range(steps):
            step()

    return epoch


def times_of(epoch: Epoch, rounds: int) -> list[float]:
    """Processor seconds of each epoch, warm-up left out."""
    times = [time.process_time()]
    for _ in range(WARM_UP + rounds):
        epoch()
        times.append(time.process_time())
    return [end - begin for begin, end in pairwise(times)][WARM_UP:]


def our_times(
    images: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    width: int,
    batch: int,
    *,
    compile_: str,
    rounds: int,
) -> list[float]:
    """Likewise, of the epochs of one training."""
    from pipeline import model, train
    from pipeline.data import Data, Split

    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = to_config(hydra.compose("run", ["+experiment=notebook"]))
    split = Split(name="train", images=images, labels=labels, digest="")
    names = [str(number) for number in range(CLASSES)]
    data = Data(
        train=split,
        validation=None,
        test=split,
        class_names=names,
        pixel_max=255,
        digest="",
        source="",
    )
    training = replace(config.training, batch_size=batch, epochs=WARM_UP + rounds, compile=compile_)
    network = model.build_mlp(replace(config.model, hidden_units=width), data)
    optimizer = model.build_optimizer(
        config.optimizer, steps_per_epoch=1, epochs=1, ema_momentum=config.training.ema_momentum
    )
    times = [time.process_time()]
    train.train(
        network,
        optimizer,
        data,
        training,
        seed=0,
        augmentation=config.augmentation,
        on_epoch_end=lambda epoch, metrics: times.append(time.process_time()),
    )
    return [end - begin for begin, end in pairwise(times)][WARM_UP:]


def measure(width: int, batch: int, rounds: int, seconds: float) -> dict[str, float]:
    """Processor milliseconds a step, by contestant."""
    flops = sum(2.0 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in products(width, batch))
    steps = min(400, max(5, round(seconds * 5e10 / flops)))
    draw = np.random.default_rng(0).integers
    images = draw(0, 256, (steps * batch, 28, 28), np.uint8)
    labels = draw(0, CLASSES, steps * batch).astype(np.int32)
    times = {
        NUMPY: times_of(numpy_products(width, batch, steps), rounds),
        TENSORFLOW: times_of(tensorflow_products(width, batch, steps), rounds),
        FIT: times_of(stock_fit(images, labels, width, batch), rounds),
        XLA: our_times(images, labels, width, batch, compile_="always", rounds=rounds),
        PLAIN: our_times(images, labels, width, batch, compile_="never", rounds=rounds),
    }
    return {name: 1e3 * median(each) / steps for name, each in times.items()}


def build_table(figures: dict[tuple[int, int], dict[str, float]]) -> Table:
    table = Table(title="A training step, one thread", caption=describe())
    heads = ("width", "batch", "limit, ms", "of the limit: fit", XLA, PLAIN, "XLA to fit")
    for head in heads:
        table.add_column(head, justify="right")
    for (width, batch), ms in figures.items():
        limit = min(ms[NUMPY], ms[TENSORFLOW])
        shares = [f"{limit / ms[name]:.0%}" for name in (FIT, XLA, PLAIN)]
        cells = [f"{width}", f"{batch}", f"{limit:.2f}", *shares, f"{ms[FIT] / ms[XLA]:.2f}"]
        table.add_row(*cells, end_section=batch == BATCHES[-1])
    return table


def draw(figures: dict[tuple[int, int], dict[str, float]], path: Path) -> None:
    """The shares of the limit at the notebook's batch of 128, by width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    of_batch = {width: ms for (width, batch), ms in figures.items() if batch == 128}
    for name in (XLA, PLAIN, FIT):
        shares = [min(ms[NUMPY], ms[TENSORFLOW]) / ms[name] for ms in of_batch.values()]
        axes.plot(
            list(of_batch), shares, marker="o", label="stock Keras fit" if name == FIT else name
        )
    axes.set(
        xscale="log", ylim=(0, 1), xlabel="hidden width", title="A step, batch 128, one thread"
    )
    axes.set_ylabel("share of the speed of the matrix products")
    axes.set_xticks(list(of_batch), list(map(str, of_batch)), minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a training step beside its limit.")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each ({ROUNDS})")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"of an epoch of products ({SECONDS})"
    )
    parser.add_argument("--plot", type=Path, help="file for a picture (.svg or .png)")
    options = parser.parse_args()
    start_libraries()
    from pipeline import train

    train.initialize(threads=1, seed=0)
    figures = {
        each: measure(*each, options.rounds, options.seconds)
        for each in product(options.widths, options.batches)
    }
    Console(width=100).print(build_table(figures))
    if options.plot:
        draw(figures, options.plot)


if __name__ == "__main__":
    main()
