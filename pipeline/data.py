"""Images and labels: found or downloaded, verified by content, split by a seed."""

import gzip
import hashlib
import logging
import os
import struct
import sys
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pooch
import requests

from pipeline.config import DataConfig, without_password

log = logging.getLogger(__name__)

Array = npt.NDArray[np.generic]
Rows = npt.NDArray[np.int64]

# In the order of `data.sha256`: the names in an `.npz` file, and of the IDX files.
NPZ_NAMES = ("x_train", "y_train", "x_test", "y_test")
IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
# Type codes of the IDX format (LeCun, Cortes and Burges, "The MNIST database").
IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

PATIENCE = 10.0  # seconds without a piece of a download before it is given up
MAX_CLASSES = 100_000  # more labels than that are no classes
DIGITS_TEST_SIZE = 360  # a fifth of the 1,797


class DataError(ValueError):
    """A file cannot be read, or its arrays are not what they should be."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images with their labels.

    Attributes:
        name: `train`, `validation` or `test`.
        images: `[n, height, width]`, uint8 or float32, raw pixels.
        labels: `[n]`, int32, from 0 to the number of classes - 1.
        digest: SHA-256 of what is in it.
    """

    name: str
    images: Array
    labels: npt.NDArray[np.int32]
    digest: str

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set, split.

    Attributes:
        train: What the model is fitted to.
        validation: What choices are made on; None when nothing is held out.
        test: Read by `pipeline.evaluate` alone.
        class_names: One name a class.
        pixel_max: Pixel value that the model scales to 1.
        digest: SHA-256 of the whole content, whatever the split.
        source: Where the arrays came from.
    """

    train: Split
    validation: Split | None
    test: Split
    class_names: list[str]
    pixel_max: float
    digest: str
    source: str

    @property
    def splits(self) -> dict[str, Split]:
        """The splits by name, for a record of what a run was given: their digests and shapes."""
        splits = (self.train, self.validation, self.test)
        return {split.name: split for split in splits if split is not None}


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """A data set as published: checked, in one form, not yet split.

    Attributes:
        images: `[n, height, width]`, uint8 or float32.
        labels: `[n]`, uint8, or int32 beyond 256 classes.
        test_images: `[m, height, width]`, as `images`.
        test_labels: `[m]`, as `labels`.
        source: File or address they came from.
    """

    images: Array
    labels: Array
    test_images: Array
    test_labels: Array
    source: str

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """SHA-256 of each array in its uncompressed IDX form, in the order of `data.sha256`."""
        return tuple(
            idx_sha256(array)
            for array in (self.images, self.labels, self.test_images, self.test_labels)
        )


def load(config: DataConfig) -> Data:
    """Loads, verifies and splits a data set.

    Raises:
        ValueError: A file is damaged, or an array is not what its name says.
        OSError: A file cannot be read or downloaded.
    """
    arrays = LOADERS[config.loader](config)
    train_rows, validation_rows = _draw_rows(arrays.labels, config)

    def take(name: str, rows: Rows) -> Split:
        digest = _sha256(*arrays.digests[:2], rows.astype("<i8").tobytes().hex())
        labels = arrays.labels[rows].astype(np.int32)
        return Split(name=name, images=arrays.images[rows], labels=labels, digest=digest)

    num_classes = int(arrays.labels.max()) + 1
    if missing := sorted(set(range(num_classes)) - set(np.unique(arrays.labels).tolist())):
        log.warning("%s: no training image of class %s", arrays.source, missing[0])
    return Data(
        train=take("train", train_rows),
        validation=take("validation", validation_rows) if len(validation_rows) else None,
        test=Split(
            name="test",
            images=arrays.test_images,
            labels=arrays.test_labels.astype(np.int32),
            digest=_sha256(*arrays.digests[2:]),
        ),
        class_names=config.class_names or [str(label) for label in range(num_classes)],
        pixel_max=config.pixel_max,
        digest=_sha256(*arrays.digests),
        source=arrays.source,
    )


def _draw_rows(labels: Array, config: DataConfig) -> tuple[Rows, Rows]:
    """Rows of the training images for train and for validation, each sorted."""
    rows: Rows = np.arange(len(labels))
    validation: Rows = rows[:0]
    if config.validation_size:
        rows, validation = _draw(
            "data.validation_size", config.validation_size, rows, labels, config
        )
    if config.train_size is not None and config.train_size != len(rows):
        _, rows = _draw("data.train_size", config.train_size, rows, labels, config)
    return np.sort(rows), np.sort(validation)


def _draw(
    key: str, size: float, rows: Rows, labels: Array, config: DataConfig
) -> tuple[Rows, Rows]:
    """Draws `size` of the rows, each class in proportion: the rest and the drawn."""
    from sklearn.model_selection import train_test_split  # takes half a second

    try:
        rest, drawn = train_test_split(
            rows,
            test_size=size if size < 1 else int(size),
            stratify=labels[rows],
            random_state=config.split_seed,
        )
    except (ValueError, OverflowError) as error:
        shown = size if isinstance(size, int) else f"{size:g}"  # no float holds any number
        raise ValueError(
            f"{key}={shown}: cannot draw as many of {len(rows)} training images "
            "with every class in proportion."
        ) from error
    return rest, drawn


# --- loaders -----------------------------------------------------------------------------


def load_digits(config: DataConfig) -> Arrays:
    """The digits bundled with scikit-learn, a fixed fifth of them as the test split."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    bunch = datasets.load_digits()
    images, test_images, labels, test_labels = train_test_split(
        bunch.images,
        bunch.target,
        test_size=DIGITS_TEST_SIZE,
        stratify=bunch.target,
        random_state=0,
    )
    return _check((images, labels, test_images, test_labels), "sklearn.datasets", config)


