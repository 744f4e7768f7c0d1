"""What a difference between two runs is worth: known values, pairing, coverage, ranks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import sqrt
from statistics import NormalDist, pstdev
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.store import Predictions
from sweeps.noise import Score, are_paired, quantile, ranks, standard_error

MEASURED = ("val_accuracy", "val_loss")
COUNTED = ("parameters", "fit_seconds")


def judged(
    correct: npt.ArrayLike, *, losses: npt.ArrayLike | None = None, label: int = 0
) -> Predictions:
    """Predictions of images of one class, as `Run.log_predictions` keeps them."""
    right = np.asarray(correct, dtype=bool)
    labels = np.full(len(right), label, np.uint8)
    return Predictions(
        labels=labels,
        classes=np.where(right, labels, labels + 1).astype(np.uint8),
        losses=np.asarray(~right if losses is None else losses, np.float16),
    )


def score_of(kept: Predictions, objective: str = "val_accuracy") -> Score:
    values = kept.correct if objective == "val_accuracy" else kept.losses.astype(float)
    return Score(value=float(values.mean()), images=len(values), read=lambda: kept)


def unread(value: float, images: int = 1000) -> Score:
    """A score whose predictions were not kept."""
    return Score(value=value, images=images)


def pair(both: int, first: int, second: int, none: int) -> tuple[Score, Score]:
    """Two scores, by the numbers of images that both, one alone, or none has right."""
    one = np.repeat([True, True, False, False], [both, first, second, none])
    other = np.repeat([True, False, True, False], [both, first, second, none])
    return score_of(judged(one)), score_of(judged(other))


class Shelf:
    """Scores, the best first, that count how often their predictions are read."""

    def __init__(self, objective: str, kept: list[Predictions], is_kept: list[bool]) -> None:
        self.reads = [0] * len(kept)
        scores = [
            replace(score_of(each, objective), read=self._reader(place, each if keep else None))
            for place, (each, keep) in enumerate(zip(kept, is_kept, strict=True))
        ]
        self.scores = sorted(scores, key=lambda s: s.value, reverse=objective == "val_accuracy")

    def _reader(self, place: int, kept: Predictions | None) -> Callable[[], Predictions | None]:
        def read() -> Predictions | None:
            self.reads[place] += 1
            return kept

        return read


# --- the standard error ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "error"),
    [
        ((80, 8, 2, 10), 0.031990031),  # sqrt(11 - 36 / 102) / 102
        ((80, 2, 8, 10), 0.031990031),
        ((90, 5, 5, 0), 0.032515929),
        ((0, 100, 0, 0), 0.016869539),  # always better, by the same
        ((100, 0, 0, 0), 0.009803922),  # sqrt(1) / 102: alike on these images
        ((0, 0, 0, 1), 0.333333333),
    ],
)
def test_on_the_same_images_the_error_of_two_accuracies_is_known(
    counts: tuple[int, int, int, int], error: float
) -> None:
    one, other = pair(*counts)

    assert standard_error("val_accuracy", one, other) == pytest.approx(error, abs=1e-8)


@given(*[st.integers(0, 200)] * 3, st.integers(1, 200))
def test_on_the_same_images_it_is_that_of_agresti_and_min(
    both: int, first: int, second: int, none: int
) -> None:
    one, other = pair(both, first, second, none)
    images = both + first + second + none + 2

    variance = first + second + 1 - (first - second) ** 2 / images

    assert standard_error("val_accuracy", one, other) == pytest.approx(
        sqrt(variance) / images, abs=1e-9
    )


@pytest.mark.parametrize("images", [2, 240, 10_000])
def test_on_the_same_images_it_is_that_of_the_mean_of_the_differences_of_the_losses(
    images: int,
) -> None:
    rng = np.random.default_rng(images)
    first, second = rng.exponential(30, (2, images)).astype(np.float16)  # their sum overflows

    error = standard_error(
        "val_loss",
        score_of(judged([True] * images, losses=first), "val_loss"),
        score_of(judged([True] * images, losses=second), "val_loss"),
    )

    differences = [float(a) - float(b) for a, b in zip(first, second, strict=True)]
    assert error == pytest.approx(pstdev(differences) / sqrt(images))


@pytest.mark.parametrize("objective", MEASURED)
def test_the_error_is_that_of_the_difference_either_way(objective: str) -> None:
    one, other = (score_of(judged(right), objective) for right in ([1, 1, 1, 0], [1, 0, 0, 1]))

    assert standard_error(objective, one, other) == standard_error(objective, other, one)


@pytest.mark.parametrize(
    ("one", "other", "error"),
    [
        (unread(0.9, 100), unread(0.8, 400), 0.036653741),  # of 91 in 102, 321 in 402
        (unread(0.5, 50), unread(0.5, 50), 0.098058068),
        (unread(1.0, 10), unread(0.0, 10), 0.112833867),  # sqrt(2 * 11 / 12 * 1 / 12 / 12)
    ],
)
def test_without_predictions_the_error_of_two_accuracies_is_binomial(
    one: Score, other: Score, error: float
) -> None:
    assert standard_error("val_accuracy", one, other) == pytest.approx(error)


def test_errors_on_many_of_the_same_images_make_the_paired_error_the_smaller() -> None:
    one, other = pair(both=900, first=12, second=8, none=80)

    paired = standard_error("val_accuracy", one, other)
    binomial = standard_error("val_accuracy", unread(0.912), unread(0.908))

    assert paired is not None
    assert binomial is not None
    assert paired < binomial / 2


KEPT = score_of(judged([True] * 8 + [False] * 2))
OF_OTHER_IMAGES = [
    score_of(judged([True] * 8 + [False] * 2, label=1)),
    score_of(judged([True] * 16 + [False] * 4)),
]
UNPAIRED = [
    (unread(0.8, 10), unread(0.8, 10)),
    (KEPT, unread(0.8, 10)),
    (unread(0.8, 10), KEPT),
    *((KEPT, other) for other in OF_OTHER_IMAGES),
]


@pytest.mark.parametrize(("one", "other"), UNPAIRED)
def test_predictions_that_lack_or_are_of_other_images_are_not_paired(
    one: Score, other: Score
) -> None:
    fractions = [(0.8 * each.images + 1) / (each.images + 2) for each in (one, other)]
    binomial = sqrt(
        sum(
            fraction * (1 - fraction) / (each.images + 2)
            for fraction, each in zip(fractions, (one, other), strict=True)
        )
    )

    assert not are_paired(one, other)
    assert standard_error("val_accuracy", one, other) == pytest.approx(binomial)
    assert standard_error("val_loss", one, other) is None


def test_predictions_of_the_same_images_are_paired() -> None:
    one, other = pair(both=5, first=1, second=2, none=3)

    assert are_paired(one, other)
    assert are_paired(one, one)


@pytest.mark.parametrize(("one", "other"), [(0, 0), (0, 100), (100, 0)])
def test_the_error_is_unknown_where_the_number_of_images_is(one: int, other: int) -> None:
    assert standard_error("val_accuracy", unread(0.9, one), unread(0.8, other)) is None


@pytest.mark.parametrize(("objective", "error"), [("parameters", 0.0), ("fit_seconds", None)])
def test_a_count_has_no_noise_and_that_of_a_time_is_unknown_and_neither_reads_anything(
    objective: str, error: float | None
) -> None:
    shelf = Shelf("val_accuracy", [judged([True, False])] * 2, [True, True])

    assert standard_error(objective, *shelf.scores) == error
    assert shelf.reads == [0, 0]


@pytest.mark.parametrize(
    ("confidence", "errors"),
    [(0.5, 0.674490), (0.6826895, 1.0), (0.95, 1.959964), (0.99, 2.575829)],
)
def test_an_interval_is_as_wide_as_that_of_the_normal_distribution(
    confidence: float, errors: float
) -> None:
    assert quantile(confidence) == pytest.approx(errors, abs=1e-6)


# --- coverage ----------------------------------------------------------------------------

DRAWS = 2000  # of which a share near 0.95 is known to +/- 0.005


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Of two models that are equally good, each draw on other images; `[DRAWS]` each."""

    values: npt.NDArray[np.float64]
    paired: npt.NDArray[np.float64]
    binomial: npt.NDArray[np.float64]

    def covered(self, errors: npt.NDArray[np.float64]) -> float:
        """Share of the 95 % intervals that hold the true difference, 0."""
        return float((np.abs(self.values) <= quantile(0.95) * errors).mean())


