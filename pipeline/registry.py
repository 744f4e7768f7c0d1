"""Promoted models: versions, the aliases `champion` and `challenger`, the ledger, loading them.

The alias `champion` says which version is in use. It is moved last, so whatever breaks off leaves
the old champion in place. MLflow keeps no history of aliases: each move is written down before it
is made, as a tag of the registered model whose name is its time. A line whose move never happened
shows by what follows it, and is not counted.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import yaml
from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from pipeline.config import TrackingConfig, printable, without_password
from pipeline.database import alone, sqlite_path, sqlite_uri
from pipeline.store import is_server

if TYPE_CHECKING:  # or TensorFlow is imported
    import keras

    from pipeline.data import Array
    from pipeline.store import Recorded

CHAMPION, CHALLENGER = "champion", "challenger"
DIGEST = "model.sha256"  # tag of a version: of the file that holds its layers and weights
_DESCRIPTION = 5_000  # characters that MLflow's databases have room for
_ABOUT = """Champions are made by `python -m sweeps.promote`, which writes down why.

Who was champion when, and why: `python -m sweeps.promote history=true name={name}`"""
_LINE = "ledger."  # what the tags begin with that are lines of the ledger

# All that a model of ours consists of. Anything else could be code: a pickle, a module.
_FILES = {
    "MLmodel",
    "conda.yaml",
    "python_env.yaml",
    "requirements.txt",
    "input_example.json",
    "serving_input_example.json",
    "registered_model_meta",
    "data/keras_module.txt",
    "data/save_format.txt",
    "data/model.keras",
}
_KERAS = ("keras", "tensorflow.keras")  # modules that MLflow may load it with
# What MLflow imports, opens and puts on Python's path.
_FLAVORS = {
    "python_function": {"loader_module": "mlflow.tensorflow", "data": "data", "code": None},
    "tensorflow": {"model_type": "keras", "data": "data", "save_format": "tf", "code": None},
}
# All that a network of ours is made of, by Keras' modules. Keras' safe mode refuses lambdas, but
# not a network that calls functions of Keras itself while it is loaded.
_PARTS = {
    "keras": {"Sequential", "DTypePolicy"},
    "keras.layers": {
        "InputLayer",
        "Rescaling",
        "Flatten",
        "Dense",
        "BatchNormalization",
        "Activation",
        "Dropout",
    },
    "keras.initializers": {
        "GlorotUniform",
        "GlorotNormal",
        "HeUniform",
        "HeNormal",
        "LecunUniform",
        "LecunNormal",
        "Zeros",
        "Ones",
    },
    "keras.regularizers": {"L2"},
    "keras.constraints": {"MaxNorm"},
    "keras.metrics": {"SparseCategoricalAccuracy"},
    "keras.optimizers": {"RMSprop", "Adam", "SGD"},
    "keras.optimizers.schedules": {"CosineDecay"},
}
_ARCHIVE = ["config.json", "metadata.json", "model.weights.h5"]  # what a file of Keras consists of
_UNLIKE = (KeyError, TypeError, ValueError)  # of a description that is no description


class RefusedModelError(ValueError):
    """A model is not what this pipeline saves, and is not loaded."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """A registered version of a model.

    Attributes:
        name: Of the registered model.
        number: Of the version, from 1.
        run_id: Run that trained it.
        aliases: `champion`, `challenger` or what others set.
        tags: All of them.
        created: When, in UTC.
    """

    name: str
    number: int
    run_id: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    created: datetime

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.number}"

    def __str__(self) -> str:
        return f"{self.name} version {self.number}"


@dataclass(frozen=True, kw_only=True)
class Move:
    """A line of the ledger: which version became champion, and why.

    Attributes:
        at: When, in UTC, ISO 8601.
        action: `promote` or `rollback`.
        version: The champion from then on.
        replaced: The champion until then; None for the first.
        run_id: Run that trained the version.
        promotion: Run of the promotion, which has the evidence; empty for a rollback.
        evidence: In one line.
        happened: Whether the alias was moved.
    """

    at: str
    action: str
    version: int
    replaced: int | None
    run_id: str
    promotion: str
    evidence: str
    happened: bool = True


# --- versions ----------------------------------------------------------------------------


def registered_models() -> list[str]:
    """Names of all registered models."""
    return [found.name for found in mlflow.search_registered_models()]


def find_version(name: str | None, alias: str = CHAMPION) -> Version:
    """The version with an alias.

    Args:
        name: Of the registered model; None: the only one there is.
        alias: `champion` or `challenger`.

    Raises:
        ValueError: There is none, or the name does not say which.
    """
    known = registered_models()
    if not known:
        raise ValueError("no model is promoted here: run python -m sweeps.promote.")
    if name is None and len(known) > 1:
        raise ValueError(f"name= must say which of {', '.join(known)}.")
    chosen = name or known[0]
    if chosen not in known:
        raise ValueError(f"name={chosen}: no such model is promoted, only {', '.join(known)}.")
    found = version_of(chosen, alias)
    if found is None:
        raise ValueError(f"name={chosen} has no {alias}: run python -m sweeps.promote.")
    return found


def version_of(name: str, alias: str = CHAMPION) -> Version | None:
    """The version with an alias; None where there is none, or no such model."""
    model = _registered(name)
    number = model and model.aliases.get(alias)
    return None if number is None else read_version(name, int(number))


def _registered(name: str) -> Any:
    """A registered model; None where there is none that may be read.

    A server that grants nothing unless it is told to says of one that is not there that it must
    not be read.
    """
    try:
        return mlflow.MlflowClient().get_registered_model(name)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"):
            raise
        return None


def read_version(name: str, number: int) -> Version:
    """One version.

    Raises:
        ValueError: There is none of this number.
    """
    client = mlflow.MlflowClient()
    try:
        found = client.get_model_version(name, str(number))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ValueError(f"name={name} has no version {number}.") from error
    return _version(found)


def _version(found: Any) -> Version:
    return Version(
        name=found.name,
        number=int(found.version),
        run_id=found.run_id,
        aliases=tuple(found.aliases),
        tags={key: printable(text) for key, text in found.tags.items()},
        created=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
    )


def lock_uri(uri: str, tracking: TrackingConfig) -> str:
    """Of the database that locks are in or beside; of a server, in our own folder.

    So promotions to a server keep clear of each other on one machine only.
    """
    if is_server(uri):
        return sqlite_uri(Path(tracking.directory).absolute() / "mlflow.db")
    return uri


@contextmanager
def deciding(uri: str, name: str) -> Iterator[None]:
    """Inside, no other process decides about a model; others wait. The lock ends with the process.

    Args:
        uri: Of the database beside or in which the lock is.
        name: Of the registered model.
    """
    path = sqlite_path(uri)
    with ExitStack() as stack:
        if path is None:
            stack.enter_context(alone(uri, f"digit-sweeps promote {name}"))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.with_name(f".registry-{name}.lock")))
        yield


def register(
    name: str, run: Recorded, card: str, tags: Mapping[str, object], *, anew: bool = True
) -> Version:
    """The version of a run's model: the one there is, or a new one with this card and tags.

    Args:
        name: Of the registered model, created when missing.
        run: Finished.
        card: Model card, in Markdown; of a longer one, the first 5,000 characters.
        tags: Set on the version.
        anew: Whether card and tags are set on a version that is there too.

    Raises:
        ValueError: The run has no model.
    """
    client = mlflow.MlflowClient()
    with _unless_existing():
        client.create_registered_model(name, description=_ABOUT.format(name=name))
    shown = {key: without_password(str(value)) for key, value in tags.items()}
    card = without_password(card)[:_DESCRIPTION]
    model_id = logged_model(run)
    shown[DIGEST] = model_digest(f"models:/{model_id}")
    found = _of_run(name, run.run_id)
    if found is None:
        client.create_model_version(
            name,
            f"models:/{model_id}",
            run_id=run.run_id,
            tags=shown,
            description=card,
            model_id=model_id,
        )
        found = _of_run(name, run.run_id)  # the first, where another machine was as fast
        assert found is not None
        anew = True
    if anew:
        client.update_model_version(name, str(found.number), card)
        for key, value in shown.items():
            client.set_model_version_tag(name, str(found.number), key, value)
    return read_version(name, found.number)


@contextmanager
def _unless_existing() -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _of_run(name: str, run_id: str) -> Version | None:
    """The run's first version."""
    found = mlflow.MlflowClient().search_model_versions(f"name='{name}' and run_id='{run_id}'")
    return min(map(_version, found), key=lambda version: version.number, default=None)


