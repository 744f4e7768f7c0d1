"""What a sweep shows: its running trials while it goes, its result at the end."""

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Self

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.compose import Value
from sweeps.config import OBJECTIVES

SHOWN = 16  # running trials shown at once
# In the names of runs alone: the UI cuts long ones.
SHORT = {
    "hidden_units": "width",
    "hidden_layers": "layers",
    "dropout_rate": "dropout",
    "input_dropout_rate": "input",
    "label_smoothing": "smooth",
    "ema_momentum": "ema",
    "elastic_sigma": "sigma",
    "learning_rate": "lr",
    "batch_size": "batch",
    "batch_normalization": "batchnorm",
    "weight_decay": "decay",
    "warmup_epochs": "warmup",
}
Z = 1.645  # of the normal distribution: 90 % lie within so many standard deviations


@dataclass(frozen=True, kw_only=True)
class Running:
    """A running trial, as it is shown.

    Attributes:
        number: Of the trial.
        values: What is searched in it.
        epoch: Last whole epoch, 0 before the first.
        epochs: At most.
        value: Objective of that epoch.
        pace: Seconds an epoch, from the first one on; None before the second.
    """

    number: int
    values: Mapping[str, Value]
    epoch: int
    epochs: int
    value: float | None
    pace: float | None


@dataclass(kw_only=True)
class Progress:
    """A sweep's counts.

    Attributes:
        budget: Finished trials to reach.
        objectives: What is optimized.
        finished: Trials, complete or pruned.
        pruned: Of these.
        failed: Trials besides.
        best: The best value of each objective, none before the first complete trial.
        best_trial: Number of the best trial, of one objective.
        seconds: Wall time of each trial finished since the launcher started.
    """

    budget: int
    objectives: tuple[str, ...]
    finished: int = 0
    pruned: int = 0
    failed: int = 0
    best: tuple[float, ...] = ()
    best_trial: int | None = None
    seconds: list[float] = field(default_factory=list)

    def add(self, *trials: FrozenTrial) -> None:
        """Counts trials that ended; others are passed over."""
        for trial in trials:
            self.failed += trial.state == TrialState.FAIL
            self.pruned += trial.state == TrialState.PRUNED
            self.finished += trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
            if trial.state == TrialState.COMPLETE:
                self._compare(trial)

    def _compare(self, trial: FrozenTrial) -> None:
        best = self.best or tuple(trial.values)
        pairs = zip(self.objectives, best, trial.values, strict=True)
        better = {"maximize": max, "minimize": min}
        self.best = tuple(better[OBJECTIVES[name]](pair) for name, *pair in pairs)
        if len(self.objectives) == 1 and self._is_best(trial, best):
            self.best_trial = trial.number

    def _is_best(self, trial: FrozenTrial, before: tuple[float, ...]) -> bool:
        """Of equal ones, the first that was asked, as Optuna has it."""
        if self.best_trial is None or self.best != before:
            return True
        return trial.values[0] == before[0] and trial.number < self.best_trial

    @property
    def metrics(self) -> dict[str, float]:
        """As recorded on the sweep's run."""
        pairs = zip(self.objectives, self.best, strict=True) if self.best else ()
        best = {f"best_{name}": value for name, value in pairs}
        counts = {"finished": self.finished, "pruned": self.pruned, "failed": self.failed}
        return {**best, **counts}

    @property
    def counts(self) -> str:
        text = f"{self.finished} of {self.budget} trials, {self.pruned} pruned"
        return f"{text}, {self.failed} failed" if self.failed else text

    @property
    def best_text(self) -> str:
        if not self.best:
            return "no trial is complete yet"
        figures = ", ".join(
            f"{name} {number(value)}"
            for name, value in zip(self.objectives, self.best, strict=True)
        )
        if len(self.best) > 1:
            return f"best of each alone: {figures}"
        return f"best {figures} (trial {self.best_trial})"

    def time_left(self, running: int, workers: int) -> str:
        """When the rest will be done: the middle nine tenths of what chance may bring.

        Each worker has some more trials to do, each as long as those so far, whose mean is
        uncertain too. The running ones may be nearly done, or just begun.
        """
        rest = self.budget - self.finished
        if len(self.seconds) < 3 or rest <= 0:
            return "time left: known after 3 trials" if rest > 0 else "nearly done"
        mean, deviation = statistics.mean(self.seconds), statistics.stdev(self.seconds)
        fewest, most = math.ceil((rest - running) / workers), math.ceil(rest / workers)
        spread = Z * deviation * math.sqrt(most + most**2 / len(self.seconds))
        low, high = max(fewest * mean - spread, 0), most * mean + spread
        return f"{duration(low)} to {duration(high)} left"


