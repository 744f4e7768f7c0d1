"""Files that are not what they should be: read, or refused in one line, and never changed."""

import functools
import gzip
import io
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from pipeline.arrays import Frame, Labels, Stored, find_images, find_labels, fit
from pipeline.compose import CONF, explain, to_config
from pipeline.config import DataConfig
from pipeline.data import load
from pipeline.pictures import Style, check_picture, prepare
from pipeline.predict import Predicted
from tests.commands import content_of, fuzzed

Array = npt.NDArray[Any]

NAMES = ("x_train", "y_train", "x_test", "y_test")
IDX_FILES = dict(
    zip(
        NAMES,
        (
            "train-images-idx3-ubyte",
            "train-labels-idx1-ubyte",
            "t10k-images-idx3-ubyte",
            "t10k-labels-idx1-ubyte",
        ),
        strict=True,
    )
)
DIGESTS = ["0" * 64] * 4  # of no array: the refusal then tells the digest of what is there
FRAME = Frame(height=4, width=3, dtype=np.dtype(np.uint8), pixel_max=255.0)
STYLE = Style(box=20, centre=(14.0, 14.0), dark_on_light=False)

GOOD: dict[str, Array] = {
    "x_train": np.arange(240, dtype=np.uint8).reshape(20, 4, 3),
    "y_train": np.arange(20, dtype=np.uint8) % 2,
    "x_test": np.arange(48, dtype=np.uint8).reshape(4, 4, 3),
    "y_test": np.arange(4, dtype=np.uint8) % 2,
}


# --- what is odd about them --------------------------------------------------------------

