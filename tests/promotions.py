"""Registries with real models: trained in a second, copied, looked at, spoilt."""

import io
import json
import shlex
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from pipeline.compose import CONF, to_config, to_typed
from pipeline.config import RunConfig
from pipeline.console import open_console
from pipeline.store import Recorded, connect, open_store, read_run, search
from pipeline.tracking import Run, create_run
from sweeps.config import EXECUTORS, PromotionConfig
from sweeps.promote import main

PROMOTE = [sys.executable, "-m", "sweeps.promote"]
REGISTRY = (
    "registered_models",
    "registered_model_tags",
    "registered_model_aliases",
    "model_versions",
    "model_version_tags",
)
# Columns of MLflow's database that hold where files are.
ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)
# Seconds to train; 718 validation images, so that a much better network is so beyond chance.
TINY = ("data=digits", "data.validation_size=0.4", "training.epochs=3", "training.batch_size=32")
NARROW, WIDE = "model.hidden_units=4", "model.hidden_units=256"


def composed(*overrides: str) -> PromotionConfig:
    """The configuration of a promotion, as from the command line."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("promote", list(overrides))
    GlobalHydra.instance().clear()
    return to_typed(cfg, PromotionConfig, {"executor": {**EXECUTORS}})


@dataclass(frozen=True)
class Bench:
    """A folder whose store is filled by real trainings in this process."""

    folder: Path
    uri: str | None = None

    @property
    def database(self) -> Path:
        return self.folder / "mlruns" / "mlflow.db"

    def configure(self, *overrides: str) -> RunConfig:
        given = [*TINY, f"tracking.directory={self.folder / 'mlruns'}", "tracking.figures=false"]
        if self.uri:
            given.append(f"tracking.uri={self.uri}")
        GlobalHydra.instance().clear()
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            cfg = compose("run", [*given, "evaluate_test=false", *overrides])
        GlobalHydra.instance().clear()
        return to_config(cfg)

    def create(self) -> None:
        """An empty store."""
        open_store(self.configure().tracking)

    def connect(self) -> str:
        return connect(self.configure().tracking)

    def train(self, *overrides: str, into: Run | None = None) -> Recorded:
        """One run; its end is recorded, whatever it is."""
        from pipeline.run import execute_run

        config = self.configure(*overrides)
        run = into or create_run(open_store(config.tracking), "single", {})
        words = ["python", "-m", "pipeline.run", *TINY, "evaluate_test=false", *overrides]
        with suppress(ArithmeticError):  # diverged
            execute_run(config, shlex.join(words), into=run)
        return read_run(run.run_id)

    def sweep(self, name: str, *trials: tuple[str, ...]) -> Recorded:
        """A sweep, as its launcher records it, of these configurations."""
        store = open_store(self.configure().tracking)
        tags = {"sweep": name, "kind": "sweep", "objective": "val_accuracy"}
        parent = create_run(store, name, tags)
        runs = [self._trial(name, number, parent, each) for number, each in enumerate(trials)]
        failed = sum(run.status == "FAILED" for run in runs)
        parent.log_metrics({"finished": len(runs) - failed, "failed": failed, "pruned": 0})
        parent.end("FINISHED")
        return read_run(parent.run_id)

    def _trial(self, name: str, number: int, parent: Run, given: tuple[str, ...]) -> Recorded:
        tags = {"sweep": name, "trial": number}
        run = create_run(parent.store, f"trial-{number:03d}", tags, parent=parent)
        return self.train(*given, into=run)

    @contextmanager
    def edit(self) -> Iterator[sqlite3.Connection]:
        """The database, to be changed behind MLflow's back."""
        with closing(sqlite3.connect(self.database, timeout=30)) as connection:
            yield connection
            connection.commit()

    def copy(self, folder: Path) -> "Bench":
        """The same, with all files, elsewhere."""
        shutil.copytree(self.folder / "mlruns", folder / "mlruns")
        with closing(sqlite3.connect(folder / "mlruns" / "mlflow.db")) as database:
            for table, column in ADDRESSES:
                sql = f"UPDATE {table} SET {column} = replace({column}, ?, ?)"
                database.execute(sql, (str(self.folder), str(folder)))
            database.commit()
        copied = Bench(folder)
        copied.connect()
        return copied


# --- looking -----------------------------------------------------------------------------


