"""Distortions are what they say, of images of any size and dtype, and repeat themselves."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline import augmentation
from pipeline.augmentation import Distortion, _interpolate, _smooth_modes
from pipeline.config import AugmentationConfig

pytestmark = pytest.mark.usefixtures("tensorflow")

NONE = {"rotation": 0.0, "shift": 0.0, "scale": 0.0, "shear": 0.0, "elastic": 0.0}
SIZES = [(8, 8), (28, 28), (5, 9)]


def distortion(size: tuple[int, ...] = (28, 28), **amounts: Any) -> Distortion:
    return Distortion(AugmentationConfig(**{**NONE, "elastic_sigma": 0.14, **amounts}), size)


def pixels(count: int, height: int, width: int, dtype: str = "uint8") -> npt.NDArray[Any]:
    drawn = np.random.default_rng(0).integers(0, 256, (count, height, width))
    return drawn.astype(dtype)


ALL: dict[str, Any] = {"rotation": 15.0, "shift": 0.1, "scale": 0.2, "shear": 10.0, "elastic": 0.05}


# --- what comes out ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("size", [*SIZES, (1, 1), (1, 7), (2, 2)])
def test_images_keep_their_shape_and_dtype_and_their_range(
    size: tuple[int, int], dtype: str
) -> None:
    images = pixels(5, *size, dtype)

    distorted = np.asarray(distortion(size, **ALL)(images, (0,)))

    assert (distorted.shape, distorted.dtype) == (images.shape, images.dtype)
    assert images.min() <= distorted.min() <= distorted.max() <= images.max()


@pytest.mark.parametrize("size", SIZES)
def test_no_amount_leaves_the_images_as_they_are(size: tuple[int, int]) -> None:
    images = pixels(5, *size)

    np.testing.assert_array_equal(distortion(size)(images, (0,)), images)


@pytest.mark.parametrize("name", ALL)
def test_each_amount_alone_changes_images(name: str) -> None:
    images = pixels(5, 28, 28)

    distorted = np.asarray(distortion(**{name: ALL[name]})(images, (0,)))

    assert (distorted != images).any(axis=(1, 2)).all()


def test_an_equal_key_distorts_equally_and_any_other_otherwise() -> None:
    images, distort = pixels(3, 28, 28), distortion(**ALL)

    keys = [(1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0), (2**32 - 1, 2, 3)]
    drawn = [np.asarray(distort(images, key)).tobytes() for key in [*keys, keys[0]]]

    assert drawn[0] == drawn[-1]
    assert len(set(drawn)) == len(keys)


def test_equal_images_are_distorted_each_in_its_own_way() -> None:
    images = np.repeat(pixels(1, 28, 28), 20, axis=0)

    distorted = np.asarray(distortion(**ALL)(images, (0,)))

    assert len({image.tobytes() for image in distorted}) == 20


@pytest.mark.parametrize("background", [0, 255])
def test_the_background_comes_in_from_outside(background: int) -> None:
    images = np.full((4, 28, 28), background, np.uint8)
    images[:, 10:18, 10:18] = 128

    distorted = np.asarray(distortion(shift=0.2, scale=0.3)(images, (0,)))

    assert (distorted[:, [0, -1]] == background).all()
    assert (distorted[:, :, [0, -1]] == background).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), height=st.integers(1, 12), width=st.integers(1, 12))
def test_pixels_are_interpolated_as_by_scipy(seed: int, height: int, width: int) -> None:
    draw = np.random.default_rng(seed)
    image = draw.normal(size=(height, width)).astype(np.float32)
    sources = draw.uniform(-3, 15, (2, height, width)).astype(np.float32)

    ours = _interpolate(image[None], sources[None])[0]

    theirs = ndimage.map_coordinates(image, sources, order=1, mode="nearest")
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_whole_numbers_are_rounded() -> None:
    image = np.array([[[0, 3]]], np.uint8)
    between = np.array([[[[0.0, 0.0]], [[0.5, 0.2]]]], np.float32)

    ours = _interpolate(image, between)

    assert np.asarray(ours).tolist() == [[[2, 1]]]


# --- affine maps -------------------------------------------------------------------------


def mapped(image: npt.NDArray[Any], draw: list[float], **amounts: float) -> npt.NDArray[Any]:
    """An image by the affine map of one draw."""
    distort = distortion(image.shape, **amounts)
    maps = distort._affine_maps(tf.constant([draw], tf.float32)[0][:, None])
    (mapped,) = np.asarray(_interpolate(image[None], distort._sources(maps)))
    return np.asarray(mapped)


def test_a_rotation_by_90_degrees_turns_the_image() -> None:
    image = pixels(1, 9, 9)[0]

    turned = [mapped(image, [sign, 0, 0, 0, 0, 0], rotation=90) for sign in (1, -1)]

    np.testing.assert_array_equal(turned[0], np.rot90(image, -1))
    np.testing.assert_array_equal(turned[1], np.rot90(image, 1))


@pytest.mark.parametrize("size", [(10, 10), (10, 20)])
def test_a_shift_is_a_fraction_of_each_side(size: tuple[int, int]) -> None:
    image = pixels(1, *size)[0]

    shifted = mapped(image, [0, 0, 1, -1, 0, 0], shift=0.2)

    rows, columns = 2, size[1] // 5
    np.testing.assert_array_equal(shifted[:-rows, columns:], image[rows:, :-columns])


def test_a_scale_is_of_each_axis_around_the_middle() -> None:
    image = np.add.outer(100.0 * np.arange(5), np.arange(5)).astype(np.float32)

    scaled = mapped(image, [0, 0, 0, 0, 1, -1], scale=0.5)  # 1.5 times as high, half as wide

    rows, columns = 2 + (np.arange(5) - 2) / 1.5, np.clip(2 + (np.arange(5) - 2) / 0.5, 0, 4)
    np.testing.assert_allclose(scaled, np.add.outer(100 * rows, columns), atol=1e-4)


def test_a_shear_of_45_degrees_moves_each_row_by_one_more_pixel() -> None:
    image = pixels(1, 5, 5)[0]

    slanted = mapped(image, [0, 1, 0, 0, 0, 0], shear=45)

    for row in range(5):
        sources = np.clip(np.arange(5) + row - 2, 0, 4)
        np.testing.assert_array_equal(slanted[row], image[row, sources])


def test_an_image_is_scaled_then_turned_then_slanted() -> None:
    image = np.add.outer(100.0 * np.arange(9), np.arange(9)).astype(np.float32)

    whole = mapped(image, [1, 1, 0, 0, 1, 0], rotation=90, shear=45, scale=0.5)

    # A pixel (y, x) of the middle comes from the row x + y, divided by 1.5, and the column -y.
    y, x = np.mgrid[-1:2, -1:2]
    expected = 100 * (4 - (x + y) / 1.5) + (4 + y)
    np.testing.assert_allclose(whole[3:6, 3:6], expected, atol=1e-3)


def test_draws_fill_the_range_to_both_sides() -> None:
    distort = distortion((28, 28), shift=0.1)
    images = np.tile(np.arange(28, dtype=np.float32), (4_000, 28, 1))

    middle = np.asarray(distort(images, (0,)))[:, 14, 14] - 14

    assert middle.min() == pytest.approx(-2.8, abs=0.02)
    assert middle.max() == pytest.approx(2.8, abs=0.02)
    assert np.std(middle) == pytest.approx(2.8 / math.sqrt(3), rel=0.05)


# --- elastic fields ----------------------------------------------------------------------


@pytest.mark.parametrize(("size", "sigma"), [((28, 28), 0.14), ((8, 8), 0.14), ((12, 20), 0.05)])
def test_fields_are_distributed_as_white_noise_smoothed_by_a_gaussian(
    size: tuple[int, int], sigma: float
) -> None:
    height, width = size
    modes = _smooth_modes(size, sigma).reshape(-1, height * width)

    impulses: npt.NDArray[np.float64] = np.eye(height * width).reshape(-1, height, width)
    for axis, side in enumerate(size, start=1):
        impulses = ndimage.gaussian_filter1d(
            impulses, sigma * side, axis, mode="constant", truncate=30
        )
    smoothed = impulses.reshape(height * width, -1)
    expected = smoothed.T @ smoothed
    expected /= np.trace(expected) / (height * width)
    np.testing.assert_allclose(modes.T @ modes, expected, atol=1e-3)


def test_smooth_fields_need_far_fewer_numbers_than_pixels() -> None:
    assert len(_smooth_modes((28, 28), 0.14)) < 28 * 28 / 10


@pytest.mark.parametrize("size", [(28, 28), (10, 20)])
def test_a_pixel_is_shifted_by_the_amount_in_the_root_mean_square(size: tuple[int, int]) -> None:
    height, width = size
    distort = distortion(size, elastic=0.05)
    across = np.tile(np.arange(width, dtype=np.float32), (2_000, height, 1))

    shift = np.asarray(distort(across, (0,))) - across

    inside = shift[:, :, width // 4 : -width // 4]  # the edge cuts none off
    modes = _smooth_modes(size, 0.14)
    strength = np.square(modes).sum(0)[:, width // 4 : -width // 4].mean()
    assert np.square(inside).mean() == pytest.approx(strength * (0.05 * width) ** 2, rel=0.1)


def test_large_images_are_distorted_a_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    images, distort = pixels(7, 28, 28), distortion(**ALL)
    whole = np.asarray(distort(images, (0,)))
    monkeypatch.setattr(augmentation, "_PIXELS", 3 * 28 * 28 + 1)

    np.testing.assert_array_equal(distort(images, (0,)), whole)


def test_numbers_of_images_are_compiled_for_powers_of_two() -> None:
    distort = distortion((9, 11), **ALL)
    before = _interpolate.experimental_get_tracing_count()

    for count in (129, 130, 200, 256, 140):
        assert len(distort(pixels(count, 9, 11), (0,))) == count

    assert _interpolate.experimental_get_tracing_count() == before + 1


def test_fields_of_the_smallest_images_are_whole() -> None:
    modes = _smooth_modes((2, 2), 0.05)

    np.testing.assert_allclose(np.square(modes).sum(0), 1, rtol=1e-4)


def test_images_of_a_camera_have_fields_too() -> None:
    images = pixels(2, 300, 400)

    distorted = np.asarray(distortion((300, 400), elastic=0.05)(images, (0,)))

    assert (distorted != images).mean() > 0.9


def test_the_fields_of_both_axes_differ() -> None:
    ramp = np.tile(np.arange(28, dtype=np.float32), (500, 28, 1))
    distort = distortion(elastic=0.03)

    across = np.asarray(distort(ramp, (0,)) - ramp)[:, 14, 14]
    down = np.asarray(distort(ramp.transpose(0, 2, 1), (0,)) - ramp.transpose(0, 2, 1))[:, 14, 14]

    assert abs(np.corrcoef(across, down)[0, 1]) < 0.15
