"""One run: data -> model -> train -> evaluate -> record; the command line of it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline import start_libraries
from pipeline.compose import run_cli
from pipeline.config import AugmentationConfig, RunConfig, without_password
from pipeline.console import open_console
from pipeline.pages import store_command, ui_command
from pipeline.summary import Job, summary_table

if TYPE_CHECKING:  # or TensorFlow is imported
    import keras

    from pipeline.data import Data
    from pipeline.evaluate import Evaluation
    from pipeline.tracking import Run
    from pipeline.train import EpochHook, History, Metrics

console = open_console()


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to.

    Attributes:
        run_id: In MLflow.
        name: In MLflow.
        metrics: Of the whole run, as recorded.
        training_seconds: Spent by this call on building and fitting the model, without what it
            records and the caller's hook.
        address: Of its page on an MLflow server, else empty.
        spool: Folder of what the store, which is away, has yet to be told; None: it knows all.
    """

    run_id: str
    name: str
    metrics: Metrics
    training_seconds: float
    address: str
    spool: Path | None


def execute_run(
    config: RunConfig,
    command: str,
    *,
    on_epoch_end: EpochHook = lambda epoch, metrics: None,
    data: Data | None = None,
    into: Run | None = None,
    checkpoint: Path | None = None,
    constants: Mapping[str, float] | None = None,
) -> RunResult:
    """Trains, evaluates and records one model.

    Args:
        config: The run.
        command: Command line that repeats it.
        on_epoch_end: Called with the epoch, from 1, and its metrics, once they are recorded;
            may raise `pipeline.endings.StopRun`.
        data: What `config.data` loads, when it is loaded already.
        into: Run to record in: created beforehand, or to go on with.
        checkpoint: File that keeps the training after each epoch, and from which one that was
            killed goes on.
        constants: Metrics of the whole run that are known beforehand, recorded with an epoch.

    Raises:
        ValueError: The data or the size of the network is refused; no run is recorded then, but
            one that was created beforehand is FAILED for its size.
        OSError: The data cannot be read or downloaded; no run is recorded then.
        pipeline.endings.DivergedError: The loss is not finite; the run is recorded as FAILED.
        pipeline.endings.StopRun: The hook raised it; the run is recorded as KILLED.
    """
    # TensorFlow and MLflow take ten seconds to import: a misspelt key need not wait for them.
    from pipeline.data import load
    from pipeline.evaluate import evaluate
    from pipeline.model import build_mlp, build_optimizer, check_memory
    from pipeline.tracking import run_note, start_run
    from pipeline.train import initialize, steps_per_epoch, train

    initialize(threads=config.training.threads, seed=config.seed)
    data = data or load(config.data)
    if into is None:  # what does not fit leaves no run
        inputs = data.train.images[0].size
        check_memory(config.model, num_inputs=inputs, num_classes=len(data.class_names))
    with start_run(config, data, command, run=into) as run:
        start = time.perf_counter()
        model = build_mlp(config.model, data)
        optimizer = build_optimizer(
            config.optimizer,
            steps_per_epoch=steps_per_epoch(len(data.train), config.training),
            epochs=config.training.epochs,
            ema_momentum=config.training.ema_momentum,
        )
        recorded = run.known_metrics if into else {"epoch": 0.0}
        # A store that is away cannot say which epochs an earlier process has told it.
        once = "epoch" not in recorded
        best = {name: value for name, value in recorded.items() if name.startswith("best_")}
        if once:
            best = _best_before(checkpoint)
        unsaid = {name: x for name, x in (constants or {}).items() if name not in recorded}
        hook_seconds: list[float] = []

        def report(epoch: int, metrics: Metrics) -> None:
            begin = time.perf_counter()
            if epoch > recorded.get("epoch", 0):
                if metrics.get("val_accuracy", -1.0) > best.get("best_val_accuracy", -1.0):
                    best.update(best_val_accuracy=metrics["val_accuracy"], best_epoch=epoch)
                # The UI's page that compares runs begins with what was recorded first.
                ordered = {**best, "epoch": epoch, **metrics}
                run.log_metrics(ordered, step=epoch, once=once, constants=unsaid)
                unsaid.clear()
            on_epoch_end(epoch, metrics)
            hook_seconds.append(time.perf_counter() - begin)

        history = train(
            model,
            optimizer,
            data,
            config.training,
            seed=config.seed,
            on_epoch_end=report,
            augmentation=config.augmentation,
            checkpoint=checkpoint,
        )
        training_seconds = time.perf_counter() - start - sum(hook_seconds)
        metrics = {**history.summary, "parameters": model.count_params()}
        judged = None
        if config.evaluate_test:
            looked, judged = look_at_test(run, model, data)
            metrics |= looked
        if data.validation:
            judged = evaluate(model, data.validation)
            run.log_predictions(judged)
        if config.tracking.figures:
            _draw(run, config.augmentation, data, history, judged)
        run.log_model(model, data, {name: metrics[name] for name in metrics.keys() - best.keys()})
        run.describe(run_note(config, data, command, *_outcome(metrics)))
    return RunResult(
        run_id=run.run_id,
        name=run.name,
        metrics=metrics,
        training_seconds=training_seconds,
        address=run.address,
        spool=None if run.spool.is_empty else run.spool.folder,
    )


