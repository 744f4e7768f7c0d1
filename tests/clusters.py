"""Ray clusters of several nodes on this machine."""

import logging
import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

# Ray has its workers step back behind all else, which beside other tests are never done.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # Ray spells it so

import ray
from ray.cluster_utils import Cluster

from sweeps.ray_executor import NAMESPACE

STORE = 80 * 2**20  # bytes that a node keeps for objects: we have none
QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}


@dataclass(frozen=True)
class Nodes:
    """A cluster that is up.

    Attributes:
        head: Has no room for workers.
        nodes: The others.
    """

    cluster: Cluster
    nodes: list[Any]

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Inside, this process is connected to it."""
        ray.init(self.address, namespace=NAMESPACE, **QUIET)
        try:
            yield
        finally:
            ray.shutdown()

    def lose(self, index: int) -> None:
        """Kills all processes of a node at once."""
        self.cluster.remove_node(self.nodes[index], allow_graceful=False)


@contextmanager
def ray_nodes(*cpus: float) -> Iterator[Nodes]:
    """A head and so many nodes of so many processor cores.

    The cores are counted, not reserved: there may be more than the machine has.
    """
    store: dict[str, Any] = {"object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=0, **store)
        yield Nodes(cluster, [cluster.add_node(num_cpus=count, **store) for count in cpus])
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


class Container:
    """A node that is as if on another machine: other files, processes and host name.

    Needs root.

    Args:
        address: Of the head.
        hidden: A folder of which it sees nothing.
        temporary: Folder of its temporary files.
    """

    def __init__(self, address: str, *, hidden: Path, temporary: Path) -> None:
        temporary.mkdir()
        self.temporary = temporary
        start = ["ray", "start", f"--address={address}", "--num-cpus=1", "--block"]
        script = (
            f"hostname another && mount -t tmpfs tmpfs {shlex.quote(str(hidden))} && "
            f"exec {shlex.join(start)} --object-store-memory={STORE}"
        )
        apart = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        with (temporary / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*apart, "bash", "-c", script],
                env={**os.environ, "TMPDIR": str(temporary)},
                stdout=log,
                stderr=log,
            )

    def lose(self) -> None:
        """Ends all of its processes at once, as a power cut does."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.lose()