def registry(database: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All that is registered."""
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        return {
            table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in REGISTRY
        }


NOTHING: Mapping[str, list[tuple[Any, ...]]] = {table: [] for table in REGISTRY}


def whole(database: Path) -> list[str]:
    """All that a database holds."""
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        return list(connection.iterdump())


# --- spoiling ----------------------------------------------------------------------------


@contextmanager
def refusing(database: Path, table: str, events: str = "INSERT UPDATE") -> Iterator[None]:
    """Meanwhile, the database refuses to write into a table."""
    _execute(
        database,
        *(
            f"CREATE TRIGGER no_{event} BEFORE {event} ON {table} "
            "BEGIN SELECT RAISE(ABORT, 'the disk is gone'); END"
            for event in events.split()
        ),
    )
    try:
        yield
    finally:
        _execute(database, *(f"DROP TRIGGER no_{event}" for event in events.split()))


def _execute(database: Path, *statements: str) -> None:
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def folder_of_model(bench: Bench, run_id: str) -> Path:
    """Files of the model that a run saved."""
    sql = "SELECT artifact_location FROM logged_models WHERE source_run_id = ?"
    with closing(sqlite3.connect(bench.database, timeout=30)) as connection:
        ((address,),) = connection.execute(sql, (run_id,)).fetchall()
    return Path(address.removeprefix("file://"))


class Payload:
    """What a pickle does when it is loaded: it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.path,))


def plant_lambda(files: Path, executed: Path) -> None:
    """Puts a model in the place of another that writes a file where its layer is executed."""
    import keras

    path = str(executed)
    layers = [
        keras.Input((8, 8)),
        keras.layers.Flatten(),
        keras.layers.Lambda(lambda pixels: (__import__("pathlib").Path(path).touch(), pixels)[1]),
        keras.layers.Dense(10, activation="softmax"),
    ]
    keras.Sequential(layers).save(files / "data" / "model.keras")
    executed.unlink()  # the layer was called when the model was built


def change_weights(files: Path, scale: float, shift: float = 0.0) -> None:
    """Scales what the last layer gives, and favours its first class."""
    import keras

    path = files / "data" / "model.keras"
    model = keras.saving.load_model(path)
    *before, kernel, bias = model.get_weights()
    bias = scale * bias
    bias[0] += shift
    model.set_weights([*before, scale * kernel, bias])
    model.save(path)


# --- promoting in this process -----------------------------------------------------------


class Here:
    """An executor without processes: all is done here, where TensorFlow is warm.

    The seam of `sweeps.executors`; what a promotion does with real workers is tested elsewhere.
    """

    workers = 1

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: object) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def interrupt(self) -> None:
        pass

    def stop(self, grace: float = 0.0) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


@dataclass(frozen=True)
class Promoted:
    """What a promotion came to.

    Attributes:
        text: That it printed.
        run: Its own.
        verdict: Its `verdict.json`.
        registered: All that is registered since.
    """

    text: str
    run: Recorded
    verdict: dict[str, Any]
    registered: Mapping[str, list[tuple[Any, ...]]]

    @property
    def decision(self) -> str:
        return str(self.verdict["decision"])

    @property
    def evidence(self) -> dict[str, str]:
        """Of each check, by its name."""
        return {check["name"]: check["evidence"] for check in self.verdict["checks"]}


def file_of(run: Recorded, name: str) -> Path:
    """An artifact."""
    return Path(run.artifacts.removeprefix("file://")) / name


def command(bench: Bench, *overrides: str) -> str:
    """Executes what `python -m sweeps.promote` does, here; returns what it prints."""
    bench.connect()
    given = [*overrides, f"tracking.directory={bench.folder / 'mlruns'}"]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for opens in ("LocalExecutor", "open_executor"):
            patch.setattr(f"sweeps.promote.{opens}", Here)
        for module in ("promote", "ledger"):
            patch.setattr(f"sweeps.{module}.console", open_console(printed))
        main(composed(*given), given)
    return printed.getvalue()


def promote(bench: Bench, *overrides: str) -> Promoted:
    text = command(bench, "promote.seeds=[1001, 1002]", *overrides)
    return promoted(bench, text)


def promoted(bench: Bench, text: str) -> Promoted:
    """Of the latest promotion."""
    (run,) = search("tags.kind = 'promotion'", limit=1)
    verdict = json.loads(file_of(run, "verdict.json").read_text(encoding="utf-8"))
    return Promoted(text, run, verdict, registry(bench.database))
