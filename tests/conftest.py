"""What several test modules share."""

import functools
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from sqlite3 import Connection
from typing import cast

import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from selenium.webdriver.remote.webdriver import WebDriver
from sqlalchemy import Engine, Pool, StaticPool, create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from pipeline import fast_imports
from pipeline.compose import CONF, to_config
from pipeline.config import RunConfig
from tests.commands import call
from tests.served import CHROMIUM, DRIVER, open_browser
from tests.servers import POSTGRESQL, Postgresql


def pytest_xdist_auto_num_workers() -> int:
    """Two more than there are cores, of few: tests often wait for what they started."""
    return min(os.cpu_count() or 1, 4) + 2


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """The tests import what the commands do, and as they do: without garbage collection."""
    with fast_imports():
        import hypothesis  # noqa: F401  # asks the collector, which later does not know of trio

        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole sweeps come first: on several cores, the longest module must not be the last."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Ctrl-C reaches the tests and what they start, also where a shell's `&` had it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def tables_once() -> Iterator[None]:
    """MLflow makes the tables of one SQLite database here: 50 migrations, which take a second.

    Those of other databases are copied from it. A process of its own makes its own, as ever.
    """
    utils = sys.modules.get("mlflow.store.db.utils")
    if utils is None:  # none of the tests that were chosen has a store
        yield
        return
    create: Callable[[Engine], None] = utils._initialize_tables

    @functools.cache
    def empty() -> Engine:
        engine = create_engine("sqlite://", poolclass=StaticPool)
        create(engine)
        return engine

    def copy_tables(engine: Engine) -> None:
        if engine.dialect.name != "sqlite":
            create(engine)
            return
        with closing(empty().raw_connection()) as source, closing(engine.raw_connection()) as new:
            cast(Connection, source.driver_connection).backup(
                cast(Connection, new.driver_connection)
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_initialize_tables", copy_tables)
        yield


@pytest.fixture(scope="session")
def tensorflow() -> None:
    """TensorFlow as runs use it: a process has one number of threads for good."""
    import tensorflow as tf

    from pipeline.train import initialize

    initialize(threads=1, seed=0)
    tf.zeros(1)  # in use from here on


@pytest.fixture(scope="session")
def need() -> Callable[[object, str], None]:
    """Skips a test that lacks a part of the machine; in CI that is a failure."""

    def need(part: object, what: str) -> None:
        if not part and os.environ.get("CI") == "true":
            pytest.fail(f"this test needs {what}")
        if not part:
            pytest.skip(f"this test needs {what}")

    return need


@pytest.fixture(scope="session")
def mnist_npz(need: Callable[[object, str], None]) -> Path:
    """The real MNIST."""
    need(os.environ.get("MNIST_NPZ"), "MNIST_NPZ, which names the real mnist.npz")
    return Path(os.environ["MNIST_NPZ"])


@pytest.fixture(scope="session")
def configure() -> Callable[..., RunConfig]:
    """Composes the real `conf/` with overrides."""

    def configure(*overrides: str) -> RunConfig:
        GlobalHydra.instance().clear()
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            cfg = compose("run", list(overrides))
        GlobalHydra.instance().clear()
        return to_config(cfg)

    return configure


@pytest.fixture(scope="session")
def swept(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder whose store holds two real sweeps, `narrow` and `wide`; to be left as it is.

    The workers of pytest-xdist share it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "swept"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            _sweep_twice(folder)
    return folder


def _sweep_twice(folder: Path) -> None:
    folder.mkdir()
    for name, units in (("narrow", "4, 8"), ("wide", "64, 512")):
        done = call(
            "data=digits",
            f"model.hidden_units=tag(log, int(interval({units})))",
            "training.epochs=6",
            "pruner.min_resource=2",
            "sweep.trials=8",
            f"sweep.name={name}",
            folder=folder,
        )
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def browser(
    tmp_path_factory: pytest.TempPathFactory, need: Callable[[object, str], None]
) -> Iterator[WebDriver]:
    """A real one."""
    need(CHROMIUM.exists() and DRIVER.exists(), "Debian's chromium and chromium-driver")
    driver = open_browser(tmp_path_factory.mktemp("browser"))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def postgresql(need: Callable[[object, str], None]) -> Iterator[Postgresql]:
    need(POSTGRESQL.exists() and os.geteuid() == 0, "PostgreSQL 15's programs, and root to be it")
    with Postgresql() as server:
        yield server


@pytest.fixture
def new_database(postgresql: Postgresql) -> Iterator[Callable[[], str]]:
    """Creates an empty database on a real PostgreSQL server and gives its address.

    Connections of the test itself are closed behind it: Optuna leaves its own to the garbage
    collector, which finds them in the midst of another test.
    """
    opened: list[DBAPIConnection] = []

    def remember(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        if not isinstance(connection, Connection):
            opened.append(connection)

    event.listen(Pool, "connect", remember)
    yield postgresql.new_database
    event.remove(Pool, "connect", remember)
    for connection in opened:
        connection.close()