def load_arrays(config: DataConfig) -> Arrays:
    """From `data.path`, else the Keras cache, else our own cache, else downloaded."""
    if config.path:
        return _read_verified(_given_path(config.path), config)
    own = _cache() / f"{config.name}.npz"
    for path in (*_keras_cache(config.name), own):
        if path.exists():
            try:
                return _read_verified(path, config)
            except (OSError, ValueError) as error:
                log.warning("passed over: %s", error)
    return _download(config, own)


def _given_path(given: str) -> Path:
    try:
        path = Path(given).expanduser()
    except RuntimeError as error:  # ~nobody
        raise ValueError(f"data.path={given}: {error}") from error
    if path.exists() and not path.is_file() and not path.is_dir():  # reading a pipe waits for ever
        raise ValueError(f"data.path={given} is no file and no folder.")
    return path


LOADERS: dict[str, Callable[[DataConfig], Arrays]] = {
    "arrays": load_arrays,
    "digits": load_digits,
}


def _cache() -> Path:
    return Path(pooch.os_cache("digit-sweeps"))


def _keras_cache(name: str) -> tuple[Path, Path]:
    """Where `keras.datasets` keeps a data set: `mnist.npz`, `fashion-mnist/*.gz`."""
    home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "datasets"
    return home / f"{name}.npz", home / name.replace("_", "-")


def _download(config: DataConfig, target: Path) -> Arrays:
    """Fetches the data set from the first source that has it, and caches it."""
    reasons = []
    for urls in config.sources:
        shown = without_password(urls[0])
        with tempfile.TemporaryDirectory() as folder:
            try:
                arrays = _fetch(urls, Path(folder), config)
            except (OSError, ValueError) as error:
                reasons.append(f"{urlsplit(shown).netloc}: {_reason(error)}")
                continue
        _save(arrays, target)
        return arrays
    tried = "; ".join(reasons) or "data.sources is empty"
    raise OSError(
        f"data={config.name} could not be downloaded ({tried}): name a local copy with "
        f"data.path=FILE, or use data=digits, which needs no download."
    )


def _fetch(urls: list[str], folder: Path, config: DataConfig) -> Arrays:
    for url in urls:
        log.info("downloading %s", without_password(url))
        _fetch_file(url, folder / Path(urlsplit(url).path).name)
    files = list(folder.iterdir())
    arrays = _read_verified(files[0] if len(files) == 1 else folder, config)
    return replace(arrays, source=without_password(urls[0]))


