"""A sweep under faults: each is inflicted at its moment; whatever ends is started again."""

import os
import random
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from sqlalchemy.exc import SQLAlchemyError

from tests.faults import Fault
from tests.invariants import QUIET
from tests.launching import ENVIRONMENT, SWEEP, Started
from tests.servers import MLflowServer, Postgresql
from tests.stores import Stores, processes_in, query

NAME = "chaos"
# Trials of some seconds, of which some diverge and some are pruned.
SETTINGS = [
    "data=digits",
    "training.epochs=60",
    "training.early_stopping_patience=null",
    "pruner.min_resource=15",
    "model.hidden_units=choice(8, 16, 32)",
    "optimizer=sgd",
    "optimizer.learning_rate=choice(0.01, 0.03, 0.1, 0.3, 1e30)",
    "sweep.first=[{model.hidden_units: 8, optimizer.learning_rate: 1e30}, "
    "{model.hidden_units: 8, optimizer.learning_rate: 0.1}]",
    "sweep.max_failures=1000000",
    f"sweep.name={NAME}",
]
SILENCE = 30.0  # seconds without a line, at most
TICK = 0.05  # seconds between two looks
PATIENCE = 900.0  # seconds without an epoch or a trial, while no fault lasts: a standstill
FRUITLESS = 6  # launches in a row that failed while no fault lasted: likewise
MORE = 4  # trials, where the budget is reached before the last fault
LINGER = 60.0  # seconds a worker may outlive its launcher where it gets hardly any processor time
GRACE = 10  # seconds that killed processes need to be gone
LOCK_PATIENCE = 2  # seconds until a database that is to be locked is


class StandstillError(RuntimeError):
    """The sweep does not get to its budget."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the sweep is run.

    Attributes:
        stores: Where its trials and runs are, and the folder from where it is run.
        study: Overrides that lead to its study.
        tracking: Overrides that lead to its runs.
        postgresql: Holds the stores, if any.
        server: Holds the runs, if any.
    """

    stores: Stores
    study: list[str]
    tracking: list[str]
    postgresql: Postgresql | None
    server: MLflowServer | None

    @property
    def sweep(self) -> Path:
        return self.stores.folder

    @property
    def environment(self) -> dict[str, str]:
        """Of what is started there: who is killed leaves its temporary files."""
        return {**ENVIRONMENT, "TMPDIR": str(self.sweep / "tmp")}


@dataclass(frozen=True)
class Lasting:
    """A fault under way.

    Attributes:
        what: It is.
        until: When it ends, as of `time.monotonic`.
        undo: Ends it.
    """

    what: str
    until: float
    undo: Callable[[], object]


