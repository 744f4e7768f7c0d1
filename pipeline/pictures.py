"""A digit in a PNG or JPEG picture, made into an image like those that a model was trained on.

MNIST's digits were scaled to fit a box of 20x20 pixels, with anti-aliasing and without distortion,
and put into 28x28 with their centre of mass in the middle (LeCun et al. 1998). Those bundled with
scikit-learn fill the height of their 8x8. What a model's own digits are like is seen in the input
example that was saved with it: its first five training images.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage

from pipeline.arrays import Array, Frame

Grey = npt.NDArray[np.float32]

FORMATS = ("PNG", "JPEG")
SIDE = 256  # pixels that the longer side of a picture is reduced to: the average has less noise
CONTRAST = 12.0  # between ink and paper, of 255; less is an empty picture
NOISE = 5.0  # likewise, in standard deviations of the paper: noise cut in two has 2.6
SPECK = 0.03  # of the largest piece of ink; smaller pieces are dirt
_AROUND = np.ones((3, 3), bool)  # pixels that touch at a corner are one piece too


@dataclass(frozen=True, kw_only=True)
class Style:
    """What the digits are like that a model was trained on.

    Attributes:
        box: Longer side of a digit, in pixels.
        centre: Row and column of its centre of mass.
        dark_on_light: Whether the background has the high values.
    """

    box: int
    centre: tuple[float, float]
    dark_on_light: bool


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A picture as a model takes it.

    Attributes:
        pixels: `[height, width]`
        note: What was done to it.
    """

    pixels: Array
    note: str


def style_of(examples: Array, frame: Frame) -> Style:
    """The style of some images `[n, height, width]` in a model's own form.

    Raises:
        ValueError: They show nothing.
    """
    inks = examples.astype(np.float64) / frame.pixel_max
    edges = np.concatenate([inks[:, [0, -1], :].ravel(), inks[:, :, [0, -1]].ravel()])
    dark_on_light = bool(np.median(edges) > 0.5)
    inks = 1 - inks if dark_on_light else inks
    inks = inks[inks.any(axis=(1, 2))]
    if not len(inks):
        raise ValueError("the model's input example is empty: it does not show how digits look.")
    boxes = [_box(ink > 0) for ink in inks]
    centre = np.mean([ndimage.center_of_mass(ink) for ink in inks], axis=0)
    y, x = np.round(2 * centre) / 2  # to half a pixel: five digits say no more
    return Style(
        box=int(np.median([max(bottom - top, right - left) for top, bottom, left, right in boxes])),
        centre=(float(y), float(x)),
        dark_on_light=dark_on_light,
    )


def check_picture(path: Path) -> None:
    """Reads no more than the head of a picture.

    Raises:
        ValueError: It is none, or too large.
    """
    with _picture(path):
        pass


def prepare(path: Path, frame: Frame, style: Style) -> Prepared:
    """Finds the digit in a picture and makes it an image for a model.

    Raises:
        ValueError: The picture cannot be read, or shows nothing.
    """
    with _picture(path) as picture:
        upright = ImageOps.exif_transpose(picture)
        width, height = upright.size
        upright.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
        grey = _grey(upright)
    try:
        ink, dark_on_light = find_ink(grey)
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from error
    image = place(ink, frame, style)
    polarity = "dark on light" if dark_on_light else "light on dark"
    inverted = ": inverted" if dark_on_light != style.dark_on_light else ""
    scaled = f"digit scaled to {style.box} of {frame.height} pixels"
    return Prepared(
        pixels=frame.pixels(1 - image if style.dark_on_light else image, frame.pixel_max),
        note=f"{width}x{height}, {polarity}{inverted}, {scaled}, centred by its mass",
    )


# --- reading -----------------------------------------------------------------------------


@contextmanager
def _picture(path: Path) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damage that the digit may survive, as to EXIF data
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with path.open("rb") as file, Image.open(file, formats=FORMATS) as picture:
                yield picture
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no PNG, no JPEG and no .npz file.") from error
    except Exception as error:  # whatever a damaged picture makes its parser raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"{path} cannot be read: {reason.rstrip('.')}.") from error


