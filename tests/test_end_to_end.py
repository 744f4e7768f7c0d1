"""The command line, real servers, a real browser: what a person meets."""

import contextlib
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

from tests.commands import call
from tests.served import Served, open_ui, sees, text_of, wait

Need = Callable[[object, str], None]

RUN = [sys.executable, "-m", "pipeline.run"]
QUICK = ["data=digits", "training=quick", "model.hidden_units=32"]


def run(*arguments: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs `python -m pipeline.run` to its end."""
    return subprocess.run(
        [*RUN, *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )


def query(folder: Path, sql: str) -> list[tuple[str, ...]]:
    with contextlib.closing(sqlite3.connect(folder / "mlruns" / "mlflow.db")) as database:
        return database.execute(sql).fetchall()


@dataclass(frozen=True)
class Ended:
    """Two runs of one command line."""

    folder: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("user")
    done = run("-m", *QUICK, "seed=1,2", cwd=folder)
    assert done.returncode == 0, done.stderr
    return Ended(folder, done.stdout, done.stderr)


def test_each_job_of_a_multirun_is_a_run_of_its_own(ended: Ended) -> None:
    names = query(ended.folder, "SELECT name FROM runs ORDER BY start_time")

    assert names == [
        ("32-32 dropout=0.2 rmsprop lr=0.001 seed=1",),
        ("32-32 dropout=0.2 rmsprop lr=0.001 seed=2",),
    ]


def test_a_run_ends_with_its_figures_and_the_lines_that_repeat_and_show_it(ended: Ended) -> None:
    assert re.search(r"^Test score: \d\.\d{4}$", ended.out, re.M)
    assert re.search(r"^Test accuracy: 0\.\d{4} \(look 1 at this test split\)$", ended.out, re.M)
    assert re.search(r"^Test accuracy: 0\.\d{4} \(look 2 at this test split\)$", ended.out, re.M)
    command = "python -m pipeline.run data=digits training=quick model.hidden_units=32 seed=1"
    assert f"\nRepeat: {command}\n" in ended.out
    assert (
        len(re.findall(r"^See it: python -m pipeline\.ui run=[0-9a-f]{32}$", ended.out, re.M)) == 2
    )


def test_a_multirun_ends_with_mean_and_spread_over_its_seeds(ended: Ended) -> None:
    found = re.findall(r"^Test accuracy: (0\.\d{4})", ended.out, re.M)
    first, second = map(float, found)
    mean, spread = (first + second) / 2, abs(first - second) / 2**0.5

    title, heading, row = ended.out.splitlines()[-3:]

    assert title == "The runs that finished, with mean and standard deviation over seeds:"
    assert heading.split() == ["seeds", "val_accuracy", "test_accuracy", "seconds"]
    assert row.startswith("1, 2 ")
    test_accuracy = re.fullmatch(r"1, 2 +\S+ ±\S+ +(\S+) ±(\S+) +\d+\.\d ±\d+\.\d", row)
    assert test_accuracy
    assert [*map(float, test_accuracy.groups())] == pytest.approx([mean, spread], abs=2e-4)


def test_the_results_of_equal_settings_are_read_from_the_store(ended: Ended) -> None:
    from tests.benchmarks.results import build_table, read_results

    (result,) = read_results(str(ended.folder / "mlruns"), "digits")

    told = re.findall(r"^Test accuracy: (0\.\d{4})", ended.out, re.M)
    errors = sorted(100 * (1 - float(accuracy)) for accuracy in told)
    assert result.command == shlex.join(QUICK)
    assert sorted(result.errors) == pytest.approx(errors, abs=0.01)
    assert len(result.validation) == len(result.seconds) == 2
    assert not result.whole
    assert build_table([result]).row_count == 1
    assert read_results(str(ended.folder / "mlruns"), "mnist") == []


def test_a_run_shows_every_epoch_and_says_nothing_on_standard_error(ended: Ended) -> None:
    assert len(re.findall(r"^epoch \d of 3 .*val_accuracy", ended.out, re.M)) == 6
    assert ended.err == ""


def test_a_run_writes_to_its_store_alone(ended: Ended) -> None:
    assert [path.name for path in ended.folder.iterdir()] == ["mlruns"]


def test_the_command_that_repeats_a_run_gives_its_figures_again(ended: Ended) -> None:
    (command,) = re.findall(r"^Repeat: python (.*seed=2)$", ended.out, re.M)

    again = call(*shlex.split(command)[2:], folder=ended.folder, command=RUN)

    figures = re.compile(r"^(?:epoch|Test score|Best).*$", re.M)
    assert figures.findall(again.stdout) == figures.findall(ended.out)[5:]


# --- interruptions -----------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_is_killed_in_the_store(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = subprocess.Popen(
        [*RUN, "data=digits", "training.epochs=100000", "training.early_stopping_patience=null"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("epoch"))
    asked = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)

    assert process.returncode == code
    assert time.monotonic() - asked < 10
    assert "Traceback" not in err
    assert query(tmp_path, "SELECT status FROM runs") == [("KILLED",)]


def test_a_multirun_that_is_interrupted_ends_with_the_seeds_that_finished(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*RUN, "-m", *QUICK, "training.epochs=60", "seed=-1,1,2,3"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines = iter(process.stdout)
    next(line for line in lines if "seed=3" in line)
    next(line for line in lines if line.startswith("epoch"))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)

    assert process.returncode == 130
    *_, title, heading, row = out.splitlines()
    assert title == "The runs that finished, with mean and standard deviation over seeds:"
    assert (heading.split()[0], row.split()[:2]) == ("seeds", ["1,", "2"])
    refused, interrupted = err.splitlines()
    assert "seed must be in [0, 2**32), got -1." in refused
    assert interrupted.startswith("Interrupted")


def test_a_full_disk_fails_the_run_with_its_reason_and_spares_the_database(
    tmp_path: Path, need: Need
) -> None:
    need(os.geteuid() == 0, "root, to mount a small disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    subprocess.run(mount, check=True)
    try:
        done = run("data=digits", "training=quick", "model.hidden_units=1000", cwd=tmp_path)
        runs = query(tmp_path, "SELECT status FROM runs")
        reasons = query(tmp_path, "SELECT value FROM tags WHERE key = 'error'")
        integrity = query(tmp_path, "PRAGMA integrity_check")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert re.search("No space left|disk is full", done.stderr)
    assert (runs, integrity) == ([("FAILED",)], [("ok",)])
    assert re.search("No space left|disk is full", reasons[0][0])


# --- the MLflow UI and an MLflow server --------------------------------------------------


@pytest.fixture(scope="module")
def served(ended: Ended) -> Iterator[Served]:
    """The UI, opened by the line that the first run ends with."""
    line = re.findall(r"^See it: python -m pipeline\.ui (.*)$", ended.out, re.M)[0]
    with open_ui(*shlex.split(line), folder=ended.folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(served: Served) -> str:
    """Address of the first run's page."""
    return served.pages["32-32 dropout=0.2 rmsprop lr=0.001 seed=1"]


def test_the_ui_shows_a_run_with_its_result_and_how_to_repeat_it(
    page: str, browser: WebDriver
) -> None:
    browser.get(page)

    WebDriverWait(browser, 60).until(
        lambda driver: sees(
            driver,
            "32-32 dropout=0.2 rmsprop lr=0.001 seed=1",
            "Finished",
            "best validation accuracy",
            "python -m pipeline.run data=digits",
        )
    )
    assert sees(browser, "Model metrics", "Artifacts", "version.keras")


@pytest.mark.parametrize("name", ["digits", "learning_curves", "confusion_matrix", "mistakes"])
def test_the_ui_shows_the_figures_inline(page: str, browser: WebDriver, name: str) -> None:
    address, _, options = page.partition("?")
    browser.get("about:blank")  # or the figure before is still there
    browser.get(f"{address}/artifacts/figures/{name}.png?{options}")

    def width(driver: WebDriver) -> int:
        script = (
            "return Math.max(0, ...Array.from(document.querySelectorAll('img, [style*=blob]'))"
            ".map(image => image.naturalWidth || image.clientWidth))"
        )
        found: int = driver.execute_script(script)
        return found

    WebDriverWait(browser, 60).until(lambda driver: width(driver) > 200)
    assert sees(browser, f"{name}.png")


def test_the_ui_and_all_it_starts_listen_on_this_machine_alone(served: Served) -> None:
    processes = psutil.Process(served.process.pid).children(recursive=True)
    listening = [
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]

    assert set(listening) == {"127.0.0.1"}


def test_the_ui_lists_the_runs_of_the_experiment(page: str, browser: WebDriver) -> None:
    browser.get(re.sub(r"/runs/\w+", "/runs", page))

    WebDriverWait(browser, 60).until(lambda driver: sees(driver, "matching runs"))
    assert sees(browser, "Run Name", "Created", "Dataset")
    wait(browser, lambda driver: text_of(driver, "body").count("32-32 dropout") >= 2)


def test_a_run_logs_to_a_server_and_hides_its_password(
    ended: Ended, served: Served, tmp_path: Path
) -> None:
    address = served.address.replace("http://", "http://me:hush-7f3a@")

    done = run(
        *QUICK,
        "tracking=server",
        f"tracking.uri={address}",
        "tracking.experiment=remote",
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    assert (
        f"See it: {served.address.replace('http://', 'http://me:***@')}/#/experiments/"
        in done.stdout
    )
    runs = query(
        ended.folder,
        "SELECT status FROM runs JOIN experiments USING (experiment_id) "
        "WHERE experiments.name = 'remote'",
    )
    assert runs == [("FINISHED",)]
    assert "hush-7f3a" not in done.stdout + done.stderr
    holding = [
        path
        for path in ended.folder.rglob("*")
        if path.is_file() and b"hush-7f3a" in path.read_bytes()
    ]
    assert holding == []


def test_a_server_that_is_not_there_ends_in_one_line(tmp_path: Path) -> None:
    away = ["tracking=server", "tracking.uri=http://127.0.0.1:9"]

    done = call(*QUICK, *away, folder=tmp_path, command=RUN)

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "127.0.0.1" in done.stderr