def logged_model(run: Recorded) -> str:
    """Id of the model that a run saved.

    Raises:
        ValueError: It has none.
    """
    found = mlflow.MlflowClient().search_logged_models(
        [run.experiment_id], f"source_run_id = '{run.run_id}'"
    )
    ready = [model.model_id for model in found if str(model.status) == "READY"]
    if not ready:
        raise ValueError(f"run={run.run_id} ({run.name}) has no model.")
    return str(ready[0])


def set_alias(version: Version, alias: str) -> None:
    """Moves an alias; one that stands there already stays."""
    client = mlflow.MlflowClient()
    if client.get_registered_model(version.name).aliases.get(alias) != str(version.number):
        client.set_registered_model_alias(version.name, alias, str(version.number))


def delete_alias(name: str, alias: str) -> None:
    mlflow.MlflowClient().delete_registered_model_alias(name, alias)


# --- the ledger --------------------------------------------------------------------------


def read_ledger(name: str) -> list[Move]:
    """All lines, the oldest first."""
    model = _registered(name)
    if model is None:
        return []
    lines = sorted(item for item in model.tags.items() if item[0].startswith(_LINE))
    moves = [_move(key.removeprefix(_LINE), json.loads(text)) for key, text in lines]
    champion = model.aliases.get(CHAMPION)
    # What the next line found to be champion, after the last line the alias itself.
    found = [*(move.replaced for move in moves[1:]), champion and int(champion)]
    return [
        replace(move, happened=move.version == after)
        for move, after in zip(moves, found, strict=False)  # no lines: one too many
    ]


