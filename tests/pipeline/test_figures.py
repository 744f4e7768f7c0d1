"""Every figure can be drawn and read, whatever the images, the classes and the mistakes."""

import io
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib import image
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from pipeline import figures
from pipeline.config import AugmentationConfig
from pipeline.data import Split
from pipeline.evaluate import Evaluation

pytestmark = pytest.mark.usefixtures("tensorflow")

SIZES = [(8, 8), (28, 28), (64, 48), (20, 60)]
NUMBERS = [str(label) for label in range(10)]
CLOTHES = [
    *("T-shirt", "trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
]
DISTORTING = AugmentationConfig(
    rotation=10, shift=0.1, scale=0.1, shear=10, elastic=0.05, elastic_sigma=0.14
)
SEARCHED = AugmentationConfig(
    rotation=12.34, shift=0.0567, scale=0.0789, shear=12.34, elastic=0.0456, elastic_sigma=0.234
)
AMOUNTS = "rotation=10 shift=0.1 scale=0.1 shear=10 elastic=0.05 elastic_sigma=0.14"
LONG = [f"a class with a rather long name, number {label}" for label in range(10)]


def names_of(num_classes: int) -> list[str]:
    return [str(label) for label in range(num_classes)]


def split_of(num_images: int, *, size: tuple[int, int] = (8, 8), num_classes: int = 10) -> Split:
    draw = np.random.default_rng(0)
    return Split(
        name="train",
        images=draw.integers(0, 256, (num_images, *size), dtype=np.uint8),
        labels=np.arange(num_images, dtype=np.int32) % num_classes,
        digest="",
    )


def evaluation_of(split: Split, *, wrong: int, num_classes: int = 10) -> Evaluation:
    """The first images are taken for the next class, the confidence falling from image to image."""
    images = np.arange(len(split))
    predicted = (split.labels + (images < wrong)) % num_classes
    confidence = np.linspace(1.0, 0.6, len(split))
    probabilities = np.tile((1 - confidence)[:, None] / num_classes, num_classes)
    probabilities[images, predicted] = confidence
    accuracy = 1 - wrong / len(split)
    return Evaluation(
        split=split, loss=0.5, accuracy=accuracy, probabilities=probabilities.astype(np.float32)
    )


def history(epochs: int, *names: str) -> list[dict[str, float]]:
    return [dict.fromkeys(names, 1.0 / epoch) for epoch in range(1, epochs + 1)]


def drawn(figure: Figure) -> Figure:
    """The figure with everything in its final place."""
    figure.draw_without_rendering()
    return figure


def texts_of(figure: Figure) -> list[Text]:
    return [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]


def png(figure: Figure) -> npt.NDArray[np.float64]:
    """The picture `[height, width, 4]` in a file of it."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG\r\n\x1a\n")
    file.seek(0)
    return np.asarray(image.imread(file))


def assert_readable(figure: Figure) -> None:
    """No text is cut off, on another text, or on an image."""
    drawn(figure)
    places = [text.get_window_extent() for text in texts_of(figure)]
    assert [box for box in places if not is_inside(box, figure)] == []
    assert overlapping(places) == []
    assert [text for text in figure.axes[0].texts if not is_on_white(text, figure)] == []


def is_inside(box: Bbox, figure: Figure) -> bool:
    width, height = figure.get_size_inches() * figure.dpi
    return bool(0 <= box.x0 < box.x1 <= width and 0 <= box.y0 < box.y1 <= height)


def overlapping(places: list[Bbox]) -> list[tuple[Bbox, Bbox]]:
    return [(box, other) for box, other in combinations(places, 2) if box.overlaps(other)]


def shown(figure: Figure) -> npt.NDArray[Any]:
    """What its first axes show, masked where there is nothing."""
    array = figure.axes[0].images[0].get_array()
    assert array is not None
    return array


def is_on_white(text: Text, figure: Figure) -> bool:
    """Whether no pixel of an image lies under the text."""
    is_empty = np.ma.getmaskarray(shown(figure))
    to_pixels = figure.axes[0].transData.inverted()
    place = text.get_window_extent().transformed(to_pixels)
    x0, x1 = sorted((place.x0, place.x1))
    y0, y1 = sorted((place.y0, place.y1))
    rows = slice(max(0, round(y0)), max(0, round(y1) + 1))
    return bool(is_empty[rows, max(0, round(x0)) : max(0, round(x1) + 1)].all())


# --- grids of images ---------------------------------------------------------------------


@pytest.mark.parametrize("class_names", [NUMBERS, CLOTHES, LONG])
@pytest.mark.parametrize("num_images", [1, 60])
@pytest.mark.parametrize("size", SIZES)
def test_a_grid_of_images_can_be_read(
    size: tuple[int, int], num_images: int, class_names: list[str]
) -> None:
    figure = figures.digit_grid(split_of(num_images, size=size), class_names)

    assert_readable(figure)


@pytest.mark.parametrize("class_names", [NUMBERS, CLOTHES, LONG])
@pytest.mark.parametrize("wrong", [3, 40])
@pytest.mark.parametrize("size", SIZES)
def test_mistakes_can_be_read(size: tuple[int, int], wrong: int, class_names: list[str]) -> None:
    evaluation = evaluation_of(split_of(50, size=size), wrong=wrong)

    figure = figures.confident_mistakes(evaluation, class_names)

    assert_readable(figure)


@pytest.mark.parametrize(("num_images", "count"), [(1, 1), (10, 10), (11, 11), (50, 50), (51, 50)])
def test_the_first_images_are_shown_in_their_order(num_images: int, count: int) -> None:
    split = split_of(num_images)

    figure = figures.digit_grid(split, CLOTHES)

    labels = [text.get_text() for text in figure.axes[0].texts]
    canvas = np.ma.getdata(shown(figure))
    pixels = np.sort(canvas[np.isfinite(canvas)])
    assert labels == [CLOTHES[label] for label in split.labels[:count]]
    np.testing.assert_array_equal(pixels, np.sort(split.images[:count].ravel()))


@pytest.mark.parametrize(
    ("size", "num_images", "class_names"),
    [((28, 28), 60, CLOTHES), ((8, 8), 1, LONG), ((20, 60), 60, NUMBERS)],
)
@pytest.mark.parametrize("amounts", [DISTORTING, SEARCHED])
def test_distorted_images_can_be_read(
    size: tuple[int, int], num_images: int, class_names: list[str], amounts: AugmentationConfig
) -> None:
    figure = figures.distorted_grid(split_of(num_images, size=size), class_names, amounts)

    assert_readable(figure)


def test_images_are_shown_above_what_augmentation_makes_of_them() -> None:
    split = split_of(10)

    figure = figures.distorted_grid(split, CLOTHES, DISTORTING, rows=2)

    labels = [text.get_text() for text in figure.axes[0].texts]
    canvas = np.ma.getdata(shown(figure))
    assert figure.get_suptitle().split("\n")[1] == AMOUNTS
    top, *rest = np.split(canvas, 3)
    assert labels == [CLOTHES[label] for label in split.labels[:10]] * 3
    pixels = np.sort(top[np.isfinite(top)])
    np.testing.assert_array_equal(pixels, np.sort(split.images.ravel()))
    versions = [top, *rest]
    assert len({np.nan_to_num(version).tobytes() for version in versions}) == 3


def test_distortions_that_are_off_are_not_named_above_the_images() -> None:
    only = AugmentationConfig(
        rotation=0, shift=0.0123, scale=0, shear=0, elastic=0, elastic_sigma=0.14
    )

    figure = figures.distorted_grid(split_of(10), NUMBERS, only)

    assert figure.get_suptitle().split("\n")[1] == "shift=0.0123"


def test_mistakes_are_shown_from_the_most_confident_down() -> None:
    split = split_of(40)
    evaluation = evaluation_of(split, wrong=35)
    reversed_ = replace(
        evaluation,
        split=replace(split, images=split.images[::-1], labels=split.labels[::-1]),
        probabilities=evaluation.probabilities[::-1],
    )

    figure = figures.confident_mistakes(reversed_, NUMBERS)

    titles = [" ".join(text.get_text().split()) for text in figure.axes[0].texts]
    confidences = [float(title.split()[-1].rstrip("%")) for title in titles]
    assert len(titles) == 30
    assert titles[:2] == ["0 as 1 100.0%", "1 as 2 99.0%"]
    assert confidences == sorted(confidences, reverse=True)
    assert "35 mistakes in 40 train images" in figure.texts[0].get_text()


@pytest.mark.parametrize("num_images", [1, 40])
@pytest.mark.parametrize("size", SIZES)
def test_without_a_mistake_the_heading_says_so(size: tuple[int, int], num_images: int) -> None:
    evaluation = evaluation_of(split_of(num_images, size=size), wrong=0)

    figure = figures.confident_mistakes(evaluation, NUMBERS)

    assert_readable(figure)
    assert f"0 mistakes in {num_images} train images" in figure.texts[0].get_text()


@pytest.mark.parametrize("pixel", ["uint8", "float32"])
def test_a_grid_becomes_a_picture_of_a_few_hundred_pixels(pixel: str) -> None:
    split = split_of(60)
    images = (split.images.astype(np.float32) / 255).astype(pixel)

    picture = png(figures.digit_grid(replace(split, images=images), NUMBERS))

    height, width, _ = picture.shape
    assert 300 < height < 1_200
    assert 300 < width < 1_200


# --- curves and matrices -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("loss", "accuracy"), ["train"]),
        (("loss", "accuracy", "val_loss", "val_accuracy"), ["train", "validation"]),
    ],
)
@pytest.mark.parametrize("epochs", [1, 2, 300])
def test_learning_curves_have_a_point_an_epoch(
    epochs: int, names: tuple[str, ...], labels: list[str]
) -> None:
    figure = figures.learning_curves(history(epochs, *names))

    png(figure)
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy"]
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == labels
        assert {tuple(np.asarray(line.get_xdata())) for line in axes.lines} == {
            tuple(range(1, epochs + 1))
        }


@pytest.mark.parametrize("epochs", [1, 2, 7, 300])
def test_epochs_are_marked_by_whole_numbers(epochs: int) -> None:
    figure = drawn(figures.learning_curves(history(epochs, "loss", "accuracy")))

    low, high = figure.axes[0].get_xlim()
    ticks = [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high]
    assert ticks
    assert all(float(tick).is_integer() for tick in ticks)


@pytest.mark.parametrize(
    "class_names",
    [["no", "yes"], NUMBERS, CLOTHES, LONG, *(names_of(size) for size in (20, 21, 200))],
    ids=len,
)
@pytest.mark.parametrize("wrong", [0, 1, 250])
def test_a_confusion_matrix_counts_the_mistakes(wrong: int, class_names: list[str]) -> None:
    size = len(class_names)
    split = split_of(300, num_classes=size)

    figure = figures.confusion_matrix(
        evaluation_of(split, wrong=wrong, num_classes=size), class_names
    )

    png(figure)
    shades = np.asarray(shown(figure))
    assert figure.axes[0].get_title() == f"{wrong} of 300 train images wrong"
    assert shades.shape == (size, size)
    assert (shades.sum(), np.trace(shades)) == (wrong, 0)


@pytest.mark.parametrize(("num_classes", "numbers"), [(2, 4), (20, 40), (21, 0), (200, 0)])
def test_a_confusion_matrix_has_numbers_where_there_is_room(num_classes: int, numbers: int) -> None:
    split = split_of(400, num_classes=num_classes)
    evaluation = evaluation_of(split, wrong=200, num_classes=num_classes)

    figure = drawn(figures.confusion_matrix(evaluation, names_of(num_classes)))

    places = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(places) == numbers
    assert overlapping(places) == []


@pytest.mark.parametrize("class_names", [["no", "yes"], NUMBERS, CLOTHES, LONG, names_of(20)])
def test_the_classes_stand_beside_a_confusion_matrix(class_names: list[str]) -> None:
    size = len(class_names)
    evaluation = evaluation_of(split_of(100, num_classes=size), wrong=9, num_classes=size)

    figure = drawn(figures.confusion_matrix(evaluation, class_names))

    axes = figure.axes[0]
    starts = [name[:10] for name in class_names]
    assert [text.get_text()[:10] for text in axes.get_xticklabels()] == starts
    assert [text.get_text()[:10] for text in axes.get_yticklabels()] == starts
    rows = [
        text.get_window_extent() for text in (*axes.get_yticklabels(), axes.title, axes.yaxis.label)
    ]
    columns = [text.get_window_extent() for text in (*axes.get_xticklabels(), axes.xaxis.label)]
    assert [box for box in (*rows, *columns) if not is_inside(box, figure)] == []
    assert overlapping(rows) == []
