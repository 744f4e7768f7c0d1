"""Pictures of one run: its digits, its learning curves, its mistakes."""

import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.augmentation import Distortion
from pipeline.config import AugmentationConfig
from pipeline.data import Array, Split
from pipeline.evaluate import Evaluation
from pipeline.train import Metrics

_COLUMNS = 10
_CELL = 1.1  # inches from one image to the next
_LINE = 0.14  # inches a line of a title takes
_LETTERS = 15  # of a title that fit above an image
_HEADING = 7.2  # inches that hold the longest heading
_MOST_NUMBERS = 20  # classes beyond which a confusion matrix has no room for its numbers


def digit_grid(split: Split, class_names: list[str], *, rows: int = 5) -> Figure:
    """The first images of the split, each under its label."""
    count = min(len(split), rows * _COLUMNS)
    titles = [class_names[label] for label in split.labels[:count]]
    return _grid(split.images[:count], titles, "Training images and their labels")


def distorted_grid(
    split: Split, class_names: list[str], config: AugmentationConfig, *, rows: int = 4
) -> Figure:
    """The first images of the split, each above others such as training makes of it."""
    count = min(len(split), _COLUMNS)
    distort = Distortion(config, split.images.shape[1:])
    chosen = split.images[:count]
    versions = [chosen, *(distort(chosen, (row,)) for row in range(rows))]
    titles = [class_names[label] for label in split.labels[:count]]
    amounts = {name: amount for name, amount in asdict(config).items() if amount}
    if not config.elastic:
        del amounts["elastic_sigma"]
    listed = " ".join(f"{name}={amount:.3g}" for name, amount in amounts.items())
    heading = f"Training images, and what augmentation makes of them\n{listed}"
    return _grid(np.concatenate(versions), titles * len(versions), heading)


def confident_mistakes(evaluation: Evaluation, class_names: list[str], *, rows: int = 3) -> Figure:
    """The wrong predictions of the highest probability, the most confident first."""
    split, probabilities = evaluation.split, evaluation.probabilities
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != split.labels)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][: rows * _COLUMNS]
    joint = " as " if max(map(len, class_names)) <= _LETTERS // 3 else "\nas "
    titles = [
        class_names[split.labels[i]] + joint + class_names[predicted[i]] + f"\n{confidence[i]:.1%}"
        for i in worst
    ]
    heading = (
        f"Most confident of {len(wrong)} mistakes in {len(split)} {split.name} images "
        "(label as prediction)"
    )
    return _grid(split.images[worst], titles, heading)


def _grid(images: Array, titles: Sequence[str], heading: str) -> Figure:
    """Images in rows of ten, drawn as one picture: an axes an image takes seconds."""
    columns = min(_COLUMNS, max(1, len(images)))
    rows = max(1, -(-len(images) // columns))
    height, width = images.shape[1:]
    gap = max(1, round(width * 0.12))
    inch = (width + gap) / _CELL  # in pixels of the images
    lines = 1 + max((title.count("\n") for title in titles), default=0)
    top = math.ceil(lines * _LINE * inch)
    cell_height, cell_width = height + top + gap, width + gap
    canvas = np.full((rows * cell_height, columns * cell_width - gap), np.nan)
    margin = 0.4 + 0.2 * heading.count("\n")  # inches of the heading
    figure = Figure(figsize=(max(columns * _CELL, _HEADING), rows * cell_height / inch + margin))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98 - margin / figure.get_figheight()))
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        y, x = (i // columns) * cell_height + top, (i % columns) * cell_width
        canvas[y : y + height, x : x + width] = image
        text = "\n".join(_shorten(line) for line in title.split("\n"))
        above = y - 0.5 - 0.03 * inch
        axes.text(x + width / 2 - 0.5, above, text, ha="center", va="bottom", fontsize=8)
    axes.imshow(canvas, cmap="gray_r", interpolation="nearest", vmin=0)
    axes.set_axis_off()
    figure.suptitle(heading, fontsize=11, y=0.99, va="top")
    return figure


def _shorten(text: str) -> str:
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 1]}…"


def learning_curves(history: list[Metrics]) -> Figure:
    """Loss and accuracy an epoch, on train and, where there is one, validation."""
    figure = Figure(figsize=(9, 3.6))
    pair = figure.subplots(1, 2)
    # By hand: a layout engine draws every figure twice.
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.14, top=0.96, wspace=0.22)
    epochs = range(1, len(history) + 1)
    for axes, name in zip(pair, ("loss", "accuracy"), strict=True):
        for key, label in ((name, "train"), (f"val_{name}", "validation")):
            if key in history[0]:
                axes.plot(epochs, [metrics[key] for metrics in history], marker=".", label=label)
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def confusion_matrix(evaluation: Evaluation, class_names: list[str]) -> Figure:
    """Images of each label (rows) by prediction (columns); the shade shows the mistakes."""
    labels, predicted = evaluation.split.labels, evaluation.probabilities.argmax(axis=1)
    size = len(class_names)
    counts = np.zeros((size, size), int)
    np.add.at(counts, (labels, predicted), 1)
    mistakes = counts * (1 - np.eye(size, dtype=int))
    side = 2.4 + 0.34 * min(size, 30)
    names = [_shorten(name) for name in class_names]
    margin = 0.55 + 0.09 * max(map(len, names))  # inches, of which 0.09 a letter in 10 points
    figure = Figure(figsize=(side + margin, side + margin))
    share = margin / (side + margin)
    top = 0.35 / (side + margin)
    axes = figure.add_axes((share, share, 1 - share - top, 1 - share - top))
    axes.imshow(mistakes, cmap="Reds", vmax=max(5, mistakes.max()))
    axes.set(
        xlabel="prediction",
        ylabel="label",
        title=f"{mistakes.sum()} of {len(labels)} {evaluation.split.name} images wrong",
    )
    if size <= _MOST_NUMBERS:
        axes.set_xticks(range(size), names)
        if max(map(len, names)) > 2:
            for name in axes.get_xticklabels():
                name.set(rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(size), names)
        _write_counts(axes, counts, mistakes)
    return figure


def _write_counts(axes: Axes, counts: npt.NDArray[np.int_], mistakes: npt.NDArray[np.int_]) -> None:
    dark = mistakes > 0.6 * max(5, mistakes.max())
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if dark[row, column] else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=color)
