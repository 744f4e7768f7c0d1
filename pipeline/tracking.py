"""Runs in MLflow: what is recorded of them, how they end.

Imports no TensorFlow: the launcher of a sweep records runs too, and trains none.
"""

from __future__ import annotations

import functools
import getpass
import json
import logging
import platform
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import yaml
from mlflow.data.schema import TensorDatasetSchema
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.types import Schema, TensorSpec
from mlflow.utils import requirements_utils
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline.config import RunConfig, flatten, without_password
from pipeline.database import patiently
from pipeline.endings import DivergedError, StopRun
from pipeline.entries import merge, merged, tell
from pipeline.owner import OWNER, me
from pipeline.pages import run_page
from pipeline.spool import Entry, Spool, spools
from pipeline.store import NOTE, PREDICTIONS, SETTINGS, Store, impatient, is_away, open_store

if TYPE_CHECKING:  # or TensorFlow is imported, or what takes a second
    import keras
    from matplotlib.figure import Figure

    from pipeline.data import Array, Data, Split
    from pipeline.evaluate import Evaluation

log = logging.getLogger(__name__)

LIBRARIES = ("tensorflow", "keras", "numpy", "mlflow")
ROOT = Path(__file__).resolve().parents[1]
CODE = ("conf", "pipeline", "sweeps", "pyproject.toml")  # there, what figures can depend on

