"""Pictures of digits, made into what MNIST's digits and scikit-learn's are like."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits

from pipeline.arrays import Frame
from pipeline.pictures import Style, check_picture, find_ink, place, prepare, style_of

Array = npt.NDArray[Any]

MNIST = Frame(height=28, width=28, dtype=np.dtype("uint8"), pixel_max=255.0)
MNIST_STYLE = Style(box=20, centre=(14.0, 14.0), dark_on_light=False)
SMALL = Frame(height=8, width=8, dtype=np.dtype("uint8"), pixel_max=16.0)
DIGITS = (load_digits().images * 255 / 16).astype(np.uint8)


def enlarged(digit: int, side: int) -> Array:
    """A real digit, light on dark."""
    picture = Image.fromarray(DIGITS[digit]).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def saved(picture: Image.Image | Array, path: Path, **options: Any) -> Path:
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(path, **options)
    return path


def nine() -> Array:
    return np.pad(enlarged(9, 100), 30)


def mean_difference(one: Array, other: Array) -> float:
    """Of 255."""
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


# --- the style of a model ----------------------------------------------------------------


def test_the_digits_of_mnist_fill_20_of_28_pixels(mnist_npz: Path) -> None:
    with np.load(mnist_npz) as arrays:
        images = arrays["x_train"][:5]

    assert style_of(images, MNIST) == MNIST_STYLE


def test_the_digits_of_scikit_learn_fill_their_height() -> None:
    style = style_of(load_digits().images[:5], SMALL)

    assert (style.box, style.dark_on_light) == (8, False)


def test_a_model_of_dark_digits_on_light_gets_such(tmp_path: Path) -> None:
    style = style_of(16 - load_digits().images[:5], SMALL)

    prepared = prepare(saved(nine(), tmp_path / "9.png"), SMALL, style)

    assert style.dark_on_light
    assert set(prepared.pixels.flat) <= set(range(17))
    assert prepared.pixels[0, 0] == 16
    assert "light on dark: inverted" in prepared.note


def test_an_empty_example_shows_no_style() -> None:
    with pytest.raises(ValueError, match=r"input example is empty"):
        style_of(np.zeros((5, 8, 8)), SMALL)


# --- any picture -------------------------------------------------------------------------


@st.composite
def pictures(draw: st.DrawFn) -> Array:
    """A digit of any size, anywhere in a picture, light on dark."""
    digit = enlarged(draw(st.integers(0, 1796)), draw(st.integers(8, 120)))
    margins = st.integers(1, 60)
    return np.pad(digit, ((draw(margins), draw(margins)), (draw(margins), draw(margins))))


@settings(deadline=None, max_examples=50)
@given(picture=pictures())
def test_a_digit_of_any_size_anywhere_becomes_an_image_like_mnist_s(picture: Array) -> None:
    ink, _ = find_ink(picture.astype(np.float32))

    image = place(ink, MNIST, MNIST_STYLE)

    rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
    assert image.shape == (28, 28)
    assert (image.min(), image.max()) == (0, 1)
    assert 18 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 20
    assert ndimage.center_of_mass(image) == pytest.approx((14, 14), abs=0.75)


@settings(deadline=None, max_examples=50)
@given(picture=pictures())
def test_dark_on_light_is_the_same_digit_as_light_on_dark(picture: Array) -> None:
    light, was_dark = find_ink(picture.astype(np.float32))
    dark, is_dark = find_ink(255 - picture.astype(np.float32))

    assert (was_dark, is_dark) == (False, True)
    np.testing.assert_allclose(dark, light, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(picture=pictures(), side=st.integers(1, 40), box=st.integers(1, 40))
def test_a_digit_fits_into_a_frame_of_any_size(picture: Array, side: int, box: int) -> None:
    frame = Frame(height=side, width=side + 3, dtype=np.dtype("uint8"), pixel_max=255.0)
    style = Style(box=min(box, side), centre=(0.0, side / 2), dark_on_light=False)

    image = place(find_ink(picture.astype(np.float32))[0], frame, style)

    assert image.shape == (side, side + 3)
    assert 0 <= image.min() <= image.max() == 1


def test_a_digit_keeps_its_proportions() -> None:
    bar = np.zeros((100, 60), np.float32)
    bar[10:90, 30:38] = 255

    image = place(find_ink(bar)[0], MNIST, MNIST_STYLE)

    assert (image.any(axis=1).sum(), image.any(axis=0).sum()) == (20, 2)


# --- pictures as people have them --------------------------------------------------------


def test_what_was_done_is_said(tmp_path: Path) -> None:
    picture = np.pad(255 - enlarged(3, 100), ((80, 100), (100, 100)), constant_values=255)

    prepared = prepare(saved(picture, tmp_path / "3.png"), MNIST, MNIST_STYLE)

    assert prepared.note == (
        "300x280, dark on light: inverted, digit scaled to 20 of 28 pixels, centred by its mass"
    )
    assert prepared.pixels.shape == (28, 28)
    assert prepared.pixels.dtype == np.uint8
    assert prepared.pixels.max() == 255


def in_colour(mode: str) -> Image.Image:
    return Image.fromarray(nine()).convert(mode)


def transparent(ink: int) -> Image.Image:
    """Strokes of one colour and nothing behind them."""
    strokes = Image.new("RGBA", nine().shape[::-1], (ink, ink, ink, 0))
    strokes.putalpha(Image.fromarray(nine()))
    return strokes


def deep() -> Image.Image:
    """16 bits a pixel, few of them used."""
    return Image.fromarray(nine().astype(np.uint16) * 100)


def with_noise(sigma: float) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, sigma, nine().shape)
    return Image.fromarray(np.clip(60 + nine() * 0.5 + noise, 0, 255).astype(np.uint8))


def with_specks() -> Image.Image:
    picture = nine().copy()
    for y, x in np.random.default_rng(0).integers(0, 158, (12, 2)):
        picture[y : y + 2, x : x + 2] = 255
    return Image.fromarray(picture)


def in_light_from_one_side() -> Image.Image:
    slope = np.linspace(0.0, 90.0, nine().shape[1])
    return Image.fromarray((230 - slope - nine() * 0.5).astype(np.uint8))


def of_little_contrast() -> Image.Image:
    return Image.fromarray((100 + nine() // 8).astype(np.uint8))


PICTURED = {
    "rgb": in_colour("RGB"),
    "palette": in_colour("P"),
    "alpha": in_colour("LA"),
    "bilevel": in_colour("1"),
    "dark strokes on nothing": transparent(0),
    "light strokes on nothing": transparent(255),
    "16 bits": deep(),
    "noise": with_noise(10),
    "specks": with_specks(),
    "light from one side": in_light_from_one_side(),
    "little contrast": of_little_contrast(),
    "large": Image.fromarray(nine()).resize((1600, 1600), Image.Resampling.BICUBIC),
}


@pytest.mark.parametrize("picture", PICTURED.values(), ids=PICTURED.keys())
def test_a_digit_is_the_same_however_it_was_pictured(tmp_path: Path, picture: Image.Image) -> None:
    plain = prepare(saved(nine(), tmp_path / "plain.png"), MNIST, MNIST_STYLE)

    prepared = prepare(saved(picture, tmp_path / "9.png"), MNIST, MNIST_STYLE)

    assert mean_difference(prepared.pixels, plain.pixels) < 10


def test_a_jpeg_is_read_as_a_png_is(tmp_path: Path) -> None:
    png = prepare(saved(nine(), tmp_path / "9.png"), MNIST, MNIST_STYLE)

    jpeg = prepare(saved(nine(), tmp_path / "9.jpg", quality=30), MNIST, MNIST_STYLE)

    assert mean_difference(jpeg.pixels, png.pixels) < 5


def test_a_photo_that_lies_on_its_side_is_set_upright(tmp_path: Path) -> None:
    wide = np.pad(enlarged(7, 100), ((20, 20), (60, 20)))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned to the right
    path = saved(np.rot90(wide), tmp_path / "7.jpg", exif=exif, quality=95)
    upright = prepare(saved(wide, tmp_path / "7.png"), MNIST, MNIST_STYLE)

    turned = prepare(path, MNIST, MNIST_STYLE)

    assert turned.note == upright.note
    assert mean_difference(turned.pixels, upright.pixels) < 5


# --- pictures that are refused -----------------------------------------------------------


def bomb() -> bytes:
    """A small PNG that says it has 10 gigapixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def png(picture: Array) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return content.getvalue()


