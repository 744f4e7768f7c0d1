"""A sweep on a Ray cluster, with PostgreSQL and an MLflow server.

It is terminated and gone on with, and one of its nodes is lost.
"""

import os
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import ray

from tests.clusters import Container, ray_nodes
from tests.invariants import Finding, find
from tests.launching import SWEEP, Started, wait_until
from tests.servers import MLflowServer, Postgresql
from tests.stores import Stores, runs_of

TRIALS = 30
PATIENCE = 900  # seconds, of a busy machine
HERE = socket.gethostname()
SETTINGS = ["data=digits", "training=quick", f"sweep.trials={TRIALS}", "sweep.name=spread"]


@dataclass(frozen=True)
class Story:
    """What came of it.

    Attributes:
        interrupted: Status of the first launcher, which was told to stop, and its last line.
        status: Of the second one.
        text: All that it wrote.
        findings: On what must hold whatever happens.
        hosts: On which trials were executed.
        left: Where each run was last executed of which the lost node had files left.
    """

    interrupted: tuple[int, str]
    status: int
    text: str
    findings: list[Finding]
    hosts: set[str]
    left: set[str]


@pytest.fixture(scope="module")
def story(
    postgresql: Postgresql,
    need: Callable[[object, str], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Story]:
    need(os.geteuid() == 0, "root, for a node with files of its own")
    base = tmp_path_factory.mktemp("cluster")
    folder, temporary = base / "sweep", base / "temporary"
    folder.mkdir()
    study, backend = (postgresql.new_database() for _ in range(2))
    with (
        MLflowServer(base / "server", backend, names=f"{HERE}:*") as server,
        ray_nodes(1) as nodes,
        Container(nodes.address, hidden=folder, temporary=temporary) as another,
    ):
        with nodes.connected():
            wait_until(lambda: len(ray.nodes()) == 3)  # type: ignore[no-untyped-call]
        where = [
            *("executor=ray", f"executor.address={nodes.address}"),
            f"study.storage={study.replace('127.0.0.1', HERE)}",
            *("tracking=server", f"tracking.uri={server.uri.replace('127.0.0.1', HERE)}"),
        ]
        with Started(*SWEEP, *SETTINGS, *where, folder=folder) as started:
            started.says(r"^trial +3 ", limit=PATIENCE)
            started.process.terminate()
            interrupted = started.end(limit=60), started.text.rstrip().rpartition("\n")[2]
        with Started(*SWEEP, *SETTINGS, *where, folder=folder) as started:
            started.says(rf"^trial +{TRIALS // 3} ", limit=PATIENCE)
            another.lose()
            status = started.end(limit=PATIENCE)
        stores = Stores(folder=folder, study=study, runs=backend)
        runs = runs_of(stores, "spread")
        left = {path.name for path in temporary.glob("digit-sweeps-*/*/*")}
        yield Story(
            interrupted=interrupted,
            status=status,
            text=started.text,
            findings=list(find(stores, "spread", TRIALS)),
            hosts={run.tags["host"] for run in runs if "trial" in run.tags},
            left={run.tags["host"] for run in runs if run.run_id in left},
        )


def test_a_sweep_on_a_cluster_that_is_terminated_says_how_to_go_on(story: Story) -> None:
    status, line = story.interrupted
    assert status == 143
    assert re.fullmatch(r"Stopped after \d+ of 30 trials, .*Go on with: python -m .*", line)


def test_a_sweep_is_spread_over_nodes_and_survives_the_loss_of_one(story: Story) -> None:
    assert story.status == 0, story.text
    assert story.hosts == {HERE, "another"}
    assert "raylet" not in story.text
    assert "Traceback" not in story.text


def test_after_the_loss_of_a_node_every_invariant_holds(story: Story) -> None:
    assert [finding for finding in story.findings if finding.broken] == []


def test_what_a_node_keeps_for_trials_that_it_ended_is_cleared_up(story: Story) -> None:
    assert story.left <= {HERE}  # it was stopped at them, or lost
