"""Rows 1 to 3 of the faults, the published digests, and the splits."""

import functools
import gzip
import hashlib
import io
import logging
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pooch
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline import data
from pipeline.compose import CONF, to_config
from pipeline.config import DataConfig

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
Writer = Callable[[Path, Arrays], Path]
Reply = Callable[[BaseHTTPRequestHandler], None]

NAMES = ("x_train", "y_train", "x_test", "y_test")
IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
# Of the uncompressed files: http://yann.lecun.com/exdb/mnist, as torchvision checks the .gz.
MNIST_MD5 = {
    "x_train": "6bbc9ace898e44ae57da46a324031adb",
    "y_train": "a25bea736e30d166cdddb491f175f624",
    "x_test": "2646ac647ad5339dbf082846283269ea",
    "y_test": "27ae3e4e09519cfbb04c329615203637",
}
IDX_CODES = {"u1": 0x08, "i4": 0x0C, "f4": 0x0D}
DIGESTS = re.compile(r"[Ee]xpected SHA-256 ([0-9a-f]{64}), got ([0-9a-f]{64})\.")

fuzzed = settings(max_examples=15, deadline=None, database=None)


# --- configurations, arrays and files ----------------------------------------------------


@functools.cache
def composed(overrides: tuple[str, ...]) -> DataConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("run", [*overrides, "training.early_stopping_patience=null"])
    GlobalHydra.instance().clear()
    return to_config(cfg).data


def digits_config(*overrides: str) -> DataConfig:
    return composed(("data=digits", *overrides))


def npz_config(path: Path, *overrides: str) -> DataConfig:
    return replace(composed(("data=npz", "data.path=set_below", *overrides)), path=str(path))


def mnist_config(path: Path | None = None, **fields: Any) -> DataConfig:
    """The real configuration, reading `path`; `fields` are replaced."""
    return replace(
        composed(("data=mnist", "data.path=null")), path=str(path) if path else None, **fields
    )


def small_config(path: Path | None = None, **fields: Any) -> DataConfig:
    """As `mnist_config`, of the content of `small_arrays`."""
    known = {"sha256": sha256_of(small_arrays()), "validation_size": 20}
    return mnist_config(path, **(known | fields))


def small_arrays() -> Arrays:
    """100 training and 30 test images, 6 x 5, ten classes."""
    draw = np.random.default_rng(0)
    return {
        "x_train": draw.integers(0, 256, (100, 6, 5), dtype=np.uint8),
        "y_train": (np.arange(100) % 10).astype(np.uint8),
        "x_test": draw.integers(0, 256, (30, 6, 5), dtype=np.uint8),
        "y_test": (np.arange(30) % 10).astype(np.uint8),
    }


def idx_bytes(array: Array) -> bytes:
    """The IDX form, written apart from `pipeline.data`."""
    code = IDX_CODES[array.dtype.str[1:]]
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def sha256_of(arrays: Arrays) -> list[str]:
    return [hashlib.sha256(idx_bytes(arrays[name])).hexdigest() for name in NAMES]


def write_npz(folder: Path, arrays: Arrays) -> Path:
    path = folder / "mnist.npz"
    np.savez(path, allow_pickle=True, **arrays)
    return path


def write_compressed_npz(folder: Path, arrays: Arrays) -> Path:
    path = folder / "mnist.npz"
    np.savez_compressed(path, allow_pickle=True, **arrays)
    return path


def write_idx(folder: Path, arrays: Arrays) -> Path:
    for name, array in arrays.items():
        (folder / IDX_FILES[name]).write_bytes(idx_bytes(array))
    return folder


def write_idx_gz(folder: Path, arrays: Arrays) -> Path:
    for name, content in gzipped(arrays).items():
        (folder / name).write_bytes(content)
    return folder


def write_dotted_idx(folder: Path, arrays: Arrays) -> Path:
    for name, array in arrays.items():
        (folder / IDX_FILES[name].replace("-idx", ".idx")).write_bytes(idx_bytes(array))
    return folder


def write_wide_idx(folder: Path, arrays: Arrays) -> Path:
    """Labels of four bytes each."""
    labels = {name: arrays[name].astype(np.int32) for name in ("y_train", "y_test")}
    return write_idx(folder, arrays | labels)


def gzipped(arrays: Arrays) -> dict[str, bytes]:
    return {
        f"{IDX_FILES[name]}.gz": gzip.compress(idx_bytes(array), compresslevel=1)
        for name, array in arrays.items()
    }


def npz_bytes(arrays: Arrays) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=True, **arrays)
    return stream.getvalue()


