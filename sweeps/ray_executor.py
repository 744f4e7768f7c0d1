"""Workers on the nodes of a Ray cluster.

Ray finds each a node with room and tells when that is lost. A worker there is the process that it
is on one machine, the child of a Ray actor: so it is told to stop, dies and is warm likewise, and
what it imports does not meet what Ray has imported.
"""

import errno
import hashlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from uuid import uuid4

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.exceptions import OutOfMemoryError, RayError
from sqlalchemy import make_url

from pipeline import stderr_closed
from pipeline.config import without_password
from pipeline.database import causes
from sweeps.config import RayConfig
from sweeps.executors import GRACE, Executor
from sweeps.processes import Process, WorkerDiedError, WorkerLostError

log = logging.getLogger(__name__)

NAMESPACE = "digit-sweeps"  # of the names of our actors
ANSWER = 10.0  # seconds to wait for the head of a cluster
UNSAID = 30.0  # seconds that workers may wait for room without a word
LOOK = 5.0  # seconds between two looks at the cluster
GONE = 45.0  # seconds without an answer; after 60 Ray itself would end this process without a word

# What a store on a server has in its address. (A database has no place for the files of runs.)
SERVERS = {"study.storage": ("postgresql",), "tracking.uri": ("http", "https")}

LOST = (RayError, ConnectionError)  # an actor, or from outside the cluster the way to it
GRAIN = 1e-4  # in which Ray counts resources

# What a worker needs to write to the stores. It goes to the nodes with the actor; no log shows it.
_CREDENTIALS = ("MLFLOW_TRACKING_", "PG")


class ClusterLostError(OSError):
    """Ray's head, or the node of this process, is gone: no other worker can be had."""


class RayExecutor(Executor):
    """Warm processes on the nodes of a Ray cluster, as many as fit unless told.

    Args:
        config: Which cluster, and what a worker takes there.
        warm_up: Called in each worker before its first job.
        name: Of the sweep or the promotion; workers that an earlier process of it left are ended.
        threads: Of a job.
        most: Workers, at most.
        addresses: Of the stores that the workers write to, by their keys; None: a local one.

    Raises:
        ValueError: The cluster has no room for such a worker, or its nodes could not reach a store.
        OSError: There is no such cluster.
    """

    def __init__(
        self,
        config: RayConfig,
        warm_up: Callable[[], None],
        *,
        name: str,
        threads: int,
        most: int,
        addresses: Mapping[str, str | None],
    ) -> None:
        self._is_ours, self._is_over = not ray.is_initialized(), False
        self._notice = threading.Timer(UNSAID, self._tell_of_waiting)
        self._notice.daemon = True
        self._watch = _Watch()
        if self._is_ours:
            _connect(config.address)
        try:
            self._watch.find_places()
            nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
            _check_reach([node["NodeManagerHostname"] for node in nodes], addresses)
            asked = config.asked(threads)
            workers = config.workers or _room(nodes, asked)
            title = f"{name}-{_digest(addresses)}"
            _kill_left(title)
            start = partial(_Remote, warm_up, title, asked, self._watch)
            super().__init__(min(workers, most), start)
            self._notice.start()
            self._watch.start()
        except BaseException:
            self._disconnect()
            raise

    def stop(self, grace: float = GRACE) -> None:
        if not self._is_over:  # or Ray would connect anew, by itself
            super().stop(grace)
            self._disconnect()

    def _tell_of_waiting(self) -> None:
        workers = [each.placed for each in self._workers.values() if isinstance(each, _Remote)]
        waiting: list[Any] = []
        with suppress(Exception):  # the cluster is gone, which others say
            _, waiting = ray.wait(workers, num_returns=len(workers), timeout=0)
        if waiting and not (self._stopped or self._watch.lost.done()):
            log.warning(
                "%d of %d workers have not started yet: they wait for room, or for nodes; "
                "`ray status` shows both.",
                len(waiting),
                len(workers),
            )

    def _disconnect(self) -> None:
        self._is_over = True
        self._watch.over.set()
        self._notice.cancel()
        if self._notice.is_alive():
            self._notice.join(ANSWER)  # or it would connect anew
        if self._is_ours and not self._watch.lost.done():  # or Ray would end this process
            ray.shutdown()


