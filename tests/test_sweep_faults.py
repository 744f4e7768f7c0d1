"""Sweeps that are killed, interrupted, started twice, starved: FAULTS.md from the command line."""

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.commands import call
from tests.invariants import check_invariants, check_whole
from tests.launching import SWEEP, OnTerminal, Started, run, wait_until, without_escapes
from tests.stores import (
    epochs,
    parent_of,
    processes_in,
    runs_of,
    told,
    trials_of,
)

Need = Callable[[object, str], None]

SMALL = ["data=digits", "model.hidden_units=16", "sampler=random", "sweep.first=[]"]
# Trials that last some seconds, so that there is time to disturb them.
LONG = [*SMALL, "training.epochs=100", "training.early_stopping_patience=null", "pruner=none"]
# A trial on a terminal, from the second look at it on: the first does not know its pace.
ROW = re.compile(r"^ +0 +\d+/600 .* 0\.\d{4} +\d+\.\d\d +dropout_rate=0", re.M)


def wait_for_progress(folder: Path, trial: int) -> None:
    """Until a trial is a few epochs further: a worker has it in hand."""
    before = epochs(folder, trial)
    wait_until(lambda: epochs(folder, trial) > before + 3)


# --- interruptions -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Interruption:
    """How a sweep answered a signal.

    Attributes:
        text: All that it wrote.
        status: Of its exit.
        seconds: From the (last) signal to its end.
        statuses: Of its runs afterwards.
        left: Processes.
    """

    text: str
    status: int
    seconds: float
    statuses: set[str]
    left: list[psutil.Process]

    @property
    def go_on(self) -> str:
        """The command that is said to go on with the sweep."""
        (line,) = re.findall(r"Go on with: (.*)$", self.text, re.M)
        return str(line)


@dataclass(frozen=True, kw_only=True)
class Story:
    """A sweep without a name, on terminals: Ctrl-C, then Ctrl-C twice, then SIGTERM, then none.

    Attributes:
        folder: Of it.
        name: That it was given.
        holder: Process of its first launcher.
        second: The same sweep, started while the first launcher was at work.
        once: One Ctrl-C.
        twice: Two, while the workers are paused.
        terminated: SIGTERM, likewise.
        whole: What followed.
    """

    folder: Path
    name: str
    holder: int
    second: subprocess.CompletedProcess[str]
    once: Interruption
    twice: Interruption
    terminated: Interruption
    whole: subprocess.CompletedProcess[str]


def ended_by(signalled: float, started: Started, folder: Path, name: str) -> Interruption:
    status = started.end(limit=60)
    return Interruption(
        status=status,
        seconds=time.monotonic() - signalled,
        text=without_escapes(started.text),
        statuses={run.status for run in runs_of(folder, name)} - {"FINISHED"},
        left=processes_in(folder),
    )


def pause_workers(started: Started, folder: Path, trial: int) -> None:
    wait_for_progress(folder, trial)
    for worker in started.workers:
        worker.suspend()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("interrupted")
    # Each launcher gets a little further with trial 0: it must not be done before the last one.
    long = ["training.epochs=600", "training.early_stopping_patience=null", "pruner=none"]
    command = [*SMALL, *long, "sweep.trials=1", "executor.workers=1"]

    with OnTerminal(*SWEEP, *command, folder=folder) as first:
        first.says(r"Sweep [a-z-]+: 0 of 1")
        (name,) = re.findall(r"Sweep ([a-z-]+):", first.text)
        second = run(*command, f"sweep.name={name}", folder=folder)
        wait_until(lambda: ROW.search(without_escapes(first.text)))
        signalled = time.monotonic()
        first.press_ctrl_c()
        once = ended_by(signalled, first, folder, name)

    with OnTerminal("bash", "-c", f"exec {once.go_on}", folder=folder) as again:
        pause_workers(again, folder, 0)
        again.press_ctrl_c()
        again.says("once more to stop at once")
        signalled = time.monotonic()
        again.press_ctrl_c()
        twice = ended_by(signalled, again, folder, name)

    with Started(*SWEEP, *shlex.split(once.go_on)[3:], folder=folder) as third:
        pause_workers(third, folder, 0)
        signalled = time.monotonic()
        third.process.send_signal(signal.SIGTERM)
        terminated = ended_by(signalled, third, folder, name)

    whole = run(*shlex.split(terminated.go_on)[3:], folder=folder)
    yield Story(
        folder=folder,
        name=name,
        holder=first.process.pid,
        second=second,
        once=once,
        twice=twice,
        terminated=terminated,
        whole=whole,
    )


def test_a_terminal_shows_what_runs_how_far_it_is_and_what_is_left(story: Story) -> None:
    shown = story.once.text

    assert re.search(r"^trial +epoch +now +s/epoch +settings", shown, re.M)
    assert ROW.search(shown)
    assert "0 of 1 trials, 0 pruned; no trial is complete yet; time left" in shown


def test_the_same_sweep_started_twice_is_refused_with_the_holder(story: Story) -> None:
    refused = story.second.stderr

    assert story.second.returncode == 1
    assert refused.count("\n") == 1
    assert f"sweep.name={story.name} is being run by process {story.holder} on " in refused


