"""What the runs of one command line (`-m`) came to: mean and spread over the seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from rich.table import Table

# Heading, metric, digits.
_COLUMNS = (
    ("val_accuracy", "saved_val_accuracy", 4),
    ("test_accuracy", "test_accuracy", 4),
    ("seconds", "fit_seconds", 0),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run of several.

    Attributes:
        overrides: Its command line.
        seed: Of it.
        metrics: Of the whole run.
    """

    overrides: Sequence[str]
    seed: int
    metrics: Mapping[str, float]

    @property
    def settings(self) -> tuple[str, ...]:
        """All but the seed."""
        return tuple(each for each in self.overrides if not each.lstrip("+").startswith("seed="))


def summary_table(jobs: Sequence[Job]) -> Table | None:
    """Mean and standard deviation over the seeds, a row for equal settings.

    Returns:
        None where no two jobs differ by their seed alone.
    """
    groups: dict[tuple[str, ...], dict[int, Job]] = {}
    for job in jobs:
        groups.setdefault(job.settings, {})[job.seed] = job
    if all(len(group) < 2 for group in groups.values()):
        return None
    table = Table(box=None, pad_edge=False)
    shared = set.intersection(*map(set, groups))
    if len(groups) > 1:
        table.add_column("settings")
    table.add_column("seeds")
    columns = [each for each in _COLUMNS if all(each[1] in job.metrics for job in jobs)]
    for heading, _, _ in columns:
        table.add_column(heading, justify="right")
    for settings, group in groups.items():
        own = " ".join(each for each in settings if each not in shared)
        figures = (
            _figure([job.metrics[metric] for job in group.values()], digits)
            for _, metric, digits in columns
        )
        seeds = ", ".join(map(str, group))
        table.add_row(*([own] if len(groups) > 1 else []), seeds, *figures)
    return table


def _figure(values: Sequence[float], digits: int) -> str:
    spread = f" ±{stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"
