"""What every executor promises, and what the death of a process does to it."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from sweeps.config import RayConfig
from sweeps.executors import Executor, LocalExecutor, WorkerDiedError, WorkerLostError
from sweeps.processes import Process
from tests.clusters import Nodes, ray_nodes
from tests.launching import seconds_until_none, workers_of

ROOT = Path(__file__).resolve().parents[2]

SOON = 60.0  # seconds in which a worker of two busy cores starts and does its job


# --- jobs, and what a worker does before its first one -----------------------------------


def nothing() -> None:
    pass


def note(folder: Path) -> None:
    """Leaves a file named after the process."""
    (folder / str(os.getpid())).touch()


def note_and_sleep(folder: Path) -> None:
    note(folder)
    time.sleep(600)


def note_and_pause(folder: Path) -> None:
    note(folder)
    os.kill(os.getpid(), signal.SIGSTOP)
    (folder / "woken").touch()


def double(number: int) -> int:
    return 2 * number


def refuse(text: str) -> None:
    raise ValueError(text)


def process() -> int:
    return os.getpid()


def first_use_of_tensorflow(threads: int) -> bool:
    """Whether it was imported; raises RuntimeError where it was used before."""
    was_imported = "tensorflow" in sys.modules
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    return was_imported and float(tf.reduce_sum(tf.ones((64, 64)) @ tf.ones((64, 64)))) == 64**3


def imported(*names: str) -> list[str]:
    return [name for name in names if sys.modules.get(name)]


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def meet(folder: Path, count: int) -> int:
    """Waits until so many jobs are in here at once."""
    note(folder)
    until(lambda: len(list(folder.iterdir())) >= count)
    return os.getpid()


def sleep_noted(folder: Path) -> str:
    try:
        note(folder)
        time.sleep(600)
    except KeyboardInterrupt:
        return "interrupted"
    return "slept"


class Dying:
    """Something that takes long to be collected."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __del__(self) -> None:
        note(self.folder)
        time.sleep(2)


def sleep_after_collection(folder: Path) -> str:
    Dying(folder)
    return sleep_noted(folder)


def count_interruptions(folder: Path, seconds: float) -> int:
    note(folder)
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            time.sleep(max(0.0, end - time.monotonic()))
        except KeyboardInterrupt:
            count += 1
    return count


