"""Digits in images, by the champion: `python -m pipeline.predict FILES... [--out FILE]`."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline import fast_imports, start_libraries
from pipeline.arrays import Array, Frame, Labels, Stored, find_images, find_labels, fit
from pipeline.compose import run_cli
from pipeline.config import PredictConfig
from pipeline.console import open_console
from pipeline.pictures import Style, check_picture, prepare, style_of

if TYPE_CHECKING:  # or TensorFlow is imported
    import keras

    from pipeline.registry import Version

console = open_console()

ROWS = 10  # images of an array that are shown
# Flags of Hydra's whose value is the next argument.
_WITH_VALUE = {"-c", "--cfg", "-p", "--package", "-i", "--info", "-cp", "--config-path"}
_WITH_VALUE |= {"-cn", "--config-name", "-cd", "--config-dir", "--experimental-rerun"}

Given = Stored | Path  # an array of images, or a picture


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A registered model that is loaded.

    Attributes:
        version: Of the registered model.
        model: Raw pixels `[n, height, width]` to probabilities `[n, num_classes]`.
        frame: What it takes.
        class_names: One a class; their numbers where the run that trained it is gone.
        batch_size: Images at once.
    """

    version: Version
    model: keras.Model
    frame: Frame
    class_names: list[str]
    batch_size: int

    @cached_property
    def style(self) -> Style:
        """What the digits look like that the model knows."""
        from pipeline.registry import example_of

        return style_of(example_of(self.version.uri), self.frame)

    def __call__(self, pixels: Array) -> npt.NDArray[np.float32]:
        """Probabilities `[n, num_classes]`."""
        return np.asarray(self.model(pixels, training=False), np.float32)


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What the model says of a file.

    Attributes:
        given: The file.
        probabilities: `[n, num_classes]`
        labels: What is known of the true classes.
        note: What was done to the images, or empty.
        seconds: That it took.
    """

    given: Given
    probabilities: npt.NDArray[np.float32]
    labels: Labels
    note: str
    seconds: float

    def __len__(self) -> int:
        return len(self.probabilities)

    @property
    def file(self) -> str:
        path = self.given.path if isinstance(self.given, Stored) else self.given
        return str(path).encode(errors="backslashreplace").decode()  # of bytes that are no UTF-8

    @cached_property
    def ranked(self) -> npt.NDArray[np.intp]:
        """Classes of each image, the most probable first: `[n, num_classes]`."""
        return np.argsort(-self.probabilities, axis=1, kind="stable")


# --- the command line --------------------------------------------------------------------


def split_files(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes the files out of a command line: what exists, or is neither a flag nor an override.

    Returns:
        Overrides and flags for Hydra, `--out FILE` as `out=FILE`; and the files.
    """
    rest: list[str] = []
    files: list[str] = []
    left = iter(arguments)
    for argument in left:
        flag, equals, value = argument.partition("=")
        if flag == "--out":
            rest.append(_override("out", value if equals else next(left, "")))
        elif flag == "out" and equals:
            rest.append(_override("out", value))
        elif argument in _WITH_VALUE:
            rest += [argument, *(value for value in [next(left, None)] if value is not None)]
        elif argument.startswith(("-", "~")):
            rest.append(argument)
        elif _is_there(argument) or not (equals or argument.startswith("+")):
            files.append(argument)
        else:
            rest.append(argument)
    return rest, files


def _is_there(argument: str) -> bool:
    try:
        return Path(argument).exists()
    except OSError:  # longer than a file name may be, or in a folder that is closed to us
        return False


def _override(key: str, value: str) -> str:
    """Quoted: a file name may hold what is special to Hydra."""
    if value == "null":
        return f"{key}=null"
    escaped = re.sub(r"(\\*)('|\$\{)", r"\1\1\\\2", value)  # backslashes before these count
    return f"{key}='{escaped}'"


