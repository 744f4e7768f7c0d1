"""What a reader is told of a promotion: each decision, the luck, the evidence, the card."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from io import StringIO
from typing import Any

import hydra
import numpy as np
import pytest

from pipeline.compose import CONF, to_config
from pipeline.config import RunConfig, without_password
from pipeline.console import open_console
from pipeline.registry import Version
from pipeline.store import Recorded
from sweeps.candidates import Candidate, Retrained, Source
from sweeps.config import GateConfig
from sweeps.gate import CONFIDENCE, HOLD, PROMOTE, REJECT, Check, beats, compare, interval
from sweeps.judge import Judgement
from sweeps.judge import Test as Look  # or pytest takes it for a test
from sweeps.trial import METRICS
from sweeps.verdict import (
    LIMITS,
    Challenge,
    Verdict,
    as_json,
    as_markdown,
    candidates_table,
    describe_test,
    headline,
    lines,
    luck,
    model_card,
    seeds_figure,
)

STARTED = datetime(2026, 1, 1, tzinfo=UTC)
DIGEST = "f25a73" + "0" * 58
COMMAND = "python -m sweeps.promote sweep.name=small"
FRESH = (0.9788, 0.9758, 0.9750, 0.9757, 0.9756)
RIGHT = "serves what was recorded"


def composed() -> RunConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        overrides = ["data=mnist", "data.path=/data/mnist.npz", "model.hidden_units=110"]
        return to_config(hydra.compose("run", overrides))


CONFIG = composed()


def run_of(
    value: float,
    *,
    run_id: str = "a1b2",
    objective: str = "val_accuracy",
    seed: int = 0,
    **tags: str,
) -> Recorded:
    command = f"python -m pipeline.run data=mnist model.hidden_units=110 seed={seed}"
    return Recorded(
        run_id=run_id,
        name=f"run {run_id}",
        experiment_id="1",
        parent=None,
        status="FINISHED",
        started=STARTED,
        seconds=20.0,
        params={},
        metrics={
            "saved_val_accuracy": 0.9757,
            METRICS[objective]: value,
            "parameters": 99_670.0,
        },
        tags={"command": command, "data.sha256": DIGEST, **tags},
        artifacts="",
        validation=(DIGEST[:8], 10_000),
    )


def retrained(
    searched: float,
    fresh: Sequence[float] = FRESH,
    *,
    trial: str = "5",
    objective: str = "val_accuracy",
    failures: Mapping[int, str] | None = None,
) -> Retrained:
    run = run_of(searched, run_id=f"search{trial}", objective=objective, trial=trial)
    return Retrained(
        candidate=Candidate(run=run, config=CONFIG, objective=objective),
        runs={
            seed: run_of(value, run_id=f"fresh{trial}-{seed}", objective=objective, seed=seed)
            for seed, value in enumerate(fresh, start=1001)
        },
        failures=failures or {},
    )


FINALIST = retrained(0.9764)
OTHER = retrained(0.9729, (0.9741, 0.9731, 0.9735, 0.9746, 0.9751), trial="3")
BROKEN = retrained(0.9720, (0.9684,), trial="2", failures={1002: "the loss is not finite"})
TEST = Look(accuracy=0.9745, images=10_000, look=3)
JUDGED = Judgement(problem="", images=10_000, example=(7, 2, 1), looked=TEST)
GATE = GateConfig(
    top=3, seeds=[1001], rule="superiority", significance=0.05, margin=0.002, floor=0.95
)


def version(number: int) -> Version:
    return Version(
        name="mnist", number=number, run_id="c0ffee", aliases=(), tags={}, created=STARTED
    )


def challenge(
    *candidates: Retrained,
    finalist: Retrained | None = FINALIST,
    judgement: Judgement = JUDGED,
    command: str = COMMAND,
) -> Challenge:
    sweep = replace(run_of(0.0, run_id="5eeb"), tags={"kind": "sweep", "sweep": "small"})
    source = Source(run=sweep, title="sweep small", objective="val_accuracy", best=[])
    return Challenge(
        source=source,
        retrained=candidates or (FINALIST, OTHER, BROKEN),
        finalist=finalist,
        judgement=judgement,
        command=command,
    )


SERVED = Check(name=RIGHT, holds=True, evidence="it answers as recorded", decision=REJECT)
UNSERVED = replace(SERVED, holds=False, evidence="it predicts 7 images otherwise")
GAINED = compare(  # of 200 images, quick to resample
    np.repeat([True, True, False, False], [150, 24, 6, 20]),
    np.repeat([True, False, True, False], [150, 24, 6, 20]),
    0.05,
)
LOST = compare(
    np.repeat([True, True, False, False], [150, 6, 24, 20]),
    np.repeat([True, False, True, False], [150, 6, 24, 20]),
    0.05,
)


def first() -> Verdict:
    """The first champion."""
    return Verdict(
        decision=PROMOTE,
        name="mnist",
        challenge=challenge(),
        champion=None,
        comparison=None,
        checks=[SERVED, beats(GATE, None, None)],
    )


def better() -> Verdict:
    """It takes a champion's place."""
    return replace(
        first(),
        champion=version(3),
        comparison=GAINED,
        checks=[SERVED, beats(GATE, GAINED, (10, 10))],
    )