DTYPES = st.one_of(
    hnp.scalar_dtypes(),
    hnp.unicode_string_dtypes(),
    hnp.byte_string_dtypes(),
    hnp.array_dtypes(max_size=2),
    st.sampled_from([np.dtype(object), np.dtype(np.longdouble), np.dtype("V0"), np.dtype("U0")]),
)
SHAPES = st.one_of(
    st.sampled_from([(20, 4, 3), (20,), (4, 4, 3), (4,), (), (0,), (20, 0, 3), (0, 4, 3)]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
)


@st.composite
def odd_arrays(draw: st.DrawFn) -> Array:
    dtype, shape = draw(DTYPES), draw(SHAPES)
    if dtype.hasobject or dtype.itemsize == 0:
        return np.zeros(shape, dtype)
    content = draw(st.binary(min_size=dtype.itemsize, max_size=64))
    size = int(np.prod(shape)) * dtype.itemsize
    repeated = (content * (size // len(content) + 1))[:size]
    return np.frombuffer(repeated, dtype).reshape(shape)


WHOLE = st.one_of(
    st.integers(-2, 20),
    st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**400]),
)
DESCRIPTIONS = st.sampled_from(
    ["|u1", "<u1", "<f8", ">f4", "|O", "|V0", "<U0", "|b1", "", "x", "<M8[s]", "<f16", "(2,)<u1"]
).map(repr) | st.sampled_from(["[('a', '<u1')]", "None", "1", "'<u1', 'x'", "[]", "()"])
HEADERS = st.one_of(
    st.builds(
        lambda kind, order, shape: (
            f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': ({', '.join(shape)},), }}"
        ),
        DESCRIPTIONS,
        st.sampled_from(["False", "True", "0", "None"]),
        st.lists(WHOLE.map(str) | st.sampled_from(["True", "1.5", "4L", "'a'"]), max_size=4),
    ),
    st.sampled_from(
        ["", "{", "{}", "()", "1", "{'descr': '|u1'}", "(" * 300, "\xe9", "__import__"]
    ),
)


def member(header: str, version: int = 1, content: bytes = b"\x01" * 240) -> bytes:
    """An array in NumPy's format with whatever header."""
    text = header.encode("latin1") + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + content


def saved(array: Array) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():  # of names that older versions of NumPy cannot read
        warnings.simplefilter("ignore")
        np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


MEMBERS = st.one_of(
    odd_arrays().map(saved),
    st.builds(member, HEADERS, st.sampled_from([1, 2, 3, 4, 0]), st.binary(max_size=300)),
    st.builds(lambda name: saved(GOOD[name]), st.sampled_from(NAMES)),
    st.binary(max_size=40),
)


def archive(members: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", kind) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return stream.getvalue()


def idx(array: Array) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 0x08, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Some bytes flipped, put in or left out, the end cut off; or nothing of all that."""
    found = bytearray(content)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, max(len(found) - 1, 0)))
        match draw(st.sampled_from(["flip", "flip", "insert", "cut", "zero"])):
            case "flip" if found:
                found[place] ^= draw(st.integers(1, 255))
            case "insert":
                found[place:place] = draw(st.binary(max_size=4))
            case "cut":
                del found[place:]
            case "zero":
                found[place : place + 8] = bytes(8)
    return bytes(found)


ARCHIVES = st.builds(
    lambda odd, kind: archive({name: saved(array) for name, array in GOOD.items()} | odd, kind),
    st.dictionaries(st.sampled_from(NAMES), MEMBERS, max_size=2),
    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
).flatmap(damaged)
IDX_HEADERS = st.builds(
    lambda code, sizes, content: (
        struct.pack(">HBB", 0, code, len(sizes)) + struct.pack(f">{len(sizes)}I", *sizes) + content
    ),
    st.sampled_from([0x08, 0x09, 0x0B, 0x0C, 0x0D, 0x0E, 0x00, 0xFF]),
    st.lists(st.integers(0, 5) | st.sampled_from([20, 2**32 - 1]), max_size=4),
    st.binary(max_size=100),
)
IDX_CONTENTS = st.one_of(
    IDX_HEADERS,
    st.sampled_from([idx(array) for array in GOOD.values()]).flatmap(damaged),
    st.binary(max_size=20),
)
IDX_FOLDERS = st.dictionaries(st.sampled_from(NAMES), IDX_CONTENTS | st.none(), max_size=2)
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "sha256": st.just(DIGESTS),
        "pixel_max": st.floats(0, 2**32, exclude_min=True) | st.just(1.0),
        "class_names": st.lists(st.sampled_from(["a", "", "\x1b[31m"]), min_size=1, max_size=4),
        "train_size": st.integers(1, 30) | st.just(10**400),
        "validation_size": st.integers(0, 30)
        | st.floats(0, 1, exclude_max=True)
        | st.just(10**400),
        "split_seed": st.integers(0, 2**32 - 1),
    },
)


# --- the properties ----------------------------------------------------------------------


@functools.cache
def configured() -> DataConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return to_config(compose("run", ["data=npz", "data.path=below"])).data


def empty(folder: Path) -> Path:
    for path in folder.iterdir():
        path.unlink()
    return folder


def outcome(act: Callable[[], object], *names: str) -> object:
    """What comes out, or the one line that refuses it and has one of the names; no warnings."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            found = act()
        except (ValueError, OSError) as error:
            found = explain(error)
            assert len(found.splitlines()) == 1
            assert found.isprintable()
            assert any(name in found for name in names)
    assert [str(warning.message) for warning in warned] == []
    return found


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def with_member(name: str, content: bytes) -> bytes:
    return archive({each: saved(array) for each, array in GOOD.items()} | {name: content})


@fuzzed(100)
@given(content=ARCHIVES, changes=CHANGES)
@example(content=with_member("x", b""), changes={"train_size": 10**400})
@example(content=with_member("x", b""), changes={"validation_size": 10**400})
@example(content=with_member("y_test", member("{'shape': (4L,)}")), changes={})
@example(
    content=with_member(
        "y_train", member(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({10**30},)}}")
    ),
    changes={},
)
def test_an_odd_archive_is_read_or_refused_by_name_and_stays_as_it_is(
    content: bytes, changes: dict[str, Any], scratch: Path
) -> None:
    path = empty(scratch) / "mine.npz"
    path.write_bytes(content)
    config = replace(configured(), path=str(path), **changes)

    outcome(lambda: load(config), "mine.npz", "data.")

    assert path.read_bytes() == content
    assert [*scratch.iterdir()] == [path]


@fuzzed(100)
@given(odd=IDX_FOLDERS, changes=CHANGES, is_packed=st.booleans())
@example(odd={"y_test": b""}, changes={}, is_packed=False)
@example(odd={"x_train": b"\x00\x00\x0c\x00N"}, changes={}, is_packed=True)
@example(odd={"x_train": b"", "y_test": None}, changes={"sha256": DIGESTS}, is_packed=False)
def test_odd_idx_files_are_read_or_refused_by_name_and_stay_as_they_are(
    odd: dict[str, bytes | None], changes: dict[str, Any], is_packed: bool, scratch: Path
) -> None:
    folder = empty(scratch)
    for name, good in GOOD.items():
        content = odd.get(name, idx(good))
        if content is not None:
            path = folder / f"{IDX_FILES[name]}{'.gz' if is_packed else ''}"
            path.write_bytes(gzip.compress(content, 1) if is_packed else content)
    before = content_of(folder)
    config = replace(configured(), path=str(folder), **changes)

    outcome(lambda: load(config), "ubyte", *NAMES, "data.")

    assert content_of(folder) == before


@fuzzed(150)
@given(
    content=st.dictionaries(
        st.sampled_from(["x_train", "y_train", "images", "labels", "a\x1b[31mb", "x"]),
        MEMBERS,
        min_size=1,
        max_size=3,
    )
    .map(archive)
    .flatmap(damaged),
    array=st.sampled_from([None, None, "x", "x_train", "nosuch"]),
    size=st.integers(1, 30),
)
def test_odd_images_to_predict_are_read_or_refused_by_name_and_stay_as_they_are(
    content: bytes, array: str | None, size: int, scratch: Path
) -> None:
    path = empty(scratch) / "mine.npz"
    path.write_bytes(content)

    def read() -> object:
        images = find_images(path, array)
        len(images)
        factor = fit(images, FRAME, size)
        find_labels(images, 10)
        return [FRAME.pixels(batch, factor) for batch in images.batches(size)]

    outcome(read, "mine.npz")

    assert path.read_bytes() == content


def header(shape: str) -> bytes:
    return member(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}")


@pytest.mark.parametrize("shape", [f"({2**70}, 4, 3)", "(-1, 4, 3)", f"(1, {2**62}, {2**62})"])
def test_images_whose_number_no_memory_holds_are_refused_by_the_name_of_their_file(
    shape: str, scratch: Path
) -> None:
    path = empty(scratch) / "mine.npz"
    path.write_bytes(archive({"images": header(shape)}))

    with pytest.raises(ValueError, match=r"mine\.npz cannot be read: its header has the shape"):
        find_images(path)


def named_pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return str(folder / "pipe")


@pytest.mark.parametrize("sha256", [None, DIGESTS])
@pytest.mark.parametrize(
    "place",
    [
        named_pipe,
        lambda folder: "~nobody-of-that-name/mine.npz",
        lambda folder: f"{folder}/a\0b.npz",
        lambda folder: f"{folder}/{'a' * 300}",
        lambda folder: "/dev/zero",
    ],
    ids=["pipe", "home of nobody", "NUL", "long", "device"],
)
def test_a_path_that_leads_to_nothing_to_read_is_named_in_one_line_at_once(
    place: Callable[[Path], str], sha256: list[str] | None, tmp_path: Path
) -> None:
    path = place(tmp_path)
    config = replace(configured(), path=path, sha256=sha256)

    found = outcome(lambda: load(config), path.replace("\0", "\\x00"))

    assert isinstance(found, str)


def test_a_file_whose_name_is_no_text_has_one_that_can_be_printed() -> None:
    images = Stored(
        path=Path("\udcff.npz"), name="images", shape=(1, 4, 3), dtype=np.dtype(np.uint8)
    )
    predicted = Predicted(
        given=images, probabilities=np.ones((1, 1), np.float32), labels=Labels(), note="", seconds=1
    )

    assert str(images).encode() == b"\\udcff.npz: images"
    assert predicted.file.encode() == b"\\udcff.npz"


# --- pictures ----------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(width: int, height: int, depth: int, colour: int, pixels: bytes) -> bytes:
    """A PNG file that says of itself whatever it likes."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(pixels))
        + chunk(b"IEND", b"")
    )


SIDES = st.integers(1, 40) | st.sampled_from([1, 2, 3, 300])


@st.composite
def pictures(draw: st.DrawFn) -> bytes:
    mode = draw(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"]))
    width, height = draw(SIDES), draw(SIDES)
    kinds = {"CMYK": ["JPEG", "TIFF"], "L": ["PNG", "JPEG", "GIF", "BMP"], "RGB": ["PNG", "JPEG"]}
    kind = draw(st.sampled_from(kinds.get(mode, ["PNG"])))
    pattern = draw(st.binary(min_size=1, max_size=64))
    size = 8 * width * height
    stream = io.BytesIO()
    picture = (
        Image.frombytes(mode, (width, height), (pattern * (size // len(pattern) + 1))[:size])
        if mode != "1"
        else Image.new("1", (width, height), draw(st.integers(0, 1)))
    )
    options: dict[str, Any] = {}
    if kind in ("PNG", "JPEG") and draw(st.booleans()):
        exif = Image.Exif()
        exif[0x0112] = draw(st.integers(0, 65_535))
        options["exif"] = exif
    if mode in ("P", "L") and kind == "PNG" and draw(st.booleans()):
        options["transparency"] = (
            draw(st.binary(min_size=1, max_size=3) | st.just(1)) if mode == "P" else 1
        )
    picture.save(stream, kind, **options)
    return stream.getvalue()


def photo(exif: bytes) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (9, 9)).save(stream, "JPEG", exif=b"Exif\0\0" + exif)
    return stream.getvalue()


# One tag, the orientation, that has 4,096 values in a file of a few hundred bytes.
LONG_TAG = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\x10\0\0\0\0\0"
PICTURES = st.one_of(
    pictures(),
    pictures().flatmap(damaged),
    st.builds(
        png,
        st.integers(0, 9) | st.sampled_from([20_000, 2**31 - 1, 2**32 - 1]),
        st.integers(0, 9) | st.sampled_from([20_000, 2**31 - 1]),
        st.sampled_from([1, 2, 4, 8, 16, 3]),
        st.sampled_from([0, 2, 3, 4, 6, 1]),
        st.binary(max_size=99),
    ),
    st.binary(max_size=20).map(b"\x89PNG\r\n\x1a\n".__add__),
    st.binary(max_size=20).map(b"\xff\xd8\xff".__add__),
    st.binary(max_size=20),
)


@fuzzed(150)
@given(content=PICTURES, side=st.sampled_from([1, 8, 28]))
@example(content=photo(LONG_TAG), side=8)
def test_an_odd_picture_is_prepared_or_refused_by_name_and_stays_as_it_is(
    content: bytes, side: int, scratch: Path
) -> None:
    path = empty(scratch) / "mine.png"
    path.write_bytes(content)
    frame = replace(FRAME, height=side, width=side)

    def read() -> object:
        check_picture(path)
        return prepare(path, frame, STYLE)

    found = outcome(read, "mine.png")

    assert isinstance(found, str) or found.pixels.shape == (side, side)  # type: ignore[attr-defined]
    assert path.read_bytes() == content
