"""Images in `.npz` files: which array is meant, read in batches, checked against the model."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.arrays import Frame, find_images, find_labels, fit

FRAME = Frame(height=8, width=8, dtype=np.dtype("uint8"), pixel_max=16.0)
Array = npt.NDArray[Any]
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes arrays into a file."""

    def save(**arrays: npt.ArrayLike) -> Path:
        path = tmp_path / "images.npz"
        np.savez_compressed(path, allow_pickle=True, **arrays)
        return path

    return save


def images_of(count: int, *, height: int = 8, dtype: str = "uint8") -> Array:
    draw = np.random.default_rng(count)
    return draw.integers(0, 17, (count, height, 8)).astype(dtype)


# --- which array -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images", "x", "x_test", "anything"])
def test_the_images_are_found_by_name_or_as_the_only_ones(save: Save, name: str) -> None:
    path = save(**{name: images_of(3)}, labels=np.arange(3), weights=np.ones((2, 2)))

    assert find_images(path).name == name


def test_a_usual_name_goes_before_another_array_of_images(save: Save) -> None:
    path = save(masks=images_of(3), images=images_of(3))

    assert find_images(path).name == "images"


def test_an_array_that_is_named_is_taken(save: Save) -> None:
    path = save(x_train=images_of(4), x_test=images_of(3))

    assert len(find_images(path, "x_train")) == 4


@pytest.mark.parametrize(
    ("arrays", "array", "message"),
    [
        (["x_train", "x_test"], None, r"holds x_train and x_test: set array= to one of them\.$"),
        (["one", "other"], None, r"several arrays of images: set array= to one of one, other\.$"),
        (["one"], "other", r"^array=other: .*images\.npz holds one \[3, 8, 8\]\.$"),
        ([], None, r"must hold images \[n, height, width\], but holds labels \[3\]\.$"),
    ],
)
def test_a_choice_that_is_not_clear_is_told_in_one_line(
    save: Save, arrays: list[str], array: str | None, message: str
) -> None:
    labels = {} if array or arrays else {"labels": np.arange(3)}
    path = save(**{name: images_of(3) for name in arrays}, **labels)

    with pytest.raises(ValueError, match=message):
        find_images(path, array)


# --- batches -----------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(count=st.integers(1, 40), size=st.integers(1, 50), order=st.sampled_from("CF"))
def test_batches_are_the_array_in_its_order(
    tmp_path: Path, count: int, size: int, order: str
) -> None:
    whole = images_of(count, dtype=">i4")
    np.savez(tmp_path / "a.npz", images=np.asarray(whole, order="F" if order == "F" else "C"))

    batches = list(find_images(tmp_path / "a.npz").batches(size))

    assert {len(batch) for batch in batches[:-1]} <= {size}
    assert 0 < len(batches[-1]) <= size
    np.testing.assert_array_equal(np.concatenate(batches), whole)


def test_a_large_array_is_not_read_into_memory(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((100_000, 28, 28), np.uint8))
    stored = find_images(tmp_path / "a.npz")

    tracemalloc.start()
    seen = sum(len(batch) for batch in stored.batches(1_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert seen == 100_000
    assert peak < 10 * 2**20  # of 75 MiB


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_file_that_is_cut_short_is_told_in_one_line(save: Save, share: float) -> None:
    path = save(images=images_of(50))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])

    with pytest.raises(ValueError, match=r"images\.npz cannot be read: .*\.$"):
        find_images(path)


def test_a_damaged_array_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, images=images_of(50))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

    with pytest.raises(ValueError, match=r"cannot be read: Bad CRC-32 for file 'images\.npy'\.$"):
        list(find_images(path).batches(7))


# --- fitting the model -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", ">f8", "float16"])
def test_images_of_any_type_of_number_become_the_model_s(save: Save, dtype: str) -> None:
    whole = images_of(5)
    stored = find_images(save(images=whole.astype(dtype)))

    factor = fit(stored, FRAME, 2)
    pixels = np.concatenate([FRAME.pixels(batch, factor) for batch in stored.batches(2)])

    assert factor == 1
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, whole)


