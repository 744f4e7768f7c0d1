"""The decision of a promotion: is the challenger better than the champion, beyond chance?

Both were trained on several seeds and judged on the same validation images, so what tells them
apart are the images on which one is right and the other wrong. McNemar's exact test asks whether
these fall on the challenger's side more often than a fair coin would (McNemar 1947, in the exact
form of Edwards 1948; one-sided). Over several seeds an image counts several times, so besides the
interval around the gain has to leave out 0: a bootstrap of whole images, however often each counts
(Efron and Tibshirani 1993, percentiles). The challenger was the best of several candidates on
these images, so each of them has its part of the error that is allowed (Bonferroni). The seeds are
taken as they are, and so are the candidates: that a search chose them on the same images, from many
more, is not counted.

Averaging over seeds is what makes small gains visible: two trainings of one configuration differ
on as many images as those of two configurations (on MNIST 1.4 %).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sweeps.config import GateConfig

PROMOTE, HOLD, REJECT = "PROMOTE", "HOLD", "REJECT"
CONFIDENCE = 0.95  # of the interval around a test accuracy
RESAMPLES = 9_999

Correct = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Challenger against champion on the same images.

    Attributes:
        images: How many.
        seeds: Pairs of trainings that were compared.
        gained: Images, counted once a pair, that the challenger alone has right.
        lost: Those that the champion alone has right.
        gain: Of mean accuracy, a fraction; negative where the challenger is worse.
        low: Lower end of the bootstrap interval around the gain.
        high: Upper end.
        p_value: Of McNemar's exact test against the challenger being no better.
        significance: That this must not exceed, and that lies outside of the interval on each side.
    """

    images: int
    seeds: int
    gained: int
    lost: int
    gain: float
    low: float
    high: float
    p_value: float
    significance: float

    @property
    def effect(self) -> str:
        """The gain and what surrounds it, in words."""
        each = f", {self.seeds} seeds each" if self.seeds > 1 else ""
        return (
            f"{self.gain:+.4f} ({100 * (1 - 2 * self.significance):.3g} % interval "
            f"{self.low:+.4f} to {self.high:+.4f}) on {self.images:,} validation images{each}: "
            f"{self.gained} gained, {self.lost} lost"
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


def compare(
    challenger: Correct, champion: Correct, significance: float, *, doubt: int = 0
) -> Comparison:
    """Compares two models on the same images.

    Args:
        challenger: `[seeds, n]` or `[n]`, whether each prediction is right.
        champion: Likewise, of the same images in the same order.
        significance: Chance to find a model better that is not, in (0, 0.5).
        doubt: Images that the interval counts as gained, and as lost, besides: of a few hundred
            that were not lost it would say that none could ever be.
    """
    ours, theirs = np.atleast_2d(challenger), np.atleast_2d(champion)
    seeds = min(len(ours), len(theirs))
    gained = int(np.sum(ours[:seeds] & ~theirs[:seeds]))
    lost = int(np.sum(theirs[:seeds] & ~ours[:seeds]))
    # In whole numbers, so that a tie is exactly 0.
    whole = len(ours) * len(theirs)
    gains = ours.sum(axis=0) * len(theirs) - theirs.sum(axis=0) * len(ours)
    low, high = _interval_of_mean(np.append(gains, [whole, -whole] * doubt), 1 - 2 * significance)
    return Comparison(
        images=len(gains),
        seeds=seeds,
        gained=gained,
        lost=lost,
        gain=float(gains.mean() / whole),
        low=low / whole,
        high=high / whole,
        p_value=mcnemar(gained, lost),
        significance=significance,
    )


def _interval_of_mean(gains: npt.NDArray[np.int_], confidence: float) -> tuple[float, float]:
    """Percentiles: gains have few values, so a resample is how often each of them was drawn."""
    values, counts = np.unique(gains, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(gains), counts / len(gains), RESAMPLES)
    ends = (1 - confidence) / 2, (1 + confidence) / 2
    low, high = np.quantile(drawn @ values / len(gains), ends)
    return float(low), float(high)


def mcnemar(gained: int, lost: int) -> float:
    """Chance of so many gained images, or more, among those that differ, if a coin decided."""
    if not gained + lost:
        return 1.0
    from scipy.stats import binomtest  # takes a second

    return float(binomtest(gained, gained + lost, alternative="greater").pvalue)


def interval(accuracy: float, images: int) -> tuple[float, float]:
    """Wilson's interval around an accuracy (Wilson 1927)."""
    from scipy.stats import binomtest

    found = binomtest(round(accuracy * images), images).proportion_ci(CONFIDENCE, "wilson")
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
        holds = found.p_value <= found.significance and found.low > 0
        evidence = (
            f"{found.effect}; McNemar's exact test p = {found.p_value:.2g}, at most "
            f"{found.significance:.3g} asked{_share(config.significance, found.significance)}"
        )
        return Check(name="better than the champion", holds=holds, evidence=evidence, decision=HOLD)
    ours, theirs = parameters
    holds = ours < theirs and found.low > -config.margin
    evidence = (
        f"{ours:,} parameters, the champion has {theirs:,}; {found.effect}; an interval above "
        f"{-config.margin:g} asked"
    )
    name = "smaller than the champion, and not worse"
    return Check(name=name, holds=holds, evidence=evidence, decision=HOLD)


def _share(whole: float, part: float) -> str:
    candidates = round(whole / part)
    return f" ({whole:g} shared by {candidates} candidates)" if candidates > 1 else ""


def decide(checks: Sequence[Check]) -> str:
    """REJECT before HOLD before PROMOTE."""
    decisions = {check.decision for check in checks if not check.holds}
    return next((each for each in (REJECT, HOLD) if each in decisions), PROMOTE)
