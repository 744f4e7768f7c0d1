"""Test errors that a store's runs had over seeds, and the published ones beside them.

    python -m pipeline.run -m +experiment=strong data.validation_size=0 seed=0,1,2,3,4
    python -m tests.benchmarks.results --plot tests/benchmarks/results.svg

The first trains, and others like it; the second reads MNIST's finished runs that were tested.
Errors are in percent, their mean and standard deviation over the seeds of equal settings by one
commit, of each seed the first run; each run is a look at the test split. Seconds are those of a
training, their median.
"""

import argparse
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from pipeline.config import TrackingConfig
from pipeline.store import Recorded, connect, search

# Percent, on the same 10,000 images.
PUBLISHED = {
    "800, of 50,000 images (Simard et al. 2003)": 1.6,
    "3 x 1024, dropout, max-norm (Srivastava et al. 2014)": 1.06,
    "2 x 8192, dropout, max-norm (Srivastava et al. 2014)": 0.95,
    "800, elastic distortions of 50,000 images (Simard et al. 2003)": 0.7,
    "6 layers, distortions, on a GPU (Ciresan et al. 2010)": 0.35,
}
WHOLE = "data.validation_size=0"
ASIDE = {"seed", "data.path"}  # of the settings, what changes no figure or is what they are over


@dataclass(frozen=True)
class Result:
    """The runs of equal settings by one commit.

    Attributes:
        command: Overrides of the first of them, without its seed and store.
        commit: That of the code, shortened; empty where that was no checkout.
        whole: Whether all training images were trained on.
        errors: On the test split, percent; one a seed.
        validation: Likewise, on what was held out; empty where nothing was.
        seconds: Likewise, of the training.
        looks: Runs that were tested, also of a seed that had been tested before.
    """

    command: str
    commit: str
    whole: bool
    errors: list[float]
    validation: list[float]
    seconds: list[float]
    looks: int


def shorten(command: str) -> str:
    """The overrides of `python -m pipeline.run ...`, without those of the seed and the store."""
    _, _, _, *overrides = shlex.split(command)
    kept = (each.lstrip("+") for each in overrides)
    return shlex.join(each for each in kept if not each.startswith(("seed=", "tracking")))


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
    groups: dict[tuple[tuple[str, str], ...], list[Recorded]] = {}
    for run in search("metrics.test_accuracy > 0 and attributes.status = 'FINISHED'"):
        if run.params.get("data.name") == data:
            settings = sorted(item for item in run.params.items() if item[0] not in ASIDE)
            code = ("git.commit", run.tags.get("git.commit", ""))
            groups.setdefault((*settings, code), []).append(run)
    results = [to_result(runs) for runs in groups.values()]
    return sorted(results, key=lambda result: statistics.mean(result.errors), reverse=True)


def to_result(runs: Sequence[Recorded]) -> Result:
    newest_first = sorted(runs, key=lambda run: run.started, reverse=True)
    by_seed = {run.params["seed"]: run for run in newest_first}  # of equal ones the first
    first = newest_first[-1]
    return Result(
        shorten(first.tags["command"]),
        first.tags.get("git.commit", "")[:7],
        (first.params["data.validation_size"], first.params["data.train_size"]) == ("0", "null"),
        to_errors(by_seed.values(), "test_accuracy"),
        to_errors(by_seed.values(), "saved_val_accuracy"),
        [run.metrics["fit_seconds"] for run in by_seed.values()],
        len(runs),
    )


def to_errors(runs: Iterable[Recorded], metric: str) -> list[float]:
    return [100 * (1 - run.metrics[metric]) for run in runs if metric in run.metrics]


def show(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def build_table(results: Sequence[Result]) -> Table:
    title = "Errors in percent, mean ± standard deviation over seeds; seconds of a training"
    table = Table(Column("settings", overflow="fold"), title=title, title_justify="left")
    for heading in ("code", "seeds", "looks", "validation", "test", "seconds"):
        table.add_column(heading, justify="right")
    for result in results:
        counts = (result.commit, str(len(result.errors)), str(result.looks))
        figures = (show(result.validation), show(result.errors))
        seconds = f"{statistics.median(result.seconds):.0f}"
        table.add_row(result.command, *counts, *figures, seconds)
    return table


def draw(results: Sequence[Result], path: Path) -> None:
    """Errors over the seconds of a training: a point for each seed on all images."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    commands = [result.command for result in results]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log")
    for label, error in PUBLISHED.items():
        axes.axhline(error, color="grey", linestyle=":", linewidth=1)
        where = axes.get_yaxis_transform()  # x in parts of the width, y as data
        axes.text(0.01, error, label, transform=where, va="bottom", size="x-small", color="dimgrey")
    for result in results:
        if result.whole:
            words = [word for word in shlex.split(result.command) if word != WHOLE]
            name = " ".join(word.removeprefix("experiment=") for word in words) or "the defaults"
            if commands.count(result.command) > 1:
                name = f"{name} ({result.commit})"
            axes.scatter(result.seconds, result.errors, s=16, alpha=0.7, label=name)
    axes.margins(0.2)
    axes.set(xticks=[10, 30, 100, 300, 1000, 3000], yticks=[0.35, 0.5, 0.7, 1, 1.6, 2.5])
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
    try:
        results = read_results(options.directory, "mnist")
    except FileNotFoundError:
        parser.error(f"no store in {options.directory}.")
    Console().print(build_table(results))
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