def draw(objective: str, images: int = 400) -> Differences:
    """Both models find the same images hard."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(DRAWS):
        hard = rng.normal(0, 1, images)
        margins = 2.5 - 1.5 * hard + rng.normal(0, 1, (2, images))
        scores = [
            score_of(judged(each > 0, losses=np.log1p(np.exp(-each))), objective)
            for each in margins
        ]
        paired = standard_error(objective, *scores)
        binomial = standard_error("val_accuracy", *(replace(s, read=lambda: None) for s in scores))
        rows.append((scores[0].value - scores[1].value, paired, binomial))
    values, paired_errors, binomial_errors = np.asarray(rows, dtype=float).T
    return Differences(values=values, paired=paired_errors, binomial=binomial_errors)


@pytest.mark.parametrize("objective", MEASURED)
def test_paired_intervals_hold_no_difference_where_there_is_none_as_often_as_they_say(
    objective: str,
) -> None:
    drawn = draw(objective)

    assert drawn.covered(drawn.paired) == pytest.approx(0.95, abs=0.015)


def test_binomial_intervals_are_too_wide_for_models_that_err_on_the_same_images() -> None:
    drawn = draw("val_accuracy")

    assert drawn.covered(drawn.binomial) > 0.975
    assert (drawn.paired < drawn.binomial).mean() > 0.99


# --- ranks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([0.95], [1]),
        ([0.95, 0.949, 0.948, 0.80], [1, 1, 1, 4]),
        ([0.95, 0.80, 0.799, 0.60], [1, 2, 2, 4]),
        ([0.95, 0.94, 0.92], [1, 1, 3]),  # within the noise of the second, not of the first
        ([0.95, 0.94, 0.92, 0.91], [1, 1, 3, 3]),
    ],
)
def test_what_is_within_the_noise_of_a_groups_first_shares_its_rank(
    values: list[float], expected: list[int]
) -> None:
    assert ranks("val_accuracy", list(map(unread, values)), 0.95) == expected


@pytest.mark.parametrize(
    ("objective", "values", "expected"),
    [
        ("val_loss", [0.1, 0.11, 0.12], [1, 2, 3]),
        ("val_loss", [0.1, 0.1, 0.12, 0.12, 0.13], [1, 1, 3, 3, 5]),
        ("parameters", [650.0, 651.0, 651.0], [1, 2, 2]),
        ("fit_seconds", [1.0, 1.0, 1.0], [1, 1, 1]),
    ],
)
def test_where_there_is_no_noise_or_none_is_known_only_equal_values_tie(
    objective: str, values: list[float], expected: list[int]
) -> None:
    assert ranks(objective, list(map(unread, values)), 0.95) == expected


def test_accuracies_of_an_unknown_number_of_images_do_not_tie() -> None:
    assert ranks("val_accuracy", [unread(0.9, 0), unread(0.8999, 0)], 0.95) == [1, 2]


@pytest.mark.parametrize(("wider", "expected"), [(-1e-4, [1, 2]), (1e-4, [1, 1])])
def test_the_confidence_decides_where_a_tie_ends(wider: float, expected: list[int]) -> None:
    one, other = pair(both=80, first=8, second=2, none=10)
    enough = 2 * NormalDist().cdf(0.06 / 0.031990031) - 1  # the interval ends at 0

    assert ranks("val_accuracy", [one, other], enough + wider) == expected


def test_a_handful_of_images_makes_no_rank() -> None:
    """McNemar's exact test gives 0.125."""
    one, other = pair(both=230, first=4, second=0, none=6)

    assert ranks("val_accuracy", [one, other], 0.95) == [1, 1]


