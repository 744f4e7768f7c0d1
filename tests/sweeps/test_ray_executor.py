"""What a Ray cluster adds: nodes that come and go, room, what workers there can reach."""

import gc
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from typing import Any

import pytest
import ray

from sweeps.config import RayConfig
from sweeps.executors import WorkerDiedError
from sweeps.ray_executor import RayExecutor
from tests.clusters import Nodes, ray_nodes
from tests.servers import free_port

ROOT = Path(__file__).resolve().parents[2]

LIMIT = 90.0  # seconds, of a busy machine
LOCAL: dict[str, str | None] = {"study.storage": "sqlite:////tmp/optuna.db", "tracking.uri": None}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Two of a processor core each."""
    with ray_nodes(1, 1) as nodes:
        yield nodes


def process() -> int:
    return os.getpid()


def note_and_sleep(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def open_on(address: str, study: str = "sqlite:////tmp/mine.db", **changes: Any) -> RayExecutor:
    settings = {"workers": None, "address": address, "cpus": 1, "memory": None, "gpus": 0}
    config = RayConfig(name="ray", **{**settings, **changes})
    addresses = {**LOCAL, "study.storage": study}
    return RayExecutor(config, gc.enable, name="room", threads=1, most=12, addresses=addresses)


def test_the_job_of_a_lost_node_fails_and_the_next_one_runs_where_a_node_comes(
    tmp_path: Path,
) -> None:
    with ray_nodes(1, 1) as nodes, open_on(nodes.address) as executor:
        futures = [executor.submit(note_and_sleep, tmp_path) for _ in range(executor.workers)]
        end = time.monotonic() + LIMIT
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < end:
            time.sleep(0.05)

        nodes.lose(0)
        done, running = wait(futures, timeout=LIMIT, return_when=FIRST_COMPLETED)
        nodes.cluster.add_node(num_cpus=1)
        next_one = executor.submit(process).result(timeout=LIMIT)

        assert (executor.workers, len(done), len(running)) == (2, 1, 1)
        error = done.pop().exception()
        assert isinstance(error, WorkerDiedError)
        assert re.fullmatch(r"worker lost: .* has gone \(\w+\)\.", str(error))
        assert next_one > 0


def test_there_are_as_many_workers_as_fit_unless_told(nodes: Nodes) -> None:
    with open_on(nodes.address, cpus=0.2) as many:
        assert many.workers == 10
    with open_on(nodes.address, cpus=0.75) as two:
        assert two.workers == 2
    with open_on(nodes.address, workers=3) as three:
        assert three.workers == 3


def test_workers_that_wait_for_room_are_told(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sweeps.ray_executor.UNSAID", 0.1)  # when none has started
    with open_on(nodes.address, workers=3) as executor:
        end = time.monotonic() + LIMIT
        while not caplog.messages and time.monotonic() < end:
            time.sleep(0.05)
        while not caplog.messages[-1].startswith("1 ") and time.monotonic() < end:
            time.sleep(0.5)
            executor._tell_of_waiting()

    told = (
        "workers have not started yet: they wait for room, or for nodes; `ray status` shows both."
    )
    assert caplog.messages[0] == f"3 of 3 {told}"
    assert caplog.messages[-1] == f"1 of 3 {told}"


def test_a_worker_does_not_import_ray(nodes: Nodes) -> None:
    with open_on(nodes.address) as executor:
        # Functions of this module would import it: as the job, or to warm up.
        has_ray = executor.submit(eval, "'ray' in __import__('sys').modules")

        assert has_ray.result(timeout=LIMIT) is False


def test_workers_of_a_sweep_of_the_same_name_elsewhere_are_left_alone(
    nodes: Nodes, tmp_path: Path
) -> None:
    with open_on(nodes.address, workers=1) as mine:
        job = mine.submit(note_and_sleep, tmp_path)
        end = time.monotonic() + LIMIT
        while not list(tmp_path.iterdir()) and time.monotonic() < end:
            time.sleep(0.05)

        code = (
            "import sys; from tests.sweeps.test_ray_executor import open_on, process;"
            "yours = open_on(sys.argv[1], 'sqlite:////tmp/yours.db', workers=1);"
            "print(yours.submit(process).result(timeout=90)); yours.stop(grace=0)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, nodes.address], cwd=ROOT, check=True, capture_output=True
        )

        assert int(done.stdout) > 0
        assert not job.done()


# The node of the launcher, or Ray's head: Ray itself waits for ever, or ends the process.
GONE = """
import sys
from pathlib import Path
import sweeps.ray_executor
from tests.launching import wait_until
from tests.sweeps.test_ray_executor import note_and_sleep, open_on, process
sweeps.ray_executor.GONE, sweeps.ray_executor.LOOK = float(sys.argv[3]), 1.0
executor, folder = open_on(sys.argv[1], workers=2), Path(sys.argv[2])
futures = [executor.submit(note_and_sleep, folder)]
wait_until(lambda: list(folder.iterdir()), limit=90)  # it has all the room there is
futures += [executor.submit(process) for _ in range(3)]
(folder / "all").touch()
for future in futures:
    print(repr(future.exception(timeout=90)))
