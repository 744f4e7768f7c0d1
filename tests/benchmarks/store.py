"""How long comparing runs takes in a large store: the leaderboard, and the UI's first page.

    python -m tests.benchmarks.store            # some three minutes; see --help

A real sweep of 8 trials on digits is multiplied by bulk insert, predictions and data sets
included, until its store holds 10,000 runs: once all in that sweep, once in sweeps of 100. What is
timed begins after the imports: the leaderboard as its command makes it, beside reading the same
trials with `mlflow.search_runs` and sorting them in pandas; and the UI's pages in chromium, from
the address to the last row in view, beside those of the sweep that was multiplied. Medians.
"""

import argparse
import contextlib
import io
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

from pipeline.compose import CONF, to_typed
from pipeline.database import analyze
from sweeps import leaderboard
from sweeps.board import find_sweeps
from sweeps.config import LeaderboardConfig
from tests.launching import run
from tests.served import open_browser, open_ui

SWEEP = "sweep"
ROUNDS = 5


# --- large stores ------------------------------------------------------------------------


def sweep(folder: Path) -> None:
    """A real one, of 8 trials."""
    done = run(
        "data=digits", "training.epochs=10", "pruner=none", "sweep.trials=8",
        f"sweep.name={SWEEP}", folder=folder,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)


def multiply(database: Path, runs: int, *, each: int) -> None:
    """Fills a store by copies of its one sweep.

    Args:
        database: MLflow's.
        runs: To hold in the end, but for the sweeps' own.
        each: Trials of a sweep; copies of the sweep are made as needed.
    """
    with contextlib.closing(sqlite3.connect(database)) as store:
        sql = "SELECT run_uuid FROM tags WHERE key = ?"
        (parent,) = (run_id for (run_id,) in store.execute(sql, ["kind"]))
        trials = [run_id for (run_id,) in store.execute(sql, ["trial"])]
        store.execute("CREATE TEMP TABLE copy (old TEXT, new TEXT, number INT, parent TEXT, n INT)")
        for first in range(0, runs, each):
            name = parent if first == 0 else f"{first:032x}"
            if first:
                store.execute("INSERT INTO copy VALUES (?, ?, 0, NULL, ?)", [parent, name, first])
            store.executemany(
                "INSERT INTO copy VALUES (?, ?, ?, ?, ?)",
                [
                    (trials[number % len(trials)], f"{first + number:031x}f", number, name, first)
                    for number in range(0 if first else len(trials), min(each, runs - first))
                ],
            )
        for table in ("runs", "params", "tags", "metrics", "latest_metrics"):
            copy(store, table, "run_uuid")
        store.execute(
            "INSERT INTO input_tags SELECT input_uuid || new, name, value "
            "FROM input_tags JOIN inputs USING (input_uuid) JOIN copy ON destination_id = old"
        )
        copy(store, "inputs", "destination_id", input_uuid="input_uuid || new")
        change = "UPDATE tags SET value = {} FROM copy WHERE run_uuid = new AND key = '{}'"
        store.execute(change.format("number", "trial"))
        store.execute(change.format("parent", "mlflow.parentRunId"))
        store.execute(change.format(f"'{SWEEP}-' || n", "sweep") + " AND n > 0")
        store.execute(  # or all are equal in groups of a thousand
            "UPDATE latest_metrics SET value = value - 0.3 * (number % 997) / 997 "
            "FROM copy WHERE run_uuid = new AND key LIKE '%accuracy'"
        )
        store.commit()
    analyze(database)  # as a sweep does at its end


def copy(store: sqlite3.Connection, table: str, key: str, **changed: str) -> None:
    names = [name for _, name, *_ in store.execute(f"PRAGMA table_info({table})")]
    values = [{key: "new", **changed}.get(name, f"{table}.{name}") for name in names]
    store.execute(
        f"INSERT INTO {table} ({', '.join(names)}) SELECT {', '.join(values)} "
        f"FROM {table} JOIN copy ON {table}.{key} = copy.old"
    )


# --- what is timed -----------------------------------------------------------------------


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median of several times, after one that is not counted."""
    work()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def rank(folder: Path, *overrides: str) -> Callable[[], None]:
    """The leaderboard's command, but for its imports and its configuration."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("leaderboard", [f"tracking.directory={folder}/mlruns", *overrides])
    config = to_typed(cfg, LeaderboardConfig, {})

    def main() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            leaderboard.main(config, list(overrides))

    return main


def plainly(folder: Path) -> None:
    """The same with MLflow and pandas alone."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlruns/mlflow.db")
    runs = mlflow.search_runs(
        search_all_experiments=True,
        filter_string=f"tags.sweep = '{SWEEP}' and attributes.status = 'FINISHED'",
    )
    runs.sort_values("metrics.saved_val_accuracy", ascending=False).head(20)


def load(browser: WebDriver, address: str) -> Callable[[], None]:
    """Opens a page and waits for its rows; reading its text would take longer than it does."""
    rows = "return document.querySelectorAll('.ag-center-cols-container .ag-row').length"

    def show() -> None:
        browser.get("about:blank")
        browser.get(address)
        WebDriverWait(browser, 120, 0.02).until(lambda page: page.execute_script(rows))

    return show


def pages(folder: Path, browser: WebDriver, rounds: int) -> dict[str, float]:
    """Seconds until the list of all runs, and that of a sweep's trials, is in view."""
    store = f"tracking.directory={folder}/mlruns"
    with open_ui(store, folder=folder) as served:
        every = seconds(load(browser, served.pages["experiment digits"]), rounds)
    parent = find_sweeps([SWEEP])[0].run_id
    with open_ui(store, f"run={parent}", folder=folder) as served:
        trials = seconds(load(browser, served.pages["the trials, best first"]), rounds)
    return {"list of all runs": every, "trials of a sweep, best first": trials}


# --- the table ---------------------------------------------------------------------------


def measure(runs: int, rounds: int) -> Table:
    table = Table(title=f"Seconds in a store of {runs:,} runs, medians of {rounds}")
    for heading in ("", "here", "beside", "what is beside it"):
        table.add_column(heading, justify="left" if heading.startswith(("", "what")) else "right")
    with tempfile.TemporaryDirectory() as scratch:
        small, one, many = (Path(scratch) / name for name in ("small", "one", "many"))
        small.mkdir()
        sweep(small)
        for folder, each in ((one, runs), (many, 100)):
            shutil.copytree(small, folder)
            multiply(folder / "mlruns" / "mlflow.db", runs, each=each)
        plain = seconds(lambda: plainly(one), 1)
        for title, work in {
            f"leaderboard of a sweep of {runs:,}": rank(one, f"sweep.name={SWEEP}"),
            "leaderboard of the latest of many sweeps": rank(many),
            "leaderboard, two of many sweeps": rank(many, f"sweep.name=[{SWEEP},{SWEEP}-100]"),
            "leaderboard, all=true": rank(many, "all=true"),
        }.items():
            table.add_row(title, f"{seconds(work, rounds):.2f}", f"{plain:.2f}", "pandas, all rows")
        browser = open_browser(Path(scratch) / "browser")
        try:
            before = pages(small, browser, rounds)
            for title, taken in pages(one, browser, rounds).items():
                name = f"UI, {title}"
                table.add_row(name, f"{taken:.2f}", f"{before[title]:.2f}", "a store of 9 runs")
        finally:
            browser.quit()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10_000, help="in the store (10000)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each ({ROUNDS})")
    arguments = parser.parse_args()
    Console().print(measure(arguments.runs, arguments.rounds))


if __name__ == "__main__":
    main()