def flip(path: Path, offset: int, mask: int = 0xFF) -> bytes:
    """Damages one byte in place; what the file then holds."""
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    path.write_bytes(content)
    return bytes(content)


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def own_copy() -> Path:
    """Where the pipeline caches what it downloaded."""
    return Path(pooch.os_cache("digit-sweeps")) / "mnist.npz"


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home with empty caches, which also holds the temporary files."""
    path = tmp_path_factory.mktemp("home")
    (path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.setenv("KERAS_HOME", str(path / ".keras"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(path / ".cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("MNIST_NPZ", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(path / "tmp"))
    return path


@pytest.fixture
def keras_cache(home: Path) -> Path:
    path = home / ".keras" / "datasets"
    path.mkdir(parents=True)
    return path


# --- a server that misbehaves ------------------------------------------------------------


class Site(ThreadingHTTPServer):
    """Answers each path as told, counts what was asked, and says 404 to the rest."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: dict[str, Reply] = {}
        self.asked: list[str] = []
        self.closing = threading.Event()

    def url(self, name: str, reply: Reply) -> str:
        """The address of a file that is answered so."""
        self.replies[f"/{name}"] = reply
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.server.replies.get(self.path, not_found)(self)

    def log_message(self, *args: Any) -> None:
        """Writes nothing: the log of `pipeline` is what the tests read."""


def serve(content: bytes) -> Reply:
    return announce(len(content), content)


def announce(length: int, content: bytes) -> Reply:
    """Sends `content` under a header that promises `length` bytes."""

    def reply(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(length))
        request.end_headers()
        request.wfile.write(content)

    return reply


def not_found(request: BaseHTTPRequestHandler) -> None:
    request.send_error(404)


def reset(request: BaseHTTPRequestHandler) -> None:
    """Closes with RST, as a firewall does: `SO_LINGER` of 0 seconds."""
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.close()
    request.close_connection = True
    request.wfile = io.BytesIO()


def hang(request: BaseHTTPRequestHandler) -> None:
    site = request.server
    assert isinstance(site, Site)
    site.closing.wait(60)


def hang_half_way(request: BaseHTTPRequestHandler) -> None:
    announce(1_000_000, b"PK\x03\x04" * 1000)(request)
    hang(request)


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def gz_urls(site: Site, arrays: Arrays) -> list[str]:
    return [site.url(name, serve(content)) for name, content in gzipped(arrays).items()]


# --- digits ------------------------------------------------------------------------------


def test_importing_the_module_does_not_import_tensorflow() -> None:
    program = "import sys, pipeline.data; print('tensorflow' in sys.modules)"

    result = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )

    assert result.stdout.strip() == "False"


def test_digits_are_split_into_1197_240_and_360_images() -> None:
    digits = data.load(digits_config())

    assert {name: len(split) for name, split in digits.splits.items()} == {
        "train": 1197,
        "validation": 240,
        "test": 360,
    }
    assert digits.train.images.shape == (1197, 8, 8)
    assert digits.train.images.dtype == np.uint8
    assert digits.train.labels.dtype == np.int32
    assert digits.class_names == list("0123456789")
    assert digits.pixel_max == 16
    assert digits.test.images.max() == 16


@pytest.mark.parametrize("train_size", ["null", "500"])
def test_every_split_of_digits_has_the_classes_in_proportion(train_size: str) -> None:
    digits = data.load(digits_config(f"data.train_size={train_size}"))

    whole = np.concatenate([split.labels for split in digits.splits.values()])
    for split in digits.splits.values():
        counts = np.bincount(split.labels, minlength=10)
        proportional = np.bincount(whole, minlength=10) * len(split) / len(whole)
        assert np.abs(counts - proportional).max() <= 2


def test_splits_are_disjoint_and_together_are_all_images(tmp_path: Path) -> None:
    number = np.arange(1000, dtype=np.float32).reshape(-1, 1, 1)
    labels = np.arange(1000) % 4
    arrays: Arrays = {
        "x_train": number,
        "y_train": labels,
        "x_test": number + 1000,
        "y_test": labels,
    }
    path = write_npz(tmp_path, arrays)

    loaded = data.load(npz_config(path, "data.pixel_max=2000", "data.validation_size=150"))

    assert loaded.validation is not None
    train, validation = set(loaded.train.images.flat), set(loaded.validation.images.flat)
    assert (len(train), len(validation)) == (850, 150)
    assert train | validation == set(range(1000))
    assert loaded.test.images.ravel().tolist() == list(range(1000, 2000))
    assert loaded.train.labels.tolist() == [int(pixel) % 4 for pixel in loaded.train.images.flat]


def test_a_training_draw_leaves_the_validation_split_as_it_is() -> None:
    whole = data.load(digits_config())
    drawn = data.load(digits_config("data.train_size=500"))

    assert whole.validation is not None
    assert drawn.validation is not None
    assert drawn.validation.digest == whole.validation.digest
    assert drawn.train.digest != whole.train.digest
    assert {image.tobytes() for image in drawn.train.images} < {
        image.tobytes() for image in whole.train.images
    }