executor.stop()
print("stopped")
"""


@pytest.mark.parametrize(
    ("parts", "gone"),
    [(["raylet"], 3), (["gcs_server"], 3), (["gcs_server", "raylet"], 12)],
    ids=str,
)
def test_jobs_fail_and_nothing_waits_when_the_cluster_is_lost(
    tmp_path: Path, parts: list[str], gone: float
) -> None:
    with ray_nodes(1) as nodes:
        launcher = subprocess.Popen(
            [sys.executable, "-c", GONE, nodes.address, str(tmp_path), str(gone)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        end = time.monotonic() + LIMIT
        while not (tmp_path / "all").exists() and time.monotonic() < end:
            time.sleep(0.05)

        for part in parts:
            getattr(nodes.cluster.head_node, f"kill_{part}")(check_alive=False)
        if len(parts) > 1:  # and all that trains
            nodes.lose(0)
        printed, said = launcher.communicate(timeout=LIMIT)

    lost = 'ClusterLostError("Ray\'s head, or its node on this machine, is gone: start Ray again.")'
    *ends, last = printed.splitlines()
    assert (launcher.returncode, last) == (0, "stopped"), said
    assert set(ends[1:]) == {lost}
    assert lost == ends[0] or "WorkerLostError" in ends[0]  # its node may have gone before


def test_an_executor_that_is_stopped_twice_leaves_the_cluster_once(nodes: Nodes) -> None:
    executor = open_on(nodes.address)
    assert executor.submit(process).result(timeout=LIMIT) > 0

    executor.stop(grace=0)
    executor.stop(grace=0)

    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (
            {"cpus": 2},
            "executor: no node of the cluster has 2 processor cores for a worker; one has at most "
            "1 processor core. Set executor.workers where nodes are to come.",
        ),
        (
            {"gpus": 1},
            "executor: no node of the cluster has 1 processor core, 1 GPU for a worker; one has at "
            "most 1 processor core or 0 GPUs. Set executor.workers where nodes are to come.",
        ),
    ],
    ids=str,
)
def test_a_worker_for_which_no_node_has_room_is_refused(
    nodes: Nodes, asked: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError) as error:
        open_on(nodes.address, **asked)

    assert str(error.value) == told
    assert not ray.is_initialized()


def test_a_cluster_where_nobody_answers_is_told_at_once() -> None:
    address, start = f"127.0.0.1:{free_port()}", time.monotonic()

    with pytest.raises(ConnectionError) as error:
        open_on(address)

    told = rf"executor\.address={address}: nobody answers: .*Connection refused\."
    assert re.fullmatch(told, str(error.value))
    assert time.monotonic() - start < 30


def test_a_cluster_is_found_by_the_name_of_its_head(nodes: Nodes) -> None:
    port = nodes.address.rpartition(":")[2]

    with open_on(f"{socket.gethostname()}:{port}") as executor:
        assert executor.workers == 2


def test_stores_that_other_machines_would_seek_on_their_own_are_refused() -> None:
    from sweeps.ray_executor import _check_reach

    here, hosts = socket.gethostname(), [socket.gethostname(), "another"]
    server = {"study.storage": "postgresql+psycopg://ann:secret@10.0.0.1/optuna"}

    _check_reach([here], LOCAL)
    _check_reach(hosts, {**server, "tracking.uri": "http://10.0.0.1:5000"})
    for key, uri in [
        ("study.storage", "sqlite:////tmp/optuna.db"),
        ("study.storage", "postgresql+psycopg://ann:secret@localhost/optuna"),
        ("tracking.uri", None),
        ("tracking.uri", "http://127.0.0.1:5000"),
        ("tracking.uri", "postgresql+psycopg://ann:secret@10.0.0.1/mlflow"),
        ("study.storage", "postgresql+psycopg:///optuna"),
        ("study.storage", "postgresql+psycopg:///optuna?host=localhost"),
        ("study.storage", "postgresql+psycopg:///optuna?host=/run/postgresql"),
    ]:
        with pytest.raises(ValueError) as error:
            _check_reach(hosts, {key: uri})

        assert str(error.value).startswith(f"{key} must be a server (")
        assert "that workers on another can reach" in str(error.value)
        assert "secret" not in str(error.value)
