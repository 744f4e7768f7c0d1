"""The decision of a promotion: known values, oracles, properties, and where each rule ends."""

from dataclasses import replace
from fractions import Fraction
from functools import cache
from math import comb, nextafter, sqrt

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.proportion import proportion_confint

from sweeps.config import RULES, GateConfig
from sweeps.gate import (
    HOLD,
    PROMOTE,
    REJECT,
    Check,
    Comparison,
    beats,
    compare,
    decide,
    interval,
    mcnemar,
)

Correct = npt.NDArray[np.bool_]

COUNTS = st.integers(0, 300)


def pair(both: int, gained: int, lost: int, none: int = 0) -> tuple[Correct, Correct]:
    """Challenger and champion, by the numbers of images that both, one alone, or none has right."""
    counts = [both, gained, lost, none]
    challenger = np.repeat([True, True, False, False], counts)
    champion = np.repeat([True, False, True, False], counts)
    return challenger, champion


def gate(**changes: object) -> GateConfig:
    """As `conf/promote.yaml` has it, but for what is given."""
    usual = GateConfig(
        top=3, seeds=[1, 2, 3], rule="superiority", significance=0.05, margin=0.002, floor=0.95
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def found(**changes: float) -> Comparison:
    """A comparison that the challenger wins, but for what is given."""
    won = Comparison(
        images=10_000,
        seeds=1,
        gained=90,
        lost=50,
        gain=0.004,
        low=0.002,
        high=0.006,
        p_value=0.0004,
        significance=0.05,
    )
    return replace(won, **changes)  # type: ignore[arg-type]


# --- McNemar's exact test ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("gained", "lost", "two_sided"),
    [
        (9, 2, 0.06543),  # vignette of R's exact2x2 (Fay 2016)
        (7, 1, 0.0703125),  # Bentur et al. 2009, in Fagerland, Lydersen and Laake 2013
        (150, 86, 3.716e-05),  # approval of a prime minister, Agresti 1990
    ],
)
def test_the_p_value_is_half_the_published_two_sided_one(
    gained: int, lost: int, two_sided: float
) -> None:
    assert 2 * mcnemar(gained, lost) == pytest.approx(two_sided, rel=1e-3)


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (0, 0, 1),
        (1, 0, 1 / 2),
        (0, 1, 1),
        (1, 1, 3 / 4),
        (4, 0, 1 / 16),
        (5, 0, 1 / 32),
        (0, 5, 1),
        (8, 2, 56 / 1024),
        (9, 1, 11 / 1024),
    ],
)
def test_the_p_value_of_a_few_images_is_that_of_a_coin(
    gained: int, lost: int, p_value: float
) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p_value, rel=1e-12)


@given(COUNTS, COUNTS)
def test_the_p_value_is_the_sum_of_the_coins_outcomes(gained: int, lost: int) -> None:
    tosses = gained + lost
    outcomes = sum(comb(tosses, heads) for heads in range(gained, tosses + 1))

    assert mcnemar(gained, lost) == pytest.approx(float(Fraction(outcomes, 2**tosses)), rel=1e-9)


@given(COUNTS, COUNTS)
def test_the_smaller_of_both_sides_doubled_is_the_two_sided_test_of_statsmodels(
    one: int, other: int
) -> None:
    reference = reference_mcnemar([[0, one], [other, 0]], exact=True).pvalue

    doubled = 2 * min(mcnemar(one, other), mcnemar(other, one))

    assert min(1.0, doubled) == pytest.approx(reference, rel=1e-9)


@given(COUNTS, COUNTS)
def test_both_sides_share_nothing_but_what_was_seen(gained: int, lost: int) -> None:
    seen = stats.binom.pmf(gained, gained + lost, 0.5)

    assert mcnemar(gained, lost) + mcnemar(lost, gained) == pytest.approx(1 + seen)