def worse() -> Verdict:
    return replace(
        better(),
        decision=HOLD,
        comparison=LOST,
        checks=[SERVED, beats(GATE, LOST, (10, 10))],
    )


def rejected() -> Verdict:
    """It does not serve what was recorded: nothing was looked at."""
    problem = Judgement(problem=UNSERVED.evidence)
    return replace(
        first(), decision=REJECT, challenge=challenge(judgement=problem), checks=[UNSERVED]
    )


def nobody() -> Verdict:
    """A seed of each candidate failed."""
    problem = Judgement(problem="a seed of each candidate failed")
    nobody_left = challenge(BROKEN, finalist=None, judgement=problem)
    return replace(rejected(), challenge=nobody_left, champion=version(3))


VERDICTS = [(first, version(1)), (better, version(4)), (worse, version(4)), (rejected, None)]
ALL = [*VERDICTS, (nobody, None)]


# --- the decision in a line --------------------------------------------------------------


def test_the_headline_of_a_first_champion_names_it_and_its_seed() -> None:
    assert headline(first(), version(1)) == (
        "PROMOTE: mnist version 1 (trial 5, seed 1004) is the champion, its first"
    )


def test_the_headline_of_a_replacement_names_both() -> None:
    assert headline(better(), version(4)) == (
        "PROMOTE: mnist version 4 (trial 5, seed 1004) is the champion, in place of version 3"
    )


def test_the_headline_of_a_hold_says_who_stays_and_whether_the_challenger_is_worse() -> None:
    unclear = replace(worse(), comparison=None)

    held = "HOLD: mnist version 3 stays champion; the challenger was trial 5, seed 1004"
    assert headline(unclear, version(4)) == held
    assert headline(worse(), version(4)) == f"{held}, which is worse"


def test_the_headline_of_a_rejection_says_that_there_is_no_champion_where_there_is_none() -> None:
    assert headline(rejected(), None) == (
        "REJECT: mnist still has no champion; the challenger was trial 5, seed 1004"
    )


def test_the_headline_says_when_no_candidate_is_left() -> None:
    assert headline(nobody(), None) == (
        "REJECT: mnist version 3 stays champion; no candidate is left"
    )


def test_the_challenger_is_the_median_run_not_the_best() -> None:
    found = challenge()

    assert found.seed == 1004
    assert found.run is FINALIST.runs[1004]
    assert challenge(finalist=None).run is None


def test_each_check_is_a_line_with_its_answer() -> None:
    assert lines(replace(first(), checks=[SERVED, UNSERVED])) == [
        f"yes  {RIGHT}: it answers as recorded",
        f"NO   {RIGHT}: it predicts 7 images otherwise",
    ]


# --- the luck ----------------------------------------------------------------------------


def test_the_luck_of_a_search_is_what_fresh_seeds_do_not_confirm() -> None:
    assert luck(retrained(0.9800, (0.9780, 0.9760, 0.9770))) == (
        "The search's best, trial 5, had val_accuracy 0.9800; on 3 fresh seeds it has 0.9770 "
        "±0.0010 on average: 0.0030 of it was luck."
    )


def test_fresh_seeds_that_are_better_show_no_luck() -> None:
    assert luck(retrained(0.9729, (0.9741, 0.9751))).endswith(
        "on 2 fresh seeds it has 0.9746 ±0.0007 on average: none of it was luck."
    )


def test_fresh_seeds_that_are_alike_show_no_luck() -> None:
    assert luck(retrained(0.5, (0.5, 0.5))).endswith(": none of it was luck.")


@pytest.mark.parametrize(
    ("searched", "fresh", "told"),
    [(0.07, 0.09, "0.0200 of it was luck."), (0.09, 0.07, "none of it was luck.")],
)
def test_the_luck_of_a_loss_is_that_it_was_lower(searched: float, fresh: float, told: str) -> None:
    assert luck(retrained(searched, (fresh, fresh), objective="val_loss")).endswith(told)


def test_a_single_seed_has_no_spread() -> None:
    told = luck(retrained(0.98, (0.97,)))

    assert "it has 0.9700 on average" in told
    assert "±" not in told


