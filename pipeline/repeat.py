"""A recorded run, trained again: does the same come out? `python -m pipeline.repeat`."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline import start_libraries
from pipeline.compose import from_settings, run_cli
from pipeline.config import RepeatConfig, RunConfig, flatten, without_password
from pipeline.endings import DivergedError
from pipeline.pages import run_page, ui_command
from pipeline.run import console, execute_run, progress

if TYPE_CHECKING:  # or TensorFlow is imported
    from pipeline.data import Data, Split
    from pipeline.store import Recorded
    from pipeline.tracking import Run
    from pipeline.train import EpochHook

EXACT, CLOSE, DIFFERENT = "EXACT", "CLOSE", "DIFFERENT"
STATUS = {EXACT: 0, CLOSE: 0, DIFFERENT: 4}  # of the process: 1 is an error, 2 one of the shell's
SIGNIFICANCE = 0.05  # chance to find two models apart that are not, two-sided

METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")  # of an epoch
# Settings of where things are, how they are checked, and what is done after the training.
ASIDE = ("tracking.", "data.path", "data.sha256", "evaluate_test")
DIRTY = "git.dirty"
# Tags of what the figures depend on, data and settings apart. MLflow's version is not among them:
# it records what others have computed.
ENVIRONMENT = (
    *(f"version.{name}" for name in ("python", "tensorflow", "keras", "numpy")),
    "platform",
    "host",
    "git.commit",
    DIRTY,
)

History = Mapping[str, Mapping[int, float]]
Weights = Sequence[npt.NDArray[np.generic]]
Inputs = dict[str, str | None]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run came to.

    Attributes:
        history: Value by epoch, from 1, of each of `METRICS`.
        weights: Of its model.
        correct: `[n]`, whether its model is right, of each validation image; None where there
            are none, or both runs have not the same.
    """

    history: History
    weights: Weights
    correct: npt.NDArray[np.bool_] | None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a run and its repetition are to each other.

    Attributes:
        word: `EXACT`, `CLOSE` or `DIFFERENT`.
        reason: In a sentence.
        details: The first metric that differs, and by how much weights do; a sentence each.
    """

    word: str
    reason: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """A repetition before it starts.

    Attributes:
        of: The run.
        config: Of the run, recorded where the run is.
        data: As it is now.
        differences: What the run was given otherwise: a sentence by name, the first one first.
        then: What the run came to.
        shared: Validation images that both runs have.
    """

    of: Recorded
    config: RunConfig
    data: Data
    differences: Mapping[str, str]
    then: Trained
    shared: Split | None


# --- before the training -----------------------------------------------------------------


def find(config: RepeatConfig) -> tuple[Recorded, RunConfig]:
    """The run to repeat, and the configuration of its repetition.

    Raises:
        ValueError: There is no such run, or it cannot be repeated.
        FileNotFoundError: There is no store.
        ConnectionError: No server answers.
    """
    from pipeline.registry import logged_model
    from pipeline.store import connect, experiments, read_run, read_settings

    connect(config.tracking)
    run = read_run(str(config.run))
    _check_repeatable(run)
    logged_model(run)
    experiment = experiments().get(run.experiment_id)
    if experiment is None:
        raise ValueError(f"run={run.run_id} ({run.name}): its experiment was deleted.")
    try:
        recorded = from_settings(read_settings(run))
    except ValueError as error:
        raise ValueError(f"run={run.run_id} ({run.name}) cannot be repeated: {error}") from error
    if config.data.path and recorded.data.loader == "digits":
        raise ValueError(f"data.path={config.data.path}: the digits of this run are in no file.")
    tracking = replace(
        config.tracking, experiment=experiment, run_name=f"repeat of {run.name}", figures=False
    )
    return run, replace(
        recorded,
        data=replace(recorded.data, path=config.data.path or recorded.data.path),
        training=replace(
            recorded.training, threads=config.training.threads or recorded.training.threads
        ),
        tracking=tracking,
        evaluate_test=not recorded.data.validation_size,  # equal weights have equal test figures
    )


def _check_repeatable(run: Recorded) -> None:
    name = f"run={run.run_id} ({run.name})"
    if (kind := run.tags.get("kind")) in ("sweep", "promotion"):
        raise ValueError(
            f"{name} is that of a {kind}, which trains nothing itself: repeat one of the runs "
            f"under it, which python -m pipeline.ui run={run.run_id} shows."
        )
    if run.status != "FINISHED":
        why = f" ({run.tags['error']})" if "error" in run.tags else ""
        raise ValueError(
            f"{name} is {run.status}{why}: only a FINISHED run has a model to compare with."
        )


def prepare(run: Recorded, config: RunConfig) -> Repetition:
    """Reads the data, and all that the run came to.

    Args:
        run: To repeat.
        config: Of its repetition.

    Raises:
        ValueError: The data or the model is refused, or TensorFlow runs with other threads.
        OSError: The data cannot be read or downloaded.
    """
    from pipeline.data import load
    from pipeline.store import read_splits
    from pipeline.tracking import environment
    from pipeline.train import initialize

    initialize(threads=config.training.threads, seed=config.seed)  # before the model is loaded
    data = load(config.data)
    splits = read_splits(run.run_id)
    now = {split.name: split.digest[:16] for split in (data.train, data.validation) if split}
    shared = data.validation if splits.get("validation") == now.get("validation") else None
    return Repetition(
        of=run,
        config=config,
        data=data,
        differences=differences(
            _inputs(splits, run.params, run.tags),
            _inputs(now, dict(flatten(asdict(config))), environment(config, data)),
        ),
        then=_trained(run, shared),
        shared=shared,
    )


def _inputs(
    splits: Mapping[str, str], settings: Mapping[str, str], environment: Mapping[str, str]
) -> Inputs:
    """What the figures depend on, in the order in which it is looked at."""
    return {
        "data.sha256": environment.get("data.sha256"),
        **{f"split.{name}": splits.get(name) for name in ("train", "validation")},
        **{name: value for name, value in sorted(settings.items()) if not name.startswith(ASIDE)},
        **{name: environment.get(name) for name in ENVIRONMENT},
    }


def differences(then: Inputs, now: Inputs) -> dict[str, str]:
    """A sentence by name of each input that differs; changes that are not committed may always."""
    found = {
        name: f"{name}: {_short(then.get(name))} then, {_short(now.get(name))} now"
        for name in then | now
        if then.get(name) != now.get(name) and name != DIRTY
    }
    changed = [when for when, given in (("then", then), ("now", now)) if given.get(DIRTY) == "true"]
    if changed:
        found[DIRTY] = f"{DIRTY}: the code had uncommitted changes {' and '.join(changed)}"
    return found


def _short(value: str | None) -> str:
    if value is None:
        return "not recorded"
    is_digest = len(value) >= 16 and set(value) <= set("0123456789abcdef")
    return value[:12] if is_digest else value


def _trained(run: Recorded, shared: Split | None) -> Trained:
    from pipeline.evaluate import evaluate
    from pipeline.registry import load_model, logged_model
    from pipeline.store import read_history

    model = load_model(f"models:/{logged_model(run)}")
    correct = None
    if shared:
        correct = evaluate(model, shared).probabilities.argmax(axis=1) == shared.labels
    history = read_history(run.run_id, METRICS)
    return Trained(history=history, weights=model.get_weights(), correct=correct)


# --- the verdict -------------------------------------------------------------------------


def judge(then: Trained, now: Trained) -> Verdict:
    """Compares a run with its repetition."""
    first = first_difference(then.history, now.history)
    if not first and _are_identical(then.weights, now.weights):
        count = len(set().union(*then.history.values()))
        return Verdict(
            word=EXACT,
            reason=f"the metrics of all {count} epochs and all weights are the same, bit for bit.",
        )
    details = (
        f"First difference: {first}." if first else "The metrics of every epoch are the same.",
        _weights_apart(then.weights, now.weights),
    )
    if then.correct is None or now.correct is None:
        reason = "they have no validation images in common on which to compare them."
        return Verdict(word=DIFFERENT, reason=reason, details=details)
    word, reason = _weigh(then.correct, now.correct)
    return Verdict(word=word, reason=reason, details=details)


def first_difference(then: History, now: History) -> str:
    """The first epoch's first metric that differs; empty where all are the same."""
    epochs = sorted(set().union(*then.values(), *now.values()))
    for epoch, name in itertools.product(epochs, METRICS):
        one, other = (history.get(name, {}).get(epoch) for history in (then, now))
        if one != other:
            return f"{name} of epoch {epoch}: {_figure(one)} then, {_figure(other)} now"
    return ""


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.9g}"  # tells any two of float32 apart


