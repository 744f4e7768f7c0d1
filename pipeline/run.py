"""One run: data -> model -> train -> evaluate -> record; the command line of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline import start_libraries
from pipeline.compose import run_cli
from pipeline.config import RunConfig, without_password

if TYPE_CHECKING:  # or TensorFlow is imported
    import keras

    from pipeline.data import Data
    from pipeline.tracking import Run
    from pipeline.train import EpochHook, Metrics

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to.

    Attributes:
        run_id: In MLflow.
        name: In MLflow.
        metrics: Of the whole run, as recorded.
        ui: What to do to see the run in the MLflow UI.
    """

    run_id: str
    name: str
    metrics: Metrics
    ui: str


def execute_run(
    config: RunConfig,
    command: str,
    *,
    on_epoch_end: EpochHook = lambda epoch, metrics: None,
    parent_run_id: str | None = None,
) -> RunResult:
    """Trains, evaluates and records one model.

    Args:
        config: The run.
        command: Command line that repeats it.
        on_epoch_end: Called with the epoch, from 1, and its metrics, once they are recorded;
            may raise `pipeline.endings.StopRun`.
        parent_run_id: MLflow run under which this one is nested.

    Raises:
        ValueError: The data or the size of the network is refused; no run is recorded then.
        OSError: The data cannot be read or downloaded; no run is recorded then.
        pipeline.endings.DivergedError: The loss is not finite; the run is recorded as FAILED.
        pipeline.endings.StopRun: The hook raised it; the run is recorded as KILLED.
    """
    # TensorFlow and MLflow take ten seconds to import: a misspelt key need not wait for them.
    from pipeline import figures
    from pipeline.data import load
    from pipeline.model import build_mlp, build_optimizer
    from pipeline.tracking import start_run
    from pipeline.train import initialize, steps_per_epoch, train

    initialize(threads=config.training.threads, seed=config.seed)
    data = load(config.data)
    model = build_mlp(config.model, data)
    optimizer = build_optimizer(
        config.optimizer,
        steps_per_epoch=steps_per_epoch(len(data.train), config.training),
        epochs=config.training.epochs,
    )
    with start_run(config, data, command, parent_run_id=parent_run_id) as run:
        run.log_figure(figures.digit_grid(data.train, data.class_names), "digits")

        def report(epoch: int, metrics: Metrics) -> None:
            run.log_metrics(metrics, step=epoch)
            on_epoch_end(epoch, metrics)

        history = train(
            model, optimizer, data, config.training, seed=config.seed, on_epoch_end=report
        )
        run.log_figure(figures.learning_curves(history.epochs), "learning_curves")
        metrics = {
            **history.summary,
            "parameters": model.count_params(),
            **_judge(run, model, data, look_at_test=config.evaluate_test),
        }
        run.log_metrics(metrics)
        run.log_model(model, data)
        run.describe(_description(metrics, command))
    return RunResult(run_id=run.run_id, name=run.name, metrics=metrics, ui=run.ui)


def _judge(run: Run, model: keras.Model, data: Data, *, look_at_test: bool) -> Metrics:
    """Metrics of the test split, where the run looks at it; pictures of the mistakes.

    The pictures are of the validation images, or of the test images where nothing is held out.
    """
    from pipeline import figures
    from pipeline.evaluate import evaluate, evaluate_test

    metrics: Metrics = {}
    evaluation = evaluate(model, data.validation) if data.validation else None
    if look_at_test:
        metrics["test_look"] = run.count_test_look(data)  # before the look: none goes uncounted
        test = evaluate_test(model, data)
        metrics |= {"test_loss": test.loss, "test_accuracy": test.accuracy}
        evaluation = evaluation or test
    if evaluation:
        names = data.class_names
        run.log_figure(figures.confusion_matrix(evaluation, names), "confusion_matrix")
        run.log_figure(figures.confident_mistakes(evaluation, names), "mistakes")
    return metrics


def _best(metrics: Metrics) -> str:
    best, saved = int(metrics["best_epoch"]), int(metrics["saved_epoch"])
    note = "" if saved == best else f"; the model is that of epoch {saved}"
    return f"{metrics['best_val_accuracy']:.4f} (epoch {best}{note})"


def _description(metrics: Metrics, command: str) -> str:
    """What the UI shows on top of the run: the result, and how to repeat it."""
    lines = []
    if "best_val_accuracy" in metrics:
        lines.append(f"- best validation accuracy: {_best(metrics)}")
    if "test_look" in metrics:
        accuracy, look = metrics["test_accuracy"], metrics["test_look"]
        lines.append(f"- test accuracy: **{accuracy:.4f}** (look {look:.0f})")
    lines.append(f"- {metrics['parameters']:,.0f} parameters, {metrics['fit_seconds']:.1f} s")
    return "\n".join([*lines, "", f"Repeat: `{command}`"])


@contextmanager
def _progress(config: RunConfig) -> Iterator[EpochHook]:
    """A hook that shows each epoch: a bar on a terminal, lines elsewhere."""
    epochs = config.training.epochs

    def line(epoch: int, metrics: Metrics) -> str:
        figures = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        return f"epoch {epoch:>{len(str(epochs))}} of {epochs}  {figures}"

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("training", total=epochs)

        def show(epoch: int, metrics: Metrics) -> None:
            progress.update(task, completed=epoch)
            progress.console.print(line(epoch, metrics))

        yield show


def _print_result(result: RunResult, command: str) -> None:
    metrics = result.metrics
    console.print()
    if "best_val_accuracy" in metrics:
        console.print(f"Best validation accuracy: {_best(metrics)}")
    if "test_look" in metrics:
        console.print(f"Test score: {metrics['test_loss']:.4f}")
        console.print(
            f"Test accuracy: {metrics['test_accuracy']:.4f} "
            f"(look {metrics['test_look']:.0f} at this test split)"
        )
    console.print(
        f"{metrics['parameters']:,.0f} parameters, trained in {metrics['fit_seconds']:.1f} s "
        f"({metrics['samples_per_second']:,.0f} images/s)"
    )
    console.print(f"Repeat: {command}")
    console.print(f"See it: {result.ui}")


def main(config: RunConfig, overrides: str) -> None:
    command = f"python -m pipeline.run {overrides}".rstrip()
    with console.status("starting TensorFlow and MLflow"):
        start_libraries()
    with _progress(config) as show:
        result = execute_run(config, command, on_epoch_end=show)
    _print_result(result, without_password(command))


if __name__ == "__main__":
    run_cli("run", main)