def test_equal_split_seeds_draw_the_same_rows() -> None:
    first, second = (data.load(digits_config("data.split_seed=7")) for _ in range(2))

    assert first.validation is not None
    assert second.validation is not None
    assert np.array_equal(first.train.images, second.train.images)
    assert np.array_equal(first.validation.images, second.validation.images)
    assert first.train.digest == second.train.digest


def test_another_split_seed_draws_other_rows_and_leaves_the_test_split() -> None:
    first = data.load(digits_config("data.split_seed=7"))
    second = data.load(digits_config("data.split_seed=8"))

    assert first.validation is not None
    assert second.validation is not None
    assert not np.array_equal(first.train.images, second.train.images)
    assert first.train.digest != second.train.digest
    assert first.validation.digest != second.validation.digest
    assert first.test.digest == second.test.digest
    assert first.digest == second.digest


@pytest.mark.parametrize(
    ("train_size", "validation_size", "sizes"),
    [
        ("null", "240", {"train": 1197, "validation": 240, "test": 360}),
        ("null", "0", {"train": 1437, "test": 360}),
        ("null", "0.0", {"train": 1437, "test": 360}),
        ("null", "0.15", {"train": 1221, "validation": 216, "test": 360}),
        ("null", "0.5", {"train": 718, "validation": 719, "test": 360}),
        ("null", "10", {"train": 1427, "validation": 10, "test": 360}),
        ("null", "1427", {"train": 10, "validation": 1427, "test": 360}),
        ("500", "240", {"train": 500, "validation": 240, "test": 360}),
        ("10", "0", {"train": 10, "test": 360}),
        ("1197", "240", {"train": 1197, "validation": 240, "test": 360}),
    ],
)
def test_sizes_are_a_number_a_fraction_or_nothing(
    train_size: str, validation_size: str, sizes: dict[str, int]
) -> None:
    config = digits_config(
        f"data.train_size={train_size}", f"data.validation_size={validation_size}"
    )

    digits = data.load(config)

    assert {name: len(split) for name, split in digits.splits.items()} == sizes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train_size=1198"], "data.train_size=1198: .* of 1197 training images"),
        (["data.train_size=9"], "data.train_size=9: .* every class in proportion"),
        (["data.validation_size=1437"], "data.validation_size=1437: .* of 1437 training images"),
        (["data.validation_size=1428"], "data.validation_size=1428: .* every class in proportion"),
        (["data.validation_size=9"], "data.validation_size=9: .* every class in proportion"),
        (["data.validation_size=0.001"], "data.validation_size=0.001: .* every class"),
    ],
)
def test_a_size_that_cannot_be_drawn_names_its_key_in_one_line(
    overrides: list[str], message: str
) -> None:
    config = digits_config(*overrides)

    with pytest.raises(ValueError, match=message) as caught:
        data.load(config)

    assert "\n" not in str(caught.value)


# --- the real MNIST ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def mnist_arrays(mnist_npz: Path) -> Arrays:
    with np.load(mnist_npz) as file:
        return {name: file[name] for name in NAMES}