@given(COUNTS, COUNTS)
def test_an_image_gained_never_raises_the_p_value_and_one_lost_never_lowers_it(
    gained: int, lost: int
) -> None:
    p_value = mcnemar(gained, lost)

    assert mcnemar(gained + 1, lost) <= p_value <= mcnemar(gained, lost + 1)


# --- the comparison ----------------------------------------------------------------------


def exact_quantile(images: int, gained: int, lost: int, level: float) -> float:
    """Of the gain in all resamples of the images, by the sum over what differs in them."""
    differing = np.arange(images + 1)
    weights = stats.binom.pmf(differing, images, (gained + lost) / images)
    likely = weights > 1e-12
    differing, weights = differing[likely], weights[likely]
    share = gained / (gained + lost)

    def reached(gain: int) -> float:  # chance of so many images more than lost, or fewer
        of_them = np.floor((differing + gain) / 2)
        return float((weights * stats.binom.cdf(of_them, differing, share)).sum())

    return next(gain for gain in range(-images, images + 1) if reached(gain) >= level) / images


Counts = tuple[int, int, int, int]
LARGE: list[Counts] = [(9_800, 85, 50, 65), (9_800, 20, 120, 60)]
SMALL: list[Counts] = [(950, 20, 20, 10), (330, 12, 6, 12)]


@cache  # of 10,000 images, one takes a second
def compared(counts: Counts, significance: float = 0.05) -> Comparison:
    return compare(*pair(*counts), significance)


@pytest.mark.parametrize(
    ("counts", "significance"),
    [*((each, 0.05) for each in [*LARGE, *SMALL]), *((each, 0.2) for each in SMALL)],
    ids=str,
)
def test_the_interval_is_that_of_all_resamples_to_an_image_or_two(
    counts: Counts, significance: float
) -> None:
    _, gained, lost, _ = counts
    images = sum(counts)

    comparison = compared(counts, significance)

    low = exact_quantile(images, gained, lost, significance)
    high = exact_quantile(images, gained, lost, 1 - significance)
    assert comparison.low == pytest.approx(low, abs=1.6 / images)
    assert comparison.high == pytest.approx(high, abs=1.6 / images)


@pytest.mark.parametrize("counts", LARGE, ids=str)
def test_the_interval_of_many_images_is_that_of_the_normal_distribution(counts: Counts) -> None:
    _, gained, lost, _ = counts
    images, gain = sum(counts), (gained - lost) / sum(counts)
    error = sqrt((gained + lost) / images - gain**2) / sqrt(images)

    comparison = compared(counts)

    assert comparison.low == pytest.approx(gain - 1.645 * error, abs=1.6 / images)
    assert comparison.high == pytest.approx(gain + 1.645 * error, abs=1.6 / images)


def test_the_interval_is_that_of_scipys_bootstrap_of_the_images() -> None:
    challenger, champion = pair(330, 14, 5, 11)
    gains = challenger.astype(float) - champion

    comparison = compare(challenger, champion, 0.05)

    reference = stats.bootstrap(
        (gains,), np.mean, confidence_level=0.9, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert comparison.low == pytest.approx(reference.low, abs=1.1 / 360)
    assert comparison.high == pytest.approx(reference.high, abs=1.1 / 360)


@pytest.mark.parametrize(
    ("significance", "told"), [(0.05, "90 %"), (0.05 / 3, "96.7 %"), (0.25, "50 %")]
)
def test_the_interval_leaves_out_on_either_side_what_the_test_may_err(
    significance: float, told: str
) -> None:
    comparison = compare(*pair(300, 14, 5, 11), significance)

    assert comparison.significance == significance
    assert f"({told} interval " in comparison.effect


def test_a_comparison_is_the_same_again() -> None:
    models = pair(300, 14, 5, 11)

    assert compare(*models, 0.05) == compare(*models, 0.05)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 120), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_a_comparison_counts_and_its_interval_holds_the_gain(
    both: int, gained: int, lost: int, none: int
) -> None:
    challenger, champion = pair(both + 1, gained, lost, none)

    comparison = compare(challenger, champion, 0.05)

    assert comparison.images == both + 1 + gained + lost + none
    assert (comparison.seeds, comparison.gained, comparison.lost) == (1, gained, lost)
    assert comparison.gain == pytest.approx(challenger.mean() - champion.mean(), abs=1e-12)
    assert comparison.low <= comparison.gain + 1e-12
    assert comparison.high >= comparison.gain - 1e-12
    assert comparison.p_value == mcnemar(gained, lost)


