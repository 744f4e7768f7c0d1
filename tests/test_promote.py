"""Promotions of real runs: the first from the command line, then one after the other in a store."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient

from pipeline.config import check_name
from pipeline.registry import CHALLENGER, previous_champion, read_ledger, version_of
from pipeline.store import NOTE, Recorded, read_run, search
from sweeps.candidates import NothingToPromoteError
from sweeps.promote import PromotionFailedError, main
from tests.commands import call
from tests.launching import run
from tests.promotions import (
    NARROW,
    NOTHING,
    PROMOTE,
    WIDE,
    Bench,
    Promoted,
    change_weights,
    command,
    composed,
    file_of,
    folder_of_model,
    plant_lambda,
    promote,
    promoted,
    refusing,
    registry,
    whole,
)
from tests.stores import query

SLIM = "model.hidden_units=64"
FREE = "promote.floor=0"
FIRST = ["sweep.name=narrow", "promote.top=2", "promote.seeds=[1001, 1002]", FREE]
WORKER = "executor.workers=1"


@dataclass(frozen=True)
class Story:
    """Promotions in one store, in this order. To be left as it is.

    Attributes:
        bench: The store.
        ids: Of single runs.
        first: Of the sweep `narrow`, from the command line.
        error: What that wrote on standard error.
        again: The same once more, and whether anything changed.
        better: Of a much larger network.
        worse: Of a small one.
        slim: Of one smaller than the champion, which need only be not much worse.
        large: Of one larger than that, by the same rule.
        low: Of it again, where the test split asks for more than it gives.
        other: Of a run that was judged on other images.
    """

    bench: Bench
    ids: dict[str, str]
    first: Promoted
    error: str
    again: tuple[str, bool]
    better: Promoted
    worse: Promoted
    slim: Promoted
    large: Promoted
    low: Promoted
    other: Promoted

    def copy(self, folder: Path) -> "Story":
        return Story(**{**vars(self), "bench": self.bench.copy(folder)})


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tensorflow: None) -> Story:
    bench = Bench(tmp_path_factory.mktemp("story"))
    bench.sweep("narrow", (NARROW,), ("model.hidden_units=5",))
    ids = {
        "wide": bench.train(WIDE).run_id,
        "poor": bench.train(NARROW, "seed=3").run_id,
        "slim": bench.train(SLIM).run_id,
        "other": bench.train(WIDE, "data.split_seed=1").run_id,
    }
    done = run(*FIRST, WORKER, folder=bench.folder, command=PROMOTE)
    assert done.returncode == 0, done.stderr
    first, before = promoted(bench, done.stdout), whole(bench.database)
    repeated = call(*FIRST, WORKER, folder=bench.folder, command=PROMOTE)
    smaller = ("promote.rule=non_inferiority", "promote.margin=0.3", FREE)
    return Story(
        bench,
        ids,
        first,
        done.stderr,
        (repeated.stdout, whole(bench.database) == before),
        better=promote(bench, f"run={ids['wide']}", FREE),
        worse=promote(bench, f"run={ids['poor']}", FREE),
        slim=promote(bench, f"run={ids['slim']}", *smaller),
        large=promote(bench, f"run={ids['wide']}", *smaller),
        low=promote(bench, f"run={ids['wide']}", "promote.floor=0.999"),
        other=promote(bench, f"run={ids['other']}", FREE),
    )


def aliases(promotion: Promoted) -> dict[str, int]:
    return {row[0]: row[1] for row in promotion.registered["registered_model_aliases"]}


def versions(promotion: Promoted) -> int:
    return len(promotion.registered["model_versions"])


# --- the first ---------------------------------------------------------------------------


def test_the_first_promotion_says_who_is_champion_and_what_to_do_with_it(story: Story) -> None:
    first = story.first

    assert story.error == ""
    assert re.search(
        r"^PROMOTE: digits version 1 \(trial [01], seed 100[12]\) is the champion, its first$",
        first.text,
        re.M,
    )
    assert "\nyes  better than the champion: there is no champion yet\n" in first.text
    assert "\nUse it: python -m pipeline.predict images.npz name=digits\n" in first.text
    assert "Take it back" not in first.text
    assert first.text.endswith(f"\nSee it: python -m pipeline.ui run={first.run.run_id}\n")


def test_a_promotion_is_a_finished_run_with_its_verdict_its_card_and_a_figure(
    story: Story,
) -> None:
    promotion = story.first.run

    assert (promotion.status, promotion.tags["verdict"]) == ("FINISHED", "PROMOTE")
    assert shlex.split(promotion.tags["command"])[3:] == [*FIRST, WORKER]
    folder = file_of(promotion, "")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {"verdict.json", "verdict.md", "model_card.md", "figures/seeds.png"}
    assert file_of(promotion, "figures/seeds.png").read_bytes().startswith(b"\x89PNG")
    assert file_of(promotion, "verdict.md").read_text(encoding="utf-8") == promotion.tags[NOTE]
    assert promotion.metrics["test_look"] == 1


def test_a_verdict_names_the_runs_it_rests_on(story: Story) -> None:
    verdict = story.first.verdict

    finalist = next(each for each in verdict["candidates"] if each["run_id"] == verdict["finalist"])
    assert finalist["mean"] == max(each["mean"] for each in verdict["candidates"])
    chosen = finalist["seeds"][str(verdict["seed"])]
    assert chosen["run_id"] == verdict["challenger"]
    assert chosen["value"] == min(each["value"] for each in finalist["seeds"].values())
    assert (verdict["version"], verdict["champion"], verdict["comparison"]) == (1, None, None)
    low, high = verdict["test"]["interval"]
    assert low <= verdict["test"]["accuracy"] <= high


def children(promotion: Recorded) -> list[Recorded]:
    return list(search(f"tags.`mlflow.parentRunId` = '{promotion.run_id}'"))


def test_each_training_is_nested_and_tells_what_it_repeats_and_how(story: Story) -> None:
    story.bench.connect()
    trials = {run.run_id for run in search("tags.sweep = 'narrow' and tags.trial != ''")}

    trained = children(story.first.run)

    assert {(each.tags["retrains"], each.tags["retrained.seed"]) for each in trained} == {
        (trial, seed) for trial in trials for seed in ("1001", "1002")
    }
    assert {each.status for each in trained} == {"FINISHED"}
    for each in trained:
        words = shlex.split(each.tags["command"])
        assert words.count("evaluate_test=false") == 1
        assert [word for word in words if word.startswith("seed=")] == [f"seed={each.tags['seed']}"]


def test_only_the_challenger_of_a_promotion_looks_at_the_test_split(story: Story) -> None:
    story.bench.connect()

    looked = [each.run_id for each in children(story.first.run) if "test_split" in each.tags]

    assert looked == [story.first.verdict["challenger"]]


def test_a_version_has_its_card_its_shapes_and_what_it_answers(story: Story) -> None:
    story.bench.connect()
    version = MlflowClient().get_model_version("digits", "1")

    card = file_of(story.first.run, "model_card.md").read_text(encoding="utf-8")
    info = mlflow.models.get_model_info("models:/digits/1")

    assert version.description == card
    assert f"trained by run `{version.run_id}`" in card
    assert version.tags["promotion"] == story.first.run.run_id
    assert len(version.tags["smoke"].split()) == 5
    assert info.signature is not None
    assert info.saved_input_example_info is not None


def test_the_same_promotion_again_changes_nothing(story: Story) -> None:
    text, is_same = story.again

    assert text == "digits version 1 is the champion already: nothing is changed.\n"
    assert is_same


# --- those that follow -------------------------------------------------------------------


def test_a_better_model_takes_the_champion_s_place(story: Story) -> None:
    better = story.better

    assert better.decision == "PROMOTE"
    assert "is the champion, in place of version 1" in better.text
    assert aliases(better) == {"champion": 2}
    assert (better.verdict["version"], better.verdict["champion"]) == (2, 1)
    found = better.verdict["comparison"]
    assert found["images"] == 575
    assert found["low"] > 0
    assert found["gain"] > 0.2


def test_a_model_that_is_not_better_is_held_as_the_challenger(story: Story) -> None:
    worse = story.worse

    assert worse.decision == "HOLD"
    assert "HOLD: digits version 2 stays champion" in worse.text
    assert aliases(worse) == {"champion": 2, "challenger": 3}
    assert worse.verdict["comparison"]["gain"] < 0
    ledger = "registered_model_tags"
    assert worse.registered[ledger] == story.better.registered[ledger]


def test_a_smaller_model_that_is_not_worse_is_promoted_by_that_rule(story: Story) -> None:
    slim = story.slim

    assert slim.decision == "PROMOTE"
    assert "smaller than the champion, and not worse" in slim.evidence
    assert aliases(slim) == {"champion": 4}


def test_a_larger_model_is_held_by_that_rule(story: Story) -> None:
    large = story.large

    assert large.decision == "HOLD"
    assert aliases(large) == {"champion": 4, "challenger": 2}
    assert versions(large) == 4


def test_a_version_that_was_promoted_keeps_its_card_when_it_is_held_later(story: Story) -> None:
    def of_version_2(promotion: Promoted, table: str) -> list[tuple[Any, ...]]:
        return [row for row in promotion.registered[table] if 2 in row]

    for table in ("model_versions", "model_version_tags"):
        assert of_version_2(story.large, table) == of_version_2(story.better, table) != []


def test_where_the_champion_s_run_is_gone_the_challenger_is_held_with_the_way_out(
    story: Story, tmp_path: Path
) -> None:
    bench = story.bench.copy(tmp_path)
    champion = version_of("digits")
    assert champion is not None
    with bench.edit() as database:
        for table in ("latest_metrics", "metrics", "params", "tags", "runs"):
            database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (champion.run_id,))

    held = promote(bench, f"run={story.ids['wide']}", FREE)

    assert held.decision == "HOLD"
    assert "is not there any more: promote to another name=" in held.evidence["comparable"]
    assert aliases(held)["champion"] == champion.number


def test_a_model_below_the_floor_is_rejected_and_the_registry_untouched(story: Story) -> None:
    low = story.low

    assert low.decision == "REJECT"
    assert "at least 0.999 asked" in low.evidence["good enough"]
    assert low.registered == story.large.registered
    assert (low.run.status, low.run.tags["verdict"]) == ("FINISHED", "REJECT")
    assert not file_of(low.run, "model_card.md").exists()
    assert low.verdict["version"] is None


def test_a_model_that_was_judged_on_other_images_is_held_with_the_reason(story: Story) -> None:
    other = story.other

    assert other.decision == "HOLD"
    assert "digits version 4 was judged on other validation images" in other.evidence["comparable"]
    assert "data.split_seed" in other.evidence["comparable"]
    assert other.verdict["comparison"] is None
    assert aliases(other)["champion"] == 4


def test_each_challenger_looks_at_the_test_split_once_and_the_number_is_shown(
    story: Story,
) -> None:
    order = ["first", "better", "worse", "slim", "large", "low"]
    promotions: list[Promoted] = [getattr(story, name) for name in order]

    looks = [promotion.verdict["test"]["look"] for promotion in promotions]

    assert looks == [1, 2, 3, 4, 2, 2]
    assert all(
        f"look {look} at this test split" in promotion.text
        for look, promotion in zip(looks, promotions, strict=True)
    )


def test_after_all_promotions_no_run_is_left_without_an_end(story: Story) -> None:
    statuses = query(story.bench.database, "SELECT DISTINCT status FROM runs")

    assert statuses == [("FINISHED",)]


def test_the_ledger_tells_who_was_champion_in_which_order(story: Story) -> None:
    story.bench.connect()

    moves = read_ledger("digits")

    assert [(move.version, move.replaced, move.happened) for move in moves] == [
        (1, None, True),
        (2, 1, True),
        (4, 2, True),
    ]
    promotions = [story.first.run, story.better.run, story.slim.run]
    assert [move.promotion for move in moves] == [run.run_id for run in promotions]


def test_the_history_shows_each_move_with_its_evidence(story: Story) -> None:
    text = command(story.bench, "history=true")

    title, heading, *lines = text.splitlines()
    assert title.strip() == "digits"
    assert heading.split() == ["when", "action", "version", "replaced", "run", "evidence"]
    assert [line.split()[2:4] for line in lines] == [["promote", each] for each in ("1", "2", "4")]
    assert "the first champion" in lines[0]


def test_a_model_with_code_in_it_is_rejected_and_the_registry_untouched(
    story: Story, tmp_path: Path
) -> None:
    spoilt, executed = story.copy(tmp_path), tmp_path / "executed"
    before = registry(spoilt.bench.database)
    plant_lambda(folder_of_model(spoilt.bench, story.better.verdict["challenger"]), executed)

    again = promote(spoilt.bench, f"run={story.ids['wide']}", FREE)

    assert again.decision == "REJECT"
    assert "is not loaded" in again.evidence["serves what was recorded"]
    assert again.registered == before
    assert not executed.exists()


# --- back --------------------------------------------------------------------------------


def test_rollbacks_lead_back_promotion_by_promotion_to_the_first(
    story: Story, tmp_path: Path
) -> None:
    bench = story.copy(tmp_path).bench

    texts = [command(bench, "rollback=true") for _ in range(2)]
    before = registry(bench.database)

    with pytest.raises(ValueError, match="digits version 1 has no champion before it"):
        command(bench, "rollback=true")

    assert texts[0].startswith("digits version 2 is the champion again, in place of version 4: ")
    assert texts[1].startswith("digits version 1 is the champion again, in place of version 2: ")
    assert registry(bench.database) == before
    assert champion() == 1
    assert [move.action for move in read_ledger("digits")][3:] == ["rollback"] * 2


def champion() -> int:
    version = version_of("digits")
    assert version is not None
    return version.number


def test_what_was_taken_back_can_be_promoted_again_as_the_same_version(
    story: Story, tmp_path: Path
) -> None:
    bench = story.copy(tmp_path).bench
    for _ in range(2):
        command(bench, "rollback=true")

    again = promote(bench, f"run={story.ids['wide']}", FREE)

    assert again.decision == "PROMOTE"
    assert (again.verdict["version"], champion()) == (2, 2)
    assert previous_champion("digits") == 1
    assert versions(again) == versions(story.other)


def with_other_weights(files: Path, executed: Path) -> None:
    change_weights(files, 1.0, 100.0)


def with_a_little_other_weights(files: Path, executed: Path) -> None:
    change_weights(files, 1.1)


def without_files(files: Path, executed: Path) -> None:
    shutil.rmtree(files)


def cut_short(files: Path, executed: Path) -> None:
    path = files / "data" / "model.keras"
    path.write_bytes(path.read_bytes()[:1000])


def without_an_example(files: Path, executed: Path) -> None:
    (files / "serving_input_example.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "tells"),
    [
        (with_other_weights, r"predicts 0 0 0 0 0 for its example, at its promotion .*: the champ"),
        (with_a_little_other_weights, "is not what was promoted: the champion stays"),
        (without_files, "its files cannot be read"),
        (cut_short, "is not loaded"),
        (plant_lambda, "is not loaded"),
        (without_an_example, "its input example is missing"),
    ],
)
def test_a_rollback_to_what_does_not_answer_as_before_is_refused_and_the_champion_stays(
    story: Story, tmp_path: Path, spoil: Callable[[Path, Path], None], tells: str
) -> None:
    spoilt, executed = story.copy(tmp_path), tmp_path / "executed"
    before = registry(spoilt.bench.database)
    spoil(folder_of_model(spoilt.bench, story.better.verdict["challenger"]), executed)

    with pytest.raises(ValueError, match=tells) as told:
        command(spoilt.bench, "rollback=true")

    assert len(str(told.value).splitlines()) == 1
    assert registry(spoilt.bench.database) == before
    assert not executed.exists()


def test_a_rollback_leaves_the_challenger_where_it_is(story: Story, tmp_path: Path) -> None:
    bench = story.copy(tmp_path).bench
    before = version_of("digits", CHALLENGER)

    command(bench, "rollback=true")

    assert version_of("digits", CHALLENGER) == before


# --- broken off --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table",
    [
        "model_versions",
        "registered_model_tags",
        "registered_model_aliases WHEN NEW.alias = 'champion'",
    ],
)
def test_a_promotion_that_the_store_breaks_off_leaves_the_champion_and_goes_on_as_the_same_run(
    story: Story, tmp_path: Path, table: str
) -> None:
    bench = story.copy(tmp_path).bench
    for _ in range(2):
        command(bench, "rollback=true")
    given = (f"run={story.ids['wide']}", FREE)

    with refusing(bench.database, table), pytest.raises(PromotionFailedError) as told:
        promote(bench, *given)
    broken, stayed = promotion_of(bench), champion()
    done = promote(bench, *given, "promote.significance=0.04")

    assert len(str(told.value).splitlines()) == 1
    assert " Go on with: python -m sweeps.promote " in str(told.value)
    assert (broken.status, stayed) == ("FAILED", 1)
    assert "error" in broken.tags
    assert (done.decision, done.run.run_id, champion()) == ("PROMOTE", broken.run_id, 2)
    assert (done.run.status, "error" in done.run.tags) == ("FINISHED", False)
    assert "promote.significance=0.04" in done.run.tags["command"]
    assert done.run.tags["promote.significance"] == "0.04"
    assert versions(done) == versions(story.other)
    assert [move.happened for move in read_ledger("digits")] == [True] * 6


def promotion_of(bench: Bench) -> Recorded:
    bench.connect()
    (run,) = search("tags.kind = 'promotion'", limit=1)
    return run


# --- refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["sweep.name=none", "run=none", "history=true", "rollback=true"])
def test_without_a_store_there_is_nothing_to_promote_and_none_is_created(
    tmp_path: Path, what: str
) -> None:
    given = [what, f"tracking.directory={tmp_path / 'mlruns'}"]

    with pytest.raises(NothingToPromoteError, match=r"run python -m sweeps\.run data=digits"):
        main(composed(*given), given)

    assert list(tmp_path.iterdir()) == []


def test_an_empty_store_ends_with_status_3_in_one_line(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.create()

    done = call(folder=tmp_path, command=PROMOTE)

    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "no sweep is recorded here: run python -m sweeps.run data=digits." in done.stderr
    assert registry(bench.database) == NOTHING


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["sweep.name=unknown"], NothingToPromoteError),
        ([f"run={'0' * 32}"], ValueError),
        (["sweep.name=narrow", "promote.seeds=[5, 0]"], ValueError),
        (["sweep.name=narrow", "name=../up"], ValueError),
        (["rollback=true", "name=digit"], ValueError),
        (["history=true", "name=digit"], ValueError),
    ],
)
def test_what_is_refused_leaves_the_store_as_it_is(
    story: Story, overrides: list[str], error: type[Exception]
) -> None:
    before = whole(story.bench.database)

    with pytest.raises(error) as told:
        command(story.bench, *overrides)

    assert len(str(told.value).splitlines()) == 1
    assert whole(story.bench.database) == before


def test_the_run_of_a_promotion_is_not_promoted(story: Story) -> None:
    with pytest.raises(NothingToPromoteError, match="is a promotion: give a run that trained"):
        command(story.bench, f"run={story.first.run.run_id}")


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "", ".", "..", "ziffern-ä", "x" * 65, "a b", "a\n", "models:/x", "-"]
)
def test_an_odd_name_is_refused_in_one_line(name: str) -> None:
    allowed = re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) and name.strip(".")

    assert bool(allowed) == (name == "-")
    assert refusal(name) == (not allowed)


def refusal(name: str) -> bool:
    try:
        check_name("name", name)
    except ValueError as error:
        assert str(error).startswith("name must be 1 to 64 of the characters")
        return True
    return False


@given(name=st.text(max_size=70) | st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True))
def test_whatever_becomes_a_path_stays_in_its_folder(name: str) -> None:
    inside = Path("/registry").joinpath(f".promotion-{name}.lock") if not refusal(name) else None

    assert inside is None or inside.resolve().parent == Path("/registry")


def test_an_odd_name_on_the_command_line_creates_nothing(tmp_path: Path) -> None:
    done = call("name=../up", folder=tmp_path, command=PROMOTE)

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "name must be 1 to 64 of the characters A-Z a-z 0-9 . _ -, got '../up'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def check_json(value: Any) -> None:
    json.dumps(value, allow_nan=False)


def test_every_verdict_is_json_as_other_programs_read_it(story: Story) -> None:
    for promotion in (story.first, story.worse, story.low, story.other):
        check_json(promotion.verdict)


def test_the_challenger_of_a_verdict_is_a_run_that_can_be_read(story: Story) -> None:
    story.bench.connect()

    challengers = [read_run(each.verdict["challenger"]) for each in (story.first, story.better)]

    assert [run.tags["retrained.seed"] for run in challengers] == [
        str(story.first.verdict["seed"]),
        str(story.better.verdict["seed"]),
    ]