@pytest.fixture(scope="module", params=["npz", "idx", "idx_gz"])
def mnist_copy(
    request: pytest.FixtureRequest,
    mnist_npz: Path,
    mnist_arrays: Arrays,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The real MNIST in one of its containers."""
    writers: dict[str, Writer] = {
        "npz": lambda folder, arrays: mnist_npz,
        "idx": write_idx,
        "idx_gz": write_idx_gz,
    }
    return writers[request.param](tmp_path_factory.mktemp("mnist"), mnist_arrays)


def test_the_idx_form_of_mnist_has_the_published_digests(mnist_arrays: Arrays) -> None:
    contents = {name: idx_bytes(array) for name, array in mnist_arrays.items()}

    assert {name: hashlib.md5(content).hexdigest() for name, content in contents.items()} == (
        MNIST_MD5
    )
    assert [hashlib.sha256(content).hexdigest() for content in contents.values()] == (
        mnist_config().sha256
    )


def test_every_container_of_mnist_is_verified_and_split(
    mnist_copy: Path, mnist_arrays: Arrays
) -> None:
    config = mnist_config(mnist_copy)

    mnist = data.load(config)

    assert {name: len(split) for name, split in mnist.splits.items()} == {
        "train": 50_000,
        "validation": 10_000,
        "test": 10_000,
    }
    assert mnist.digest == hashlib.sha256("".join(config.sha256 or []).encode()).hexdigest()
    assert mnist.source == str(mnist_copy)
    assert np.array_equal(mnist.test.images, mnist_arrays["x_test"])
    assert np.array_equal(mnist.test.labels, mnist_arrays["y_test"])


# --- containers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [write_npz, write_compressed_npz, write_idx, write_idx_gz, write_dotted_idx, write_wide_idx],
)
def test_equal_content_has_an_equal_digest_in_every_container(
    write: Writer, tmp_path: Path
) -> None:
    config = small_config(write(tmp_path, small_arrays()))

    loaded = data.load(config)

    assert loaded.digest == hashlib.sha256("".join(config.sha256 or []).encode()).hexdigest()
    assert np.array_equal(loaded.test.images, small_arrays()["x_test"])


@pytest.mark.parametrize("images", ["u1", "<u2", ">i4", "<i8", "<f2", "<f4", ">f8"])
@pytest.mark.parametrize("labels", ["u1", "<i8", ">u2"])
def test_equal_content_has_an_equal_digest_in_every_dtype(
    images: str, labels: str, tmp_path: Path
) -> None:
    dtypes = {"x": images, "y": labels}
    recast = {name: array.astype(dtypes[name[0]]) for name, array in small_arrays().items()}

    loaded = data.load(small_config(write_npz(tmp_path, recast)))

    assert loaded.train.images.dtype == np.uint8
    assert loaded.train.labels.dtype == np.int32


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8"])
@pytest.mark.parametrize("write", [write_npz, write_compressed_npz])
def test_equal_fractional_pixels_have_an_equal_digest(
    dtype: str, write: Writer, tmp_path: Path
) -> None:
    arrays = small_arrays()
    scaled = {name: (arrays[name] / 255).astype(np.float32) for name in ("x_train", "x_test")}
    recast = {name: array.astype(dtype) for name, array in scaled.items()}
    config = npz_config(write(tmp_path, arrays | recast), "data.pixel_max=1")

    loaded = data.load(config)

    expected = "".join(sha256_of(arrays | scaled))
    assert loaded.digest == hashlib.sha256(expected.encode()).hexdigest()


def test_memory_order_does_not_change_the_digest(tmp_path: Path) -> None:
    fortran = {name: np.asfortranarray(array) for name, array in small_arrays().items()}

    loaded = data.load(small_config(write_npz(tmp_path, fortran)))

    assert len(loaded.train) == 80


def test_one_changed_pixel_changes_the_digest_of_its_split_alone(tmp_path: Path) -> None:
    changed = small_arrays()
    changed["x_test"][3, 2, 1] ^= 1
    (tmp_path / "changed").mkdir()

    before = data.load(npz_config(write_npz(tmp_path, small_arrays())))
    after = data.load(npz_config(write_npz(tmp_path / "changed", changed)))

    assert after.digest != before.digest
    assert after.test.digest != before.test.digest
    assert after.train.digest == before.train.digest


@fuzzed
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    classes=st.integers(1, 300),
    dtype=st.sampled_from(["u1", "u2", "i4", "f4", "f8"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_images_of_any_size_and_number_of_classes_load(
    size: tuple[int, int], classes: int, dtype: str, seed: int, scratch: Path
) -> None:
    draw = np.random.default_rng(seed)
    labels = draw.permutation(np.repeat(np.arange(classes), 4))
    arrays = {
        "x_train": draw.integers(0, 256, (len(labels), *size)).astype(dtype),
        "y_train": labels,
        "x_test": draw.integers(0, 256, (7, *size)).astype(dtype),
        "y_test": draw.integers(0, classes, 7),
    }

    loaded = data.load(npz_config(write_npz(scratch, arrays), "data.validation_size=0.5"))

    assert {name: len(split) for name, split in loaded.splits.items()} == {
        "train": 2 * classes,
        "validation": 2 * classes,
        "test": 7,
    }
    assert loaded.class_names == [str(label) for label in range(classes)]
    assert np.array_equal(loaded.test.images, arrays["x_test"])
    assert np.array_equal(loaded.test.labels, arrays["y_test"])


def test_labels_above_255_in_the_test_split_alone_are_kept(tmp_path: Path) -> None:
    arrays = small_arrays() | {"y_test": np.arange(270, 300)}
    names = ",".join(f"class{number}" for number in range(300))

    loaded = data.load(npz_config(write_npz(tmp_path, arrays), f"data.class_names=[{names}]"))

    assert loaded.test.labels.tolist() == list(range(270, 300))


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    config = small_config(tmp_path / "absent.npz")

    with pytest.raises(ValueError, match=r"^data.path: no file .*absent.npz\.$"):
        data.load(config)


def test_a_folder_without_one_of_the_idx_files_names_it(tmp_path: Path) -> None:
    write_idx(tmp_path, small_arrays())
    (tmp_path / IDX_FILES["y_test"]).unlink()

    with pytest.raises(ValueError, match=rf"^data.path: no file .*{IDX_FILES['y_test']}\.$"):
        data.load(small_config(tmp_path))


# --- damaged files -----------------------------------------------------------------------


def refusal(config: DataConfig) -> str:
    """The one line that a damaged file ends in."""
    with pytest.raises(data.DataError) as caught:
        data.load(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_tells_digests(message: str, expected: list[str]) -> None:
    digests = DIGESTS.search(message)
    assert digests, message
    assert digests[1] in expected
    assert digests[2] not in expected


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("write", [write_npz, write_compressed_npz])
def test_a_cut_npz_is_refused_with_both_digests_and_kept(
    write: Writer, kept: float, tmp_path: Path
) -> None:
    path = write(tmp_path, small_arrays())
    cut = path.read_bytes()[: int(kept * path.stat().st_size)]
    path.write_bytes(cut)

    message = refusal(small_config(path))

    assert str(path) in message
    assert_tells_digests(message, sha256_of(small_arrays()))
    assert path.read_bytes() == cut


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("write", "suffix"), [(write_idx, ""), (write_idx_gz, ".gz")])
def test_a_cut_idx_file_is_refused_with_both_digests_and_kept(
    write: Writer, suffix: str, name: str, kept: float, tmp_path: Path
) -> None:
    write(tmp_path, small_arrays())
    path = tmp_path / f"{IDX_FILES[name]}{suffix}"
    cut = path.read_bytes()[: int(kept * path.stat().st_size)]
    path.write_bytes(cut)

    message = refusal(small_config(tmp_path))

    assert path.name in message
    assert_tells_digests(message, sha256_of(small_arrays()))
    assert path.read_bytes() == cut


@pytest.mark.parametrize("place", range(1, 10))
@pytest.mark.parametrize("write", [write_npz, write_compressed_npz])
def test_a_flipped_byte_in_an_npz_is_refused_with_both_digests(
    write: Writer, place: int, tmp_path: Path
) -> None:
    path = write(tmp_path, small_arrays())
    images = path.read_bytes().index(b"x_train.npy") + len(b"x_train.npy")
    length = path.read_bytes().index(b"y_train.npy") - images
    damaged = flip(path, images + place * length // 11)

    message = refusal(small_config(path))

    assert str(path) in message
    assert_tells_digests(message, sha256_of(small_arrays()))
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("mask", [0x02, 0x80, 0xFF])
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 7, -2, -1])
@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_byte_in_an_idx_file_is_refused_with_both_digests(
    name: str, offset: int, mask: int, tmp_path: Path
) -> None:
    write_idx(tmp_path, small_arrays())
    path = tmp_path / IDX_FILES[name]
    damaged = flip(path, offset, mask)

    message = refusal(small_config(tmp_path))

    assert str(tmp_path) in message
    assert_tells_digests(message, sha256_of(small_arrays()))
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("name", NAMES)
def test_readable_content_that_is_not_the_published_names_array_and_digests(
    name: str, tmp_path: Path
) -> None:
    arrays = small_arrays()
    arrays[name][0] ^= 1
    path = write_npz(tmp_path, arrays)

    message = refusal(small_config(path))

    expected, got = (dict(zip(NAMES, sha256_of(a), strict=True)) for a in (small_arrays(), arrays))
    assert message == (
        f"{path}: {name} is not that of mnist: expected SHA-256 {expected[name]}, got {got[name]}."
    )


def test_a_damaged_file_at_data_path_is_never_replaced_by_a_download(
    tmp_path: Path, site: Site
) -> None:
    path = tmp_path / "mnist.npz"
    path.write_bytes(b"mine")
    sources = [[site.url("mnist.npz", serve(npz_bytes(small_arrays())))]]

    refusal(small_config(path, sources=sources))

    assert site.asked == []
    assert path.read_bytes() == b"mine"


# --- caches and downloads ----------------------------------------------------------------


def test_a_download_is_cached_whole_and_the_next_load_asks_nothing(home: Path, site: Site) -> None:
    address = site.url("mnist.npz", serve(npz_bytes(small_arrays())))
    config = small_config(sources=[[address]])

    first = data.load(config)
    second = data.load(config)

    assert first.digest == second.digest
    assert first.source == address
    assert second.source == str(own_copy())
    assert site.asked == ["/mnist.npz"]
    assert files_under(home) == {str(own_copy().relative_to(home))}


def test_four_idx_files_are_downloaded_and_cached_as_one(home: Path, site: Site) -> None:
    config = small_config(sources=[gz_urls(site, small_arrays())])

    first = data.load(config)
    second = data.load(config)

    assert first.digest == second.digest
    assert site.asked == [f"/{name}.gz" for name in IDX_FILES.values()]
    assert files_under(home) == {str(own_copy().relative_to(home))}


@pytest.mark.parametrize(("folder", "write"), [(".", write_npz), ("mnist", write_idx_gz)])
def test_a_good_copy_in_the_keras_cache_is_used_where_it_is(
    folder: str, write: Writer, keras_cache: Path, home: Path, site: Site
) -> None:
    (keras_cache / folder).mkdir(exist_ok=True)
    path = write(keras_cache / folder, small_arrays())
    before = files_under(home)

    loaded = data.load(small_config(sources=[[site.url("mnist.npz", not_found)]]))

    assert loaded.source == str(path)
    assert site.asked == []
    assert files_under(home) == before


def test_fashion_mnist_is_read_from_the_folder_of_the_keras_cache(keras_cache: Path) -> None:
    folder = keras_cache / "fashion-mnist"
    folder.mkdir()
    write_idx_gz(folder, small_arrays())
    config = replace(
        composed(("data=fashion_mnist",)), sha256=sha256_of(small_arrays()), validation_size=20
    )

    loaded = data.load(replace(config, sources=[]))

    assert loaded.source == str(folder)
    assert loaded.class_names[9] == "ankle boot"


def test_our_own_damaged_copy_is_fetched_again_once_and_replaced(
    home: Path, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(sources=[[site.url("mnist.npz", serve(npz_bytes(small_arrays())))]])
    data.load(config)
    flip(own_copy(), 200)

    with caplog.at_level(logging.WARNING):
        again = data.load(config)
    cached = data.load(config)

    assert again.digest == cached.digest
    assert cached.source == str(own_copy())
    assert site.asked == ["/mnist.npz"] * 2
    assert f"passed over: {own_copy()}" in caplog.text
    assert files_under(home) == {str(own_copy().relative_to(home))}


def test_a_damaged_copy_in_the_keras_cache_is_passed_over_and_left(
    keras_cache: Path, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_npz(keras_cache, small_arrays())
    damaged = flip(path, 200)
    address = site.url("mnist.npz", serve(npz_bytes(small_arrays())))

    loaded = data.load(small_config(sources=[[address]]))

    assert loaded.source == address
    assert path.read_bytes() == damaged
    assert f"passed over: {path}" in caplog.text


def test_a_half_filled_folder_of_the_keras_cache_is_passed_over_and_left(
    keras_cache: Path, site: Site
) -> None:
    folder = keras_cache / "mnist"
    folder.mkdir()
    write_idx_gz(folder, small_arrays())
    (folder / f"{IDX_FILES['y_test']}.gz").unlink()
    before = files_under(folder)
    address = site.url("mnist.npz", serve(npz_bytes(small_arrays())))

    loaded = data.load(small_config(sources=[[address]]))

    assert loaded.source == address
    assert files_under(folder) == before


def test_a_cache_that_cannot_be_written_does_not_stop_the_load(
    home: Path, site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    (home / ".cache").write_text("a file where the folder should be")
    address = site.url("mnist.npz", serve(npz_bytes(small_arrays())))

    loaded = data.load(small_config(sources=[[address]]))

    assert loaded.source == address
    assert "the download is not cached" in caplog.text


def other_content() -> bytes:
    arrays = small_arrays()
    arrays["x_train"][0, 0, 0] ^= 1
    return npz_bytes(arrays)


MISBEHAVIOURS: dict[str, Reply] = {
    "404": not_found,
    "reset": reset,
    "truncated": announce(1_000_000, npz_bytes(small_arrays())[:1000]),
    "cut at the source": serve(npz_bytes(small_arrays())[:1000]),
    "empty": serve(b""),
    "a login page": serve(b"<html>\n<body>Sign in to the hotel's network\n</body></html>"),
    "other content": serve(other_content()),
}
misbehaving = pytest.mark.parametrize(
    "reply", [pytest.param(reply, id=name) for name, reply in MISBEHAVIOURS.items()]
)


@misbehaving
def test_a_download_falls_over_to_the_second_source(reply: Reply, home: Path, site: Site) -> None:
    second = gz_urls(site, small_arrays())
    config = small_config(sources=[[site.url("mnist.npz", reply)], second])

    loaded = data.load(config)

    assert loaded.source == second[0]
    assert site.asked == ["/mnist.npz", *(f"/{name}.gz" for name in IDX_FILES.values())]
    assert files_under(home) == {str(own_copy().relative_to(home))}


@misbehaving
def test_one_bad_file_of_four_falls_over_to_the_next_source(
    reply: Reply, home: Path, site: Site
) -> None:
    bad = [*gz_urls(site, small_arrays())[:3], site.url("t10k-labels-idx1-ubyte.gz", reply)]
    good = site.url("mnist.npz", serve(npz_bytes(small_arrays())))

    loaded = data.load(small_config(sources=[bad, [good]]))

    assert loaded.source == good
    assert files_under(home) == {str(own_copy().relative_to(home))}


@misbehaving
def test_when_no_source_works_one_line_tells_the_ways_out(
    reply: Reply, home: Path, site: Site
) -> None:
    sources = [[site.url("mnist.npz", reply)], [site.url("train-images-idx3-ubyte.gz", reply)]]

    with pytest.raises(OSError, match="data=mnist could not be downloaded") as caught:
        data.load(small_config(sources=sources))

    message = str(caught.value)
    assert "\n" not in message
    assert "data.path=" in message
    assert "data=digits" in message
    assert message.count(f"127.0.0.1:{site.server_port}: ") == 2
    assert files_under(home) == set()


@pytest.mark.parametrize("reply", [hang, hang_half_way])
def test_a_server_that_hangs_is_given_up(
    reply: Reply, home: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "PATIENCE", 0.3)
    sources = [[site.url("mnist.npz", reply)], [site.url("second.npz", reply)]]
    start = time.monotonic()

    with pytest.raises(OSError, match=r"data\.path=.*data=digits"):
        data.load(small_config(sources=sources))

    assert time.monotonic() - start < 5
    assert files_under(home) == set()


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_time_outs_of_all_sources_add_up_to_less_than_30_seconds(name: str) -> None:
    config = composed((f"data={name}", "data.path=null"))

    assert len(config.sources) * data.PATIENCE < 30


def test_a_server_that_is_not_there_ends_in_one_line(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        sources = [[f"http://127.0.0.1:{taken.getsockname()[1]}/mnist.npz"]]

        with pytest.raises(OSError, match=r"ConnectionError.*data\.path=.*data=digits") as caught:
            data.load(small_config(sources=sources))

    assert "\n" not in str(caught.value)
    assert files_under(home) == set()


def test_a_data_set_without_sources_says_so() -> None:
    with pytest.raises(OSError, match=r"data\.sources is empty.*data\.path="):
        data.load(small_config(sources=[]))


def test_a_password_in_a_source_is_not_shown(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    address = site.url("mnist.npz", not_found).replace("http://", "http://me:hunter2@")

    with caplog.at_level(logging.INFO), pytest.raises(OSError, match="404") as caught:
        data.load(small_config(sources=[[address]]))

    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in caplog.text


# --- arrays that are not what their names say --------------------------------------------


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the examples of one property overwrite."""
    return tmp_path_factory.mktemp("scratch")


LENGTH = {"x_train": 100, "y_train": 100, "x_test": 30, "y_test": 30}
THREE_NAMES = "data.class_names=[zero,one,two]"


def three_classes() -> Arrays:
    arrays = small_arrays()
    return arrays | {name: array % 3 for name, array in arrays.items() if name.startswith("y")}


def refusal_of(scratch: Path, name: str, array: Array) -> str:
    """The one line that refuses `array` in place of a good one, which the line names."""
    path = write_npz(scratch, three_classes() | {name: array})
    message = refusal(npz_config(path, THREE_NAMES, "data.validation_size=0"))
    assert name in message
    return message


image_names = pytest.mark.parametrize("name", ["x_train", "x_test"])
label_names = pytest.mark.parametrize("name", ["y_train", "y_test"])


@image_names
@fuzzed
@given(dtype=st.sampled_from(["?", "c8", "c16", "U3", "S3", "M8[s]", "m8[s]", "u1,f4"]))
def test_images_that_are_not_numbers_are_refused(name: str, dtype: str, scratch: Path) -> None:
    message = refusal_of(scratch, name, np.zeros((LENGTH[name], 6, 5), dtype))

    assert "must hold numbers" in message


@image_names
@fuzzed
@given(
    shape=st.one_of(
        hnp.array_shapes(min_dims=1, max_dims=2, max_side=8),
        hnp.array_shapes(min_dims=4, max_dims=5, max_side=4),
        st.permutations([0, 3, 4]),
        st.just(()),
    )
)
def test_images_that_are_not_three_dimensional_are_refused(
    name: str, shape: tuple[int, ...], scratch: Path
) -> None:
    message = refusal_of(scratch, name, np.zeros(shape, np.uint8))

    assert "must have shape [n, height, width]" in message


@image_names
@fuzzed
@given(
    pixel=st.one_of(
        st.sampled_from([np.nan, np.inf, -np.inf, -1.0, 256.0]),
        st.floats(max_value=-(2.0**-20), width=32),
        st.floats(min_value=255.125, width=32),
    ),
    dtype=st.sampled_from(["<f4", ">f8"]),
    data_=st.data(),
)
def test_one_pixel_out_of_range_is_refused(
    name: str, pixel: float, dtype: str, data_: st.DataObject, scratch: Path
) -> None:
    images = three_classes()[name].astype(dtype)
    images.flat[data_.draw(st.integers(0, images.size - 1))] = pixel

    message = refusal_of(scratch, name, images)

    assert "must lie in [0, data.pixel_max=255]" in message


@image_names
@fuzzed
@given(pixel=st.one_of(st.integers(-(2**15), -1), st.integers(256, 2**15 - 1)))
def test_one_whole_pixel_out_of_range_is_refused(name: str, pixel: int, scratch: Path) -> None:
    images = three_classes()[name].astype(np.int16)
    images[-1, -1, -1] = pixel

    message = refusal_of(scratch, name, images)

    assert "must lie in [0, data.pixel_max=255]" in message


@label_names
@fuzzed
@given(dtype=st.sampled_from(["?", "f4", "f8", "c8", "U3", "S3", "M8[s]", "u1,f4"]))
def test_labels_that_are_not_whole_numbers_are_refused(
    name: str, dtype: str, scratch: Path
) -> None:
    message = refusal_of(scratch, name, np.zeros(LENGTH[name], dtype))

    assert "must be integers of shape [n]" in message


@label_names
@fuzzed
@given(
    shape=st.one_of(hnp.array_shapes(min_dims=2, max_dims=4, min_side=0, max_side=5), st.just(()))
)
def test_labels_that_are_not_one_dimensional_are_refused(
    name: str, shape: tuple[int, ...], scratch: Path
) -> None:
    message = refusal_of(scratch, name, np.zeros(shape, np.uint8))

    assert "must be integers of shape [n]" in message


@label_names
@fuzzed
@given(length=st.integers(0, 200).filter(lambda length: length not in LENGTH.values()))
def test_a_label_too_many_or_too_few_is_refused(name: str, length: int, scratch: Path) -> None:
    message = refusal_of(scratch, name, np.zeros(length, np.uint8))

    assert message.endswith(f"{LENGTH[name]}, got {length}.")


@label_names
@fuzzed
@given(label=st.one_of(st.integers(-(2**63), -1), st.integers(3, 2**63 - 1)), data_=st.data())
def test_a_label_outside_the_classes_is_refused(
    name: str, label: int, data_: st.DataObject, scratch: Path
) -> None:
    labels = three_classes()[name].astype(np.int64)
    labels[data_.draw(st.integers(0, len(labels) - 1))] = label

    message = refusal_of(scratch, name, labels)

    assert "must lie in [0, 2], the classes" in message


def test_a_test_label_that_no_training_image_has_is_refused(tmp_path: Path) -> None:
    labels = np.full(30, 10)
    path = write_npz(tmp_path, small_arrays() | {"y_test": labels})

    message = refusal(npz_config(path))

    assert message == f"{path}: y_test must lie in [0, 9], the classes, got [10, 10]."


@fuzzed
@given(
    size=hnp.array_shapes(min_dims=2, max_dims=2, max_side=9).filter(lambda size: size != (6, 5))
)
def test_test_images_of_another_size_are_refused(size: tuple[int, int], scratch: Path) -> None:
    message = refusal_of(scratch, "x_test", np.zeros((30, *size), np.uint8))

    assert message.endswith(f"the image size of x_train, (6, 5), got {size}.")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_array_is_named(name: str, tmp_path: Path) -> None:
    arrays = small_arrays()
    del arrays[name]

    message = refusal(npz_config(write_npz(tmp_path, arrays)))

    assert f"missing: {name}." in message


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", NAMES)
def test_pickled_objects_are_refused_and_not_run(name: str, tmp_path: Path) -> None:
    proof = tmp_path / "was_run"
    objects = np.array([Bomb(proof)] * LENGTH[name], dtype=object)
    path = write_npz(tmp_path, small_arrays() | {name: objects})

    message = refusal(npz_config(path))

    assert name in message
    assert not proof.exists()


def write_member(path: Path, name: str, content: bytes) -> Path:
    """An archive in which the member of one array is `content`."""
    arrays = small_arrays()
    with zipfile.ZipFile(path, "w") as archive:
        for other in NAMES:
            stream = io.BytesIO()
            np.save(stream, arrays[other])
            archive.writestr(f"{other}.npy", {name: content}.get(other, stream.getvalue()))
    return path


LONG_HEADER = b"\x93NUMPY\x01\x00" + struct.pack("<H", 20_000) + b" " * 20_000


@pytest.mark.parametrize("content", [b"", b"hello", b"\x93NUMPY\x01\x00", LONG_HEADER])
@pytest.mark.parametrize("name", NAMES)
def test_a_member_that_is_no_array_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    path = write_member(tmp_path / "mine.npz", name, content)

    message = refusal(npz_config(path))

    assert str(path) in message
    assert name in message


def save_one_array(path: Path) -> None:
    np.save(path, np.zeros(3))


def save_text(path: Path) -> None:
    path.write_text("5,0,0,255\n4,0,12,255\n")


def save_an_archive_of_something_else(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing to see")


@pytest.mark.parametrize("save", [save_one_array, save_text, save_an_archive_of_something_else])
def test_a_file_of_another_kind_is_refused_by_name(
    save: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "mine.npy"
    save(path)

    message = refusal(npz_config(path))

    assert str(path) in message