@settings(max_examples=40, deadline=None)
@given(st.integers(60, 120), st.integers(0, 40), st.integers(0, 40))
def test_seen_from_the_champion_the_comparison_is_reversed(
    both: int, gained: int, lost: int
) -> None:
    challenger, champion = pair(both, gained, lost)

    ours, theirs = compare(challenger, champion, 0.05), compare(champion, challenger, 0.05)

    assert (ours.gained, ours.lost) == (theirs.lost, theirs.gained)
    assert ours.gain == pytest.approx(-theirs.gain)
    assert ours.low == pytest.approx(-theirs.high, abs=1.1 / len(champion))


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(90)))
def test_the_order_of_the_images_does_not_matter(order: list[int]) -> None:
    challenger, champion = pair(60, 12, 6, 12)

    ordered = compare(challenger, champion, 0.05)
    shuffled = compare(challenger[order], champion[order], 0.05)

    assert replace(shuffled, low=ordered.low, high=ordered.high, gain=ordered.gain) == ordered
    assert shuffled.gain == pytest.approx(ordered.gain)
    assert shuffled.low == pytest.approx(ordered.low, abs=1.1 / 90)  # resampling
    assert shuffled.high == pytest.approx(ordered.high, abs=1.1 / 90)


def test_a_comparison_reads_as_a_sentence() -> None:
    assert found(gain=-0.0031, low=-0.00456, high=-0.0016, p_value=0.999).effect == (
        "-0.0031 (90 % interval -0.0046 to -0.0016) on 10,000 validation images: 90 gained, 50 lost"
    )
    several = replace(found(), seeds=5).effect
    assert "on 10,000 validation images, 5 seeds each: 90 gained" in several


# --- several seeds -----------------------------------------------------------------------


def trained(seeds: int, images: int = 200, seed: int = 0, right: float = 0.9) -> Correct:
    """Trainings of one configuration, `[seeds, images]`."""
    return np.random.default_rng(seed).random((seeds, images)) < right


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(2, 60), st.integers(0, 2**32 - 2))
def test_of_several_seeds_the_gain_is_that_of_the_mean_accuracies(
    seeds: int, images: int, seed: int
) -> None:
    ours, theirs = trained(seeds, images, seed), trained(seeds, images, seed + 1)

    comparison = compare(ours, theirs, 0.05)

    each = [mcnemar_counts(one, other) for one, other in zip(ours, theirs, strict=True)]
    assert (comparison.images, comparison.seeds) == (images, seeds)
    assert [comparison.gained, comparison.lost] == np.sum(each, axis=0).tolist()
    assert comparison.gain == pytest.approx(ours.mean() - theirs.mean(), abs=1e-12)
    assert comparison.gain == pytest.approx(
        (comparison.gained - comparison.lost) / (seeds * images), abs=1e-12
    )
    assert comparison.low <= comparison.gain + 1e-12
    assert comparison.high >= comparison.gain - 1e-12


def mcnemar_counts(ours: Correct, theirs: Correct) -> tuple[int, int]:
    return int(np.sum(ours & ~theirs)), int(np.sum(theirs & ~ours))