def _move(at: str, line: Mapping[str, Any]) -> Move:
    return Move(at=at, **{**line, "evidence": printable(line["evidence"])})


def move_champion(version: Version, *, action: str, promotion: str, evidence: str) -> Move:
    """Makes a version the champion: the line of the ledger first, the alias last.

    A line that an interrupted move has left is used, not repeated.
    """
    champion, lines = version_of(version.name), read_ledger(version.name)
    move = Move(
        at=_after(lines),
        action=action,
        version=version.number,
        replaced=champion.number if champion else None,
        run_id=version.run_id,
        promotion=promotion,
        evidence=without_password(evidence),
    )
    last = lines[-1] if lines else None
    if last and not last.happened and (last.action, last.version) == (action, version.number):
        move = replace(move, at=last.at)
    line = {name: value for name, value in asdict(move).items() if name not in ("at", "happened")}
    client = mlflow.MlflowClient()
    client.set_registered_model_tag(version.name, f"{_LINE}{move.at}", json.dumps(line))
    client.set_registered_model_alias(version.name, CHAMPION, str(version.number))
    return move


def _after(lines: Sequence[Move]) -> str:
    """Now, or just after the last line where its clock was ahead of ours: lines are sorted."""
    now = datetime.now(UTC)
    if lines:
        now = max(now, datetime.fromisoformat(lines[-1].at) + timedelta(microseconds=1))
    return f"{now:%Y-%m-%dT%H:%M:%S.%fZ}"


def previous_champion(name: str) -> int | None:
    """Version that a rollback leads to: what was champion before the present one was promoted.

    A rollback takes a promotion back, so two of them lead two promotions back.
    """
    champions: list[int | None] = []
    for move in read_ledger(name):
        if move.happened and move.action == "promote":
            if not champions:
                champions.append(move.replaced)
            champions.append(move.version)
        elif move.happened and champions:
            champions.pop()
    return champions[-2] if len(champions) > 1 else None


# --- the model itself --------------------------------------------------------------------


def load_model(uri: str) -> keras.Model:
    """Loads a model that this pipeline saved, and nothing that could run code.

    Args:
        uri: `models:/NAME@champion`, `models:/NAME/VERSION` or `models:/MODEL_ID`.

    Returns:
        A model from raw pixels `[batch, height, width]` to probabilities `[batch, num_classes]`.

    Raises:
        RefusedModelError: It has other files, or layers that contain code.
    """
    import keras

    with fetched_model(uri) as folder:
        try:
            return keras.saving.load_model(
                folder / "data" / "model.keras", compile=False, safe_mode=True
            )
        except Exception as error:  # a damaged or malicious file raises nearly everything
            reason = " ".join(str(error).split())[:300]
            raise RefusedModelError(f"{uri} is not loaded: {reason}") from error