def _are_identical(then: Weights, now: Weights) -> bool:
    return _have_same_shapes(then, now) and all(
        one.tobytes() == other.tobytes() for one, other in zip(then, now, strict=True)
    )


def _have_same_shapes(then: Weights, now: Weights) -> bool:
    shapes = [[(array.shape, array.dtype) for array in weights] for weights in (then, now)]
    return shapes[0] == shapes[1]


def _weights_apart(then: Weights, now: Weights) -> str:
    if not _have_same_shapes(then, now):
        return "The weights have other shapes."
    largest = max(
        float(np.max(np.abs(np.subtract(one, other, dtype=np.float64)), initial=0.0))
        for one, other in zip(then, now, strict=True)
    )
    return f"Largest difference of a weight: {largest:.3g}."


def _weigh(then: npt.NDArray[np.bool_], now: npt.NDArray[np.bool_]) -> tuple[str, str]:
    """McNemar's exact test: a fair coin decides the images that one of both alone has right.

    McNemar 1947, in the exact form of Edwards 1948.
    """
    from scipy.stats import binomtest

    lost, gained = int(np.sum(then & ~now)), int(np.sum(now & ~then))
    p_value = float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    word = DIFFERENT if p_value < SIGNIFICANCE else CLOSE
    where = "beyond" if word == DIFFERENT else "within"
    return word, (
        f"validation accuracy {then.mean():.4f} then, {now.mean():.4f} now on the same "
        f"{len(now):,} images, of which {lost} were right only then and {gained} only now: "
        f"{where} their noise (p = {p_value:.2g})."
    )


