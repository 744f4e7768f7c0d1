"""What the runs of one command line (`-m`) came to: mean and spread over the seeds."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from rich.table import Table

from pipeline.config import without_password

# Heading, metric, digits.
_COLUMNS = (
    ("val_accuracy", "saved_val_accuracy", 4),
    ("test_accuracy", "test_accuracy", 4),
    ("seconds", "fit_seconds", 1),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a command line.

    Attributes:
        overrides: Of the run.
        seed: Its `seed`.
        metrics: As in `pipeline.run.RunResult`.
    """

    overrides: Sequence[str]
    seed: int
    metrics: Mapping[str, float]

    @property
    def settings(self) -> tuple[str, ...]:
        """The overrides, but for the seed."""
        names = (each.lstrip("+").partition("=")[0] for each in self.overrides)
        pairs = zip(names, self.overrides, strict=True)
        return tuple(each for name, each in pairs if name != "seed")


def summary_table(jobs: Sequence[Job]) -> Table | None:
    """Mean and standard deviation over the seeds, a row for equal settings.

    Returns:
        None where there are no two jobs that differ.
    """
    groups: dict[tuple[str, ...], dict[int, Job]] = {}
    for job in jobs:
        groups.setdefault(job.settings, {})[job.seed] = job
    if sum(map(len, groups.values())) < 2:
        return None
    columns = [column for column in _COLUMNS if any(column[1] in job.metrics for job in jobs)]
    shared = set.intersection(*map(set, groups))
    table = Table(box=None, pad_edge=False)
    several = len(groups) > 1
    if several:
        table.add_column("settings", overflow="fold")
    table.add_column("seeds", overflow="fold")
    for heading, _, _ in columns:
        table.add_column(heading, justify="right")
    for settings, group in groups.items():
        own = without_password(shlex.join(each for each in settings if each not in shared))
        found = list(group.values())
        figures = (_figure(found, metric, digits) for _, metric, digits in columns)
        seeds = ", ".join(map(str, group))
        table.add_row(*([own] if several else []), seeds, *figures)
    return table


def _figure(jobs: Sequence[Job], metric: str, digits: int) -> str:
    values = [job.metrics[metric] for job in jobs if metric in job.metrics]
    if not values:
        return ""
    spread = f" ±{stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"