def test_of_several_seeds_the_interval_is_that_of_scipys_bootstrap_of_whole_images() -> None:
    ours, theirs = trained(5, right=0.93), trained(5, seed=1)
    gains = ours.mean(axis=0) - theirs.mean(axis=0)

    comparison = compare(ours, theirs, 0.05)

    reference = stats.bootstrap(
        (gains,), np.mean, confidence_level=0.9, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert comparison.low == pytest.approx(reference.low, abs=0.5 / 200)
    assert comparison.high == pytest.approx(reference.high, abs=0.5 / 200)


@pytest.mark.parametrize("seeds", [2, 5])
def test_a_model_given_several_times_is_no_more_certain(seeds: int) -> None:
    """The p-value is fooled by it, which is what the interval is for."""
    ours, theirs = pair(180, 10, 6, 4)

    once = compare(ours, theirs, 0.05)
    again = compare(np.stack([ours] * seeds), np.stack([theirs] * seeds), 0.05)

    assert again.p_value < once.p_value
    assert (again.gain, again.low, again.high) == pytest.approx((once.gain, once.low, once.high))
    assert not beats(gate(), again, (10, 10)).holds


@pytest.mark.parametrize(("ours", "theirs"), [(5, 1), (1, 5), (3, 2)])
def test_seeds_are_paired_as_far_as_there_are_two(ours: int, theirs: int) -> None:
    challenger, champion = trained(ours, right=0.93), trained(theirs, seed=1)

    comparison = compare(challenger, champion, 0.05)

    pairs = min(ours, theirs)
    assert comparison.seeds == pairs
    assert (comparison.gained, comparison.lost) == mcnemar_counts(
        challenger[:pairs], champion[:pairs]
    )
    assert comparison.gain == pytest.approx(challenger.mean() - champion.mean())


def test_a_single_model_needs_no_axis_of_seeds() -> None:
    ours, theirs = pair(180, 10, 6, 4)

    assert compare(ours, theirs, 0.05) == compare(ours[np.newaxis], theirs[np.newaxis], 0.05)


# --- Wilson's interval -------------------------------------------------------------------


@given(st.integers(1, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_around_an_accuracy_is_that_of_statsmodels(given_: tuple[int, int]) -> None:
    right, images = given_

    low, high = interval(right / images, images)

    reference = proportion_confint(right, images, alpha=0.05, method="wilson")
    assert (low, high) == pytest.approx(reference, abs=1e-9)
    assert 0 <= low <= right / images <= high <= 1


def test_the_interval_around_an_accuracy_is_known() -> None:
    """81 of 263: Newcombe 1998, table I."""
    assert interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@pytest.mark.parametrize(
    ("accuracy", "low", "high"), [(1.0, 0.9996, 1.0), (0.0, 0.0, 0.0004), (0.98, 0.9771, 0.9826)]
)
def test_the_interval_stays_within_what_an_accuracy_can_be(
    accuracy: float, low: float, high: float
) -> None:
    assert interval(accuracy, 10_000) == pytest.approx((low, high), abs=6e-5)


# --- superiority -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p_value", "low", "holds"),
    [
        (0.05, 0.0001, True),
        (nextafter(0.05, 1), 0.0001, False),
        (0.0, 0.0, False),
        (0.0, nextafter(0, 1), True),
        (0.0, -0.0001, False),
        (1.0, 0.0, False),
    ],
)
def test_superiority_asks_for_the_p_value_and_for_the_interval(
    p_value: float, low: float, holds: bool
) -> None:
    check = beats(gate(), found(p_value=p_value, low=low, significance=0.05), (10, 10))

    assert check.holds is holds
    assert check.decision == HOLD


@pytest.mark.parametrize("parameters", [(1, 10**9), (10, 10), (10**9, 1)])
def test_superiority_does_not_ask_for_the_size(parameters: tuple[int, int]) -> None:
    assert beats(gate(), found(), parameters).holds


@pytest.mark.parametrize("significance", [0.001, 0.01, 0.05, 0.2])
def test_models_that_answer_alike_are_not_better(significance: float) -> None:
    challenger, _ = pair(9_800, 0, 0, 200)

    comparison = compare(challenger, challenger, significance)

    assert (comparison.gain, comparison.p_value) == (0, 1)
    assert not beats(gate(), comparison, (10, 10)).holds


def test_the_evidence_of_superiority_has_the_figures_and_what_they_must_be() -> None:
    assert beats(gate(), found(), (10, 10)).evidence == (
        "+0.0040 (90 % interval +0.0020 to +0.0060) on 10,000 validation images: 90 gained, "
        "50 lost; McNemar's exact test p = 0.0004, at most 0.05 asked"
    )


def test_the_evidence_tells_whose_share_of_the_error_is_asked_for() -> None:
    shared = replace(found(), significance=0.05 / 3)

    evidence = beats(gate(), shared, (10, 10)).evidence

    assert evidence.endswith("at most 0.0167 asked (0.05 shared by 3 candidates)")


def test_the_share_of_the_error_decides_not_the_whole_of_it() -> None:
    """Of three candidates, each has a third."""
    third = found(p_value=0.03, significance=0.05 / 3)

    assert not beats(gate(significance=0.05), third, (10, 10)).holds


def least_gained(lost: int, significance: float) -> int:
    """The fewest images gained at which the test finds the challenger better."""
    return next(n for n in range(lost, 10 * lost + 50) if mcnemar(n, lost) <= significance)


@pytest.mark.parametrize("significance", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("lost", [0, 3, 20, 50])
def test_one_image_decides(lost: int, significance: float) -> None:
    gained = least_gained(lost, significance)

    enough = compare(*pair(900, gained, lost, 10), significance)
    less = compare(*pair(900, gained - 1, lost, 11), significance)

    assert beats(gate(), enough, (10, 10)).holds
    assert not beats(gate(), less, (10, 10)).holds


# --- non-inferiority ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "holds"), [((9, 10), True), ((10, 10), False), ((11, 10), False)]
)
def test_non_inferiority_asks_for_fewer_parameters(
    parameters: tuple[int, int], holds: bool
) -> None:
    config = gate(rule="non_inferiority")

    assert beats(config, found(gain=0.0, low=-0.001, p_value=0.5), parameters).holds is holds


@pytest.mark.parametrize(
    ("low", "margin", "holds"),
    [
        (-0.002, 0.002, False),
        (nextafter(-0.002, 0), 0.002, True),
        (-0.0021, 0.002, False),
        (0.0, 0.0, False),
        (0.0001, 0.0, True),
    ],
)
def test_non_inferiority_asks_for_an_interval_above_the_margin(
    low: float, margin: float, holds: bool
) -> None:
    config = gate(rule="non_inferiority", margin=margin)

    assert beats(config, found(low=low, p_value=1.0), (9, 10)).holds is holds


def test_the_evidence_of_non_inferiority_has_the_sizes_and_the_margin() -> None:
    config = gate(rule="non_inferiority", margin=0.002)

    check = beats(config, found(), (99_670, 669_706))

    assert check.name == "smaller than the champion, and not worse"
    assert check.decision == HOLD
    assert check.evidence.startswith("99,670 parameters, the champion has 669,706; +0.0")
    assert check.evidence.endswith("; an interval above -0.002 asked")


# --- the first champion, and the decision ------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_without_a_champion_there_is_nothing_to_beat(rule: str) -> None:
    check = beats(gate(rule=rule), None, None)

    assert check.holds
    assert check.evidence == "there is no champion yet"


def check(decision: str, holds: bool) -> Check:
    return Check(name="asked", holds=holds, evidence="seen", decision=decision)


@pytest.mark.parametrize(
    ("failing", "decision"),
    [
        ([], PROMOTE),
        ([HOLD], HOLD),
        ([REJECT], REJECT),
        ([HOLD, REJECT], REJECT),
        ([REJECT, HOLD], REJECT),
        ([HOLD, HOLD], HOLD),
    ],
)
def test_a_rejection_comes_before_a_hold_before_a_promotion(
    failing: list[str], decision: str
) -> None:
    held = [check(REJECT, True), check(HOLD, True)]

    assert decide([*held, *(check(each, False) for each in failing)]) == decision
    assert decide([*(check(each, False) for each in failing), *held]) == decision