class Display(AbstractContextManager["Display"]):
    """Lines for what has ended; on a terminal, a table of what runs below them."""

    def __init__(self, console: Console, progress: Progress, workers: int) -> None:
        self.console, self.progress, self.workers = console, progress, workers
        self._running: Sequence[Running] = ()
        self._total = 0
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=4, transient=True
        )

    @property
    def is_live(self) -> bool:
        return self.console.is_terminal

    def __enter__(self) -> Self:
        if self.is_live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def show(self, running: Sequence[Running], total: int) -> None:
        """Shows some of all running trials from now on."""
        self._running, self._total = running, total

    def print_trial(self, trial: FrozenTrial, note: str, seconds: float) -> None:
        """One line for a trial that ended."""
        width = len(str(self.progress.budget - 1))
        value = note
        if trial.values:
            value = ", ".join(map(number, trial.values))
        is_best = trial.number == self.progress.best_trial
        epochs = trial.user_attrs.get("epochs", 0)
        line = (
            f"trial {trial.number:>{width}}  {trial.state.name.lower():8}  {value:>8}  "
            f"epoch {epochs:>3}  {seconds:5.1f} s  {settings(trial.params)}"
        )
        self.console.print(f"{line}  best" if is_best else line, style="bold" if is_best else None)

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for heading in ("trial", "epoch", "", "now", "s/epoch", "settings"):
            table.add_column(heading, justify="left" if heading in ("", "settings") else "right")
        for trial in self._running:
            table.add_row(
                str(trial.number),
                f"{trial.epoch}/{trial.epochs}",
                ProgressBar(total=trial.epochs, completed=trial.epoch, width=12),
                "starting" if trial.value is None else number(trial.value),
                "" if trial.pace is None else f"{trial.pace:.2f}",
                settings(trial.values),
            )
        if self._total > len(self._running):
            table.add_row("", "", "", "", "", f"and {self._total - len(self._running)} more")
        left = self.progress.time_left(self._total, self.workers)
        summary = f"{self.progress.counts}; {self.progress.best_text}; {left}"
        return Group("", table, Text(summary, style="bold"))


def number(value: float) -> str:
    """A metric: whole numbers with separators, fractions with four places."""
    is_count = math.isfinite(value) and value == int(value) and abs(value) > 1
    return f"{value:,.0f}" if is_count else f"{value:.4f}"


def short(value: Value) -> str:
    """Three digits of a fraction; else as on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def settings(values: Mapping[str, Value]) -> str:
    """Searched values by the last part of their names."""
    return " ".join(f"{last_part(name)}={short(value)}" for name, value in values.items())


def trial_name(number: int, values: Mapping[str, Value]) -> str:
    """Name of a trial's run, short enough for the UI's list."""
    parts = (
        f"{SHORT.get(last_part(name), last_part(name))}={_brief(value)}"
        for name, value in values.items()
    )
    return " ".join([f"trial-{number:03d}", *parts])


def _brief(value: Value) -> str:
    """Two digits of a fraction: `8.1e-4`."""
    if not isinstance(value, float):
        return short(value)
    if not value or abs(value) >= 0.001:
        return f"{value:.2g}"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def last_part(name: str) -> str:
    return name.rpartition(".")[2]


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def importance_table(importances: Mapping[str, float], objective: str, trials: int) -> Table:
    """Share of the variance of the objective, over so many trials, that is each parameter's."""
    title = f"What {objective} depends on, by {trials} complete trials"
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    for name, share in importances.items():
        table.add_row(name, ProgressBar(total=1.0, completed=share, width=24), f"{share:.2f}")
    return table
