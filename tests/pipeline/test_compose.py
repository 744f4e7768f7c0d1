"""The command line: what composes, what is refused, and how a user is told."""

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import hydra
import pytest
from hydra.errors import HydraException
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.compose import CONF, explain, to_config
from pipeline.config import AdamConfig, RMSpropConfig, RunConfig, SGDConfig
from tests.commands import start

Run = Callable[..., subprocess.CompletedProcess[str]]

OPTIONS = {
    group: sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    for group in ("data", "model", "optimizer", "training", "tracking")
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs the command line in an empty folder, where TensorFlow and MLflow cannot be imported."""
    traps = tmp_path / "traps"
    traps.mkdir()
    for library in ("tensorflow", "keras", "mlflow"):
        (traps / f"{library}.py").write_text(f"raise SystemExit('{library} was imported')")
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    environment["PYTHONPATH"] = os.pathsep.join([str(traps), str(CONF.parent)])

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipeline.run", *arguments],
            cwd=folder,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def written(tmp_path: Path) -> list[Path]:
    """What a command left in the folder it was started in."""
    return list((tmp_path / "empty").iterdir())


def compose(*overrides: str) -> RunConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return to_config(hydra.compose("run", list(overrides)))


def error_of(*overrides: str) -> Exception:
    with pytest.raises((ValueError, HydraException)) as error:
        compose(*overrides)
    return error.value


# --- real command lines ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        # Misspelt: the nearest name.
        (["modle=wide"], ["modle: no such key; did you mean model?"]),
        (["model.hiden_units=3"], ["model.hiden_units: no such key", "mean model.hidden_units?"]),
        (["model=wid"], ["model=wid: no such option among mlp, wide", "did you mean wide?"]),
        (["+experiment=notebok"], ["experiment=notebok: no such option", "mean notebook?"]),
        # A value of the wrong type, or out of its range: key, rule, value.
        (["model.hidden_units=many"], ["model.hidden_units", "'many'", "Integer"]),
        (["model.hidden_units=0"], ["model.hidden_units must be at least 1, got 0."]),
        (["optimizer.learning_rate=nan"], ["optimizer.learning_rate must be positive, got nan."]),
        (["optimizer.learning_rate=inf"], ["optimizer.learning_rate must be positive, got inf."]),
        (
            ["data.validation_size=0", "training.early_stopping_patience=5"],
            ["training.early_stopping_patience=5 needs", "data.validation_size=0"],
        ),
        (["tracking.experiment=../../x"], ["tracking.experiment must be 1 to 64", "'../../x'"]),
        (["tracking.experiment='a b'"], ["tracking.experiment must be 1 to 64", "'a b'"]),
        # Not in Hydra's grammar: the argument.
        (["model.hidden_units=[1,"], ["model.hidden_units=[1,"]),
        (["data.path=/données/été.npz"], ["data.path=/données/été.npz"]),
        (["wide"], ["'wide'", "EQUAL"]),
        (["model.hidden_units=1,2"], ["model.hidden_units=1,2", "--multirun"]),
        # Missing, deleted, added, or not to be had.
        (["data=npz"], ["data.path has no value: set data.path=..."]),
        (["~model.l2"], ["model.l2 has no value: set model.l2=..."]),
        (["~optimizer"], ["optimizer"]),
        (["+model.depth=3"], ["model.depth", "'depth' not in"]),
        (["seed=${oc.env:NO_SUCH_VARIABLE}"], ["seed", "'NO_SUCH_VARIABLE' not found"]),
    ],
    ids=str,
)
def test_a_bad_command_line_ends_in_one_line_before_anything_is_imported_or_written(
    arguments: list[str], told: list[str], tmp_path: Path
) -> None:
    ended = start("pipeline.run", *arguments, folder=tmp_path)

    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith("Error: ")
    assert ended.err.count("\n") == 1
    assert [fragment for fragment in told if fragment not in ended.err] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("override", ["data=digits", "seed=${training.epochs}"])
def test_a_good_command_line_goes_on_to_import_tensorflow(override: str, run: Run) -> None:
    ended = run(override)

    assert ended.stderr == "tensorflow was imported\n"


def test_an_unknown_option_is_named_with_the_usage(run: Run, tmp_path: Path) -> None:
    ended = run("--epochs", "3")

    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].endswith("error: unrecognized arguments: --epochs")
    assert "Traceback" not in ended.stderr
    assert written(tmp_path) == []


def test_a_traceback_is_shown_to_who_asks_for_it(run: Run) -> None:
    ended = run("seed=-1", HYDRA_FULL_ERROR="1")

    assert ended.returncode == 1
    assert "Traceback (most recent call last):\n" in ended.stderr
    assert ended.stderr.endswith("ValueError: seed must be in [0, 2**32), got -1.\n")


def test_a_multirun_tells_each_bad_job_in_one_line_and_goes_on(run: Run, tmp_path: Path) -> None:
    ended = run("-m", "seed=-1,x", "data=digits")

    first, second, count = ended.stderr.splitlines()
    assert ended.returncode == 1
    assert first.startswith("Error: job 0: ")
    assert "seed must be in [0, 2**32), got -1." in first
    assert second.startswith("Error: job 1: ")
    assert "seed: Value 'x'" in second
    assert count == "2 of 2 jobs failed."
    assert written(tmp_path) == []


def test_a_multirun_counts_the_jobs_that_failed(tmp_path: Path) -> None:
    program = """
from pipeline.compose import run_cli
from pipeline.config import RunConfig

run_cli("run", RunConfig, lambda config, overrides: None)
"""
    command = [sys.executable, "-c", program, "-m", "seed=0,-1,1", "data=digits"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "1 of 3 jobs failed."


@pytest.mark.parametrize(
    "arguments",
    [
        ["tracking.uri=https://me:hunter2@host", "seed=-1"],
        ["tracking.uri=https://me:hunter2,hunter2@host"],
        ["-m", "tracking.uri=https://me:hunter2@host", "seed=-1,-2"],
    ],
    ids=str,
)
def test_a_password_on_a_bad_command_line_is_not_repeated(
    arguments: list[str], tmp_path: Path
) -> None:
    ended = start("pipeline.run", *arguments, folder=tmp_path)

    assert ended.status == 1
    assert "hunter2" not in ended.out + ended.err


def test_help_shows_every_group_with_its_options_and_commands_to_begin_with(
    run: Run, tmp_path: Path
) -> None:
    ended = run("--help")

    lines = ended.stdout.splitlines()
    assert ended.returncode == 0
    assert ended.stderr == ""
    assert {f"{group}: {', '.join(options)}" for group, options in OPTIONS.items()} <= {*lines}
    assert any("python -m pipeline.run data=digits" in line for line in lines)
    assert any("key=value" in line for line in lines)
    assert written(tmp_path) == []


def test_the_configuration_is_shown_without_a_run(run: Run, tmp_path: Path) -> None:
    ended = run("--cfg", "job", "optimizer=adam", "optimizer.learning_rate=3e-4", "seed=7")

    lines = ended.stdout.splitlines()
    assert ended.returncode == 0
    assert ended.stderr == ""
    assert {"optimizer:", "  name: adam", "  learning_rate: 0.0003", "seed: 7"} <= {*lines}
    assert "hydra:" not in lines
    assert written(tmp_path) == []


# --- in process: what composes -----------------------------------------------------------


def test_the_defaults_are_typed() -> None:
    config = compose()

    assert type(config.optimizer) is RMSpropConfig
    assert type(config.data.pixel_max) is float
    assert type(config.data.validation_size) is int
    assert type(config.data.sources) is list
    assert type(config.data.sources[0]) is list
    assert config.data.train_size is None


@pytest.mark.parametrize(
    ("option", "expected"), [("adam", AdamConfig), ("rmsprop", RMSpropConfig), ("sgd", SGDConfig)]
)
def test_an_optimizer_composes_to_its_own_type(option: str, expected: type) -> None:
    config = compose(f"optimizer={option}")

    assert type(config.optimizer) is expected
    assert config.optimizer.name == option


@pytest.mark.parametrize(
    ("override", "value"), [("0.1", 0.1), ("0.0", 0.0), ("500", 500), ("500.0", 500.0)]
)
def test_a_validation_size_keeps_its_type(override: str, value: float) -> None:
    size = compose(
        f"data.validation_size={override}", "training.early_stopping_patience=null"
    ).data.validation_size

    assert (type(size), size) == (type(value), value)


@pytest.mark.parametrize("option", OPTIONS["optimizer"])
def test_an_integer_for_a_fraction_becomes_a_float(option: str) -> None:
    config = compose(f"optimizer={option}", "optimizer.learning_rate=1")

    assert type(config.optimizer.learning_rate) is float


# The three groups with rules between them.
COMBINATIONS = list(product(*(OPTIONS[group] for group in ("data", "optimizer", "training"))))


@pytest.mark.parametrize(("data", "optimizer", "training"), COMBINATIONS)
def test_every_combination_of_options_composes(data: str, optimizer: str, training: str) -> None:
    config = compose(
        "data.path=images.npz", f"data={data}", f"optimizer={optimizer}", f"training={training}"
    )

    assert (config.data.name, config.optimizer.name) == (data, optimizer)


def test_an_address_and_a_path_reach_the_run_as_they_were_given() -> None:
    config = compose("tracking.uri=http://127.0.0.1:5000", "data.path='/données/mes images.npz'")

    assert config.tracking.uri == "http://127.0.0.1:5000"
    assert config.data.path == "/données/mes images.npz"


# --- in process: what is refused, and how ------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["experiment=notebook"], "+experiment=notebook"),
        (["optimizer=adam", "optimizer.rho=0.5"], "optimizer.rho: no such key"),
        (["optimizer.name=adm"], "optimizer.name must be one of rmsprop, adam, sgd, got 'adm'."),
        (["+seed=1"], "seed=1"),
        (["seed={a: 1}"], "{'a': 1}"),
        (["seed=null"], "seed: "),
        (["seed=1.5"], "seed: Value '1.5'"),
        (["data.validation_size=true"], "data.validation_size: Value 'True'"),
        (["data.validation_size=-5"], "data.validation_size must be"),
        (["data.sha256=[a,b]"], "data.sha256 must be null or 4 digests"),
        (["~data"], "data"),
        (["~optimizer"], "optimizer"),
        (["~seed"], "seed"),
        (["optimizer.name=${oc.env:NO_SUCH_VARIABLE}"], "NO_SUCH_VARIABLE"),
    ],
    ids=str,
)
def test_an_error_names_what_was_wrong(overrides: list[str], told: str) -> None:
    explanation = explain(error_of(*overrides))

    assert told in explanation
    assert f"did you mean {overrides[-1].partition('=')[0]}?" not in explanation


@pytest.mark.parametrize(
    "override", ["~data", "~optimizer", "~seed", "~model.l2", "+a=1", "seed=x"]
)
def test_a_composed_configuration_is_refused_with_a_value_error_alone(override: str) -> None:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        composed = hydra.compose("run", [override])

    with pytest.raises(ValueError):
        to_config(composed)


KEYS = st.sampled_from(
    [
        "data.name",
        "data.path",
        "data.sha256",
        "data.sources",
        "data.validation_size",
        "model.hidden_units",
        "optimizer.name",
        "optimizer.learning_rate",
        "training.early_stopping_patience",
        "tracking.experiment",
        "tracking.uri",
        "seed",
        "evaluate_test",
    ]
)
TEXTS = st.text() | st.text().map(lambda text: f'"{text}"')
VALUES = st.one_of(
    TEXTS,
    st.integers().map(str),
    st.integers(min_value=10**308, max_value=10**320).map(str),
    st.floats().map(str),
    st.lists(st.integers() | st.none() | st.just("[]") | st.just("{a:1}")).map(str),
    st.sampled_from(
        ["", "???", "null", "${seed}", "${a", "$", "{a: {b: 1}}", "a,b", "1e999", "\n"]
    ),
)


@settings(deadline=None, max_examples=40)
@given(st.tuples(KEYS, VALUES) | st.tuples(st.sampled_from([*OPTIONS]), TEXTS))
@example(("data", '"a\nb"'))
@example(("seed", "9" * 5000))
@example(("model.hidden_units", "9" * 400))
@example(("data.validation_size", "9" * 400))
@example(("optimizer.learning_rate", "9" * 400))
def test_any_override_composes_or_is_refused_in_one_line(override: tuple[str, str]) -> None:
    try:
        accepted: object = compose("=".join(override))
    except (ValueError, HydraException) as error:
        accepted = explain(error)

    assert isinstance(accepted, RunConfig | str)
    assert len(str(accepted).splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        ValueError("two\nlines"),
        OSError("two\r\nlines"),
        RuntimeError("two\u2028lines"),
        HydraException("two\n\n  lines"),
        KeyError("two\nlines"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "two\nlines"),
    ],
    ids=repr,
)
def test_an_explanation_is_one_line_whatever_the_error(error: Exception) -> None:
    assert len(explain(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("connection failed: fe_sendauth: no password supplied", "Set PGPASSWORD"),
        ('FATAL: password authentication failed for user "ann"', "has another password"),
        ("failed with error code 403 != 200. Response body: 'Permission denied'", "needs EDIT"),
    ],
)
def test_an_error_that_says_what_failed_alone_also_says_what_to_do(text: str, remedy: str) -> None:
    error = RuntimeError(f"{text}\n(Background on this error at: https://sqlalche.me/e/21/e3q8)")

    line = explain(error)

    assert line.startswith(f"RuntimeError: {text} ")
    assert remedy in line
    assert "Background" not in line