def sleep_whatever_comes(folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(folder)
    time.sleep(600)


def end_when_interrupted(folder: Path) -> None:
    note(folder)
    time.sleep(600)


class Unprintable(Exception):
    """Cannot be made anew from its arguments, as some libraries' errors."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(reason)


def raise_unprintable() -> None:
    raise Unprintable(1, reason="deep inside")


def make_lambda() -> Callable[[], None]:
    return lambda: None


# --- a launcher in a process of its own --------------------------------------------------


def launch(folder: Path, warm_up: Callable[[], None], workers: int, jobs: int) -> None:
    """Starts workers, which meet in a first job, and then jobs that do not end."""
    signal.signal(signal.SIGINT, lambda *_: None)  # asked is whether the workers get it
    executor = LocalExecutor(workers, warm_up, imports=())
    (folder / "met").mkdir()
    for _ in range(workers):
        executor.submit(meet, folder / "met", workers)
    for _ in range(jobs):
        executor.submit(end_when_interrupted, folder)
    (folder / "launched").touch()
    time.sleep(600)


@contextlib.contextmanager
def launched(
    folder: Path, warm_up: str = "nothing", *, workers: int, jobs: int
) -> Iterator[psutil.Process]:
    """A launcher that has started its workers; it and they are one process group, as in a shell.

    A plain process: one of `multiprocessing` would have parts of it from this one.
    """
    code = (
        "import functools, pathlib; from tests.sweeps.test_executors import *; "
        f"folder = pathlib.Path('{folder}'); launch(folder, {warm_up}, {workers}, {jobs})"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    try:
        until((folder / "launched").exists)
        yield psutil.Process(launcher.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    """Ray on two nodes of this machine, to which this process is connected."""
    with ray_nodes(4, 4) as nodes, nodes.connected():
        yield nodes


# --- helpers -----------------------------------------------------------------------------


def until(reached: Callable[[], bool], seconds: float = SOON) -> None:
    """Waits for something to come true.

    Raises:
        TimeoutError: It did not.
    """
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.01)


def noted(folder: Path) -> list[int]:
    """Processes that left a file."""
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended, be it that nobody has asked how."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def has_ended(pid: int) -> bool:
    """Likewise, and each of its threads."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return is_gone(process) and process.num_threads() <= 1
    return True


def server_of(launcher: psutil.Process) -> psutil.Process:
    (worker, *_) = workers_of(launcher)
    return psutil.Process(worker.ppid())


def lasting_processes() -> set[psutil.Process]:
    """What this process has started that outlives an executor: its fork server, for the next."""
    LocalExecutor(1, nothing).stop()
    return set(psutil.Process().children(recursive=True))


def living(workers: Sequence[psutil.Process]) -> list[psutil.Process]:
    return [worker for worker in workers if not is_gone(worker)]


def error_of(future: Future[Any], seconds: float = SOON) -> BaseException | None:
    return future.exception(timeout=seconds)


def build_on_ray(workers: int, warm_up: Callable[[], None]) -> Executor:
    from sweeps.ray_executor import RayExecutor

    config = RayConfig(name="ray", workers=workers, address=None, cpus=1, memory=None, gpus=0)
    return RayExecutor(config, warm_up, name="contract", threads=1, most=workers, addresses={})


@dataclass(frozen=True)
class Build:
    """Builds executors of a kind.

    Attributes:
        place: What the death of a worker is told with.
    """

    kind: Callable[[int, Callable[[], None]], Executor]
    place: str
    built: list[Executor] = field(default_factory=list)

    def __call__(self, workers: int = 1, warm_up: Callable[[], None] = nothing) -> Executor:
        self.built.append(self.kind(workers, warm_up))
        return self.built[-1]


@contextlib.contextmanager
def built(kind: Callable[..., Executor], place: str) -> Iterator[Build]:
    """Ends what was built at once at the end of the test."""
    build = Build(kind, place)
    yield build
    for executor in build.built:
        executor.stop(grace=0)


@pytest.fixture
def local() -> Iterator[Build]:
    with built(LocalExecutor, "") as build:
        yield build


@pytest.fixture
def on_ray(cluster: Nodes) -> Iterator[Build]:
    with built(build_on_ray, f" on {socket.gethostname()}") as build:
        yield build


@pytest.fixture(params=["local", "on_ray"])
def build(request: pytest.FixtureRequest) -> Build:
    return cast(Build, request.getfixturevalue(request.param))


# --- jobs --------------------------------------------------------------------------------


def test_a_future_has_the_result_of_its_job(build: Build) -> None:
    future = build().submit(double, 21)

    assert future.result(timeout=SOON) == 42


def test_a_future_has_the_exception_of_its_job_and_the_worker_lives_on(build: Build) -> None:
    executor = build()
    before = executor.submit(process).result(timeout=SOON)

    error = error_of(executor.submit(refuse, "training.epochs must be at least 1, got 0."))

    assert repr(error) == "ValueError('training.epochs must be at least 1, got 0.')"
    assert executor.submit(process).result(timeout=SOON) == before


def test_more_jobs_than_workers_are_all_done_and_keep_their_results_apart(build: Build) -> None:
    executor = build(2)

    futures = [executor.submit(double, number) for number in range(50)]

    assert [future.result(timeout=SOON) for future in futures] == [2 * n for n in range(50)]


def test_jobs_of_one_worker_are_done_in_the_order_they_were_submitted(
    build: Build, tmp_path: Path
) -> None:
    executor, ended = build(1), list[int]()

    futures = [executor.submit(double, number) for number in range(10)]
    for number, future in enumerate(futures):
        future.add_done_callback(lambda _, number=number: ended.append(number))  # type: ignore[misc]
    wait(futures, timeout=SOON)

    assert ended == list(range(10))


def test_jobs_are_done_at_the_same_time_in_processes_of_their_own(
    build: Build, tmp_path: Path
) -> None:
    executor = build(2)

    futures = [executor.submit(meet, tmp_path, 2) for _ in range(2)]

    assert {future.result(timeout=SOON) for future in futures} == set(noted(tmp_path))


def test_a_worker_warms_up_once_for_all_its_jobs(build: Build, tmp_path: Path) -> None:
    executor, met = build(2, functools.partial(note, tmp_path)), tmp_path / "met"
    met.mkdir()

    both = [executor.submit(meet, met, 2) for _ in range(2)]
    later = [executor.submit(process) for _ in range(20)]

    used = {future.result(timeout=SOON) for future in both}
    assert used == set(noted(tmp_path))
    assert {future.result(timeout=SOON) for future in later} <= used
    assert len(used) == 2


def test_a_job_that_cannot_be_sent_fails_alone(build: Build) -> None:
    executor = build()
    before = executor.submit(process).result(timeout=SOON)

    error = error_of(executor.submit(lambda: None))

    assert "lambda" in str(error)
    assert executor.submit(process).result(timeout=SOON) == before


@pytest.mark.parametrize(
    ("job", "kind"), [(make_lambda, WorkerDiedError), (raise_unprintable, TypeError)]
)
def test_what_cannot_be_sent_back_fails_its_job_alone(
    build: Build, job: Callable[[], object], kind: type[Exception]
) -> None:
    executor = build()

    error = error_of(executor.submit(job))

    assert isinstance(error, kind)
    assert executor.submit(double, 21).result(timeout=SOON) == 42


# --- the death of a worker ---------------------------------------------------------------


def test_a_worker_that_is_killed_is_known_within_a_second_and_named(
    build: Build, tmp_path: Path
) -> None:
    future = build().submit(sleep_noted, tmp_path)
    until(lambda: len(noted(tmp_path)) == 1)
    (worker,) = noted(tmp_path)

    os.kill(worker, signal.SIGKILL)
    error = error_of(future, seconds=1)

    assert isinstance(error, WorkerDiedError)
    assert str(error) == f"worker process {worker} died (exit code -9){build.place}."


@pytest.mark.parametrize(
    ("job", "arguments", "code"),
    [(os._exit, (3,), 3), (os._exit, (0,), 0), (os._exit, (255,), 255), (kill_itself, (), -9)],
)
def test_a_job_that_ends_its_worker_fails_with_the_exit_code(
    build: Build, job: Callable[..., None], arguments: tuple[int, ...], code: int
) -> None:
    error = error_of(build().submit(job, *arguments))

    assert isinstance(error, WorkerDiedError)
    assert str(error).endswith(f"died (exit code {code}){build.place}.")


def test_a_dead_worker_is_replaced_by_one_that_is_warm_too(build: Build, tmp_path: Path) -> None:
    executor = build(1, functools.partial(note, tmp_path))
    before = executor.submit(process).result(timeout=SOON)

    error = error_of(executor.submit(kill_itself))
    after = executor.submit(process).result(timeout=SOON)

    assert isinstance(error, WorkerDiedError)
    assert after != before
    assert set(noted(tmp_path)) == {before, after}


def test_the_death_of_a_worker_does_not_disturb_the_others(build: Build, tmp_path: Path) -> None:
    executor = build(2)
    waiting = executor.submit(meet, tmp_path, 2)
    until(lambda: len(noted(tmp_path)) == 1)
    (undisturbed,) = noted(tmp_path)

    deaths = [executor.submit(kill_itself) for _ in range(3)]
    errors = [error_of(death) for death in deaths]
    (tmp_path / "enough").touch()

    assert [type(error) for error in errors] == [WorkerDiedError] * 3
    assert waiting.result(timeout=SOON) == undisturbed


def test_a_worker_killed_while_idle_is_replaced_before_the_next_job(build: Build) -> None:
    executor = build()
    idle = executor.submit(process).result(timeout=SOON)

    os.kill(idle, signal.SIGKILL)
    until(lambda: has_ended(idle))

    assert executor.submit(double, 21).result(timeout=SOON) == 42
    assert executor.submit(process).result(timeout=SOON) != idle


def test_an_idle_worker_that_is_killed_is_known_to_be_dead_before_its_server_tells() -> None:
    with LocalExecutor(1, nothing) as executor:
        idle = executor.submit(process).result(timeout=SOON)
        (before,) = executor._workers.values()
        server = server_of(psutil.Process())
        server.suspend()
        try:
            os.kill(idle, signal.SIGKILL)
            until(lambda: has_ended(idle))
            future = executor.submit(process)
            until(lambda: before not in executor._workers.values())
        finally:
            server.resume()

        assert future.result(timeout=SOON) != idle


def test_a_worker_that_has_said_that_it_is_warm_and_had_no_job_is_alive() -> None:
    worker = Process(nothing, os.environ, imports=None)
    until(worker._pipe.poll)

    was_alive = worker.is_alive
    worker.interrupt()
    worker.end(time.monotonic() + SOON)

    assert was_alive
    assert not worker.is_alive


def test_a_worker_killed_while_it_warms_up_fails_its_job_and_is_replaced(
    build: Build, tmp_path: Path
) -> None:
    executor = build(1, functools.partial(note_and_sleep, tmp_path))
    future = executor.submit(double, 21)
    until(lambda: len(noted(tmp_path)) == 1)
    (worker,) = noted(tmp_path)

    os.kill(worker, signal.SIGKILL)

    error = error_of(future, seconds=1)
    executor.submit(double, 21)

    assert isinstance(error, WorkerLostError)  # which is not of the job's doing
    told = f"worker process {worker} died (exit code -9) before it had a job{build.place}."
    assert str(error) == told
    until(lambda: len(noted(tmp_path)) == 2)


def test_a_job_that_always_kills_its_worker_never_ends_the_executor(build: Build) -> None:
    executor = build(2)

    errors = [error_of(executor.submit(kill_itself)) for _ in range(6)]

    assert [type(error) for error in errors] == [WorkerDiedError] * 6
    assert executor.submit(double, 21).result(timeout=SOON) == 42


def test_a_worker_is_forked_with_tensorflow_which_nothing_has_used(local: Build) -> None:
    executor = local(2)

    futures = [executor.submit(first_use_of_tensorflow, threads) for threads in (1, 1)]

    assert [future.result(timeout=SOON) for future in futures] == [True, True]


def test_a_worker_starts_with_what_each_trial_needs_alone(local: Build) -> None:
    needed = ["keras", "mlflow", "pipeline.train", "sweeps.trial"]

    found = local(1).submit(imported, *needed, "sklearn", "scipy.stats", "matplotlib")

    assert found.result(timeout=SOON) == needed


def test_the_workers_of_a_fork_server_that_is_killed_are_replaced(
    local: Build, tmp_path: Path
) -> None:
    executor = local(2)
    futures = [executor.submit(sleep_noted, tmp_path) for _ in range(2)]
    until(lambda: len(noted(tmp_path)) == 2)

    server = server_of(psutil.Process())

    server.kill()

    errors = [error_of(future, seconds=5) for future in futures]
    assert [type(error) for error in errors] == [WorkerLostError] * 2
    assert {str(error).split(" ", 3)[3] for error in errors} == {
        "ended with the server that it was forked from."
    }
    until(lambda: has_ended(server.pid))
    assert [executor.submit(double, n).result(timeout=SOON) for n in (1, 2, 3)] == [2, 4, 6]


def test_a_worker_that_cannot_warm_up_tells_why_and_is_lost(local: Build) -> None:
    executor = local(1, functools.partial(refuse, "no such library"))

    errors = [error_of(executor.submit(double, number)) for number in range(2)]

    assert [type(error) for error in errors] == [WorkerLostError] * 2
    assert {str(error) for error in errors} == {
        "a worker could not start: ValueError: no such library"
    }


SETTING = (
    "import time; from tests.sweeps.test_executors import *; from sweeps.processes import _server"
)


def run_code(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process of its own, which has no fork server yet."""
    return subprocess.run(
        [sys.executable, "-c", f"{SETTING}; {code}"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=SOON,
    )


def test_workers_start_without_a_server_where_its_socket_would_have_too_long_a_path(
    tmp_path: Path,
) -> None:
    long = tmp_path / ("long" * 25)
    long.mkdir()

    code = (
        "executor = LocalExecutor(2, nothing); print(executor.submit(double, 21).result()); "
        "print(*[child.cmdline()[-1] for child in workers_of(psutil.Process())]); executor.stop()"
    )
    ended = run_code(code, TMPDIR=str(long))

    said = "each worker imports TensorFlow for itself, as no server can: AF_UNIX path too long\n"
    assert (ended.returncode, ended.stderr) == (0, said)
    assert ended.stdout.split() == ["42", *["--multiprocessing-fork"] * 2]  # of `spawn`


@pytest.mark.parametrize(
    "before", ["", "os.kill(_server(), signal.SIGKILL); time.sleep(0.4); "], ids=["", "killed"]
)
def test_a_stop_does_not_wait_for_what_the_server_imports(tmp_path: Path, before: str) -> None:
    code = (
        "executor = LocalExecutor(2, nothing, ('endless',)); future = executor.submit(double, 1); "
        f"time.sleep(1); {before}began = time.monotonic(); executor.stop(grace=0.5); "
        "print(time.monotonic() - began < 5, repr(future.exception()))"
    )
    ended = run_code(code, PYTHONPATH=endless(tmp_path))

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("True WorkerLostError('")


def test_an_interruption_does_not_wait_for_what_the_server_imports(tmp_path: Path) -> None:
    code = (
        "executor = LocalExecutor(2, nothing, ('endless',)); "
        "futures = [executor.submit(double, n) for n in (1, 2)]; time.sleep(1); "
        "executor.interrupt(); print(*[type(each.exception(5)).__name__ for each in futures])"
    )
    ended = run_code(code, PYTHONPATH=endless(tmp_path))

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["WorkerLostError"] * 2


def endless(folder: Path) -> str:
    """Where modules are found, one whose import has no end among them."""
    (folder / "endless.py").write_text("import time; time.sleep(600)", encoding="utf-8")
    return os.pathsep.join([str(folder), str(ROOT)])


def test_a_stop_does_not_wait_for_a_server_that_is_paused(local: Build, tmp_path: Path) -> None:
    executor = local(1)
    future = executor.submit(sleep_whatever_comes, tmp_path)
    until(lambda: len(noted(tmp_path)) == 1)
    server = server_of(psutil.Process())
    server.suspend()
    began = time.monotonic()

    executor.stop(grace=0.5)

    assert time.monotonic() - began < 4
    assert isinstance(error_of(future, seconds=0), WorkerDiedError)
    until(lambda: has_ended(server.pid))


# --- interruption and end ----------------------------------------------------------------


def test_a_job_that_is_interrupted_may_end_by_itself_and_its_result_arrives(
    build: Build, tmp_path: Path
) -> None:
    executor = build(2)
    futures = [executor.submit(sleep_noted, tmp_path) for _ in range(2)]
    until(lambda: len(noted(tmp_path)) == 2)

    executor.interrupt()

    assert [future.result(timeout=5) for future in futures] == ["interrupted"] * 2


def test_an_interruption_that_comes_where_python_drops_it_is_not_lost(
    build: Build, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    executor = build()
    future = executor.submit(sleep_after_collection, tmp_path)
    until(lambda: len(noted(tmp_path)) == 1)

    executor.interrupt()

    assert future.result(timeout=5) == "interrupted"
    assert "Traceback" not in capfd.readouterr().err


def test_a_job_is_interrupted_once_however_often_it_is_told(build: Build, tmp_path: Path) -> None:
    executor = build()
    future = executor.submit(count_interruptions, tmp_path, 1.0)
    until(lambda: len(noted(tmp_path)) == 1)

    for _ in range(3):
        executor.interrupt()
        time.sleep(0.1)

    assert future.result(timeout=5) == 1


def test_a_job_that_an_interruption_ends_fails_as_one_whose_worker_died(
    build: Build, tmp_path: Path
) -> None:
    executor = build()
    future = executor.submit(end_when_interrupted, tmp_path)
    until(lambda: len(noted(tmp_path)) == 1)

    executor.interrupt()

    assert isinstance(error_of(future, seconds=5), WorkerDiedError)


def test_jobs_that_wait_for_a_worker_are_not_begun_after_an_interruption(
    build: Build, tmp_path: Path
) -> None:
    executor = build()
    first = executor.submit(sleep_noted, tmp_path)
    waiting = [executor.submit(double, number) for number in range(3)]
    until(lambda: len(noted(tmp_path)) == 1)

    executor.interrupt()

    assert first.result(timeout=5) == "interrupted"
    lost = {WorkerLostError} if build.place else set()  # on a cluster its actor is gone, too
    assert {type(error_of(future, seconds=5)) for future in waiting} <= {WorkerDiedError, *lost}


def test_stop_waits_for_the_clean_end_of_a_job(build: Build, tmp_path: Path) -> None:
    executor = build()
    future = executor.submit(count_interruptions, tmp_path, 1.5)
    until(lambda: len(noted(tmp_path)) == 1)

    executor.stop(grace=5)

    assert future.result(timeout=0) == 1


def test_stop_without_grace_ends_a_job_that_ignores_signals(build: Build, tmp_path: Path) -> None:
    executor = build()
    future = executor.submit(sleep_whatever_comes, tmp_path)
    until(lambda: len(noted(tmp_path)) == 1)
    began = time.monotonic()

    executor.stop(grace=0)

    assert time.monotonic() - began < 1
    assert isinstance(error_of(future, seconds=0), WorkerDiedError)


def test_the_grace_of_a_stop_is_for_all_workers_together(build: Build, tmp_path: Path) -> None:
    executor = build(2)
    for _ in range(2):
        executor.submit(sleep_whatever_comes, tmp_path)
    until(lambda: len(noted(tmp_path)) == 2)
    began = time.monotonic()

    executor.stop(grace=1)

    assert 1 <= time.monotonic() - began < 1.9


def test_an_executor_may_be_stopped_twice(build: Build) -> None:
    executor = build()
    executor.stop()

    executor.stop()

    with pytest.raises(RuntimeError):
        executor.submit(double, 1)


@pytest.mark.parametrize("job", [sleep_noted, sleep_whatever_comes])
def test_no_process_is_left_after_a_stop(
    local: Build, tmp_path: Path, job: Callable[..., object]
) -> None:
    before = lasting_processes()
    executor = local(2)
    executor.submit(job, tmp_path)
    until(lambda: len(noted(tmp_path)) == 1)

    executor.stop(grace=0.5)

    assert set(psutil.Process().children(recursive=True)) <= before


def test_no_process_is_left_when_a_worker_dies_at_the_moment_of_the_stop(local: Build) -> None:
    before = lasting_processes()
    for number in range(16):
        executor = local()
        worker = psutil.Process(executor.submit(process).result(timeout=SOON))

        worker.kill()
        executor.submit(double, 1)
        time.sleep(number % 8 * 0.0005)  # in which it is found dead and replaced, or not
        executor.stop(grace=0)

    assert set(psutil.Process().children(recursive=True)) <= before


# --- signals to the launcher -------------------------------------------------------------


@pytest.mark.parametrize("jobs", [0, 3], ids=["idle", "busy"])
def test_ctrl_c_in_a_terminal_does_not_reach_the_workers(tmp_path: Path, jobs: int) -> None:
    with launched(tmp_path, workers=3, jobs=jobs) as launcher:
        until(lambda: len(noted(tmp_path / "met")) == 3)
        time.sleep(0.5)
        workers = workers_of(launcher)

        os.killpg(launcher.pid, signal.SIGINT)
        time.sleep(1)

        assert len(workers) == 3
        assert [is_gone(worker) for worker in workers] == [False] * 3


def test_sigterm_to_a_whole_group_does_not_end_the_server_of_the_workers(tmp_path: Path) -> None:
    """They would end with it, in the midst of their jobs."""
    with launched(tmp_path, workers=1, jobs=1) as launcher:
        until(lambda: len(noted(tmp_path)) == 1)
        server = server_of(launcher)

        server.terminate()
        time.sleep(1)

        assert not is_gone(server)
        assert len(living(workers_of(launcher))) == 1


@pytest.mark.parametrize(
    ("warm_up", "jobs", "at_work"),
    [
        pytest.param("nothing", 0, 0, id="idle"),
        pytest.param("nothing", 2, 2, id="busy"),
        pytest.param("functools.partial(note_and_sleep, folder)", 0, 2, id="warming up"),
    ],
)
def test_the_workers_of_a_launcher_that_is_killed_end_within_seconds(
    tmp_path: Path, warm_up: str, jobs: int, at_work: int
) -> None:
    with launched(tmp_path, warm_up, workers=2, jobs=jobs) as launcher:
        until(lambda: len(noted(tmp_path)) == at_work and len(workers_of(launcher)) == 2)
        workers = [*workers_of(launcher), server_of(launcher)]

        launcher.kill()

        assert len(workers) == 3
        assert seconds_until_none(lambda: living(workers), limit=5) < 5


def test_a_paused_worker_of_a_launcher_that_is_killed_never_goes_on(tmp_path: Path) -> None:
    """What it would do next is another worker's by then."""
    warm_up = "functools.partial(note_and_pause, folder)"
    with launched(tmp_path, warm_up, workers=1, jobs=0) as launcher:
        until(lambda: len(noted(tmp_path)) == 1)
        (worker,) = workers_of(launcher)
        until(lambda: worker.status() == psutil.STATUS_STOPPED)

        launcher.kill()

        assert seconds_until_none(lambda: living([worker]), limit=5) < 5
        assert not (tmp_path / "woken").exists()