def _best_before(checkpoint: Path | None) -> Metrics:
    """Best epoch, by the checkpoint, of those after which a training goes on."""
    from pipeline.checkpoint import load_checkpoint

    try:
        epochs = load_checkpoint(checkpoint).epochs if checkpoint else []
    except (FileNotFoundError, ValueError):  # the training starts anew, and says so
        return {}
    values = [epoch.get("val_accuracy", -1.0) for epoch in epochs]
    if max(values, default=-1.0) < 0:  # without validation
        return {}
    return {"best_val_accuracy": max(values), "best_epoch": values.index(max(values)) + 1}


def look_at_test(run: Run, model: keras.Model, data: Data) -> tuple[Metrics, Evaluation]:
    """Looks at the test split, and counts it before: no look goes uncounted."""
    from pipeline.evaluate import evaluate_test

    look = run.count_test_look(data)
    test = evaluate_test(model, data)
    looked = {} if look is None else {"test_look": float(look)}
    return {**looked, "test_loss": test.loss, "test_accuracy": test.accuracy}, test


def _draw(
    run: Run,
    augmentation: AugmentationConfig,
    data: Data,
    history: History,
    judged: Evaluation | None,
) -> None:
    from pipeline import figures

    run.log_figure(figures.digit_grid(data.train, data.class_names), "digits")
    if augmentation.distorts:
        distorted = figures.distorted_grid(data.train, data.class_names, augmentation)
        run.log_figure(distorted, "augmentation")
    run.log_figure(figures.learning_curves(history.epochs), "learning_curves")
    if judged:
        run.log_figure(figures.confusion_matrix(judged, data.class_names), "confusion_matrix")
        run.log_figure(figures.confident_mistakes(judged, data.class_names), "mistakes")


def _best(metrics: Metrics) -> str:
    best, saved = int(metrics["best_epoch"]), int(metrics["saved_epoch"])
    note = "" if saved == best else f"; the model is that of epoch {saved}"
    return f"{metrics['best_val_accuracy']:.4f} (epoch {best}{note})"


def _look(metrics: Metrics) -> str:
    """Which look it was, where the store was there to tell."""
    return f"look {metrics['test_look']:.0f}" if "test_look" in metrics else "one more look"


def _outcome(metrics: Metrics) -> list[str]:
    lines = []
    if "best_val_accuracy" in metrics:
        lines.append(f"best validation accuracy: {_best(metrics)}")
    if "test_accuracy" in metrics:
        lines.append(f"test accuracy: **{metrics['test_accuracy']:.4f}** ({_look(metrics)})")
    return [*lines, f"{metrics['parameters']:,.0f} parameters, {metrics['fit_seconds']:.1f} s"]


@contextmanager
def progress(config: RunConfig) -> Iterator[EpochHook]:
    """A hook that shows each epoch: a bar on a terminal, lines elsewhere."""
    epochs = config.training.epochs

    def line(epoch: int, metrics: Metrics) -> str:
        figures = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        return f"epoch {epoch:>{len(str(epochs))}} of {epochs}  {figures}"

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("training", total=epochs)

        def show(epoch: int, metrics: Metrics) -> None:
            bar.update(task, completed=epoch)
            bar.console.print(line(epoch, metrics))

        yield show


def _print_result(result: RunResult, command: str, overrides: list[str]) -> None:
    metrics = result.metrics
    console.print()
    if "best_val_accuracy" in metrics:
        console.print(f"Best validation accuracy: {_best(metrics)}")
    if "test_accuracy" in metrics:
        console.print(f"Test score: {metrics['test_loss']:.4f}")
        console.print(
            f"Test accuracy: {metrics['test_accuracy']:.4f} ({_look(metrics)} at this test split)"
        )
    console.print(
        f"{metrics['parameters']:,.0f} parameters, trained in {metrics['fit_seconds']:.1f} s "
        f"({metrics['samples_per_second']:,.0f} images/s)"
    )
    if result.spool:
        console.print(
            f"The tracking store is away: what it has yet to be told is in {result.spool}."
        )
        console.print(f"Tell it: {store_command(overrides, 'sweeps.doctor', 'fix=true')}")
    console.print(f"Repeat: {command}")
    console.print(f"See it: {result.address or ui_command(result.run_id, overrides)}")


def main(config: RunConfig, overrides: list[str], *, jobs: list[Job]) -> None:
    """Executes a run and shows it.

    Args:
        config: The run.
        overrides: The command line.
        jobs: Runs of this command line so far; this one is appended.
    """
    command = shlex.join(["python", "-m", "pipeline.run", *overrides])
    with console.status("starting TensorFlow and MLflow"):
        start_libraries()
    with progress(config) as show:
        result = execute_run(config, command, on_epoch_end=show)
    _print_result(result, without_password(command), overrides)
    jobs.append(Job(overrides=overrides, seed=config.seed, metrics=result.metrics))


def print_summary(jobs: list[Job]) -> None:
    """What the runs of a multirun came to."""
    if table := summary_table(jobs):
        console.print("\nThe runs that finished, with mean and standard deviation over seeds:")
        console.print(table)


if __name__ == "__main__":
    finished: list[Job] = []
    run_cli("run", RunConfig, partial(main, jobs=finished), at_end=partial(print_summary, finished))
