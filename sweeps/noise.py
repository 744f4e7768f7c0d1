"""What a difference between two runs is worth: the noise of the validation images.

Another draw of as many validation images would give other accuracies. Two runs judged on the same
images err on many of the same ones, so their difference varies less than each of them: where the
predictions are kept, it is the standard error of the mean of the paired differences, which for
accuracies is Wald's, of the images that one of both has right (Agresti 2013, section 11.1); else
the binomial one of two independent samples. The noise of the training, of another seed, comes on
top and is not in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

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
            differences = first.correct.astype(float) - second.correct
        else:
            differences = first.losses.astype(float) - second.losses
        return float(differences.std() / np.sqrt(len(differences)))
    if objective == "val_loss" or not (one.images and other.images):
        return None
    variances = (score.value * (1 - score.value) / score.images for score in (one, other))
    return float(np.sqrt(sum(variances)))


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