def load_served(uri: str) -> Callable[[Array], Array]:
    """Loads a model as `mlflow models serve` does, once its files are checked.

    Returns:
        Raw pixels `[batch, height, width]` to probabilities `[batch, num_classes]`; raises
        `RefusedModelError` where the model cannot do that.

    Raises:
        RefusedModelError: As `load_model`.
    """
    with fetched_model(uri) as folder:
        try:
            model = mlflow.pyfunc.load_model(str(folder))
        except Exception as error:  # a damaged or malicious file raises nearly everything
            reason = " ".join(str(error).split())[:300]
            raise RefusedModelError(f"{uri} is not loaded: {reason}") from error

    def predict(images: Array) -> Array:
        try:
            answers = np.asarray(model.predict(images))
        except Exception as error:  # of a model of something else
            reason = " ".join(str(error).split())[:300]
            raise RefusedModelError(f"{uri} cannot predict {images.shape}: {reason}") from error
        if answers.ndim != 2 or len(answers) != len(images):
            raise RefusedModelError(f"{uri} answers {images.shape} with {answers.shape}.")
        return answers

    return predict


@contextmanager
def fetched_model(uri: str) -> Iterator[Path]:
    """Folder of a model's files, which are checked: from a server, a copy that is then deleted.

    Raises:
        RefusedModelError: It has other files than this pipeline saves, or was saved otherwise.
    """
    with ExitStack() as stack:
        copy = None
        if is_server(mlflow.get_registry_uri()):
            copy = stack.enter_context(tempfile.TemporaryDirectory())
        try:
            folder = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=copy)
        except (MlflowException, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise RefusedModelError(f"{uri}: its files cannot be read: {reason}") from error
        _check_files(Path(folder), uri)
        yield Path(folder)


def _check_files(folder: Path, uri: str) -> None:
    paths = list(folder.rglob("*"))
    files = {str(path.relative_to(folder)) for path in paths if not path.is_dir()}
    if strange := sorted(files - _FILES):
        raise RefusedModelError(f"{uri} is not loaded: {strange[0]} is no file of a model of ours.")
    if any(path.is_symlink() for path in (folder, *paths)):
        raise RefusedModelError(f"{uri} is not loaded: a link leads out of it.")
    try:
        keras_module = (folder / "data" / "keras_module.txt").read_text(encoding="utf-8")
        about = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))
        flavors = {name: dict(flavor) for name, flavor in about["flavors"].items()}
    except (OSError, UnicodeError, yaml.YAMLError, AttributeError, *_UNLIKE) as error:
        raise RefusedModelError(f"{uri} is not loaded: its description is damaged.") from error
    named = {
        name: {key: flavor.get(key) for key in _FLAVORS.get(name, ())}
        for name, flavor in flavors.items()
    }
    if keras_module not in _KERAS or named != _FLAVORS:
        raise RefusedModelError(f"{uri} is not loaded: it was not saved by this pipeline.")
    _check_network(folder / "data" / "model.keras", uri)


def _check_network(path: Path, uri: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names, network = archive.namelist(), json.loads(archive.read("config.json"))
        strange = [part for part in _parts(network) if part[1] not in _PARTS.get(part[0], ())]
    except Exception as error:  # a damaged or malicious file raises nearly everything
        raise RefusedModelError(f"{uri} is not loaded: its network is damaged.") from error
    if strange or sorted(names) != _ARCHIVE:
        what = ".".join(strange[0]) if strange else ", ".join(names)
        raise RefusedModelError(
            f"{uri} is not loaded: {what[:100]} is no part of a network of ours."
        )


def _parts(network: Any) -> Iterator[tuple[str, str]]:
    """Module and name of each object in a description of Keras."""
    if isinstance(network, dict):
        if "class_name" in network:
            yield str(network.get("module")), str(network["class_name"])
        network = list(network.values())
    if isinstance(network, list):
        for inside in network:
            yield from _parts(inside)


def model_digest(uri: str) -> str:
    """SHA-256 of the file that holds a model's layers and weights."""
    with fetched_model(uri) as folder, (folder / "data" / "model.keras").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def example_of(uri: str) -> Array:
    """The input example of a model: `[n, height, width]`, raw pixels of its training images.

    Raises:
        RefusedModelError: As `load_model`; or the example is missing or damaged.
    """
    with fetched_model(uri) as folder:
        try:
            given = json.loads((folder / "serving_input_example.json").read_text(encoding="utf-8"))
            inputs = Model.load(str(folder)).signature.inputs
            return np.asarray(given["inputs"], inputs.numpy_types()[0])  # JSON has plain numbers
        except (OSError, AttributeError, MlflowException, *_UNLIKE) as error:
            raise RefusedModelError(f"{uri}: its input example is missing or damaged.") from error