# --- the repetition ----------------------------------------------------------------------


def repeat(
    repetition: Repetition,
    command: str,
    *,
    on_epoch_end: EpochHook = lambda epoch, metrics: None,
) -> tuple[Run, Verdict]:
    """Trains the run again, as a run of its own, and records the verdict on that.

    One that diverges is FAILED, and DIFFERENT: what it repeats did not.

    Args:
        repetition: Which `prepare` has made.
        command: Command line of this.
        on_epoch_end: As in `execute_run`, which says what else is raised.
    """
    from pipeline.store import NOTE, open_store, read_run
    from pipeline.tracking import create_run, replay_left

    of, config = repetition.of, repetition.config
    store = open_store(config.tracking)
    replay_left(store)
    run = create_run(store, str(config.tracking.run_name), {"repeats": of.run_id})
    try:
        execute_run(config, command, on_epoch_end=on_epoch_end, data=repetition.data, into=run)
        if not run.catch_up(at_once=True):  # half of a record would be DIFFERENT
            kept = run.spool.folder
            raise ConnectionError(f"the tracking store is away; {run.name} is kept in {kept}.")
        verdict = judge(repetition.then, _trained(read_run(run.run_id), repetition.shared))
    except DivergedError as error:
        verdict = Verdict(word=DIFFERENT, reason=str(error))
    first = next(iter(repetition.differences), "none")
    run.set_tags({"repeat.verdict": verdict.word, "repeat.difference": first})
    link = f"Repeats [{of.name}]({run_page(of.experiment_id, of.run_id)})."
    run.describe("\n\n".join([*report(repetition, verdict), link, run.tags[NOTE]]))
    return run, verdict


def report(repetition: Repetition, verdict: Verdict) -> list[str]:
    """The verdict, what may have caused it, and what it rests on: a line each."""
    found = list(repetition.differences.values())
    if found:
        cause = f"First input that differs: {found[0]}."
    else:
        cause = "No input that is recorded differs."
    return [f"{verdict.word}: {verdict.reason}", cause, *verdict.details]


def main(config: RepeatConfig, overrides: list[str]) -> None:
    command = shlex.join(["python", "-m", "pipeline.repeat", *overrides])
    with console.status("reading the run"):
        of, repeated = find(config)
    with console.status("starting TensorFlow"):
        start_libraries()
        repetition = prepare(of, repeated)
    console.print(f"Repeating {of.name} ({of.run_id}).", markup=False)
    for difference in repetition.differences.values():
        console.print(f"Differs: {difference}.", markup=False)
    with progress(repeated) as show:
        run, verdict = repeat(repetition, without_password(command), on_epoch_end=show)
    console.print()
    for line in report(repetition, verdict):
        console.print(line, markup=False)
    console.print(f"See it: {run.address or ui_command(run.run_id, overrides)}", markup=False)
    if status := STATUS[verdict.word]:
        sys.exit(status)


if __name__ == "__main__":
    run_cli("repeat", RepeatConfig, main)