@dataclass(kw_only=True)
class Ordeal:
    """What befalls a sweep, and how it goes on.

    Attributes:
        place: Of the sweep.
        faults: That befall it, in this order.
        workers: Fewest and most of a launch.
        budget: Trials; grows where it is reached before the last fault.
        seed: Of the number of workers of each launch.
        launches: So far.
        happened: Kinds of the faults so far.
        outlived: Processes that did not end with their launcher.
        standstill: Why it was given up, if it was.
    """

    place: Place
    faults: list[Fault]
    workers: tuple[int, int]
    budget: int
    seed: int
    launches: list[Started] = field(default_factory=list)
    happened: list[str] = field(default_factory=list)
    outlived: list[str] = field(default_factory=list)
    standstill: str = ""
    _lasting: list[Lasting] = field(default_factory=list)
    _orphans: dict[psutil.Process, tuple[float, float]] = field(default_factory=dict)
    _counted: dict[str, int] = field(default_factory=dict)
    _fruitless: int = 0
    _is_done: bool = False

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self._progress, self._said = (0, self.started), self.started
        self._rng = random.Random(f"workers {self.seed}")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def say(self, text: str) -> None:
        self._said = time.monotonic()
        print(f"{self.seconds:7.1f} s  {text}", flush=True)

    def run(self) -> None:
        """Has all faults happen, and the sweep get to its budget."""
        self._launch()
        try:
            for number, fault in enumerate(self.faults, 1):
                self._await_moment(fault)
                self._inflict(number, fault)
            while self._lasting or not self._is_done:
                self._tick()
        except StandstillError as error:
            self.standstill = str(error)
            self.say(f"given up: {error}")

    def stop(self) -> None:
        """Ends what is under way, and what it started."""
        for each in self._lasting:
            with suppress(OSError, subprocess.SubprocessError):
                each.undo()
        self._lasting.clear()
        for launch in self.launches:
            launch.__exit__(None, None, None)
        left = processes_in(self.place.sweep)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=GRACE)

    # --- the sweep -----------------------------------------------------------------------

    @property
    def _launcher(self) -> Started:
        return self.launches[-1]

    def _launch(self) -> None:
        workers = self._rng.randint(*self.workers)
        budget = [f"sweep.trials={self.budget}", f"executor.workers={workers}"]
        command = [*SWEEP, *SETTINGS, *self.place.study, *self.place.tracking, *budget]
        environment = self.place.environment
        self.launches.append(Started(*command, folder=self.place.sweep, environment=environment))
        self.say(f"launch {len(self.launches)}: {workers} workers; trials so far: {self._finished}")

    def _tick(self) -> None:
        """Looks after everything.

        Raises:
            StandstillError: Nothing happens any more.
        """
        time.sleep(TICK)
        for each in [each for each in self._lasting if time.monotonic() >= each.until]:
            self._lasting.remove(each)
            self.say(f"  over: {each.what}")
            each.undo()
        self._look_after_orphans()
        self._look_for_progress()
        if self._launcher.process.poll() is not None and not self._is_done:
            self._go_on()

    def _go_on(self) -> None:
        """Starts the sweep again when its launcher has ended, unless all is done."""
        status = self._launcher.process.wait()
        time.sleep(TICK)  # what it wrote last is being read
        for process in processes_in(self.place.sweep):
            self._orphans.setdefault(process, (time.monotonic(), _processor_time(process)))
        last = (self._launcher.text.strip().splitlines() or [""])[-1]
        self.say(f"  the launcher has ended with {status}: {last[:300]}")
        self._fruitless = self._fruitless + 1 if status == 1 and self._is_calm else 0
        if self._fruitless == FRUITLESS:
            raise StandstillError(f"{FRUITLESS} launches in a row failed: {last}")
        are_left = len(self.happened) < len(self.faults)
        self._is_done = status == 0 and not are_left
        if status == 0 and are_left:
            self.budget += MORE
            self.say(f"  the budget is reached; from here on it is {self.budget} trials")
        if not self._is_done:
            self._launch()

    def _look_after_orphans(self) -> None:
        """Workers end with their launcher; one that is paused, when it is woken."""
        now = time.monotonic()
        for orphan, (since, used) in list(self._orphans.items()):
            status, spent = _status(orphan), _processor_time(orphan) - used
            if status == psutil.STATUS_ZOMBIE:
                del self._orphans[orphan]
            elif status == psutil.STATUS_STOPPED:
                self._orphans[orphan] = now, used
            elif now > since + LINGER or (now > since + QUIET and spent > QUIET):
                del self._orphans[orphan]
                self.outlived.append(f"process {orphan.pid}: {status}, {spent:.1f} s of processor")
                self.say(f"  process {orphan.pid} ({status}) outlives its launcher")

    def _look_for_progress(self) -> None:
        before, since = self._progress
        count, now = self._epochs + self._finished, time.monotonic()
        if now > self._said + SILENCE:
            self.say(f"  {self._finished} of {self.budget} trials, {self._epochs} epochs")
        if count != before or self._lasting:
            self._progress = (count, now)
        elif now > since + PATIENCE and self._is_calm:
            raise StandstillError(f"no epoch for {PATIENCE:.0f} s")

    @property
    def _is_calm(self) -> bool:
        """Whether no fault lasts; a server that comes back takes a while."""
        server = self.place.server
        return not self._lasting and (server is None or server.answers)

    @property
    def _epochs(self) -> int:
        return self._count("SELECT count(*) FROM trial_intermediate_values")

    @property
    def _finished(self) -> int:
        return self._count("SELECT count(*) FROM trials WHERE state IN ('COMPLETE', 'PRUNED')")

    def _count(self, sql: str) -> int:
        """As before, where the study cannot be asked just now."""
        address = self.place.stores.study
        file = Path(address.removeprefix("sqlite:///"))
        if file.exists() or not address.startswith("sqlite"):  # or it would be created
            with suppress(SQLAlchemyError):
                self._counted[sql] = int(query(address, sql)[0][0])
        return self._counted.get(sql, 0)

    # --- the faults ----------------------------------------------------------------------

    def _await_moment(self, fault: Fault) -> None:
        before, deadline = self._epochs, time.monotonic() + fault.after
        while time.monotonic() < deadline:
            if fault.epochs and self._epochs >= before + fault.epochs:
                break
            self._tick()
        deadline = time.monotonic() + fault.pause
        while time.monotonic() < deadline:
            self._tick()

    def _inflict(self, number: int, fault: Fault) -> None:
        effects: dict[str, Callable[[Fault], str]] = {
            "kill a worker": lambda fault: self._kill(self._worker(fault)),
            "kill the launcher": lambda fault: self._kill(self._launching),
            "kill both": lambda fault: self._kill(self._worker(fault), self._launching),
            "SIGTERM a worker": lambda fault: self._terminate(self._worker(fault)),
            "SIGTERM the launcher": lambda fault: self._terminate(self._launching),
            "pause a worker": lambda fault: self._pause(self._worker(fault), fault),
            "pause the launcher": lambda fault: self._pause(self._launching, fault),
            "lock mlflow.db": self._lock,
            "lock optuna.db": self._lock,
            "fill the disk": self._fill_disk,
            "kill the server": self._kill_server,
            "restart PostgreSQL": self._restart_postgresql,
            "take PostgreSQL away": self._stop_postgresql,
        }
        try:
            how = effects[fault.kind](fault)
        except psutil.NoSuchProcess as error:
            how = f"process {error.pid} has just ended"
        self.happened.append(fault.kind)
        self.say(f"fault {number:2}: {fault.kind}: {how}")

    def _last(self, what: str, seconds: float, undo: Callable[[], object]) -> str:
        self._lasting.append(Lasting(what, time.monotonic() + seconds, undo))
        return f"for {seconds:.1f} s"

    def _lasts(self, what: str) -> bool:
        return any(each.what == what for each in self._lasting)

    @property
    def _launching(self) -> psutil.Process:
        return psutil.Process(self._launcher.process.pid)

    def _worker(self, fault: Fault) -> psutil.Process:
        """Waits until there is one."""
        while True:
            with suppress(psutil.NoSuchProcess):  # the launcher has just ended
                if workers := self._launcher.workers:
                    return workers[int(fault.worker * len(workers))]
            self._tick()

    def _kill(self, *processes: psutil.Process) -> str:
        for process in processes:
            process.kill()
        return _whom(*processes)

    def _terminate(self, process: psutil.Process) -> str:
        process.terminate()
        return _whom(process)

    def _pause(self, process: psutil.Process, fault: Fault) -> str:
        process.suspend()
        what = f"{fault.kind}, {_whom(process)}"
        return f"{_whom(process)} {self._last(what, fault.seconds, lambda: _wake(process))}"

    def _lock(self, fault: Fault) -> str:
        database = self.place.sweep / "mlruns" / fault.kind.removeprefix("lock ")
        while not database.exists():
            self._tick()
        connection = sqlite3.connect(database, timeout=LOCK_PATIENCE, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            connection.close()
            return f"cannot be held: {error}"
        return self._last(fault.kind, fault.seconds, connection.close)

    def _fill_disk(self, fault: Fault) -> str:
        filler = self.place.sweep / "filler"
        with suppress(OSError), filler.open("ab") as file:
            room = os.statvfs(filler)
            os.posix_fallocate(file.fileno(), file.tell(), room.f_bavail * room.f_frsize)
        return self._last(fault.kind, fault.seconds, lambda: filler.unlink(missing_ok=True))

    def _kill_server(self, fault: Fault) -> str:
        assert self.place.server
        if self._lasts(fault.kind):
            return "it is away"
        self.place.server.kill()
        return self._last(fault.kind, fault.seconds, self.place.server.start)

    def _restart_postgresql(self, fault: Fault) -> str:
        assert self.place.postgresql
        if self._lasts("take PostgreSQL away"):
            return "it is away"
        self.place.postgresql.control("-m", "immediate", "restart")
        return "it is back"

    def _stop_postgresql(self, fault: Fault) -> str:
        assert self.place.postgresql
        if self._lasts(fault.kind):
            return "it is away"
        control = self.place.postgresql.control
        control("-m", "immediate", "stop")
        return self._last(fault.kind, fault.seconds, lambda: control("start"))


def _whom(*processes: psutil.Process) -> str:
    return " and ".join(f"process {process.pid}" for process in processes)


def _wake(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):  # killed meanwhile
        process.resume()


def _status(process: psutil.Process) -> str:
    """A process that has gone is one that waits to be collected."""
    with suppress(psutil.NoSuchProcess):
        if process.is_running():
            return str(process.status())
    return str(psutil.STATUS_ZOMBIE)


def _processor_time(process: psutil.Process) -> float:
    """Seconds so far; none of one that has gone."""
    with suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0
