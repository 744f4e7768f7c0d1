"""The files under `conf/`: all compose, explain themselves, and hold what they promise."""

import re
import shlex
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path

import hydra
import pytest

from pipeline.compose import CONF, to_config, to_typed
from pipeline.config import LATER, RunConfig, flatten
from sweeps.config import VARIANTS, SweepConfig
from sweeps.plan import Plan, build_plan
from sweeps.space import split_command_line


def options_of(root: type) -> list[Path]:
    groups = {field.name for field in fields(root)} & {path.name for path in CONF.iterdir()}
    return [path for group in sorted(groups) for path in sorted((CONF / group).glob("*.yaml"))]


OPTIONS = options_of(SweepConfig)  # those of runs among them
ROOTS = [CONF / "run.yaml", CONF / "sweep.yaml"]
EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))
FILES = [*ROOTS, CONF / "cli.yaml", *OPTIONS, *EXPERIMENTS]
# Files that build on no other one: they hold the defaults, so they explain the keys.
BASES = [path for path in [*OPTIONS, *EXPERIMENTS] if "\ndefaults:" not in path.read_text("utf-8")]
COMMAND = re.compile(r"^# Run: python -m (pipeline|sweeps)\.run ?(.*)$", re.MULTILINE)
COMMANDS = [command for path in FILES for command in COMMAND.findall(path.read_text("utf-8"))]
# In the help of a sweep: the command, then at some distance what it does.
HELP = re.findall(
    r"^ {8}python -m sweeps\.run (.*?) {3,}\S", ROOTS[1].read_text("utf-8"), re.MULTILINE
)


def name_of(path: Path) -> str:
    return str(path.relative_to(CONF).with_suffix(""))


def compose(*overrides: str) -> RunConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return to_config(hydra.compose("run", list(overrides)))


def plan(*arguments: str) -> Plan:
    overrides, searched = split_command_line(arguments)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = to_typed(hydra.compose("sweep", overrides), SweepConfig, VARIANTS)
        return build_plan(config, overrides, searched)


@pytest.mark.parametrize("path", options_of(RunConfig), ids=name_of)
def test_every_option_composes(path: Path) -> None:
    group, option = path.parent.name, path.stem

    config = compose("data.path=images.npz", f"{group}={option}")

    assert isinstance(config, RunConfig)


@pytest.mark.parametrize("path", OPTIONS, ids=name_of)
def test_every_option_composes_to_a_sweep(path: Path) -> None:
    group, option = path.parent.name, path.stem

    own = ["model.l2=0.0,0.1"] if (group, option) == ("search", "none") else []

    planned = plan("data.path=images.npz", "sampler=random", f"{group}={option}", *own)

    assert planned.space.parameters


