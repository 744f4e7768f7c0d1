"""The decision of a promotion: is the challenger better than the champion, beyond chance?

Both were judged on the same validation images, so what tells them apart are the images on which
one is right and the other wrong. McNemar's exact test asks whether these fall on the challenger's
side more often than a fair coin would (McNemar 1947, in the exact form of Edwards 1948, one-sided);
the bootstrap of the images says by how much (Efron and Tibshirani 1993, percentiles).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from sweeps.config import GateConfig

PROMOTE, HOLD, REJECT = "PROMOTE", "HOLD", "REJECT"
CONFIDENCE = 0.95  # of the interval around a test accuracy
RESAMPLES = 9_999
_BATCH = 100  # resamples at once: bounds the memory

Correct = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Challenger against champion on the same images.

    Attributes:
        images: How many.
        gained: Those that the challenger alone has right.
        lost: Those that the champion alone has right.
        gain: Of accuracy, a fraction; negative where the challenger is worse.
        low: Lower end of the bootstrap interval around the gain.
        high: Upper end.
        confidence: Of that interval, which leaves out as much on either side as the test may err.
        p_value: Of McNemar's exact test against the challenger being no better.
    """

    images: int
    gained: int
    lost: int
    gain: float
    low: float
    high: float
    confidence: float
    p_value: float

    def __str__(self) -> str:
        return (
            f"{self.gain:+.4f} ({100 * self.confidence:.4g} % interval {self.low:+.4f} to "
            f"{self.high:+.4f}) on {self.images:,} validation images, {self.gained} gained and "
            f"{self.lost} lost; McNemar's exact test p = {self.p_value:.2g}"
        )


@dataclass(frozen=True, kw_only=True)
class Check:
    """One condition of a promotion.

    Attributes:
        name: What is asked.
        holds: The answer.
        evidence: In a sentence, with figures.
        decision: Where it does not hold.
    """

    name: str
    holds: bool
    evidence: str
    decision: str


def compare(challenger: Correct, champion: Correct, significance: float) -> Comparison:
    """Compares two models on the same images.

    Args:
        challenger: `[n]`, whether its prediction is right.
        champion: Likewise, of the same images in the same order.
        significance: Chance to find a model better that is not, in (0, 0.5).
    """
    gained = int(np.sum(challenger & ~champion))
    lost = int(np.sum(champion & ~challenger))
    gains = challenger.astype(float) - champion
    confidence = 1 - 2 * significance
    low = high = float(gains.mean())
    if gained or lost:
        interval = stats.bootstrap(
            (gains,),
            np.mean,
            n_resamples=RESAMPLES,
            batch=_BATCH,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return Comparison(
        images=len(gains),
        gained=gained,
        lost=lost,
        gain=float(gains.mean()),
        low=low,
        high=high,
        confidence=confidence,
        p_value=mcnemar(gained, lost),
    )


def mcnemar(gained: int, lost: int) -> float:
    """Chance of so many gained images, or more, among those that differ, if a coin decided."""
    if not gained + lost:
        return 1.0
    return float(stats.binomtest(gained, gained + lost, alternative="greater").pvalue)


def interval(accuracy: float, images: int) -> tuple[float, float]:
    """Wilson's interval around an accuracy (Wilson 1927)."""
    found = stats.binomtest(round(accuracy * images), images).proportion_ci(CONFIDENCE, "wilson")
    return float(found.low), float(found.high)


def beats(
    config: GateConfig, found: Comparison | None, parameters: tuple[int, int] | None
) -> Check:
    """Whether the challenger takes the champion's place.

    Args:
        config: The rule, and how sure one must be.
        found: None without a champion.
        parameters: Of challenger and champion.
    """
    if found is None or parameters is None:
        evidence = "there is no champion yet"
        return Check(name="better than the champion", holds=True, evidence=evidence, decision=HOLD)
    if config.rule == "superiority":
        holds = found.p_value <= config.significance and found.low > 0
        evidence = f"{found}, which must be at most {config.significance:g}"
        return Check(name="better than the champion", holds=holds, evidence=evidence, decision=HOLD)
    ours, theirs = parameters
    holds = ours < theirs and found.low > -config.margin
    evidence = (
        f"{ours:,} parameters against {theirs:,}, which must be more; {found}; the interval must "
        f"lie above {-config.margin:g}"
    )
    name = "smaller than the champion, and not worse"
    return Check(name=name, holds=holds, evidence=evidence, decision=HOLD)


def decide(checks: Sequence[Check]) -> str:
    """REJECT before HOLD before PROMOTE."""
    decisions = {check.decision for check in checks if not check.holds}
    return next((each for each in (REJECT, HOLD) if each in decisions), PROMOTE)