def test_paired_differences_tell_apart_what_binomial_ones_do_not() -> None:
    one, other = pair(both=900, first=14, second=1, none=85)
    apart = [unread(one.value), unread(other.value)]

    assert ranks("val_accuracy", [one, other], 0.95) == [1, 2]
    assert ranks("val_accuracy", apart, 0.95) == [1, 1]


@st.composite
def shelves(draw: st.DrawFn) -> tuple[str, Shelf]:
    objective, count = draw(st.sampled_from(MEASURED)), draw(st.integers(1, 8))
    seed, images = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([1, 10, 200]))
    rng = np.random.default_rng(seed)
    rows: Any = rng.random((count, images)) < rng.choice([0.0, 0.5, 0.9, 0.95, 1.0], (count, 1))
    is_kept = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return objective, Shelf(objective, [judged(row) for row in rows], is_kept)


@given(shelves(), st.floats(0.01, 0.9999))
def test_ranks_are_places_shared_by_what_follows(
    given_: tuple[str, Shelf], confidence: float
) -> None:
    objective, shelf = given_

    found = ranks(objective, shelf.scores, confidence)

    assert found[0] == 1
    assert found == sorted(found)
    assert all(rank <= place for place, rank in enumerate(found, start=1))
    assert all(found[rank - 1] == rank for rank in found)  # the first of its group
    assert max(shelf.reads) <= 1


@given(shelves(), st.floats(0.01, 0.9999))
def test_equal_values_always_tie(given_: tuple[str, Shelf], confidence: float) -> None:
    objective, shelf = given_
    twice = [score for score in shelf.scores for _ in range(2)]

    found = ranks(objective, twice, confidence)

    assert found[::2] == found[1::2]
