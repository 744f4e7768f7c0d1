"""Test errors that a store's runs had over seeds, and the published ones beside them.

    python -m pipeline.run -m +experiment=strong data.validation_size=0 seed=0,1,2,3,4
    python -m tests.benchmarks.results --plot tests/benchmarks/results.svg

The first trains, and others like it; the second reads MNIST's finished runs that were tested.
Errors are in percent, their mean and standard deviation over the runs of one command; each run is
a look at the test split. Seconds are those of a training, their median.
"""

import argparse
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.config import TrackingConfig
from pipeline.store import Recorded, connect, search

# Percent, on the same 10,000 images.
PUBLISHED = {
    "800 (Simard et al. 2003)": 1.6,
    "3 x 1024, dropout (Srivastava et al. 2014)": 1.06,
    "2 x 8192, dropout, max-norm (Srivastava et al. 2014)": 0.95,
    "800, elastic distortions (Simard et al. 2003)": 0.7,
    "6 layers, distortions, on a GPU (Ciresan et al. 2010)": 0.35,
}
WHOLE = "data.validation_size=0"  # all 60,000 images are trained on, as by those
ASIDE = ("seed", "tracking.")  # of a command, what does not change its figures or their meaning


@dataclass(frozen=True)
class Result:
    """The runs of one command.

    Attributes:
        settings: Its overrides, without those of `ASIDE`.
        errors: Of each on the test split, percent.
        validation: Likewise, on what was held out; empty where nothing was.
        seconds: Of each training.
    """

    settings: str
    errors: list[float]
    validation: list[float]
    seconds: list[float]


def settings_of(command: str) -> str:
    """The overrides of `python -m pipeline.run ...`, without those of `ASIDE`."""
    _, _, _, *overrides = shlex.split(command)
    return shlex.join(each for each in overrides if not each.lstrip("+").startswith(ASIDE))


def read_results(directory: str, data: str) -> list[Result]:
    """What was tested on a data set, the largest error first.

    Raises:
        FileNotFoundError: There is no store.
    """
    connect(
        TrackingConfig(
            uri=None,
            directory=directory,
            experiment=data,
            run_name=None,
            system_metrics=False,
            figures=False,
        )
    )
    groups: dict[str, list[Recorded]] = {}
    for run in search("metrics.test_accuracy > 0 and attributes.status = 'FINISHED'"):
        if run.params.get("data.name") == data:
            groups.setdefault(settings_of(run.tags["command"]), []).append(run)
    results = [
        Result(
            settings,
            to_errors(runs, "test_accuracy"),
            to_errors(runs, "saved_val_accuracy"),
            [run.metrics["fit_seconds"] for run in runs],
        )
        for settings, runs in groups.items()
    ]
    return sorted(results, key=lambda result: statistics.mean(result.errors), reverse=True)


def to_errors(runs: Sequence[Recorded], metric: str) -> list[float]:
    return [100 * (1 - run.metrics[metric]) for run in runs if metric in run.metrics]


def show(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def build_table(results: Sequence[Result]) -> Table:
    table = Table("python -m pipeline.run ...")
    for heading in ("runs", "validation error", "test error", "seconds"):
        table.add_column(heading, justify="right")
    for result in results:
        figures = (show(result.validation), show(result.errors))
        seconds = f"{statistics.median(result.seconds):.0f}"
        table.add_row(result.settings, str(len(result.errors)), *figures, seconds)
    return table


def draw(results: Sequence[Result], path: Path) -> None:
    """Errors over the seconds of a training: a point for each run on all images."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, error in PUBLISHED.items():
        axes.axhline(error, color="grey", linestyle=":", linewidth=1)
        where = axes.get_yaxis_transform()  # x in parts of the width, y as data
        axes.text(0.01, error, label, transform=where, va="bottom", size="x-small", color="dimgrey")
    for result in results:
        if WHOLE in result.settings:
            rest = result.settings.replace(WHOLE, "").split()
            name = " ".join(each.removeprefix("+experiment=") for each in rest) or "the defaults"
            axes.scatter(result.seconds, result.errors, s=16, alpha=0.7, label=name)
    axes.set(xscale="log", yscale="log", xlim=(5, 2000), ylim=(0.3, 3))
    axes.set(xticks=[10, 30, 100, 300, 1000], yticks=[0.35, 0.5, 0.7, 1, 1.6, 2.5])
    axes.set(xlabel="seconds of a training", ylabel="error on MNIST's 10,000 test images, percent")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
    axes.legend(loc="upper right", fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--directory", default="mlruns", help="the store's, unless mlruns")
    parser.add_argument("--plot", type=Path, help="file for a picture (.svg or .png)")
    options = parser.parse_args()
    results = read_results(options.directory, "mnist")
    Console().print(build_table(results))
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
