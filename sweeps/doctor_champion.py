"""What the doctor finds of the champions: does each still answer as it did at its promotion?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.compose import from_settings
from pipeline.config import DataConfig, TrackingConfig
from pipeline.pages import store_command
from sweeps.executors import LocalExecutor, WorkerDiedError, WorkerLostError
from sweeps.finding import Check, Stores, count, wrong
from sweeps.judge import judge
from sweeps.ledger import SMOKE
from sweeps.trial import warm_up

if TYPE_CHECKING:  # or MLflow is imported
    from pipeline.registry import Version
    from pipeline.store import Recorded


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Of one champion.

    Attributes:
        problem: Why it must not be served; empty where it answers as it did.
        compared: On what, in words.
    """

    problem: str
    compared: str = ""


def check_champions(stores: Stores) -> Check:
    """Loads each champion in a clean process, and compares what it says."""
    from pipeline.registry import registered_models, version_of

    names, told = registered_models(), []
    champions = []
    for name in names:
        try:
            champions.append(version_of(name))
        except ValueError as error:
            yield wrong(f"the champion of {name} is gone: {error}", _way_back(stores, name))
    found = [champion for champion in champions if champion]
    if found:
        with LocalExecutor(1, warm_up) as executor:
            for champion in found:
                arguments = (stores.tracking, champion.name, champion.number, stores.data.path)
                try:
                    seen = executor.submit(examine, *arguments).result()
                except WorkerLostError as error:  # not of the model's doing
                    raise OSError(str(error)) from error
                except WorkerDiedError as error:
                    seen = Examination(problem=f"loading and using it: {error}")
                if seen.problem:
                    way = _way_back(stores, champion.name)
                    yield wrong(f"{champion}, the champion: {seen.problem}", way)
                told.append(f"{champion} answers as recorded: {seen.compared}")
    return "; ".join(told) or "no model is promoted"


def _way_back(stores: Stores, name: str) -> str:
    from pipeline.registry import previous_champion

    given = f"name={name}"
    if previous_champion(name) is None:
        again = store_command(stores.overrides, "sweeps.promote", given)
        return f"there is no champion before it; promote another: {again}"
    back = store_command(stores.overrides, "sweeps.promote", "rollback=true", given)
    return f"take it back: {back}"


# --- in a clean process ------------------------------------------------------------------


def examine(tracking: TrackingConfig, name: str, number: int, path: str | None) -> Examination:
    """Compares a version with what was recorded of it at its promotion.

    Args:
        tracking: Where it is.
        name: Of the registered model.
        number: Of the version.
        path: Where its data is now; None: where its run found it.
    """
    from pipeline.registry import DIGEST, RefusedModelError, model_digest, read_version
    from pipeline.store import connect

    connect(tracking)
    version = read_version(name, number)
    try:
        if model_digest(version.uri) != version.tags.get(DIGEST):
            return Examination(problem="its file is not what was promoted")
        return _answers(tracking, version, path)
    except RefusedModelError as error:
        return Examination(problem=str(error))


def _answers(tracking: TrackingConfig, version: Version, path: str | None) -> Examination:
    from pipeline.registry import example_of, load_served
    from pipeline.store import read_run, read_settings
    from pipeline.train import initialize

    try:
        run = read_run(version.run_id)
        config = from_settings(read_settings(run))
        threads, given = config.training.threads, config.data
    except ValueError:  # its run is gone, or its settings
        run, threads, given = None, 1, None
    initialize(threads=threads, seed=0)
    classes = load_served(version.uri)(example_of(version.uri)).argmax(axis=1)
    found = " ".join(map(str, classes))
    if found != version.tags.get(SMOKE, found):
        problem = f"it predicts {found} for its example, at its promotion {version.tags[SMOKE]}"
        return Examination(problem=problem)
    compared = count(len(classes), "example image")
    if run and given and (data := _at_hand(run, given, path)):
        whole = judge(tracking, data, run.run_id, threads)
        if whole.problem:
            return Examination(problem=whole.problem)
        compared += f" and {whole.images:,} validation images"
    return Examination(problem="", compared=compared)


def _at_hand(run: Recorded, given: DataConfig, path: str | None) -> DataConfig | None:
    """The data of a run, where it is on this machine; of a run that has been judged before.

    Another would be looked at by the test split.
    """
    from pipeline.data import load

    config = replace(given, path=path or given.path, sources=[])  # nothing is downloaded
    try:
        data = load(config)
    except (OSError, ValueError):
        return None
    validation = data.validation and (data.validation.digest[:16], len(data.validation))
    return config if validation == run.validation and "test_images" in run.metrics else None