def test_the_table_has_a_row_a_candidate_and_says_what_failed() -> None:
    shown = StringIO()

    open_console(shown).print(candidates_table([FINALIST, OTHER, BROKEN]))

    heading, *rows = shown.getvalue().splitlines()
    assert re.split(r" {2,}", heading.strip()) == [
        "candidate",
        "searched val_accuracy",
        "fresh seeds",
        "luck",
        "each seed",
    ]
    assert re.split(r" {2,}", rows[0].strip()) == [
        "trial 5",
        "0.9764",
        "0.9762 ±0.0015",
        "+0.0002",
        "0.9788, 0.9758, 0.9750, 0.9757, 0.9756",
    ]
    assert rows[2].endswith("0.9684, seed 1002 failed: the loss is not finite")
    assert len(rows) == 3


# --- for the ledger ----------------------------------------------------------------------


def test_the_evidence_for_the_ledger_is_one_line_with_gain_and_test() -> None:
    assert first().evidence == "the first champion; test 0.9745 (look 3)"
    assert re.fullmatch(
        r"\+0\.0900 \(\+0\.0\d{3} to \+0\.1\d{3}\), p 0\.0007\d?; test 0\.9745 \(look 3\)",
        better().evidence,
    )


def test_the_evidence_says_when_the_champion_could_not_be_compared_with() -> None:
    assert replace(better(), comparison=None).evidence.startswith("not comparable; test ")
    assert rejected().evidence == "the first champion"


# --- for programs ------------------------------------------------------------------------