def _fetch_file(url: str, target: Path) -> None:
    """Downloads a file, and gives up when nothing comes for `PATIENCE` seconds.

    A thread of its own, for a name server, an address and a server can each hang, one after
    another, and the time-out of a connection is for one of them alone.
    """
    fetch = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=PATIENCE)
    failure: Future[str | None] = Future()

    def work() -> None:
        try:
            fetch(url, str(target), None)
            failure.set_result(None)
        except Exception as error:
            failure.set_result(_reason(error))

    threading.Thread(target=work, daemon=True).start()
    size = 0
    while not wait([failure], timeout=PATIENCE).done:
        before, size = size, target.stat().st_size if target.exists() else 0
        if size == before:
            raise TimeoutError(f"nothing came for {PATIENCE:g} s")
    if reason := failure.result():
        raise OSError(reason)


def _reason(error: Exception) -> str:
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"{error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.RequestException):
        return type(error).__name__
    return str(error).rstrip(".")


def _save(arrays: Arrays, target: Path) -> None:
    """Caches a verified download under its final name all at once."""
    contents = (arrays.images, arrays.labels, arrays.test_images, arrays.test_labels)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".npz", delete=False) as file:
            new = Path(file.name)
            try:
                np.savez(file, allow_pickle=False, **dict(zip(NPZ_NAMES, contents, strict=True)))
                new.replace(target)
            except BaseException:
                new.unlink()
                raise
    except OSError as error:
        log.warning("the download is not cached: %s", error)


# --- reading -----------------------------------------------------------------------------


def _read_verified(path: Path, config: DataConfig) -> Arrays:
    """Reads a file or folder; its content must have the digests of `config.sha256`."""
    expected = config.sha256 or ()
    try:
        arrays = _check(_read_idx(path) if path.is_dir() else _read_npz(path), str(path), config)
    except FileNotFoundError as error:
        raise ValueError(f"data.path: no file {error.filename}.") from error
    except PermissionError:
        raise
    except DataError as error:
        raise DataError(f"{error}{_difference(path, expected)}") from error
    except Exception as error:  # whatever a damaged archive makes its parser raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(f"{path} cannot be read: {reason}.{_difference(path, expected)}") from error
    for name, want, got in zip(NPZ_NAMES, expected, arrays.digests, strict=False):
        if want != got:
            raise DataError(
                f"{path}: {name} is not that of {config.name}: expected SHA-256 {want}, got {got}."
            )
    return arrays


def _difference(path: Path, expected: Sequence[str]) -> str:
    """The first file that is not, byte for byte, what was expected: the end of a message."""
    try:
        files = [_find_idx(path, name) for name in IDX_NAMES] if path.is_dir() else [path]
    except OSError:  # what cannot be found was not read
        return ""
    for file, want in zip(files, expected, strict=False):
        with suppress(OSError, ValueError):  # what cannot be read was said before
            got = hashlib.sha256(_content(file)).hexdigest()
            if got != want:
                return f" {file.name}: expected SHA-256 {want}, got {got}."
    return ""


def _content(path: Path) -> bytes:
    """What the file holds, uncompressed if it can be."""
    content = path.read_bytes()
    with suppress(OSError, EOFError, zlib.error):  # OSError: not gzip
        return gzip.decompress(content)
    return content


def _read_npz(path: Path) -> tuple[Array, ...]:
    # Not `np.load`, which leaves the file open when the archive is damaged.
    with path.open("rb") as stream, np.lib.npyio.NpzFile(stream) as file:
        missing = [name for name in NPZ_NAMES if name not in file]
        if missing:
            raise ValueError(f"it must hold {', '.join(NPZ_NAMES)}; missing: {', '.join(missing)}")
        return tuple(_read_member(file, name) for name in NPZ_NAMES)


def _read_member(file: np.lib.npyio.NpzFile, name: str) -> Array:
    try:
        with warnings.catch_warnings():  # NumPy's, of a header that it tries to mend
            warnings.simplefilter("ignore")
            array = file[name]
    except Exception as error:  # as above
        raise ValueError(f"{name}: {error}") from error
    if not isinstance(array, np.ndarray):  # NumPy gives the bytes of what is no array
        raise ValueError(f"{name} is not an array")
    return array


def _read_idx(folder: Path) -> tuple[Array, ...]:
    return tuple(_read_idx_file(_find_idx(folder, name)) for name in IDX_NAMES)