_PAUSE = 5.0  # seconds until a store that was away is tried again, at least
_AWAY = (
    "the tracking store is away; what it has yet to be told is kept in %s. The training goes on."
)
_next_try = [0.0]  # of a store that was away, as of `time.monotonic`


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is being recorded.

    What it records is told the store at once. One that is away is told later, in the same order:
    until then it is kept in the spool, and nothing waits.
    """

    run_id: str
    name: str
    store: Store

    # --- recording -----------------------------------------------------------------------

    def tell(self, entry: Entry, path: Path | None = None) -> None:
        """Tells the store, now or later.

        Args:
            entry: As in `pipeline.entries`.
            path: File or folder that belongs to it.

        Raises:
            MlflowException: The store is there, and refuses it.
            OSError: Neither the store nor the spool can be written.
        """
        if self.spool.is_empty and time.monotonic() >= _next_try[0]:
            with self._noting_absence():
                with impatient():
                    tell(self.run_id, entry, path)
                return
        if self.spool.is_empty:
            log.warning(_AWAY, self.store.spools)
        self.spool.add(entry, self._about, path)
        self.catch_up()

    @contextmanager
    def _noting_absence(self) -> Iterator[None]:
        """Ends early where the store is away, which is then left alone for a while."""
        start = time.monotonic()
        try:
            yield
        except Exception as error:
            if not is_away(error, self.store.uri):
                raise
            now = time.monotonic()
            _next_try[0] = now + max(_PAUSE, 9 * (now - start))

    def catch_up(self, *, at_once: bool = False) -> bool:
        """Tells the store what is in the spool, if it is back.

        Args:
            at_once: Also where it was tried just now; else a tenth of the time is spent on it.

        Returns:
            Whether nothing is left to tell.
        """
        if self.spool.is_empty:
            return True
        if at_once or time.monotonic() >= _next_try[0]:
            with self._noting_absence(), impatient():
                replay(self.spool, self.store.uri)
                log.info("run %s: the tracking store is back, and was told all", self.name)
        return self.spool.is_empty

    @property
    def spool(self) -> Spool:
        return Spool(folder=self.store.spools / self.run_id)

    @property
    def _about(self) -> dict[str, str]:
        return {
            "run_id": self.run_id,
            "name": self.name,
            "experiment_id": self.store.experiment_id,
            "uri": without_password(self.store.uri),
        }

    def set_tags(self, tags: Mapping[str, object]) -> None:
        shown = {name: without_password(str(value)) for name, value in tags.items()}
        self.tell({"kind": "tags", "tags": shown})

    def describe(self, text: str) -> None:
        """Sets the Markdown text that the UI shows on top of the run."""
        self.set_tags({NOTE: text})

    def rename(self, name: str) -> None:
        self.tell({"kind": "name", "name": name})

    def end(self, status: str, *, error: str = "") -> None:
        """Ends the run as FINISHED, KILLED or FAILED; one that ended before ends anew."""
        if error:
            self.set_tags({"error": error})
        self.tell(_ending(status))

    def end_later(self, status: str) -> None:
        """Leaves the end to the next process that opens the store, which does not take it now."""
        with suppress(OSError):  # where there is no room for that either, the doctor ends it
            self.spool.add(_ending(status), self._about)

    def log_metrics(
        self,
        metrics: Mapping[str, float],
        *,
        step: int = 0,
        once: bool = False,
        constants: Mapping[str, float] | None = None,
    ) -> None:
        """Records metrics of an epoch, or with step 0 of the whole run, in one synchronous call.

        Args:
            metrics: By name.
            step: The epoch, from 1.
            once: Whether the store is asked first, and told only what it has not of this epoch.
            constants: Metrics of the whole run, in the same call.
        """
        now = _now()
        batch = [[name, value, now, step] for name, value in metrics.items()]
        batch += [[name, value, now, 0] for name, value in (constants or {}).items()]
        self.tell({"kind": "metrics", "metrics": batch, "once": once})

    def log_figure(self, figure: Figure, name: str) -> None:
        """Saves a figure as `figures/<name>.png`, which the UI shows."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.png"
            figure.savefig(path, dpi=110, pil_kwargs={"compress_level": 1})  # fast
            self.log_file(path, "figures")

    def log_text(self, text: str, name: str) -> None:
        """Saves a file; the UI shows text, Markdown and HTML."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            path.write_text(text, encoding="utf-8")
            self.log_file(path, str(Path(name).parent))

    def log_file(self, path: Path, folder: str = ".") -> None:
        """Saves a copy of a file in a folder of the run's files."""
        self.tell({"kind": "file", "folder": "" if folder == "." else folder}, path)

    def log_predictions(self, judged: Evaluation) -> None:
        """Saves what the model says of each validation image, for paired comparisons of runs.

        Args:
            judged: On the validation split.
        """
        labels = judged.split.labels
        of_label = judged.probabilities[np.arange(len(labels)), labels]
        whole = np.min_scalar_type(judged.probabilities.shape[1] - 1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(PREDICTIONS).name
            np.savez_compressed(
                path,
                label=labels.astype(whole),
                prediction=judged.probabilities.argmax(axis=1).astype(whole),
                loss=-np.log(np.maximum(of_label, np.finfo(np.float32).tiny)).astype(np.float16),
            )
            self.log_file(path, str(Path(PREDICTIONS).parent))

    def log_model(self, model: keras.Model, data: Data, metrics: Mapping[str, float]) -> None:
        """Saves the model in MLflow's own flavour, with signature, example and requirements.

        These are the steps of `mlflow.tensorflow.log_model` but for its trial, which loads what
        it saved and predicts the example, in two thirds of its time. What an earlier try of this
        run has logged is replaced.

        Args:
            model: Raw pixels `[batch, height, width]` to probabilities `[batch, num_classes]`.
            data: Its first training images are the example.
            metrics: Of the whole run, recorded for the run and the model with step 0.
        """
        import mlflow.tensorflow

        example, now = data.train.images[:5], _now()
        probabilities = TensorSpec(np.dtype("float32"), (-1, len(data.class_names)))
        signature = ModelSignature(inputs=_tensor(example), outputs=Schema([probabilities]))
        with tempfile.TemporaryDirectory() as folder, _packages_unlisted():
            mlflow.tensorflow.save_model(
                model,
                f"{folder}/model",
                mlflow_model=Model(run_id=self.run_id),
                signature=signature,
                input_example=example,
                pip_requirements=[f"{name}=={version(name)}" for name in LIBRARIES],
            )
            timed = {name: [value, now] for name, value in metrics.items()}
            self.tell({"kind": "model", "metrics": timed}, Path(folder) / "model")

    # --- what the store has --------------------------------------------------------------

    @property
    def address(self) -> str:
        """Of its page on a server; empty where `pipeline.ui` has to start one."""
        return self.store.address(run_page(self.store.experiment_id, self.run_id))

    @property
    def status(self) -> str:
        """RUNNING, FINISHED, KILLED or FAILED; DELETED when somebody deleted it."""
        info = mlflow.MlflowClient().get_run(self.run_id).info
        return "DELETED" if info.lifecycle_stage == "deleted" else str(info.status)

    @property
    def tags(self) -> dict[str, str]:
        return dict(mlflow.MlflowClient().get_run(self.run_id).data.tags)

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each metric so far."""
        return dict(mlflow.MlflowClient().get_run(self.run_id).data.metrics)

    @property
    def known_metrics(self) -> dict[str, float]:
        """Likewise, of a store that is away what the spool has; then it may lack the `epoch`."""
        entries = [entry for entry in self.spool.entries if entry["kind"] == "metrics"]
        spooled = {each[0]: each[1] for entry in entries for each in entry["metrics"]}
        if "epoch" in spooled:
            return spooled
        with self._noting_absence(), impatient():
            return {"epoch": 0.0} | self.metrics | spooled
        return spooled

    # --- between runs --------------------------------------------------------------------

    def reopen(self) -> None:
        """Goes on with a run that had ended, and forgets why it had."""
        client = mlflow.MlflowClient()
        tags = client.get_run(self.run_id).data.tags
        for name in tags.keys() & {"error", "diverged", "diverged.epoch"}:
            client.delete_tag(self.run_id, name)
        client.set_tag(self.run_id, OWNER, me())
        client.update_run(self.run_id, status="RUNNING")

    def adopt(self, run_ids: Iterable[str]) -> None:
        """Nests runs under this one; of those that were deleted it does nothing."""
        for run_id in filter(None, run_ids):
            with suppress(MlflowException):
                mlflow.MlflowClient().set_tag(run_id, MLFLOW_PARENT_RUN_ID, self.run_id)

    def count_test_look(self, data: Data) -> int | None:
        """Records that this run looks at the test split.

        Returns:
            Looks of all recorded runs so far, this one included; None while the store is away.
        """
        digest = data.splits["test"].digest
        self.set_tags({"test_split": digest})
        try:
            return _count_looks(digest) if self.spool.is_empty else None
        except Exception as error:
            if not is_away(error, self.store.uri):
                raise
            return None


def _count_looks(digest: str) -> int:
    with impatient():
        experiments = mlflow.search_experiments(view_type=ViewType.ALL)
        found = mlflow.search_runs(
            [experiment.experiment_id for experiment in experiments],
            f"tags.test_split = '{digest}'",
            run_view_type=ViewType.ALL,
            output_format="list",
        )
    return len(found)


def replay(spool: Spool, uri: str) -> int:
    """Tells the store what is in a spool, which is gone then.

    Args:
        spool: That no living process adds to, but this one.
        uri: Of the store of this process.

    Returns:
        Entries that were told.

    Raises:
        ValueError: They are of another store.
        Exception: The store is away again, or refuses an entry; the spool keeps what it was not
            told.
    """
    if spool.is_empty:
        return 0
    with spool.lock():
        if spool.is_empty:  # now: another process was faster
            return 0
        about, entries = spool.about, spool.entries
        if about["uri"] != without_password(uri):
            raise ValueError(f"run {about['run_id']} ({about['name']}) is of {about['uri']}.")
        left = list(entries)
        try:
            for group in merged(entries):
                tell(about["run_id"], merge(group), spool.path_of(group[0]))
                left = left[len(group) :]
        finally:
            spool.keep(left)
    return len(entries)


def replay_patiently(run: Run, *, seconds: float, stop: Callable[[], bool] = lambda: False) -> None:
    """Likewise of a run, waiting for a store that is away.

    Not in haste: no training waits for it, and an upload may take a server its time.

    Args:
        run: That no living process records, but this one.
        seconds: To wait, at most.
        stop: Asked every second whether to give up.

    Raises:
        AwayError: The store is still away.
        Exception: It refuses an entry.
    """
    uri = run.store.uri
    away = partial(is_away, uri=uri)
    patiently(partial(replay, run.spool, uri), away, uri, seconds=seconds, stop=stop)


def replay_left(store: Store) -> None:
    """Tells the store what processes that are gone could not tell it."""
    for spool in spools(store.spools):
        try:
            if spool.is_left and (count := replay(spool, store.uri)):
                log.info("told the tracking store %d things of run %s", count, spool.folder.name)
        except Exception as error:  # of another store, or refused: the doctor tells
            if is_away(error, store.uri):
                return
            if spool.is_empty:  # another process has told it meanwhile
                continue
            log.warning("%s: %s", spool.folder, without_password(" ".join(str(error).split())))


def create_run(
    store: Store, name: str, tags: Mapping[str, object], *, parent: Run | None = None
) -> Run:
    """Creates a run, RUNNING from now on; under a parent, the UI nests it there."""
    shown = {key: without_password(str(value)) for key, value in {**tags, OWNER: me()}.items()}
    if parent:
        shown[MLFLOW_PARENT_RUN_ID] = parent.run_id
    with impatient():  # repeated, it would create two
        created = mlflow.MlflowClient().create_run(store.experiment_id, tags=shown, run_name=name)
    return Run(run_id=created.info.run_id, name=name, store=store)


def find_run(store: Store, tags: Mapping[str, object], *, parent: Run | None = None) -> Run | None:
    """The run of the experiment with these tags, if there is one; one that was deleted is not."""
    wanted = dict(tags) | ({MLFLOW_PARENT_RUN_ID: parent.run_id} if parent else {})
    condition = " and ".join(f"tags.`{name}` = '{value}'" for name, value in wanted.items())
    found = mlflow.MlflowClient().search_runs([store.experiment_id], condition, max_results=1)
    if not found:
        return None
    return Run(run_id=found[0].info.run_id, name=found[0].info.run_name, store=store)


@contextmanager
def start_run(
    config: RunConfig, data: Data, command: str, *, run: Run | None = None
) -> Iterator[Run]:
    """Records a run: FINISHED, KILLED when stopped or interrupted, else FAILED.

    Args:
        config: Logged as parameters by their dotted names, and whole as `config.yaml`.
        data: Logged as the run's inputs.
        command: Command line that repeats the run.
        run: That `create_run` made, or an unfinished one that is gone on with.

    Raises:
        ValueError: The experiment was deleted.
    """
    if run is None:
        store = open_store(config.tracking)
        replay_left(store)
        run = create_run(store, config.tracking.run_name or run_name(config), {})
    else:
        run.store.use()
    status, failure = "FAILED", None
    try:
        with _system_metrics(run, config):
            log_inputs(run, config, data, command, note=run_note(config, data, command))
            yield run
        status = "FINISHED"
    except (KeyboardInterrupt, StopRun):
        status = "KILLED"
        raise
    except Exception as error:
        failure = error
        raise
    finally:
        _end(run, status, failure, partial(run_note, config, data, command))


@contextmanager
def _system_metrics(run: Run, config: RunConfig) -> Iterator[None]:
    if not config.tracking.system_metrics:
        yield
        return
    monitor = SystemMetricsMonitor(run.run_id, resume_logging=True)  # type: ignore[no-untyped-call]
    monitor.start()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        monitor.finish()  # type: ignore[no-untyped-call]


def log_inputs(
    run: Run,
    config: RunConfig,
    data: Data,
    command: str,
    *,
    note: str,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Records all that a run is given, so that it can be repeated.

    Args:
        run: To record in.
        config: Of the run.
        data: As it was split.
        command: Command line that repeats the run.
        note: What the UI shows on top of the run, in Markdown.
        settings: Logged as parameters by their dotted names, and whole as `config.yaml`; those
            of `config` unless given.
    """
    settings = settings or asdict(config)
    run.set_tags({"command": command, NOTE: note, OWNER: me(), **environment(config, data)})
    parameters = {
        name: without_password(value)
        for name, value in flatten(settings)
        if not name.startswith("tracking.")
    }
    run.tell({"kind": "params", "params": parameters})
    text = yaml.safe_dump(settings, sort_keys=False, width=1_000)
    run.log_text(without_password(text), SETTINGS)
    datasets = [
        {"split": name, "dataset": _dataset(config.data.name, split, data.source)}
        for name, split in data.splits.items()
    ]
    run.tell({"kind": "datasets", "datasets": datasets})


def _dataset(name: str, split: Split, source: str) -> dict[str, str]:
    """As `mlflow.entities.Dataset` takes it."""
    schema = TensorDatasetSchema(features=_tensor(split.images), targets=_tensor(split.labels))
    return {
        "name": name,
        "digest": split.digest[:16],
        "source_type": "http" if "://" in source else "local",
        "source": json.dumps({"url" if "://" in source else "uri": source}),
        "schema": json.dumps(schema.to_dict()),
        "profile": json.dumps({"num_rows": len(split), "features_shape": split.images.shape}),
    }


@contextmanager
def _packages_unlisted() -> Iterator[None]:
    """Spares MLflow listing the files of every package there is, 0.4 s once a process.

    It would do so to compare the versions that a model names with those that are installed, which
    it finds by the names alone.
    """
    utils: Any = requirements_utils
    listed = utils._MODULES_TO_PACKAGES
    utils._MODULES_TO_PACKAGES = listed or {}
    try:
        yield
    finally:
        utils._MODULES_TO_PACKAGES = listed


def _tensor(array: Array) -> Schema:
    return Schema([TensorSpec(array.dtype, (-1, *array.shape[1:]))])


def environment(config: RunConfig, data: Data) -> dict[str, str]:
    """Tags of all that the figures depend on, beyond the parameters."""
    return {
        "data.sha256": data.digest,
        "host": platform.node(),
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": "pipeline.run",
        "mlflow.source.type": "LOCAL",
        "platform": platform.platform(),
        "seed": str(config.seed),
        "threads": str(config.training.threads),
        "version.python": platform.python_version(),
        **{f"version.{name}": version(name) for name in LIBRARIES},
        **_git(),
    }


@functools.cache
def _git() -> dict[str, str]:
    """Commit of this code and whether it differs from that; nothing outside a checkout."""
    try:
        top, commit, status = (
            subprocess.run(
                ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (
                ["rev-parse", "--show-toplevel"],
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--", *CODE],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    if Path(top) != ROOT:  # the code is installed inside the checkout of something else
        return {}
    dirty = str(bool(status)).lower()
    return {"git.commit": commit, "git.dirty": dirty, "mlflow.source.git.commit": commit}


def run_name(config: RunConfig) -> str:
    """A name that tells runs apart: widths, dropout, optimizer, rate, seed."""
    model = config.model
    widths = "-".join([str(model.hidden_units)] * model.hidden_layers) or "linear"
    if model.hidden_layers > 3:
        widths = f"{model.hidden_units}x{model.hidden_layers}"
    return (
        f"{widths} dropout={model.dropout_rate:g} {config.optimizer.name} "
        f"lr={config.optimizer.learning_rate:g} seed={config.seed}"
    )


def run_note(config: RunConfig, data: Data, command: str, *outcome: str) -> str:
    """What a run is, what came out, how to repeat it: in Markdown, for the UI.

    Args:
        config: Of the run.
        data: Of the run.
        command: Command line that repeats it.
        outcome: A line each.
    """
    model, training = config.model, config.training
    inputs, classes = data.train.images[0].size, len(data.class_names)
    widths = "-".join(map(str, [inputs, *[model.hidden_units] * model.hidden_layers, classes]))
    what = (
        f"{widths}, {model.activation}, dropout {model.dropout_rate:.3g}; "
        f"{config.optimizer.name} at {config.optimizer.learning_rate:.3g}, batches of "
        f"{training.batch_size}, at most {training.epochs} epochs"
        f"{', averaged weights' if training.ema_momentum else ''}"
        f"{', smooth labels' if training.label_smoothing else ''}; "
        f"{len(data.train):,} images of {config.data.name}"
        f"{', distorted' if config.augmentation.distorts else ''}."
    )
    lines = "\n".join(f"- {line}" for line in outcome)
    return "\n\n".join(filter(None, [what, lines, f"Repeat: `{command}`"]))


def _end(run: Run, status: str, failure: Exception | None, note: Callable[..., str]) -> None:
    """Ends the run with its reason, on a full disk in the room of the reserve.

    Raises:
        Exception: A run that succeeded cannot be recorded as such.
    """
    try:
        _record_end(run, status, failure, note)
    except Exception:
        if run.store.reserve:
            run.store.reserve.unlink(missing_ok=True)
        try:
            _record_end(run, status, failure, note)
        except Exception as error:
            run.end_later("FAILED" if status == "FINISHED" else status)
            log.error("run %s is left without an end: %s", run.run_id, without_password(str(error)))
            if status == "FINISHED":
                raise
    else:
        try:
            # One that is told to stop has no time; others tell what it leaves.
            run.catch_up(at_once=status != "KILLED")
        except Exception as error:
            log.error("run %s: the store refuses: %s", run.run_id, without_password(str(error)))
            if status == "FINISHED":  # else how it ended is what the caller must know
                raise


def _record_end(run: Run, status: str, failure: Exception | None, note: Callable[..., str]) -> None:
    if status == "KILLED":
        run.describe(note(_progress(run.known_metrics)))
    if failure is not None:
        error = f"{type(failure).__name__}: {failure}"[:500]
        tags: dict[str, object] = {"error": error, NOTE: note(f"failed: {error}")}
        if isinstance(failure, DivergedError):
            tags |= {"diverged": "true", "diverged.epoch": failure.epoch}
        run.set_tags(tags)
    run.end(status)
    if failure is not None and not isinstance(failure, DivergedError):
        lines = "".join(traceback.format_exception(failure))
        with suppress(Exception):  # the reason is recorded; the disk may be full
            run.log_text(without_password(lines), "traceback.txt")


def _ending(status: str) -> Entry:
    return {"kind": "end", "status": status, "time": _now()}


def _now() -> int:
    """In milliseconds since 1970, as MLflow has it."""
    return int(time.time() * 1000)


def _progress(metrics: Mapping[str, float]) -> str:
    if "epoch" not in metrics:  # the store is away, and knows more
        return "stopped"
    if not metrics["epoch"]:
        return "stopped before the end of its first epoch"
    stopped = f"stopped after epoch {metrics['epoch']:.0f}"
    if "best_val_accuracy" not in metrics:
        return stopped
    return f"{stopped}; best validation accuracy {metrics['best_val_accuracy']:.4f}"
