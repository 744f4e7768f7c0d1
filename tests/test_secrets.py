"""Passwords in addresses stay in nobody's sight but that of who typed them: FAULTS.md 22."""

import base64
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.launching import ENVIRONMENT, SWEEP, Started, open_to_others, run
from tests.passwords import dump, forms, guard, holding
from tests.servers import Postgresql

# Of the runs, and of the study: each is found by what stands at its ends.
RUNS, STUDY = """hush7f3a@:/'" %&=?#mute9c1e""", "calm4b2d$,[]{}\\é+still8e6f"
LEADERBOARD = [sys.executable, "-m", "sweeps.leaderboard"]
# Trial 0 diverges, 1 is complete, 2 learns nothing and is pruned.
COMMAND = [
    "data=digits",
    "training.epochs=20",
    "training.early_stopping_patience=null",
    "optimizer=sgd",
    "model.hidden_units=16",
    "model.dropout_rate=0",
    "optimizer.learning_rate=choice(1e30, 0.05, 1e-9)",
    "sweep.first=[{optimizer.learning_rate: 1e30}, {optimizer.learning_rate: 0.05},"
    " {optimizer.learning_rate: 1e-9}]",
    "sampler=random",
    "pruner=median",
    "pruner.n_startup_trials=1",
    "pruner.n_warmup_steps=1",
    "sweep.trials=2",
    "executor.workers=1",
    "sweep.name=hushed",
]


@dataclass(frozen=True, kw_only=True)
class Story:
    """A sweep that is interrupted, gone on with and ranked, with an address that has a password.

    Attributes:
        folder: Of it; temporary files and the user's own are below it too.
        runs: Address of their database.
        study: Address of its database.
        ends: Exit status by command.
        texts: What each wrote.
        processes: Command lines of what the sweep started.
        listening: Addresses at which it, or what it started, waited for others than its user.
    """

    folder: Path
    runs: str
    study: str
    ends: dict[str, int]
    texts: dict[str, str]
    processes: list[str]
    listening: Sequence[object]


@pytest.fixture(scope="module")
def story(postgresql: Postgresql, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("hushed")
    for name in ("tmp", "home"):
        (folder / name).mkdir()
    own = {**ENVIRONMENT, "TMPDIR": str(folder / "tmp"), "HOME": str(folder / "home")}
    runs = guard(postgresql.new_database(), "ann", RUNS)
    study = guard(postgresql.new_database(), "bob", STUDY)
    addresses = [f"tracking.uri={runs}", f"study.storage={study}"]
    ends, texts = {}, {}

    with Started(*SWEEP, *COMMAND, *addresses, folder=folder, environment=own) as first:
        first.says("^trial 0  fail")
        started = psutil.Process(first.process.pid).children(recursive=True)
        processes = [" ".join(process.cmdline()) for process in started]
        listening = open_to_others([psutil.Process(first.process.pid), *started])
        first.process.send_signal(signal.SIGTERM)
        ends["stopped"], texts["stopped"] = first.end(), first.text

    others = {
        "whole": [*SWEEP, *COMMAND, *addresses],
        "ranked": [*LEADERBOARD, addresses[0], "format=json"],
        "no such study": [*SWEEP, *COMMAND, addresses[0], f"{addresses[1]}-none"],
        "refused": [*LEADERBOARD, addresses[0].replace("://ann:", "://ann:not-")],
        "misspelt": [*LEADERBOARD, f"tracking.url={runs}"],
    }
    for what, command in others.items():
        done = run(folder=folder, command=command, environment=own)
        ends[what], texts[what] = done.returncode, done.stdout + done.stderr
    return Story(
        folder=folder,
        runs=runs,
        study=study,
        ends=ends,
        texts=texts,
        processes=processes,
        listening=listening,
    )


def test_a_sweep_goes_on_with_passwords_of_any_characters(story: Story) -> None:
    shown = story.texts["whole"]

    assert (story.ends["stopped"], story.ends["whole"]) == (143, 0), story.texts
    assert re.search(r"^trial 1  complete .*^trial 2  pruned ", shown, re.M | re.S)
    assert story.ends["ranked"] == 0


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no such study", 'database "store[0-9]+-none" does not exist'),
        ("refused", 'password authentication failed for user "ann"'),
        ("misspelt", r"tracking\.url: no such key; did you mean tracking\.uri\?"),
    ],
)
def test_an_address_that_fails_ends_in_one_line(story: Story, what: str, said: str) -> None:
    assert story.ends[what] == 1
    assert story.texts[what].count("\n") == 1
    assert re.search(said, story.texts[what])


@pytest.mark.parametrize("password", [RUNS, STUDY])
def test_a_password_is_in_no_table_no_file_and_no_output(story: Story, password: str) -> None:
    dumped = dump(story.runs) + dump(story.study)
    shown = [text.encode() for text in (dumped, *story.texts.values(), *story.processes)]

    assert "ann:***@127.0.0.1" in dumped
    assert "bob:***@127.0.0.1" in dumped
    assert len(list(story.folder.rglob("report.html"))) == 1
    assert holding(story.folder, password) == []
    assert [text for text in shown if any(form in text for form in forms(password))] == []


def test_what_a_sweep_writes_outside_its_store_is_gone_afterwards(story: Story) -> None:
    assert list((story.folder / "tmp").iterdir()) == []
    assert {path.name for path in story.folder.iterdir()} == {"mlruns", "tmp", "home"}


def test_nobody_else_can_connect_to_a_sweep_or_its_workers(story: Story) -> None:
    """What they send each other is pickled, and who can send them a pickle can run code."""
    assert len(story.processes) > 2  # resource tracker, fork server, workers
    assert story.listening == []


def test_the_search_for_a_password_finds_it_in_each_form(tmp_path: Path) -> None:
    given = f"postgresql://ann:{RUNS}@host".encode()
    for before in range(3):
        (tmp_path / str(before)).write_bytes(base64.b64encode(bytes(before) + given))

    assert len(holding(tmp_path, RUNS)) == 3