def test_images_scaled_to_1_are_scaled_back_exactly(save: Save) -> None:
    whole = images_of(5)
    stored = find_images(save(images=whole.astype(np.float32) / 16))

    factor = fit(stored, FRAME, 2)
    pixels = np.concatenate([FRAME.pixels(batch, factor) for batch in stored.batches(2)])

    assert factor == 16
    np.testing.assert_array_equal(pixels, whole)


def test_images_are_not_scaled_for_a_model_that_takes_them_scaled(save: Save) -> None:
    frame = Frame(height=8, width=8, dtype=np.dtype("float32"), pixel_max=1.0)

    assert fit(find_images(save(images=images_of(5) / 16)), frame, 2) == 1


def changed(value: float) -> Array:
    images = images_of(5).astype(np.float32)
    images[4, 7, 7] = value
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (images_of(5, height=9), r"images must have shape \[n, 8, 8\], got \[5, 9, 8\]\.$"),
        (images_of(5)[..., None], r"images must have shape \[n, 8, 8\], got \[5, 8, 8, 1\]\.$"),
        (images_of(0), r"images must have shape \[n, 8, 8\], got \[0, 8, 8\]\.$"),
        (np.float32(3), r"images must have shape \[n, 8, 8\], got \[\]\.$"),
        (images_of(5) > 8, r"images must hold numbers, got bool\.$"),
        (images_of(5).astype(object), r"images must hold numbers, got object\.$"),
        (images_of(5).astype(complex), r"images must hold numbers, got complex128\.$"),
        (changed(17), r"must lie in \[0, 16\], as the model was trained, got \[0, 17\]\.$"),
        (changed(-1), r"must lie in \[0, 16\], as the model was trained, got \[-1, 16\]\.$"),
        (changed(np.nan), r"must lie in \[0, 16\], as the model was trained, got \[nan, nan\]\.$"),
        (changed(np.inf), r"must lie in \[0, 16\], as the model was trained, got \[0, inf\]\.$"),
    ],
)
def test_images_that_do_not_fit_the_model_are_refused(
    save: Save, images: npt.ArrayLike, message: str
) -> None:
    stored = find_images(save(images=images), "images")

    with pytest.raises(ValueError, match=message):
        fit(stored, FRAME, 2)


# --- labels ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "labels"), [("images", "labels"), ("x", "y"), ("x_train", "y_train")]
)
def test_labels_are_found_beside_the_images(save: Save, images: str, labels: str) -> None:
    stored = find_images(save(**{images: images_of(3), labels: np.array([1, 0, 9], np.uint8)}))

    found = find_labels(stored, 10)

    assert found.values is not None
    assert (found.values.tolist(), found.note) == ([1, 0, 9], "")


def test_images_without_labels_have_none(save: Save) -> None:
    found = find_labels(find_images(save(images=images_of(3))), 10)

    assert (found.values, found.note) == (None, "")


def test_the_labels_of_test_images_are_left_alone(save: Save) -> None:
    found = find_labels(find_images(save(x_test=images_of(3), y_test=np.arange(3))), 10)

    assert found.values is None
    assert found.note.startswith("its labels are not read: looks at a test split are counted")


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        (np.arange(2), "labels must be integers of shape [3], got int64 [2]: unused"),
        (np.ones(3), "labels must be integers of shape [3], got float64 [3]: unused"),
        (np.array([0, 1, 10]), "labels must lie in [0, 9], got [0, 10]: unused"),
        (np.array([-1, 1, 2]), "labels must lie in [0, 9], got [-1, 2]: unused"),
    ],
)
def test_labels_that_cannot_be_compared_are_told(save: Save, labels: Array, note: str) -> None:
    found = find_labels(find_images(save(images=images_of(3), labels=labels)), 10)

    assert (found.values, found.note) == (None, note)