def test_one_ctrl_c_stops_a_sweep_and_says_how_to_go_on(story: Story) -> None:
    assert story.once.status == 130
    assert story.once.seconds < 10
    assert story.once.statuses == {"KILLED"}
    assert story.once.left == []
    assert "Stopped after 0 of 1 trials" in story.once.text
    assert story.once.go_on.startswith("python -m sweeps.run data=digits ")
    assert story.once.go_on.endswith(f" sweep.name={story.name}")
    assert "Traceback" not in story.once.text


def test_a_second_ctrl_c_stops_a_sweep_at_once(story: Story) -> None:
    assert story.twice.status == 130
    assert story.twice.seconds < 3
    assert story.twice.statuses == {"KILLED"}
    assert story.twice.left == []
    assert "Traceback" not in story.twice.text


def test_sigterm_stops_a_sweep_in_ten_seconds_though_its_workers_are_paused(story: Story) -> None:
    assert story.terminated.status == 143
    assert story.terminated.seconds < 10
    assert story.terminated.statuses == {"KILLED"}
    assert story.terminated.left == []
    assert story.terminated.go_on == story.once.go_on


def test_an_interrupted_sweep_goes_on_to_its_budget(story: Story) -> None:
    assert (story.whole.returncode, story.whole.stderr) == (0, "")
    check_invariants(story.folder, story.name, 1)


# --- trials that fail --------------------------------------------------------------------


def test_failed_trials_are_told_with_their_reason_and_end_a_sweep_when_too_many(
    tmp_path: Path,
) -> None:
    """Of the four points of the grid one diverges and two are too large."""
    command = [
        "data=digits",
        "training.epochs=2",
        "optimizer=sgd",
        "model.dropout_rate=0.1",
        "model.hidden_units=choice(8, 1000000)",
        "optimizer.learning_rate=choice(0.01, 1e30)",
        "sampler=grid",
        "sweep.first=[{model.hidden_units: 8, optimizer.learning_rate: 1e30}]",
        "executor.workers=1",
        "sweep.name=failing",
    ]

    given_up = call(*command, "sweep.max_failures=2", folder=tmp_path)
    whole = call(*command, "sweep.max_failures=9", folder=tmp_path)

    assert given_up.returncode == 1
    assert given_up.stderr.count("\n") == 1
    assert re.search(r"2 failed trials reach sweep\.max_failures; the last one: ", given_up.stderr)
    assert (whole.returncode, whole.stderr) == (0, "")
    trials = trials_of(tmp_path, "failing")
    assert len(trials) == 4
    check_invariants(tmp_path, "failing", 1)
    (complete,) = [trial for trial in trials if trial.state.name == "COMPLETE"]
    assert complete.params == {"model.hidden_units": 8, "optimizer.learning_rate": 0.01}
    diverged, *large = sorted(
        (trial for trial in trials if trial.state.name == "FAIL"),
        key=lambda trial: trial.params["model.hidden_units"],
    )
    assert "diverged in epoch 1" in diverged.user_attrs["reason"]
    assert all("model.hidden_units" in trial.user_attrs["reason"] for trial in large)
    tags = [run.tags for run in runs_of(tmp_path, "failing") if "diverged" in run.tags]
    assert [(tag["trial"], tag["diverged.epoch"]) for tag in tags] == [(str(diverged.number), "1")]
    assert "Best of 1 complete trials\n" in whole.stdout


def test_a_full_disk_ends_a_sweep_in_one_line_and_spares_what_it_has(
    tmp_path: Path, need: Need
) -> None:
    need(os.geteuid() == 0, "root, to mount a small disk")
    disk = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path), "-o"]
    command = [
        "data=digits",
        "training.epochs=3",
        "model.hidden_units=choice(256, 257)",
        "sampler=random",
        "pruner=none",
        "sweep.trials=6",
        "executor.workers=1",
        "sweep.name=full",
    ]
    subprocess.run([*disk, "size=6m"], check=True)
    try:
        full = run(*command, folder=tmp_path)
        check_whole(tmp_path)
        kept = told(tmp_path)
        subprocess.run([*disk, "remount,size=64m"], check=True)
        whole = run(*command, folder=tmp_path)
        check_invariants(tmp_path, "full", 6)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)

    assert full.returncode == 1
    assert full.stderr.count("\n") == 1
    assert re.search("No space left|disk is full", full.stderr)
    assert 1 <= kept < 6
    assert (whole.returncode, whole.stderr) == (0, "")


# --- several sweeps at once --------------------------------------------------------------


def test_two_sweeps_may_be_the_first_to_use_empty_stores(tmp_path: Path) -> None:
    fixed = "+search.space={training.epochs: 1}"
    command = [*SMALL, fixed, "sweep.trials=1", "executor.workers=1"]
    names = ["north", "south"]
    with ExitStack() as stack:
        sweeps = [
            stack.enter_context(Started(*SWEEP, *command, f"sweep.name={name}", folder=tmp_path))
            for name in names
        ]
        statuses = [sweep.end() for sweep in sweeps]

    assert statuses == [0, 0], [sweep.text for sweep in sweeps]
    assert ["\nThe space fixes training.epochs=1.\n" in sweep.text for sweep in sweeps] == [
        True
    ] * 2
    for name in names:
        check_invariants(tmp_path, name, 1)
    assert len({parent_of(tmp_path, name).run_id for name in names}) == 2
