"""A tracking server that hangs, is killed, comes back late or never: FAULTS.md 9."""

import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from tests.launching import SWEEP, Started, wait_until
from tests.servers import MLflowServer
from tests.stores import query

RUN = [sys.executable, "-m", "pipeline.run"]
EPOCHS = 40
TRIALS = 2
PATIENCE = 600  # seconds
LONG = [
    "data=digits",
    "model.hidden_units=16",
    "training.early_stopping_patience=null",
    f"training.epochs={EPOCHS}",
    "tracking=server",
]
SWEPT = ["sampler=random", "pruner=none", "sweep.first=[]", f"sweep.trials={TRIALS}"]


def epochs_of(server: MLflowServer) -> int:
    """That it was told of."""
    return int(query(server.database, "SELECT count(*) FROM metrics WHERE key = 'val_loss'")[0][0])


@dataclass(frozen=True, kw_only=True)
class Story:
    """A server hangs in the first of two runs and is killed in the second, then in a sweep.

    Attributes:
        server: That was away.
        folder: Of the commands.
        alone: Exit status and text of the two runs.
        unknown: Epochs that the server had not been told of when both had ended.
        swept: Exit status and text of the sweep, during which it came back.
    """

    server: MLflowServer
    folder: Path
    alone: tuple[int, str]
    unknown: int
    swept: tuple[int, str]


def shown(started: Started) -> int:
    """Epochs that a command has printed."""
    return len(re.findall(r"^epoch +\d+ of", started.text, re.M))


def run_twice(server: MLflowServer, folder: Path) -> tuple[int, str]:
    command = [*RUN, "-m", *LONG, f"tracking.uri={server.uri}", "seed=1,2"]
    with Started(*command, folder=folder) as started:
        wait_until(lambda: epochs_of(server) >= 2, limit=PATIENCE)
        server.send(signal.SIGSTOP)
        wait_until(lambda: "Repeat: " in started.text, limit=PATIENCE)  # the first has ended
        server.send(signal.SIGCONT)
        wait_until(lambda: epochs_of(server) >= EPOCHS + 2, limit=PATIENCE)
        server.kill()
        return started.end(limit=PATIENCE), started.text


def spooled(folder: Path) -> int:
    """What there is to tell the server."""
    return sum(len(path.read_bytes().splitlines()) for path in folder.rglob("journal.jsonl"))


def sweep(server: MLflowServer, folder: Path) -> tuple[int, str]:
    address = [f"tracking.uri={server.uri}", "executor.workers=1", "sweep.name=away"]
    with Started(*SWEEP, *LONG, *SWEPT, *address, folder=folder) as started:
        wait_until(lambda: epochs_of(server) >= 2 * EPOCHS + 2, limit=PATIENCE)
        server.kill()
        wait_until(lambda: spooled(folder) >= 2, limit=PATIENCE)
        server.start()
        server.wait(limit=PATIENCE)
        return started.end(limit=PATIENCE), started.text


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("commands")
    server = MLflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    server.wait(limit=PATIENCE)
    try:
        alone = run_twice(server, folder)
        unknown = 2 * EPOCHS - epochs_of(server)
        server.start()
        server.wait(limit=PATIENCE)
        swept = sweep(server, folder)
        yield Story(server=server, folder=folder, alone=alone, unknown=unknown, swept=swept)
    finally:
        server.kill()


def test_a_run_goes_on_without_the_server_and_says_where_its_record_is_kept(story: Story) -> None:
    status, text = story.alone

    assert status == 0, text
    assert text.count(f"epoch {EPOCHS} of {EPOCHS} ") == 2
    assert text.count("The tracking store is away: what it has yet to be told is in ") == 2
    assert "Traceback" not in text
    assert story.unknown > 0


def test_a_sweep_goes_on_without_the_server_to_its_budget(story: Story) -> None:
    status, text = story.swept

    assert status == 0, text
    assert f"Best of {TRIALS} complete trials" in text
    assert "Traceback" not in text


def test_every_epoch_and_every_model_is_recorded_once_in_the_end(story: Story) -> None:
    runs = query(
        story.server.database,
        "SELECT status, count(step), count(DISTINCT step), max(step) FROM runs "
        "JOIN metrics USING (run_uuid) WHERE key = 'val_loss' GROUP BY run_uuid",
    )
    models = query(
        story.server.database,
        "SELECT status, count(*) FROM logged_models WHERE lifecycle_stage = 'active' GROUP BY 1",
    )
    saved = list((story.server.folder / "artifacts").rglob("model.keras"))

    assert runs == [("FINISHED", EPOCHS, EPOCHS, EPOCHS)] * (2 + TRIALS)
    assert models == [(2, 2 + TRIALS)]
    assert len(saved) == 2 + TRIALS
    assert query(story.server.database, "SELECT DISTINCT status FROM runs") == [("FINISHED",)]
    assert spooled(story.folder) == 0


def test_no_epoch_waits_more_than_15_seconds_for_the_server(story: Story) -> None:
    """A metric is stamped when it is measured, so a call that blocks shows in the next epoch."""
    sql = "SELECT run_uuid, timestamp FROM metrics WHERE key = 'val_loss' ORDER BY run_uuid, step"
    stamps = query(story.server.database, sql)
    waits = [later - earlier for (run, earlier), (same, later) in pairwise(stamps) if run == same]

    assert len(waits) == (2 + TRIALS) * (EPOCHS - 1)
    assert max(waits) < 15_000
