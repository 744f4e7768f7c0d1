"""The settings of a promotion: their ranges, what excludes what, and that the file composes."""

import re
from dataclasses import MISSING, fields
from typing import Any

import hydra
import pytest
from hydra.errors import HydraException

from pipeline.compose import CONF, explain, to_typed
from sweeps.config import EXECUTORS, RULES, GateConfig, PromotionConfig

ROOT = (CONF / "promote.yaml").read_text(encoding="utf-8")
VARIANTS: dict[str, dict[str, type]] = {"executor": {**EXECUTORS}}


def compose(*overrides: str) -> PromotionConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return to_typed(hydra.compose("promote", list(overrides)), PromotionConfig, VARIANTS)


def error_of(*overrides: str) -> str:
    with pytest.raises(ValueError) as error:
        compose(*overrides)
    return str(error.value)


# --- what composes -----------------------------------------------------------------------


def test_by_default_the_best_three_of_the_latest_sweep_are_trained_again_on_five_seeds() -> None:
    config = compose()

    assert config.sweep.names == []
    assert (config.run, config.name, config.rollback, config.history) == (None, None, False, False)
    assert config.promote == GateConfig(
        top=3,
        seeds=[1001, 1002, 1003, 1004, 1005],
        rule="superiority",
        significance=0.05,
        margin=0.002,
        floor=0.95,
    )


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_can_be_chosen(rule: str) -> None:
    assert compose(f"promote.rule={rule}").promote.rule == rule


@pytest.mark.parametrize("tracking", sorted(path.stem for path in (CONF / "tracking").iterdir()))
def test_a_promotion_composes_with_every_store(tracking: str) -> None:
    assert compose(f"tracking={tracking}").tracking.experiment == "all"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("promote.top=1", 1),
        ("promote.top=100", 100),
        ("promote.seeds=[0]", [0]),
        ("promote.seeds=[4294967295,0]", [4294967295, 0]),
        ("promote.significance=0.0001", 0.0001),
        ("promote.significance=0.4999", 0.4999),
        ("promote.margin=0", 0.0),
        ("promote.margin=0.9999", 0.9999),
        ("promote.floor=0", 0.0),
        ("promote.floor=1", 1.0),
    ],
)
def test_the_ends_of_each_range_are_allowed(override: str, value: object) -> None:
    name = override.partition("=")[0].removeprefix("promote.")

    assert getattr(compose(override).promote, name) == value


@pytest.mark.parametrize(
    "overrides",
    [
        ["run=0123456789abcdef"],
        ["sweep.name=small"],
        ["rollback=true"],
        ["history=true"],
        ["history=true", "name=mnist"],
        ["rollback=true", "name=mnist"],
        ["run=0123456789abcdef", "name=mnist"],
        ["sweep.name=small", "data.path=/data/mnist.npz"],
    ],
    ids=str,
)
def test_what_the_help_shows_can_be_asked_for(overrides: list[str]) -> None:
    assert isinstance(compose(*overrides), PromotionConfig)


