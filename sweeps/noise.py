"""What a difference between two runs is worth: the noise of the validation images.

Another draw of as many validation images would give other accuracies. Two runs judged on the same
images err on many of the same ones, so their difference varies less than each of them: where the
predictions are kept, it is the standard error of the mean of the paired differences; else the
binomial one of two independent samples. Of accuracies both count a few images more than there are,
as Agresti and Min (2005) and Agresti and Caffo (2000) found to make intervals honest where runs
differ in a handful of images, or in none. The noise of the training, of another seed, comes on
top and is not in it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # or MLflow is imported
    from pipeline.store import Predictions


@dataclass(frozen=True, kw_only=True)
class Score:
    """A value of an objective and what it was measured on.

    Attributes:
        value: Of the objective.
        images: Validation images.
        read: Reads the predictions; None where they were not kept.
    """

    value: float
    images: int
    read: Callable[[], "Predictions | None"] = lambda: None

    @cached_property
    def predictions(self) -> "Predictions | None":
        return self.read()


def quantile(confidence: float) -> float:
    """Standard errors on either side of a difference that hold so much of the normal curve."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def standard_error(objective: str, one: Score, other: Score) -> float | None:
    """Of the difference of two values on the same validation images; None where unknown."""
    if objective == "parameters":
        return 0.0
    if objective not in ("val_accuracy", "val_loss"):
        return None  # a time, measured once
    paired = are_paired(one, other)
    if paired:
        first, second = one.predictions, other.predictions
        assert first is not None and second is not None
        if objective == "val_accuracy":
            return _of_matched(first.correct, second.correct)
        differences = first.losses.astype(float) - second.losses
        return float(differences.std() / np.sqrt(len(differences)))
    if objective == "val_loss" or not (one.images and other.images):
        return None
    return math.sqrt(_variance(one) + _variance(other))


def _of_matched(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> float:
    """Of the difference of two fractions of the same images: half an image more in each cell."""
    images = len(one) + 2
    only_one, only_other = (np.sum(one & ~other) + 0.5, np.sum(other & ~one) + 0.5)
    variance = only_one + only_other - (only_one - only_other) ** 2 / images
    return float(np.sqrt(variance) / images)


def _variance(score: Score) -> float:
    """Of a fraction: one image more that is right, and one that is wrong."""
    images = score.images + 2
    fraction = (score.value * score.images + 1) / images
    return fraction * (1 - fraction) / images


def are_paired(one: Score, other: Score) -> bool:
    """Whether the predictions of both are kept, for the same images."""
    first, second = one.predictions, other.predictions
    return first is not None and second is not None and np.array_equal(first.labels, second.labels)


def ranks(objective: str, scores: Sequence[Score], confidence: float) -> list[int]:
    """Ranks from 1, the best first; what lies within the noise of a group's first shares its rank.

    Args:
        objective: What the values are of.
        scores: Ordered, the best first.
        confidence: Of the interval around a difference that has to leave out 0, in (0, 1).
    """
    ranked: list[int] = []
    first = 0
    for place, score in enumerate(scores):
        difference = abs(score.value - scores[first].value)
        if difference:
            error = standard_error(objective, scores[first], score)
            if error is None or difference > quantile(confidence) * error:
                first = place
        ranked.append(first + 1)
    return ranked
