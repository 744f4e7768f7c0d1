"""What is asked of a challenger, and answered: its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sweeps.candidates import Retrained
from sweeps.config import GateConfig
from sweeps.gate import HOLD, REJECT, Check, Comparison, Correct, beats, compare, decide
from sweeps.judge import Judgement
from sweeps.verdict import Challenge, Verdict, describe_test

if TYPE_CHECKING:  # or MLflow is imported
    from pipeline.registry import Version
    from pipeline.store import Recorded


def reach_verdict(challenge: Challenge, name: str, gate: GateConfig) -> Verdict:
    """Asks what a champion must be, and compares the challenger with who is champion now."""
    from pipeline.registry import version_of

    champion, comparison = version_of(name), None
    checks = _checks_alone(challenge.judgement, gate)
    if challenge.finalist:
        candidates = sum(bool(found.runs) for found in challenge.retrained)
        significance = gate.significance / candidates
        comparison, check = _against(challenge.finalist, champion, gate, significance)
        checks.append(check)
    return Verdict(
        decision=decide(checks),
        name=name,
        challenge=challenge,
        champion=champion,
        comparison=comparison,
        checks=checks,
    )


def _checks_alone(judgement: Judgement, gate: GateConfig) -> list[Check]:
    """What is asked of the challenger, whoever is champion."""
    evidence = judgement.problem or (
        f"loaded in a clean process, it answers {judgement.images:,} validation images as recorded"
    )
    served = Check(
        name="serves what was recorded",
        holds=not judgement.problem,
        evidence=evidence,
        decision=REJECT,
    )
    if judgement.looked is None:
        return [served]
    floor = Check(
        name="good enough",
        holds=judgement.looked.accuracy >= gate.floor,
        evidence=f"test accuracy {describe_test(judgement.looked)}, at least {gate.floor:g} asked",
        decision=REJECT,
    )
    return [served, floor]


def _against(
    finalist: Retrained, champion: Version | None, gate: GateConfig, significance: float
) -> tuple[Comparison | None, Check]:
    """The finalist's trainings against the champion's."""
    from pipeline.store import read_run

    if champion is None:
        return None, beats(gate, None, None)
    anew = "promote to another name=, or delete this alias in MLflow to begin anew"
    try:
        reigning = read_run(champion.run_id)
    except ValueError:  # deleted for good
        return None, _incomparable(f"the run of {champion} is not there any more: {anew}")
    run = finalist.median[1]
    if run.validation != reigning.validation:
        return None, _incomparable(
            f"{champion} was judged on other validation images; promote to another name=, or "
            "search with its data.split_seed and data.validation_size"
        )
    ours = _correct(list(finalist.runs.values()))
    theirs = _correct(_trainings_of(reigning, champion.name))
    if ours is None or theirs is None:
        return None, _incomparable(f"the predictions of {champion} are not there any more: {anew}")
    doubt = 1 if gate.rule == "non_inferiority" else 0  # shown by what is not there: losses
    found = compare(ours, theirs, significance, doubt=doubt)
    sizes = int(run.metrics["parameters"]), int(reigning.metrics["parameters"])
    return found, beats(gate, found, sizes)


def _incomparable(reason: str) -> Check:
    return Check(name="comparable", holds=False, evidence=reason, decision=HOLD)


def _trainings_of(run: Recorded, name: str) -> list[Recorded]:
    """The champion's run and those of its configuration on other seeds, by their seeds."""
    from pipeline.store import search

    condition = (
        f"tags.retrains = '{run.tags.get('retrains', '')}' and "
        f"tags.`promotion.model` = '{name}' and attributes.status = 'FINISHED'"
    )
    found = [each for each in search(condition) if each.validation == run.validation]
    return sorted(found, key=lambda each: int(each.tags["retrained.seed"])) or [run]


def _correct(runs: Sequence[Recorded]) -> Correct | None:
    """`[seeds, n]`, whether the predictions that are there are right; None where none are."""
    from pipeline.store import read_predictions

    found = [predicted.correct for run in runs if (predicted := read_predictions(run))]
    return np.array(found) if found else None
