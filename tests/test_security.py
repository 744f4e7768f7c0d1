"""What others may have written runs no code and hides nothing; what is secret is not said."""

import ast
import gc
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.config import TrackingConfig, printable
from sweeps.config import StudyConfig
from sweeps.executors import LocalExecutor
from tests.launching import ROOT, open_to_others, wait_until, workers_of
from tests.test_architecture import SOURCES

# What makes code of data, as it is written where it is called.
DANGEROUS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.unsafe_load",
    "yaml.full_load",
    "importlib.import_module",
    "keras.config.enable_unsafe_deserialization",
}
MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "skops", "torch"}
SECRET = "hush7f3a9c"


def calls() -> list[tuple[str, str, ast.Call]]:
    """Each call of the product: its file, what is called, the call."""
    return [
        (name, ast.unparse(node.func), node)
        for name, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def given(call: ast.Call, name: str) -> str | None:
    """What a call is given by that name."""
    found = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == name]
    return found[0] if found else None


def test_nothing_that_is_read_becomes_code() -> None:
    assert [(file, what) for file, what, _ in calls() if what in DANGEROUS] == []
    asked = [(file, what) for file, what, call in calls() if given(call, "shell") is not None]
    assert asked == []
    imported = {
        alias.name.partition(".")[0]
        for tree in SOURCES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        (node.module or "").partition(".")[0]
        for tree in SOURCES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    assert imported & MODULES == set()


def test_arrays_and_models_are_read_without_pickles() -> None:
    """NumPy's own default is to refuse them."""
    readers = ("np.load", "np.lib.format.read_array", "np.savez")
    pickles = [given(call, "allow_pickle") for _, what, call in calls() if what in readers]
    models = [given(call, "safe_mode") for _, what, call in calls() if what.endswith(".load_model")]

    assert len(pickles) >= 4
    assert set(pickles) <= {None, "False"}
    assert set(models) <= {None, "True"}
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"


def test_yaml_is_read_without_objects() -> None:
    from pipeline.store import _Settings

    loaders = [ast.unparse(call.args[1]) for _, what, call in calls() if what == "yaml.load"]

    assert loaders == ["_Settings"]
    with pytest.raises(yaml.YAMLError):
        yaml.load("!!python/object/apply:os.getpid []", _Settings)


def test_a_few_lines_of_yaml_cannot_become_gigabytes() -> None:
    from pipeline.store import _Settings

    bomb = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"

    with pytest.raises(yaml.YAMLError, match="it has an alias"):
        yaml.load(bomb, _Settings)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("trial\t1\nbest é 数", "trial\t1\nbest é 数"),
        ("\x1b[2K\rpython -m evil", "\ufffd[2K\ufffdpython -m evil"),
        ("\x9b2J \x07 \x00", "\ufffd2J \ufffd \ufffd"),
        ("safe \u202egnp.exe", "safe \ufffdgnp.exe"),
    ],
)
def test_a_terminal_is_given_no_commands_of_others(text: str, shown: str) -> None:
    assert printable(text) == shown


# --- passwords ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlflow.system_metrics.system_metrics_monitor", "optuna", "x"])
def test_no_library_logs_a_password(name: str, caplog: pytest.LogCaptureFixture) -> None:
    error = OSError(f"API request to http://me:{SECRET}@host failed")

    with caplog.at_level(logging.WARNING, logger=name):
        caplog.handler.handle(
            logging.getLogger(name).makeRecord(
                name, logging.WARNING, __file__, 1, "Failed: %s", (error,), (OSError, error, None)
            )
        )

    assert SECRET not in caplog.text
    assert caplog.text.count("http://me:***@host") == 2


def test_a_record_of_a_library_with_too_few_arguments_is_left_to_logging() -> None:
    record = logging.getLogger("x").makeRecord("x", 30, "x.py", 1, "%s and %s", ("one",), None)

    assert (record.msg, record.args) == ("%s and %s", ("one",))


def test_a_traceback_that_is_asked_for_has_no_password(tmp_path: Path) -> None:
    address = f"tracking.uri=foo://me:{SECRET}@host/db"

    ended = subprocess.run(
        [sys.executable, "-m", "sweeps.leaderboard", address],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HYDRA_FULL_ERROR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert ended.returncode == 1
    assert "Traceback (most recent call last):\n" in ended.stderr
    assert "foo://me:***@host/db" in ended.stderr
    assert SECRET not in ended.stdout + ended.stderr


def test_a_password_that_would_not_be_found_again_is_refused_unsaid() -> None:
    address = f"postgresql://me:two {SECRET}@host/db"

    with pytest.raises(ValueError, match=r"tracking\.uri must .* %20") as of_runs:
        TrackingConfig(
            uri=address,
            directory="mlruns",
            experiment="x",
            run_name=None,
            system_metrics=False,
            figures=False,
        )
    with pytest.raises(ValueError, match=r"study\.storage must .* %20") as of_study:
        StudyConfig(storage=address)

    assert SECRET not in f"{of_runs.value} {of_study.value}"
    StudyConfig(storage="sqlite:////home/me/my files/a:b@c/optuna.db")


# --- workers -----------------------------------------------------------------------------


def test_nobody_else_reaches_a_worker() -> None:
    """They are sent pickles: who could connect to one could run code."""
    before = psutil.Process().children(recursive=True)
    with LocalExecutor(2, gc.enable) as executor:
        for _ in range(2):
            executor.submit(time.sleep, 2)
        wait_until(lambda: len(workers_of(psutil.Process())) == 2)
        now = psutil.Process().children(recursive=True)
        processes = [process for process in now if process not in before]
        # The server of the workers may be that of an earlier test, whose browser is no worker.
        servers = [process for process in now if "forkserver" in " ".join(process.cmdline())]
        reachable = open_to_others([*processes, *servers])

    assert len(processes) >= 2
    assert servers
    assert reachable == []


def test_what_listens_to_others_is_found(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with socket.socket() as by_network, socket.socket(socket.AF_UNIX) as by_file:
        by_network.bind(("127.0.0.1", 0))
        by_network.listen()
        by_file.bind(str(tmp_path / "open"))
        by_file.listen()

        found = open_to_others([psutil.Process()])

        assert {by_network.getsockname(), str(tmp_path / "open")} <= set(found)