@pytest.mark.parametrize("path", OPTIONS, ids=name_of)
def test_an_option_that_carries_a_name_carries_that_of_its_file(path: Path) -> None:
    names = re.findall(r"^name: (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)

    assert set(names) <= {path.stem}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_every_experiment_is_headed_by_its_command(path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    header = re.match(r"# @package _global_\n(?:#.*\n)+", text)

    assert header
    assert f"# Run: python -m pipeline.run +experiment={path.stem}\n" in header[0]


@pytest.mark.parametrize("command", [rest for package, rest in COMMANDS if package == "pipeline"])
def test_every_command_in_a_header_composes(command: str) -> None:
    config = compose(*shlex.split(command))

    assert isinstance(config, RunConfig)


@pytest.mark.parametrize(
    "command", [*HELP, *(rest for package, rest in COMMANDS if package == "sweeps")]
)
def test_every_command_of_a_sweep_in_a_header_or_in_the_help_can_be_planned(command: str) -> None:
    planned = plan(*shlex.split(command))

    assert planned.known


def test_the_help_of_a_sweep_shows_commands() -> None:
    assert len(HELP) >= 5


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_every_experiment_can_be_swept(path: Path) -> None:
    planned = plan(f"+experiment={path.stem}")

    assert planned.trial_config({}).training == compose(f"+experiment={path.stem}").training


@pytest.mark.parametrize("data", ["digits", "fashion_mnist"])
@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_every_experiment_changes_its_data_alone_where_others_are_given(
    path: Path, data: str
) -> None:
    mnist, other = (
        compose(f"+experiment={path.stem}"),
        compose(f"+experiment={path.stem}", f"data={data}"),
    )

    assert other.data.name == data
    assert replace(other, data=mnist.data, tracking=mnist.tracking) == mnist


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    assert re.match(r"(# @package _global_\n)?# [A-Z\d].*[.:]\n", text)


@pytest.mark.parametrize("path", BASES, ids=name_of)
def test_every_default_is_explained_on_its_line(path: Path) -> None:
    lines = re.findall(r"^\w+:.+", path.read_text(encoding="utf-8"), re.MULTILINE)

    unexplained = [line for line in lines if not re.search(r" {2}# \S", line)]

    assert unexplained == []


@pytest.mark.parametrize(
    ("path", "least"),
    [
        (ROOTS[0], 2),
        (ROOTS[1], 12),
        *(
            (CONF / f"{name}.yaml", 3)
            for name in ("leaderboard", "ui", "promote", "predict", "repeat", "doctor")
        ),
    ],
    ids=str,
)
def test_every_default_of_a_root_is_explained_on_its_line(path: Path, least: int) -> None:
    own = path.read_text(encoding="utf-8").partition("\n\n")[2].partition("\nhydra:")[0]
    lines = re.findall(r"^ *\w+: .+", own, re.MULTILINE)

    assert len(lines) >= least
    assert [line for line in lines if not re.search(r" {2}# \S", line)] == []


def test_the_keys_of_a_sweep_are_all_in_its_root() -> None:
    text = (CONF / "sweep.yaml").read_text(encoding="utf-8")

    for section in ("sweep", "study"):
        written = re.search(rf"^{section}:\n((?: +.*\n)+)", text, re.MULTILINE)
        names = [field.name for field in fields(SweepConfig.__annotations__[section])]
        assert written
        assert re.findall(r"^  (\w+):", written[1], re.MULTILINE) == names


def test_a_sweep_begins_with_the_same_options_as_a_run() -> None:
    run, sweep = (
        dict(re.findall(r"^  - (\w+): (\w+)$", path.read_text("utf-8"), re.MULTILINE))
        for path in ROOTS
    )

    assert len(run) == 6
    assert run.items() <= sweep.items()


def test_a_trial_is_a_run_without_the_test_split_and_figures() -> None:
    run, trial = compose(), plan().config.run

    tracking = replace(run.tracking, figures=False)
    assert trial == replace(run, tracking=tracking, evaluate_test=False)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_comment_of_a_key_fits_on_its_line(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()

    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize(
    "section",
    [
        SweepConfig,
        *(field.type for field in fields(SweepConfig)),
        *(kind for kinds in VARIANTS.values() for kind in kinds.values()),
    ],
)
def test_defaults_stand_in_yaml_alone(section: type) -> None:
    attributes = getattr(section, "__dataclass_fields__", {}).values()

    assert [attribute.name for attribute in attributes if attribute.default is not MISSING] == []


def test_the_notebook_is_exactly_the_notebook() -> None:
    config = compose("+experiment=notebook")

    assert (config.data.name, config.data.loader, config.data.pixel_max) == ("mnist", "arrays", 255)
    assert config.data.train_size is None
    assert asdict(config.model) == {
        "hidden_units": 512,
        "hidden_layers": 2,
        "dropout_rate": 0.2,
        "input_dropout_rate": 0.0,
        "activation": "relu",
        "initializer": "glorot_uniform",
        "batch_normalization": False,
        "l2": 0.0,
        "max_norm": None,
    }
    assert asdict(config.optimizer) == {
        "name": "rmsprop",
        "learning_rate": 0.001,
        "weight_decay": 0.0,
        "schedule": "constant",
        "warmup_epochs": 0.0,
        "rho": 0.9,
        "momentum": 0.0,
    }
    assert config.training.epochs == 4
    assert config.training.batch_size == 128
    assert config.training.early_stopping_patience is None
    assert (config.training.label_smoothing, config.training.ema_momentum) == (0.0, 0.0)
    assert not config.augmentation.distorts
    assert config.evaluate_test


@pytest.mark.parametrize(
    "overrides",
    [
        ["data=fashion_mnist", "model=wide", "optimizer=adam", "training=quick"],
        ["data=digits", "optimizer=sgd", "model=wide", "training=default"],
    ],
)
def test_the_notebook_sets_what_it_must_whatever_is_given_before_it(overrides: list[str]) -> None:
    config = compose(*overrides, "+experiment=notebook")

    assert config.model.initializer == "glorot_uniform"
    assert config.training.epochs == 4


def test_the_command_line_wins_over_an_experiment() -> None:
    config = compose("+experiment=notebook", "model=wide", "training.epochs=7", "optimizer=adam")

    assert (config.model.hidden_units, config.model.hidden_layers) == (1000, 1)
    assert config.model.initializer == "glorot_uniform"
    assert config.training.epochs == 7
    assert config.optimizer.name == "adam"


def test_what_earlier_versions_had_no_setting_of_was_not_done() -> None:
    amounts = {section: dict(names) for section, names in LATER.items()}

    assert amounts["augmentation"].pop("elastic_sigma") > 0
    assert {value for names in amounts.values() for value in names.values()} == {0.0}
    assert dict(flatten(LATER)).keys() <= dict(flatten(asdict(compose()))).keys()


def test_a_named_file_of_mnist_may_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MNIST_NPZ", "/data/mnist.npz")

    assert compose("data=mnist").data.path == "/data/mnist.npz"


def test_mnist_is_looked_for_when_no_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MNIST_NPZ", raising=False)

    assert compose("data=mnist").data.path is None