def main(config: PredictConfig, overrides: list[str], *, files: Sequence[str]) -> None:
    if not files:
        raise ValueError(
            "no file is named: python -m pipeline.predict images.npz, or PNG and JPEG pictures."
        )
    if config.out:
        check_writable(Path(config.out))
    given = [open_file(Path(file), config.array) for file in files]
    predictor = load_predictor(config)
    results = list(_predict_all(predictor, given))
    if config.out:
        write(results, predictor.class_names, Path(config.out))
    version = predictor.version
    console.print(f"{version} ({config.alias}), from run {version.run_id}")
    for result in results:
        _show(result, predictor.class_names, config.out)
    if config.out:
        console.print(f"{sum(map(len, results)):,} predictions in {config.out}")


def check_writable(path: Path) -> None:
    """Checks that a file can be created or replaced.

    Raises:
        ValueError: Its folder is missing or cannot be written in, or it is a folder.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"out={path}: there is no folder {folder}.")
    if path.is_dir():
        raise ValueError(f"out={path} is a folder.")
    try:
        with tempfile.TemporaryFile(dir=folder):  # asked for its rights alone, root has them all
            pass
    except OSError as error:
        raise ValueError(f"out={path} cannot be written: {error.strerror}.") from error


def open_file(path: Path, array: str | None) -> Given:
    """Reads the head of a file, and says at once what is wrong with it.

    Raises:
        ValueError: It is neither an `.npz` file with images, nor a PNG or JPEG picture.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the files in it.")
    if not path.exists():
        raise ValueError(f"{path}: there is no such file.")
    if path.suffix.lower() == ".npz":
        return find_images(path, array)
    check_picture(path)
    return path


# --- predicting --------------------------------------------------------------------------


def load_predictor(config: PredictConfig) -> Predictor:
    """Loads the model that has the alias.

    Raises:
        FileNotFoundError: There is no store.
        ValueError: No model is promoted, or it is not loaded.
    """
    with console.status("starting MLflow and TensorFlow"):
        with fast_imports():
            from pipeline.registry import find_version, load_model
            from pipeline.store import connect

        connect(config.tracking)
        version = find_version(config.name, config.alias)
        start_libraries()
        model = load_model(version.uri)
    frame = frame_of(model)
    return Predictor(
        version=version,
        model=model,
        frame=frame,
        class_names=_class_names(version, model.output_shape[-1]),
        batch_size=config.batch_size,
    )


def frame_of(model: keras.Model) -> Frame:
    """What a model takes; its first layer scales the pixels.

    Raises:
        ValueError: It is none of this pipeline's.
    """
    import keras

    scaling = [layer for layer in model.layers if isinstance(layer, keras.layers.Rescaling)]
    if not scaling or len(model.input_shape) != 3:
        raise ValueError("the model does not take raw pixels [n, height, width].")
    _, height, width = model.input_shape
    dtype = np.dtype(model.inputs[0].dtype)
    return Frame(height=height, width=width, dtype=dtype, pixel_max=1 / float(scaling[0].scale))


def _class_names(version: Version, count: int) -> list[str]:
    from pipeline.store import read_run, read_settings

    names = None
    with suppress(ValueError):  # the run was deleted
        names = read_settings(read_run(version.run_id)).get("data", {}).get("class_names")
    return names or [str(number) for number in range(count)]