def _grey(picture: Image.Image) -> Grey:
    """Brightness `[height, width]` in [0, 255]; what is transparent becomes paper."""
    if picture.mode.startswith(("I", "F")):  # 16 bits, which Pillow would cut at 255
        return np.asarray(picture, np.float32) / np.float32(257)
    if not picture.has_transparency_data:
        return np.asarray(picture.convert("L"), np.float32)
    seen = picture.convert("RGBA")
    opacity = np.asarray(seen.getchannel("A"), np.float32) / 255
    grey = np.asarray(seen.convert("L"), np.float32)
    ink = grey[opacity > 0.5]
    paper = 0.0 if ink.size and np.percentile(ink, 1) > 127 else 255.0  # light ink has dark paper
    return np.asarray(grey * opacity + paper * (1 - opacity), np.float32)


# --- the digit ---------------------------------------------------------------------------


def find_ink(grey: Grey) -> tuple[Grey, bool]:
    """Tells the strokes of a digit from its background, in any light.

    Args:
        grey: `[height, width]`, in [0, 255].

    Returns:
        How much ink is where, `[height, width]` in [0, 1], and whether it is dark on light.

    Raises:
        ValueError: There is none.
    """
    edge = np.concatenate([grey[[0, -1], :].ravel(), grey[:, [0, -1]].ravel()])
    low, high = np.percentile(grey, (0.1, 99.9))
    paper = np.median(edge)
    dark_on_light = bool(paper - low > high - paper)  # ink is farther from the paper than light
    depth = 255 - grey if dark_on_light else grey
    depth = depth - np.median(depth)
    for _ in range(2):
        if np.ptp(depth) < CONTRAST:
            raise ValueError("it shows no digit, all of it has one brightness")
        is_paper = depth < _otsu(depth) / 2
        depth = depth - _plane(depth, is_paper)
    threshold = _otsu(depth)
    strength = np.percentile(depth[depth > threshold], 75)
    if strength < max(CONTRAST, NOISE * depth[depth <= threshold].std()):
        raise ValueError("it shows no digit that stands out from the background")
    ink = np.clip(depth / strength, 0, 1).astype(np.float32)
    return _without_specks(ink), dark_on_light


def _otsu(values: Grey) -> float:
    """The threshold between two groups that differ most (Otsu 1979)."""
    counts, edges = np.histogram(values, bins=256)
    centres = (edges[1:] + edges[:-1]) / 2
    below, moment = counts.cumsum()[:-1], (counts * centres).cumsum()
    total = counts.sum()
    apart = (moment[-1] * below - moment[:-1] * total) ** 2 / (below * (total - below))
    return float(edges[1:][apart.argmax()])


def _plane(values: Grey, where: npt.NDArray[np.bool_]) -> Grey:
    """The tilted plane that is nearest to some pixels: light that comes from one side."""
    height, width = values.shape
    y, x = np.indices(values.shape)
    terms = np.stack([np.ones_like(x), x / width, y / height], axis=-1)
    known = terms[where]
    factors = np.linalg.lstsq(known.T @ known, known.T @ values[where])[0]  # 3x3: fast
    return np.asarray(terms @ factors, np.float32)


def _without_specks(ink: Grey) -> Grey:
    pieces, _ = ndimage.label(ink > 0.5, _AROUND)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0  # the paper
    kept = np.isin(pieces, np.flatnonzero(sizes >= max(1, SPECK * sizes.max())))
    blur = max(1, min(ink.shape) // 28)  # of edges, in a picture that was enlarged
    return np.where(ndimage.binary_dilation(kept, _AROUND, blur), ink, np.float32(0))


def place(ink: Grey, frame: Frame, style: Style) -> Grey:
    """Scales the digit to the box and puts its centre of mass where the model expects it.

    Args:
        ink: As of `find_ink`.
        frame: Whose height and width the result has.
        style: Where the digit goes.

    Returns:
        `[height, width]`, in [0, 1].
    """
    top, bottom, left, right = _box(ink > 0.25)
    height, width = bottom - top, right - left
    scale = min(style.box / max(height, width), frame.height / height, frame.width / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    digit = np.asarray(
        Image.fromarray(ink).resize(size, Image.Resampling.HAMMING, (left, top, right, bottom))
    )
    digit = np.clip(digit / digit.max(), 0, 1)
    y, x = (
        int(np.clip(round(wanted - mass), 0, room - side))
        for wanted, mass, room, side in zip(
            style.centre,
            ndimage.center_of_mass(digit),
            (frame.height, frame.width),
            digit.shape,
            strict=True,
        )
    )
    image = np.zeros((frame.height, frame.width), np.float32)
    image[y : y + digit.shape[0], x : x + digit.shape[1]] = digit
    return image


def _box(mask: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of what is set; ends excluded."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