# --- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("promote.top=0", "at least 1, got 0."),
        ("promote.top=-1", "at least 1, got -1."),
        ("promote.seeds=[]", "a list of seeds that differ, got []."),
        ("promote.seeds=[1,2,1]", "a list of seeds that differ, got [1, 2, 1]."),
        ("promote.seeds=[-1]", "of seeds in [0, 2**32), got -1."),
        ("promote.seeds=[1,4294967296]", "of seeds in [0, 2**32), got 4294967296."),
        ("promote.rule=better", "one of superiority, non_inferiority, got 'better'."),
        ("promote.significance=0", "in (0, 0.5), got 0.0."),
        ("promote.significance=0.5", "in (0, 0.5), got 0.5."),
        ("promote.significance=-0.05", "in (0, 0.5), got -0.05."),
        ("promote.significance=nan", "in (0, 0.5), got nan."),
        ("promote.margin=-0.001", "in [0, 1), got -0.001."),
        ("promote.margin=1", "in [0, 1), got 1.0."),
        ("promote.margin=nan", "in [0, 1), got nan."),
        ("promote.floor=-0.1", "in [0, 1], got -0.1."),
        ("promote.floor=1.1", "in [0, 1], got 1.1."),
        ("promote.floor=95", "in [0, 1], got 95.0."),
        ("promote.floor=nan", "in [0, 1], got nan."),
        ("name=../x", "1 to 64 of the characters"),
        ("name=''", "1 to 64 of the characters"),
        ("sweep.name=../x", "1 to 64 of the characters"),
        ("sweep.name=[a,b]", "one name or null, got ['a', 'b']."),
        ("sweep.name=[]", "a name, a list of names or null, got []."),
        ("executor.workers=0", "in [1, 1024], got 0."),
    ],
)
def test_a_setting_out_of_its_range_is_refused_with_its_key_and_rule(
    override: str, rule: str
) -> None:
    told = error_of(override)

    assert told.startswith(f"{override.partition('=')[0]} must be ")
    assert rule in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("promote.top=many", "promote.top"),
        ("promote.top=2.5", "promote.top"),
        ("promote.top=null", "promote.top"),
        ("promote.seeds=1001", "promote.seeds"),
        ("promote.seeds=null", "promote.seeds"),
        ("promote.seeds=[a]", "promote.seeds"),
        ("promote.seeds=[1.5]", "promote.seeds"),
        ("promote.significance=small", "promote.significance"),
        ("promote.rule=null", "promote.rule"),
        ("rollback=maybe", "rollback"),
        ("promote.floors=0.9", "promote.floor"),
        ("+promote.alpha=0.9", "promote.alpha"),
        ("data.name=digits", "data.name"),
    ],
)
def test_a_setting_of_the_wrong_type_or_unknown_is_refused_with_its_key_in_one_line(
    override: str, key: str
) -> None:
    with pytest.raises((ValueError, HydraException)) as error:
        compose(override)

    told = explain(error.value, "promote")
    assert key in told
    assert len(told.splitlines()) == 1


def test_seeds_that_are_no_list_are_refused_with_how_to_write_one() -> None:
    with pytest.raises(ValueError) as error:
        compose("promote.seeds=7")

    assert str(error.value) == "promote.seeds must be a list, as promote.seeds=[1,2]."


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sweep=small", "sweep is a section, of sweep.name: set one of these."),
        ("model=digits", "model: no such key; did you mean name?"),
    ],
)
def test_a_key_that_was_nearly_right_leads_to_the_right_one(override: str, told: str) -> None:
    with pytest.raises((ValueError, HydraException)) as error:
        compose(override)

    assert explain(error.value, "promote") == told


ASKED = {
    "run": "run=0123456789abcdef",
    "sweep.name": "sweep.name=small",
    "rollback": "rollback=true",
    "history": "history=true",
}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (one, other)
        for one in ASKED
        for other in ASKED
        if list(ASKED).index(one) < list(ASKED).index(other)
    ],
)
def test_what_is_asked_for_is_one_thing(one: str, other: str) -> None:
    told = error_of(ASKED[other], ASKED[one])

    assert told == f"{one} and {other} exclude each other: give one of them."


# --- the file ----------------------------------------------------------------------------


def test_the_file_says_first_what_it_is_and_how_it_is_run() -> None:
    first, second = ROOT.splitlines()[:2]

    assert re.match(r"# [A-Z].*\.$", first)
    assert second == "# Run: python -m sweeps.promote sweep.name=NAME"


def test_every_default_of_the_file_is_explained_on_its_line() -> None:
    own = ROOT.partition("\n\n")[2].partition("\nhydra:")[0]
    written = re.findall(r"^ *\w+: .+", own, re.MULTILINE)

    assert len(written) >= 12
    assert [line for line in written if not re.search(r" {2}# \S", line)] == []


def test_every_line_of_the_file_can_be_read_without_scrolling() -> None:
    assert [line for line in ROOT.splitlines() if len(line) > 120] == []


def test_the_keys_of_the_rule_are_all_in_the_file() -> None:
    written = re.search(r"^promote:\n((?: +.*\n)+)", ROOT, re.MULTILINE)

    assert written
    assert re.findall(r"^  (\w+):", written[1], re.MULTILINE) == [
        field.name for field in fields(GateConfig)
    ]


@pytest.mark.parametrize("section", [GateConfig, PromotionConfig])
def test_defaults_stand_in_yaml_alone(section: Any) -> None:
    assert [field.name for field in fields(section) if field.default is not MISSING] == []


def help_commands() -> list[str]:
    return re.findall(r"^ {8}python -m sweeps\.promote(.*?) {2,}\S", ROOT, re.MULTILINE)


@pytest.mark.parametrize("command", help_commands())
def test_each_command_of_the_help_composes(command: str) -> None:
    assert isinstance(compose(*command.split()), PromotionConfig)


def test_the_help_shows_commands() -> None:
    assert len(help_commands()) >= 5
