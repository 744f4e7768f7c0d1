"""Predictions as a user asks for them: the real command, and a real server of the same model."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pipeline import registry
from pipeline.config import RunConfig
from pipeline.run import execute_run
from pipeline.store import search
from tests.commands import call
from tests.launching import ENVIRONMENT, ROOT, run, wait_until
from tests.servers import free_port

PREDICT = [sys.executable, "-m", "pipeline.predict"]
IMAGES = load_digits().images[:40].astype(np.uint8)


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, configure: Callable[..., RunConfig], tensorflow: None
) -> Path:
    """Where a model was trained and promoted, with images and the predictions of them."""
    folder = tmp_path_factory.mktemp("promoted")
    settings = ("data=digits", "training.epochs=8", "tracking.figures=false", "evaluate_test=false")
    config = configure(*settings, f"tracking.directory={folder / 'mlruns'}")
    execute_run(config, shlex.join(["python", "-m", "pipeline.run", *settings]))
    promote(folder)
    np.savez(folder / "images.npz", images=IMAGES)
    large = Image.fromarray(IMAGES[0] * 15).resize((300, 300), Image.Resampling.BICUBIC)
    Image.fromarray(255 - np.pad(np.asarray(large), 50)).save(folder / "a zero=0.png")
    return folder


def promote(folder: Path) -> None:
    """What `sweeps.promote` does in the end."""
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlruns/mlflow.db")
    (trained,) = search("attributes.status = 'FINISHED'")
    version = registry.register("digits", trained, "A card.", {})
    registry.move_champion(version, action="promote", promotion="", evidence="")


@pytest.fixture(scope="module")
def predicted(folder: Path) -> subprocess.CompletedProcess[str]:
    files = ["images.npz", "a zero=0.png"]
    return call(*files, "--out", "it's out.csv", folder=folder, command=PREDICT)


def test_the_command_says_the_digits_and_writes_them(
    folder: Path, predicted: subprocess.CompletedProcess[str]
) -> None:
    assert (predicted.returncode, predicted.stderr) == (0, "")
    first, *_, picture, last = predicted.stdout.splitlines()
    assert re.fullmatch(r"digits version 1 \(champion\), from run [0-9a-f]{32}", first)
    assert re.match(r"a zero=0\.png: 0 \(\d\.\d+\), then \d .*; 400x400, dark on light", picture)
    assert last == "41 predictions in it's out.csv"
    assert len(pd.read_csv(folder / "it's out.csv")) == 41


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no file is named: python -m pipeline.predict images.npz, or PNG and JPEG pictures."),
        (["missing.png"], "missing.png: there is no such file."),
        (["images.npz", "batch_sise=3"], "batch_sise: no such key; did you mean batch_size?"),
        (
            ["images.npz", "--out", "p.txt"],
            "out must be a file that ends in .csv or .parquet, got 'p.txt'.",
        ),
        (
            ["images.npz", "--out", "missing/p.csv"],
            "out=missing/p.csv: there is no folder {folder}/missing.",
        ),
    ],
)
def test_a_mistake_ends_in_one_line(folder: Path, arguments: list[str], message: str) -> None:
    done = call(*arguments, folder=folder, command=PREDICT)

    assert done.returncode == 1
    assert done.stderr == f"Error: {message.format(folder=folder)}\n"


def test_the_command_imports_no_slow_library_before_it_needs_one() -> None:
    code = "import sys, pipeline.predict; print({'tensorflow', 'keras', 'mlflow'} & {*sys.modules})"

    done = run("-c", code, folder=ROOT, command=[sys.executable])

    assert done.stdout.strip() == "set()"


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """MLflow's own server of the champion, with what it starts; its address."""
    port = str(free_port())
    options = ["-m", "models:/digits@champion", "--env-manager", "local"]
    options += ["--host", "127.0.0.1", "--port", port]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "models", "serve", *options],
            env={**ENVIRONMENT, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlruns/mlflow.db"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

        def is_up() -> bool:
            assert process.poll() is None, (folder / "server.log").read_text()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                return True
            return False

        try:
            wait_until(is_up)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its own group: nothing else is in it
            process.wait()


def test_mlflow_serves_the_champion_with_the_same_answers(
    folder: Path, predicted: subprocess.CompletedProcess[str]
) -> None:
    body = json.dumps({"inputs": IMAGES.tolist()}).encode()

    with serving(folder) as address:
        request = urllib.request.Request(
            f"{address}/invocations", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = np.array(json.load(response)["predictions"])

    table = pd.read_csv(folder / "it's out.csv")[:40]
    np.testing.assert_allclose(answer, table[[f"p_{k}" for k in range(10)]], atol=1e-6)
    assert answer.argmax(axis=1).tolist() == table["prediction"].tolist()