def numbers_in(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [number for each in inner for number in numbers_in(each)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize(("verdict", "registered"), ALL)
def test_the_json_has_all_evidence_and_finite_numbers(
    verdict: Any, registered: Version | None
) -> None:
    given = verdict()

    record = json.loads(as_json(given, registered))

    assert all(math.isfinite(number) for number in numbers_in(record))
    assert record["decision"] == given.decision
    assert record["version"] == (registered and registered.number)
    assert record["champion"] == (given.champion and given.champion.number)
    assert record["checks"] == [asdict(check) for check in given.checks]
    assert record["comparison"] == (given.comparison and asdict(given.comparison))
    assert record["seed"] == given.challenge.seed
    assert record["command"] == COMMAND
    assert len(record["candidates"]) == len(given.challenge.retrained)


def test_the_json_tells_which_runs_decided() -> None:
    record = json.loads(as_json(better(), version(4)))

    assert record["model"] == "mnist"
    assert record["source"] == {"title": "sweep small", "run_id": "5eeb"}
    assert record["objective"] == "val_accuracy"
    assert (record["finalist"], record["challenger"]) == ("search5", "fresh5-1004")
    assert record["candidates"][0]["seeds"]["1004"] == {"run_id": "fresh5-1004", "value": 0.9757}
    assert record["candidates"][0]["mean"] == pytest.approx(np.mean(FRESH))
    assert record["candidates"][0]["standard_deviation"] == pytest.approx(np.std(FRESH, ddof=1))
    assert record["candidates"][0]["luck"] == pytest.approx(0.9764 - np.mean(FRESH))
    assert record["candidates"][2]["failures"] == {"1002": "the loss is not finite"}
    assert record["test"] == {
        "accuracy": 0.9745,
        "images": 10_000,
        "look": 3,
        "interval": list(interval(0.9745, 10_000)),
    }


def test_the_json_of_a_candidate_whose_seeds_all_failed_has_no_numbers() -> None:
    failed = retrained(0.97, (), failures={1001: "the loss is not finite"})
    given = replace(nobody(), challenge=challenge(failed, finalist=None))

    record = json.loads(as_json(given, None))

    assert record["candidates"][0]["mean"] is None
    assert record["candidates"][0]["luck"] is None
    assert (record["finalist"], record["challenger"], record["seed"]) == (None, None, None)


# --- for the UI --------------------------------------------------------------------------


@pytest.mark.parametrize(("verdict", "registered"), ALL)
def test_the_markdown_has_the_decision_each_check_and_each_candidate(
    verdict: Any, registered: Version | None
) -> None:
    given = verdict()

    text = as_markdown(given, registered)

    assert text.startswith(f"**{headline(given, registered)}**")
    assert all(f"- {line}\n" in f"{text}\n" for line in lines(given))
    assert all(f"| {found.candidate.title} |" in text for found in given.challenge.retrained)
    assert luck(given.challenge.retrained[0]) in text
    assert text.endswith(f"Repeat: `{COMMAND}`")


def test_the_markdown_of_a_candidate_whose_seeds_all_failed_tells_of_no_luck() -> None:
    failed = retrained(0.97, (), failures={1001: "the loss is not finite"})
    given = replace(nobody(), challenge=challenge(failed, finalist=None))

    text = as_markdown(given, None)

    assert "seed 1001 failed: the loss is not finite" in text
    assert "luck." not in text


def test_each_row_of_the_markdowns_table_has_as_many_cells_as_its_heading() -> None:
    table = [line for line in as_markdown(better(), version(4)).splitlines() if line[:1] == "|"]

    assert len(table) == 5
    assert {line.count("|") for line in table} == {6}


# --- the card of the model ---------------------------------------------------------------


@pytest.mark.parametrize(("verdict", "registered"), VERDICTS[:3])
def test_the_card_has_what_whoever_uses_the_model_should_know(
    verdict: Any, registered: Version
) -> None:
    given = verdict()
    low, high = interval(0.9757, 10_000)

    card = model_card(given)

    assert (
        f"- validation accuracy 0.9757 ({100 * CONFIDENCE:g} % interval {low:.4f} to {high:.4f}, "
        "10,000 images)"
    ) in card
    assert f"- test accuracy {describe_test(TEST)}" in card
    assert ("- over the seeds 1001, 1002, 1003, 1004, 1005: val_accuracy 0.9762 ±0.0015") in card
    assert "- 99,670 parameters" in card
    assert "run `fresh5-1004`, seed 1004, of trial 5 of sweep small" in card
    assert f"- data `mnist`, SHA-256 `{DIGEST}`" in card
    assert "- repeat: `python -m pipeline.run data=mnist model.hidden_units=110 seed=1004`" in card
    assert f"- promoted by: `{COMMAND}`" in card
    assert all(f"- {line}\n" in card for line in lines(given))
    assert all(limit in card for limit in LIMITS)


def test_the_card_has_each_setting_that_decides_what_was_trained() -> None:
    card = model_card(first())

    for section in (CONFIG.model, CONFIG.optimizer, CONFIG.training):
        for name in asdict(section):
            assert f".{name}` | " in card
    assert "| `model.hidden_units` | 110 |" in card
    assert f"| `optimizer.learning_rate` | {CONFIG.optimizer.learning_rate} |" in card
    assert f"| `data.split_seed` | {CONFIG.data.split_seed} |" in card


def test_a_card_has_its_sections_in_order() -> None:
    headings = re.findall(r"^## (.*)$", model_card(first()), re.MULTILINE)

    assert headings == ["Metrics", "Evidence", "Origin", "Limits", "Settings"]


def test_the_card_of_a_model_of_a_single_seed_has_no_spread() -> None:
    alone = retrained(0.98, (0.97,))

    card = model_card(replace(first(), challenge=challenge(alone, finalist=alone)))

    assert "- over the seeds 1001: val_accuracy 0.9700\n" in card


def test_the_test_accuracy_comes_with_its_interval_and_the_number_of_the_look() -> None:
    assert describe_test(TEST) == (
        "0.9745 (95 % interval 0.9712 to 0.9774, 10,000 images, look 3 at this test split)"
    )


def test_no_text_adds_to_the_commands_it_was_given_what_these_had_hidden() -> None:
    command = without_password(
        "python -m sweeps.promote tracking.uri=postgresql+psycopg://me:secret@db/runs"
    )
    given = replace(better(), challenge=challenge(command=command))

    texts = [
        model_card(given),
        as_json(given, version(4)),
        as_markdown(given, version(4)),
        *lines(given),
    ]

    assert [text for text in texts if "secret" in text] == []
    assert all("me:***@db" in text for text in texts[:3])


# --- the figure --------------------------------------------------------------------------


def test_the_figure_has_of_each_candidate_what_was_searched_and_each_seed() -> None:
    candidates = [FINALIST, OTHER, BROKEN]

    (axes,) = seeds_figure(candidates).axes

    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "trial 5",
        "trial 3",
        "trial 2",
    ]
    assert axes.get_xlabel() == "val_accuracy"
    points = [tuple(np.asarray(line.get_xdata())) for line in axes.lines]
    for found in candidates:
        assert (found.candidate.value(found.candidate.run),) in points
        assert tuple(found.values) in points
        assert (found.mean,) in points


def test_the_figure_explains_its_marks_once() -> None:
    (legend,) = seeds_figure([FINALIST, OTHER]).legends

    assert [text.get_text() for text in legend.get_texts()] == [
        "in the search",
        "on a fresh seed",
        "their mean",
    ]


def test_the_figure_shows_a_candidate_whose_seeds_all_failed() -> None:
    failed = retrained(0.97, (), trial="9", failures={1001: "the loss is not finite"})

    (axes,) = seeds_figure([FINALIST, failed]).axes

    assert [label.get_text() for label in axes.get_yticklabels()] == ["trial 5", "trial 9"]
