"""Images for a model out of an `.npz` file, in batches: an array of any size takes no memory."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]

NAMES = ("images", "x", "x_test")  # looked for in this order
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What a model takes.

    Attributes:
        height: Of an image, in pixels.
        width: Likewise.
        dtype: Of a pixel.
        pixel_max: Pixel value that the model scales to 1.
    """

    height: int
    width: int
    dtype: np.dtype[np.generic]
    pixel_max: float

    def pixels(self, values: Array, factor: float = 1.0) -> Array:
        """Values times a factor, as the pixels that the model takes."""
        if factor != 1.0:
            values = values.astype(np.float32) * np.float32(factor)
        if self.dtype.kind in "ui" and values.dtype.kind == "f":
            values = np.rint(values)
        return values.astype(self.dtype, copy=False)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An array in an `.npz` file, of which nothing but the header was read.

    Attributes:
        path: Of the file.
        name: In the file.
        shape: Images first.
        dtype: Of an element.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    def __str__(self) -> str:
        return f"{self.path}: {self.name}".encode(errors="backslashreplace").decode()

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def batches(self, size: int) -> Iterator[Array]:
        """The array in order, `[size, ...]` each, the last one shorter.

        Raises:
            ValueError: The file is damaged.
        """
        row = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        with _open(self.path, self.name) as stream:
            _, in_columns, _ = _header(stream)
            if in_columns:  # Fortran's order: the first image is all over the file
                stream.seek(0)
                whole: Array = np.lib.format.read_array(stream, allow_pickle=False)
                yield from (whole[start : start + size] for start in range(0, len(self), size))
                return
            for start in range(0, len(self), size):
                count = min(size, len(self) - start)
                content = stream.read(count * row)
                if len(content) < count * row:
                    raise ValueError("it ends early")
                yield np.frombuffer(content, self.dtype).reshape(count, *self.shape[1:])
            stream.read(1)  # at its end the checksum is compared


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What is known of the true classes.

    Attributes:
        values: `[n]`, from 0; None: nothing.
        note: Why there are none although the file has some, or empty.
    """

    values: npt.NDArray[np.int64] | None = None
    note: str = ""


def find_images(path: Path, array: str | None = None) -> Stored:
    """The array of a file that holds the images.

    Args:
        path: Of an `.npz` file.
        array: Its name; null: one of `NAMES`, or the only one of three dimensions.

    Raises:
        ValueError: The file is damaged, or it is not clear which array is meant.
    """
    members = _members(path)
    shown = ", ".join(f"{name} {list(found.shape)}" for name, found in members.items())
    if array is not None:
        if array not in members:
            raise ValueError(f"array={array}: {path} holds {shown or 'no array'}.")
        return members[array]
    if {"x_train", "x_test"} <= members.keys():
        raise ValueError(f"{path} holds x_train and x_test: set array= to one of them.")
    named = [members[name] for name in NAMES if name in members]
    found = named[:1] or [member for member in members.values() if len(member.shape) == 3]
    if not found:
        raise ValueError(
            f"{path} must hold images [n, height, width], but holds {shown or 'no array'}."
        )
    if len(found) > 1:
        raise ValueError(
            f"{path} holds several arrays of images: set array= to one of "
            f"{', '.join(member.name for member in found)}."
        )
    return found[0]


def find_labels(images: Stored, num_classes: int) -> Labels:
    """True classes beside the images: `y_train` of `x_train`, else `labels` or `y`.

    Those of test images are not read: figures on a test split are counted, and others count them.
    """
    members = _members(images.path)
    if "test" in images.name:
        has_some = images.name.replace("x_", "y_", 1) in members.keys() - {images.name}
        note = "its labels are not read: looks at a test split are counted, in sweeps.promote"
        return Labels(note=note if has_some else "")
    own = images.name.replace("x_", "y_", 1) if images.name.startswith("x_") else ""
    found = [members[name] for name in (own, "labels", "y") if name in members]
    if not found:
        return Labels()
    labels = found[0]
    if labels.shape != (len(images),) or labels.dtype.kind not in "ui":
        rule = f"must be integers of shape [{len(images)}]"
        return Labels(note=f"{labels.name} {rule}, got {labels.dtype} {list(labels.shape)}: unused")
    values = _read(labels).astype(np.int64)
    if values.min() < 0 or values.max() >= num_classes:
        rule = f"must lie in [0, {num_classes - 1}]"
        return Labels(note=f"{labels.name} {rule}, got [{values.min()}, {values.max()}]: unused")
    return Labels(values=values)


def fit(images: Stored, frame: Frame, batch_size: int) -> float:
    """Checks all images against what a model takes.

    Returns:
        What to multiply the pixels by: 1, or `frame.pixel_max` where they are scaled already.

    Raises:
        ValueError: Shape, type or range are others, or the file is damaged.
    """
    if images.shape[1:] != (frame.height, frame.width) or not len(images):
        expected = f"[n, {frame.height}, {frame.width}]"
        raise ValueError(f"{images} must have shape {expected}, got {list(images.shape)}.")
    if images.dtype.kind not in "uif":
        raise ValueError(f"{images} must hold numbers, got {images.dtype}.")
    low, high = np.float64(np.inf), np.float64(-np.inf)
    for batch in images.batches(batch_size):
        low, high = np.minimum(low, batch.min()), np.maximum(high, batch.max())  # NaN if any is
    if not (low >= 0 and high <= frame.pixel_max * (1 + 1e-6)):
        raise ValueError(
            f"{images} must lie in [0, {frame.pixel_max:g}], as the model was trained, "
            f"got [{low:g}, {high:g}]."
        )
    return frame.pixel_max if 0 < high <= 1 < frame.pixel_max else 1.0


# --- the file ----------------------------------------------------------------------------


def _members(path: Path) -> dict[str, Stored]:
    """Each array by name, from the headers alone."""
    with _readable(path), path.open("rb") as file, zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
    members = {}
    for name in (name.removesuffix(".npy") for name in names):
        with _open(path, name) as stream:
            shape, _, dtype = _header(stream)
        members[name] = Stored(path=path, name=name, shape=shape, dtype=dtype)
    return members


def _read(stored: Stored) -> Array:
    with _open(stored.path, stored.name) as stream:
        array: Array = np.lib.format.read_array(stream, allow_pickle=False)
        return array


@contextmanager
def _open(path: Path, name: str) -> Iterator[IO[bytes]]:
    with (
        _readable(path),
        path.open("rb") as file,  # or it stays open when the archive is damaged
        zipfile.ZipFile(file) as archive,
        archive.open(f"{name}.npy") as stream,
    ):
        yield stream


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"NumPy's format {version} is not known")
    with warnings.catch_warnings():  # of a header that it tries to mend
        warnings.simplefilter("ignore")
        shape, in_columns, dtype = _HEADERS[version](stream)
    if not all(0 <= side < 2**62 for side in shape):
        raise ValueError(f"its header has the shape {list(shape)}")
    return shape, in_columns, dtype


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a damaged archive makes its parser raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(
            f"{path} cannot be read: {' '.join(str(reason).split()).rstrip('.')}."
        ) from error