def gif() -> bytes:
    content = io.BytesIO()
    Image.fromarray(nine()).save(content, "GIF")
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"9\.png is no PNG, no JPEG and no \.npz file\.$"),
        (b"Not a picture at all.", r"9\.png is no PNG, no JPEG and no \.npz file\.$"),
        (gif(), r"9\.png is no PNG, no JPEG and no \.npz file\.$"),
        (bomb(), r"9\.png cannot be read: Image size \(10000000000 pixels\) exceeds limit .*\.$"),
    ],
)
def test_what_is_no_picture_is_told_by_its_head(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "9.png"
    path.write_bytes(content)

    with pytest.raises(ValueError, match=message):
        check_picture(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(nine())[:600], r"9\.png cannot be read: .*\.$"),
        (png(np.full((50, 40), 255, np.uint8)), r"9\.png: it shows no digit, .* one brightness\.$"),
        (png(np.full((1, 1), 0, np.uint8)), r"9\.png: it shows no digit, .* one brightness\.$"),
        (
            png(np.random.default_rng(0).normal(128, 20, (90, 90)).astype(np.uint8)),
            r"9\.png: it shows no digit that stands out from the background\.$",
        ),
    ],
    ids=["cut_short", "empty", "one_pixel", "noise"],
)
def test_a_picture_that_shows_nothing_is_told_in_one_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "9.png"
    path.write_bytes(content)

    with pytest.raises(ValueError, match=message):
        prepare(path, MNIST, MNIST_STYLE)