def _predict_all(predictor: Predictor, given: Sequence[Given]) -> Iterator[Predicted]:
    """Predicts each file; a bar on a terminal shows how far it is."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal
    total = sum(len(each) if isinstance(each, Stored) else 1 for each in given)
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("predicting", total=total)
        for each in given:
            yield predict(predictor, each, lambda count: progress.advance(task, count))


def predict(
    predictor: Predictor, given: Given, on_batch: Callable[[int], None] = lambda count: None
) -> Predicted:
    """Predicts all images of a file.

    Args:
        predictor: The model.
        given: The images.
        on_batch: Called with the number of images that were predicted.

    Raises:
        ValueError: The file is damaged, or does not fit the model.
    """
    start = time.perf_counter()
    frame = predictor.frame
    labels, note = Labels(), ""
    batches: Iterator[Array]
    if isinstance(given, Stored):
        factor = fit(given, frame, predictor.batch_size)
        if factor != 1:
            note = f"pixels in [0, 1]: multiplied by {factor:g}, as the model was trained"
        labels = find_labels(given, len(predictor.class_names))
        batches = (frame.pixels(batch, factor) for batch in given.batches(predictor.batch_size))
    else:
        prepared = prepare(given, frame, predictor.style)
        note, batches = prepared.note, iter([prepared.pixels[np.newaxis]])
    pieces = []
    for batch in batches:
        pieces.append(predictor(batch))
        on_batch(len(batch))
    return Predicted(
        given=given,
        probabilities=np.concatenate(pieces),
        labels=labels,
        note=note,
        seconds=time.perf_counter() - start,
    )


# --- showing and writing -----------------------------------------------------------------


def _show(result: Predicted, class_names: Sequence[str], out: str | None) -> None:
    answers = [_answer(result, row, class_names) for row in range(min(ROWS, len(result)))]
    if isinstance(result.given, Path):
        (name, probability, second, lower) = answers[0]
        console.print(
            f"{result.file}: {name} ({probability}), then {second} ({lower}); {result.note}"
        )
        return
    labels = result.labels.values
    table = Table(box=None, pad_edge=False)
    for heading in ("index", "digit", "probability", "then", "probability"):
        table.add_column(heading, justify="right")
    if labels is not None:
        table.add_column("label", justify="right")
    for row, answer in enumerate(answers):
        label = [] if labels is None else [class_names[labels[row]]]
        table.add_row(str(row), *answer, *label)
    console.print(table)
    if len(result) > ROWS:
        console.print(
            f"... {len(result) - ROWS:,} more; {out or '--out predictions.csv'} has them all"
        )
    for line in _summary(result, class_names):
        console.print(line)


def _answer(result: Predicted, row: int, class_names: Sequence[str]) -> tuple[str, str, str, str]:
    """The most probable class with its probability, and the runner-up with its own."""
    first, second = result.ranked[row, [0, min(1, len(class_names) - 1)]]
    of = result.probabilities[row]
    return class_names[first], f"{of[first]:.3f}", class_names[second], f"{of[second]:.3f}"


def _summary(result: Predicted, class_names: Sequence[str]) -> Iterator[str]:
    yield (
        f"{result.given}: {len(result):,} images in {result.seconds:.2f} s "
        f"({len(result) / result.seconds:,.0f} a second), "
        f"mean probability {result.probabilities.max(axis=1).mean():.3f}"
    )
    counts = np.bincount(result.ranked[:, 0], minlength=len(class_names))
    yield "  ".join(f"{name}: {count:,}" for name, count in zip(class_names, counts, strict=True))
    if result.note:
        yield result.note
    if result.labels.values is not None:
        yield f"accuracy {np.mean(result.ranked[:, 0] == result.labels.values):.4f}"
    if result.labels.note:
        yield result.labels.note


def write(results: Sequence[Predicted], class_names: Sequence[str], path: Path) -> None:
    """Writes a row an image, the whole file or nothing.

    Raises:
        OSError: The disk is full.
    """
    import pandas as pd

    table = pd.concat([pd.DataFrame(_columns(result, class_names)) for result in results])
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        if path.suffix.lower() == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False)
        temporary.replace(path)
    except OSError as error:
        raise OSError(f"out={path} cannot be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _columns(result: Predicted, class_names: Sequence[str]) -> dict[str, object]:
    names = np.array(class_names, dtype=object)
    labels = result.labels.values
    return {
        "file": result.file,
        "index": np.arange(len(result)),
        "prediction": names[result.ranked[:, 0]],
        "probability": result.probabilities.max(axis=1),
        **{f"p_{number}": column for number, column in enumerate(result.probabilities.T)},
        **({} if labels is None else {"label": names[labels]}),
    }


if __name__ == "__main__":
    sys.argv[1:], named = split_files(sys.argv[1:])
    run_cli("predict", PredictConfig, partial(main, files=named), interrupted="Interrupted.")