def _find_idx(folder: Path, name: str) -> Path:
    """The file of that name, gzipped or not, also as some archives spell it (`images.idx3`)."""
    names = (name, name.replace("-idx", ".idx"))
    for path in (folder / f"{stem}{suffix}" for stem in names for suffix in ("", ".gz")):
        if path.is_file():
            return path
    raise FileNotFoundError(2, "No such file", str(folder / name))


def _read_idx_file(path: Path) -> Array:
    try:
        return _parse_idx(path)
    except PermissionError:
        raise
    except Exception as error:  # whatever a damaged file makes its parser raise
        raise ValueError(f"{path.name}: {error}") from error


def _parse_idx(path: Path) -> Array:
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    zeros, code, dimensions = struct.unpack_from(">HBB", content)
    if zeros or code not in IDX_TYPES:
        raise ValueError("not an IDX file")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    array = np.frombuffer(content, IDX_TYPES[code], offset=4 + 4 * dimensions).reshape(shape)
    return array.astype(array.dtype.newbyteorder("="))


# --- checks and digests ------------------------------------------------------------------


def _check(raw: tuple[Array, ...], source: str, config: DataConfig) -> Arrays:
    """Checks raw arrays and gives them their one form."""
    images, labels, test_images, test_labels = raw
    num_classes = len(config.class_names) if config.class_names else None
    for split, x, y in (("train", images, labels), ("test", test_images, test_labels)):
        _check_images(f"{source}: x_{split}", x, config.pixel_max)
        _check_labels(f"{source}: y_{split}", y, len(x), num_classes)
        num_classes = num_classes or int(labels.max()) + 1
    if images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"{source}: x_test must have the image size of x_train, {images.shape[1:]}, "
            f"got {test_images.shape[1:]}."
        )
    pixel = np.uint8 if all(_fits_uint8(x) for x in (images, test_images)) else np.float32
    label = np.uint8 if max(labels.max(), test_labels.max()) < 256 else np.int32
    return Arrays(
        images=images.astype(pixel, copy=False),
        labels=labels.astype(label, copy=False),
        test_images=test_images.astype(pixel, copy=False),
        test_labels=test_labels.astype(label, copy=False),
        source=source,
    )


def _check_images(name: str, images: Array, pixel_max: float) -> None:
    if images.ndim != 3 or 0 in images.shape:
        raise DataError(f"{name} must have shape [n, height, width], got {images.shape}.")
    if images.dtype.kind not in "uif":
        raise DataError(f"{name} must hold numbers, got {images.dtype}.")
    low, high = float(images.min()), float(images.max())  # NaN if any is
    if not (0 <= low and high <= pixel_max):
        raise DataError(
            f"{name} must lie in [0, data.pixel_max={pixel_max:g}], got [{low:g}, {high:g}]."
        )
    if 0 < high <= 1 < pixel_max and images.dtype.kind == "f":
        raise DataError(
            f"{name} lies in [0, {high:g}], scaled already, but data.pixel_max={pixel_max:g}: "
            "set data.pixel_max=1."
        )


def _check_labels(name: str, labels: Array, num_images: int, num_classes: int | None) -> None:
    if labels.ndim != 1 or labels.dtype.kind not in "ui":
        raise DataError(f"{name} must be integers of shape [n], got {labels.dtype} {labels.shape}.")
    if len(labels) != num_images:
        raise DataError(f"{name} must have one label per image, {num_images}, got {len(labels)}.")
    low, high = int(labels.min()), int(labels.max())
    last = num_classes - 1 if num_classes else MAX_CLASSES - 1
    if low < 0 or high > last:
        raise DataError(f"{name} must lie in [0, {last}], the classes, got [{low}, {high}].")


def _fits_uint8(images: Array) -> bool:
    """Whether uint8 holds the pixels exactly, so that equal content has equal digests."""
    return images.dtype == np.uint8 or (
        images.max() <= 255 and np.array_equal(images, images.astype(np.uint8))
    )


def idx_sha256(array: Array) -> str:
    """SHA-256 of an array in uncompressed IDX form: big-endian header, then the values."""
    big_endian = array.dtype.newbyteorder(">").str.replace("|", ">")
    code = next(code for code, name in IDX_TYPES.items() if name == big_endian)
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    values = np.ascontiguousarray(array, dtype=np.dtype(big_endian))
    digest = hashlib.sha256(header)
    digest.update(values.data)
    return digest.hexdigest()


def _sha256(*parts: str) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()