class _Watch(threading.Thread):
    """Looks whether Ray's head and the node of this process answer; a `ray://` address has neither.

    Ray does not tell: without them its calls wait, or end this process.

    Attributes:
        lost: Fails when one does not answer any more.
        over: Set to end it.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.lost: Future[None] = Future()
        self.over = threading.Event()
        self._places: list[tuple[str, int]] = []

    def find_places(self) -> None:
        """Of the cluster that this process is connected to."""
        places = []
        if not ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
            context = ray.get_runtime_context()
            head, _, port = context.gcs_address.rpartition(":")
            places.append((head.strip("[]"), int(port)))
            for node in ray.nodes():  # type: ignore[no-untyped-call]
                if node["NodeID"] == context.get_node_id():
                    places.append((node["NodeManagerAddress"], node["NodeManagerPort"]))
        self._places = [place for place in places if _answers(place)]  # else it cannot be seen

    def run(self) -> None:
        answered = dict.fromkeys(self._places, time.monotonic())
        while self._places and not self.over.wait(LOOK):
            for place in filter(_answers, self._places):
                answered[place] = time.monotonic()
            if time.monotonic() - min(answered.values()) > GONE:
                text = "Ray's head, or its node on this machine, is gone: start Ray again."
                self.lost.set_exception(ClusterLostError(text))
                return

    def wait_for_answers(self) -> None:
        """Returns at once, but where Ray would not answer now.

        Raises:
            ClusterLostError: It does not any more.
        """
        while not self.lost.done() and not all(map(_answers, self._places)):
            wait([self.lost], timeout=1)
        if self.lost.done():
            self.lost.result()


def _answers(place: tuple[str, int]) -> bool:
    """Whether somebody takes a connection; or this process has no room for one."""
    try:
        socket.create_connection(place, timeout=LOOK).close()
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return True


def _connect(address: str | None) -> None:
    """Connects this process to a cluster, or starts one.

    Raises:
        ConnectionError: Nobody is there, or refuses.
    """
    found = _find(address or os.environ.get("RAY_ADDRESS") or "")
    try:
        with _own_sigterm(), stderr_closed():
            ray.init(
                found or None, namespace=NAMESPACE, logging_level=logging.ERROR, log_to_driver=False
            )
        # Else the loss of a node is told with forty lines of its own log.
        ray._private.worker._worker_logs_enabled = False
    except (RuntimeError, ConnectionError, RayError) as error:  # other versions; no cluster
        texts = [" ".join(str(each).split()) for each in causes(error)]
        if any("AuthToken" in text or "authentication" in text.lower() for text in texts):
            texts[0] = (
                "it asks for a token that it knows: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
                "~/.ray/auth_token."
            )
        raise ConnectionError(f"executor.address={address}: {texts[0]}") from error


def _find(address: str) -> str:
    """The address with the number of its host, where somebody answers.

    Ray itself would wait for minutes, and does not know the names in /etc/hosts.

    Raises:
        ConnectionError: Nobody answers.
    """
    scheme, slashes, rest = address.rpartition("//")
    host, _, port = rest.rpartition(":")
    if not host:  # `auto`, `local`, or none
        return address
    try:
        place = host.strip("[]"), int(port)
        with socket.create_connection(place, timeout=ANSWER) as connection:
            number = connection.getpeername()[0]
    except (OSError, ValueError) as error:
        raise ConnectionError(f"executor.address={address}: nobody answers: {error}.") from error
    return address if ":" in number else f"{scheme}{slashes}{number}:{port}"


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keeps the handler of SIGTERM: Ray installs its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _room(nodes: list[dict[str, Any]], asked: Mapping[str, float]) -> int:
    """Workers that fit on the nodes while nothing else is there.

    Raises:
        ValueError: None does.
    """
    free: list[dict[str, float]] = [node["Resources"] for node in nodes]
    room = sum(
        min(round(has.get(kind, 0) / GRAIN) // round(need / GRAIN) for kind, need in asked.items())
        for has in free
    )
    if not room:
        most_of = {kind: max(has.get(kind, 0) for has in free) for kind in asked}
        raise ValueError(
            f"executor: no node of the cluster has {_told(asked)} for a worker; one has at most "
            f"{' or '.join(_told({kind: most}) for kind, most in most_of.items())}. Set "
            "executor.workers where nodes are to come."
        )
    return room


def _told(resources: Mapping[str, float]) -> str:
    """Resources as people say them."""
    words = {"CPU": "processor core", "memory": "GiB of memory", "GPU": "GPU"}
    counts = {**resources}
    if "memory" in counts:
        counts["memory"] /= 2**30
    return ", ".join(
        f"{count:.3g} {words[kind]}{'' if count == 1 or kind == 'memory' else 's'}"
        for kind, count in counts.items()
    )


def _check_reach(hosts: list[str], addresses: Mapping[str, str | None]) -> None:
    """Refuses stores that a worker on another machine would seek on its own.

    Raises:
        ValueError: There is one.
    """
    elsewhere = sorted(set(hosts) - {socket.gethostname()})
    for key, uri in addresses.items():
        if elsewhere and not (uri and _is_server(uri, SERVERS[key])):
            shown = without_password(uri) if uri else "a local file"
            raise ValueError(
                f"{key} must be a server ({', '.join(SERVERS[key])}) that workers on "
                f"{elsewhere[0]} can reach, got {shown}."
            )


def _is_server(uri: str, kinds: tuple[str, ...]) -> bool:
    """Whether an address leads to the same place from every machine."""
    url = make_url(uri)
    host = url.host or url.query.get("host") or os.environ.get("PGHOST", "")
    if url.get_backend_name() not in kinds or not host or host == "localhost":
        return False
    with suppress(ValueError):  # it is a name
        return not ip_address(str(host)).is_loopback
    return not str(host).startswith("/")  # a socket


def _digest(addresses: Mapping[str, str | None]) -> str:
    """Tells sweeps of one name apart that are kept in different places."""
    shown = [without_password(uri) if uri else None for uri in addresses.values()]
    where = f"{shown} {socket.gethostname() if None in shown else ''}"
    return hashlib.sha256(where.encode()).hexdigest()[:8]


def _kill_left(title: str) -> None:
    """Ends workers of an earlier process, which Ray may not have ended yet."""
    for each in ray.util.list_named_actors(all_namespaces=True):
        if each["namespace"] == NAMESPACE and each["name"].startswith(f"{title}/"):
            with suppress(ValueError):  # it has just ended
                ray.kill(ray.get_actor(each["name"], namespace=NAMESPACE))


# --- one worker --------------------------------------------------------------------------


class _Host:
    """On a node: has a worker process. Its methods are called at the same time."""

    def __init__(
        self, warm_up: Callable[[], None], folder: str, environment: Mapping[str, str]
    ) -> None:
        os.environ.update(environment)
        if Path(folder).is_dir():  # relative paths are those of the launcher
            os.chdir(folder)
        vars(sys.modules["__main__"]).pop("__file__", None)  # Ray's, which a child would run again
        self._process = Process(warm_up, os.environ, imports=None)

    def is_alive(self) -> bool:
        return self._process.is_alive

    def exchange(self, request: bytes) -> bytes | WorkerDiedError:
        """The reply; where the process died, how."""
        try:
            return self._process.exchange(request)
        except WorkerDiedError as error:
            return type(error)(f"{str(error).rstrip('.')} on {socket.gethostname()}.")

    def interrupt(self) -> None:
        self._process.interrupt()


class _Remote:
    """The handle of a worker on some node.

    Args:
        warm_up: Called in it before its first job.
        title: Of the sweep or promotion, this one's alone.
        asked: Amount of each of Ray's resources.
        watch: Knows when the cluster is lost; then Ray is not to be asked.

    Attributes:
        placed: Is there once it has started on a node, or never will.
    """

    def __init__(
        self,
        warm_up: Callable[[], None],
        title: str,
        asked: Mapping[str, float],
        watch: _Watch,
    ) -> None:
        watch.wait_for_answers()
        self._watch = watch
        environment = {key: os.environ[key] for key in os.environ if key.startswith(_CREDENTIALS)}
        actor: Any = ray.remote(_Host)
        self._actor = actor.options(
            name=f"{title}/{uuid4().hex[:8]}",
            namespace=NAMESPACE,
            num_cpus=asked["CPU"],
            num_gpus=asked.get("GPU", 0),
            memory=asked.get("memory"),
            max_concurrency=2,  # a job, and its interruption
        ).remote(warm_up, str(Path.cwd()), environment)
        self.placed = self._actor.is_alive.remote()
        self._job: Any = None

    def when_placed(self, tell: Callable[[], None]) -> None:
        self.placed.future().add_done_callback(lambda _: tell())
        self._watch.lost.add_done_callback(lambda _: tell())  # and its next job fails

    def exchange(self, request: bytes) -> bytes:
        self._watch.wait_for_answers()
        self._job = self._actor.exchange.remote(request)
        try:
            reply = self._reply_to(self._job)
        except OutOfMemoryError as error:
            self._kill()
            raise WorkerDiedError("worker ended by Ray: its node had no memory left.") from error
        except LOST as error:
            self._watch.wait_for_answers()
            self._kill()  # a node that is cut off may still be at work
            kind = type(error).__name__
            raise WorkerLostError(
                f"worker lost: Ray's process of it, its node or the way there has gone ({kind})."
            ) from error
        finally:
            self._job = None
        if isinstance(reply, WorkerDiedError):
            self._kill()
            raise reply
        return bytes(reply)

    def _reply_to(self, call: Any) -> Any:
        """What a call of the actor returns.

        Raises:
            ClusterLostError: Nobody is there any more who could tell.
        """
        reply = call.future()
        wait([reply, self._watch.lost], return_when=FIRST_COMPLETED)
        if self._watch.lost.done():
            self._watch.lost.result()
        return reply.result()

    @property
    def is_alive(self) -> bool:
        self._watch.wait_for_answers()
        try:
            return bool(self._reply_to(self._actor.is_alive.remote()))
        except LOST as error:
            log.warning(
                "a worker on the cluster has gone, or not come (%s): another one is asked for",
                type(error).__name__,
            )
            return False

    def interrupt(self) -> None:
        if self._watch.lost.done():
            return
        with suppress(*LOST):
            if ray.wait([self.placed], timeout=0)[0]:
                self._actor.interrupt.remote()
            else:
                self._kill()  # it is not to begin

    def end(self, deadline: float) -> None:
        if (job := self._job) and not self._watch.lost.done():
            with suppress(*LOST):
                ray.wait([job], timeout=max(0.0, deadline - time.monotonic()))
        self._kill()

    def _kill(self) -> None:
        if self._watch.lost.done():
            return
        with suppress(*LOST, ValueError):
            ray.kill(self._actor)
