"""MLflow's UI on a sweep: what a person sees of it in a real browser, and the command itself."""

import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver

from pipeline.pages import RUNS, RUNS_KEY, metric, run_page, runs_page
from tests.commands import call
from tests.launching import run
from tests.served import Served, open_ui, text_of, visit, wait
from tests.servers import free_port
from tests.stores import StoredRun, parent_of, runs_of

UI = [sys.executable, "-m", "pipeline.ui"]
EXPERIMENT = "1"  # the only one of the store, beside MLflow's own
NAMES = ["model.hidden_units", "model.dropout_rate", "optimizer.learning_rate"]
AXES = ["log10/model.hidden_units", "model.dropout_rate", "log10/optimizer.learning_rate"]
NAME = re.compile(r"trial-\d{3} width=\d+ dropout=0\.\d+ lr=\d\S*")
NEVER = -1.0  # accuracy of a trial that was pruned, in the ranking

# Name of each run in the list as it is shown, from the top, and where its text begins.
ROWS = """
    const rows = [...document.querySelectorAll('.ag-pinned-left-cols-container .ag-row')]
    rows.sort((one, other) => one.getAttribute('row-index') - other.getAttribute('row-index'))
    const links = rows.map(row => row.querySelector('a'))
    return links.map(link => [link.textContent, link.getBoundingClientRect().x])
"""
HEADINGS = """
    const cells = [...document.querySelectorAll('.ag-header-cell')]
    const left = cell => cell.getBoundingClientRect().x
    return cells.sort((one, other) => left(one) - left(other)).map(cell => cell.innerText)
"""
# Of each chart: its title, how much is drawn in it, its axes if they are parallel.
CHARTS = """
    const painted = canvas => {
        const {width, height} = canvas
        return canvas.getContext('2d').getImageData(0, 0, width, height).data.some(Boolean)
    }
    const count = (card, path) => card.querySelectorAll(path).length
    const all = '[data-testid=experiment-view-compare-runs-card]'
    return [...document.querySelectorAll(all)].map(card => ({
        title: card.innerText.split('\\n')[0],
        canvases: [...card.querySelectorAll('canvas')].filter(painted).length,
        points: count(card, '.scatterlayer .trace path.point'),
        lines: count(card, '.scatterlayer .trace path.js-line'),
        heights: count(card, '.contourlayer path'),
        axes: [...card.querySelectorAll('.axis .label')].map(label => label.textContent),
    }))
"""
# Of the plot that compares runs: how much is drawn in it.
PLOT = """
    const copy = document.createElement('canvas').getContext('2d')
    const painted = canvas => {
        Object.assign(copy.canvas, {width: canvas.width, height: canvas.height})
        copy.drawImage(canvas, 0, 0)
        return copy.getImageData(0, 0, canvas.width, canvas.height).data.some(Boolean)
    }
    const panel = document.querySelector('[role=tabpanel][data-state=active]')
    return {
        canvases: [...panel.querySelectorAll('canvas.gl-canvas-context')].filter(painted).length,
        boxes: panel.querySelectorAll('path.box').length,
        contours: panel.querySelectorAll('path.openline, path.closedline').length,
    }
"""
# Of each figure of the report: how many marks of data it shows.
FIGURES = """
    const marks = '.scatterlayer path, .barlayer path, .contourlayer path'
    const wide = [...document.querySelectorAll('.plotly-graph-div .main-svg')]
        .every(svg => svg.getBoundingClientRect().width > 500)
    return [...document.querySelectorAll('.plotly-graph-div')]
        .map(figure => wide ? figure.querySelectorAll(marks).length : 0)
"""
PICTURES = [
    "History",
    "Importances",
    "Learning curves",
    "Slices",
    "Parallel coordinates",
    "Contours",
    "Time line of the workers",
]


@pytest.fixture(scope="module")
def parent(swept: Path) -> StoredRun:
    """The run of the sweep `wide`."""
    return parent_of(swept, "wide")


@pytest.fixture(scope="module")
def trials(swept: Path, parent: StoredRun) -> dict[str, StoredRun]:
    """Runs of its trials, by name."""
    children = [run for run in runs_of(swept, "wide") if run.run_id != parent.run_id]
    return {run.tags["mlflow.runName"]: run for run in children}


@pytest.fixture(scope="module")
def served(swept: Path, parent: StoredRun) -> Iterator[Served]:
    with open_ui(f"run={parent.run_id}", folder=swept) as opened:
        yield opened


@pytest.fixture(scope="module")
def window(browser: WebDriver, served: Served) -> Iterator[WebDriver]:
    """A browser in which charts and columns are all in view: the UI draws no others."""
    size = browser.get_window_size()
    browser.set_window_size(2200, 1800)
    visit(browser, served.address, "MLflow Assistant")
    browser.find_element(By.CSS_SELECTOR, "[data-component-id$='chat_panel.close']").click()
    yield browser
    browser.set_window_size(size["width"], size["height"])


@dataclass(frozen=True)
class Listed:
    """The list of runs, as it is shown.

    Attributes:
        rows: From the top: the name, and where it begins, in pixels from the left.
        headings: Of the columns, from the left.
    """

    rows: list[tuple[str, float]]
    headings: list[str]


@dataclass(frozen=True)
class SweepPage:
    """The page of a sweep's run.

    Attributes:
        lines: Its text.
        links: Address by text.
    """

    lines: list[str]
    links: dict[str, str]


def rows(browser: WebDriver) -> list[tuple[str, float]]:
    return [(name, x) for name, x in browser.execute_script(ROWS)]


def headings(browser: WebDriver) -> list[str]:
    return [text for text in browser.execute_script(HEADINGS) if text]


def heading(column: str) -> str:
    return column.partition(".")[2].strip("`")


def saved_val_accuracy(run: StoredRun) -> float:
    return run.metrics.get("saved_val_accuracy", NEVER)


def number_of(run: StoredRun) -> str:
    return run.tags["trial"]


# --- lists of runs -----------------------------------------------------------------------


def test_the_command_prints_the_pages_of_a_sweep(served: Served, parent: StoredRun) -> None:
    assert list(served.pages) == [
        "wide",
        "the report",
        "the trials, best first",
        "charts of the trials",
        "the best side by side",
        "home",
    ]
    assert served.pages["wide"] == f"{served.address}/{run_page(EXPERIMENT, parent.run_id)}"


@pytest.fixture(scope="module")
def folded(served: Served, window: WebDriver) -> Listed:
    """Every run of the experiment."""
    visit(window, f"{served.address}/{runs_page(EXPERIMENT, RUNS_KEY)}", "matching runs")
    wait(window, lambda driver: len(rows(driver)) == 2)
    return Listed(rows(window), headings(window))


@pytest.fixture(scope="module")
def unfolded(folded: Listed, window: WebDriver) -> Listed:
    """Likewise, after a click on the plus before the sweep."""
    plus = "[row-index='0'] [col-id='attributes.`Run Name`'] button"
    window.find_element(By.CSS_SELECTOR, plus).click()
    wait(window, lambda driver: len(rows(driver)) == 10)
    wait(window, lambda driver: NAMES[-1] in headings(driver))
    return Listed(rows(window), headings(window))


def test_the_list_of_runs_folds_the_trials_under_their_sweep(
    folded: Listed, unfolded: Listed, trials: dict[str, StoredRun]
) -> None:
    (wide, left), *children, narrow = unfolded.rows

    assert [name for name, _ in folded.rows] == ["wide", "narrow"]
    assert (wide, narrow) == ("wide", folded.rows[1])
    assert {name for name, _ in children} == trials.keys()
    assert all(x > left for _, x in children)


def test_the_list_of_runs_begins_with_the_columns_of_any_run(unfolded: Listed) -> None:
    (*known, unknown) = sorted(RUNS.columns, key=lambda column: column == metric("test_accuracy"))

    columns = ["Run Name", "Created", *map(heading, known)]
    assert unfolded.headings[: len(columns)] == columns
    assert heading(unknown) == "test_accuracy"  # no run of the store has one


@pytest.fixture(scope="module")
def ranked(served: Served, window: WebDriver) -> Listed:
    """The trials of the sweep."""
    visit(window, served.pages["the trials, best first"], "8 matching runs")
    wait(window, lambda driver: len(rows(driver)) == 8)
    wait(window, lambda driver: "Duration" in headings(driver))
    return Listed(rows(window), headings(window))


def test_the_trials_are_listed_the_best_first(ranked: Listed, trials: dict[str, StoredRun]) -> None:
    names = [name for name, _ in ranked.rows]

    values = [saved_val_accuracy(trials[name]) for name in names]
    assert {*names} == trials.keys()
    assert values == sorted(values, reverse=True)
    assert [name for name in names if not NAME.fullmatch(name)] == []


def test_the_trials_are_listed_with_what_was_searched_beside_what_came_out(ranked: Listed) -> None:
    result = ["best_val_accuracy", "epoch", "parameters", "Duration"]

    assert ranked.headings == ["Run Name", "Created", "saved_val_accuracy", *NAMES, *result]


# --- charts ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def charts(served: Served, window: WebDriver) -> dict[str, dict[str, Any]]:
    """The charts of the trials, by title."""

    def first(driver: WebDriver) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = driver.execute_script(CHARTS)
        return found[:8]

    def is_drawn(chart: dict[str, Any]) -> bool:
        is_contour = chart["title"].count(" vs. ") == 2
        points = chart["points"] >= 8 and chart["heights"] >= is_contour
        return bool(chart["canvases"]) or points

    visit(window, served.pages["charts of the trials"], "Parallel Coordinates")
    wait(window, lambda driver: sum(map(is_drawn, first(driver))) == 8)
    return {chart["title"]: chart for chart in first(window)}


def test_the_charts_are_those_of_what_was_searched(charts: dict[str, dict[str, Any]]) -> None:
    x, y, z = AXES
    assert list(charts) == [
        "Parallel Coordinates",
        "val_accuracy",
        *(f"{axis} vs. best_val_accuracy" for axis in AXES),
        *(f"{pair} vs. best_val_accuracy" for pair in (f"{x} vs. {y}", f"{x} vs. {z}")),
        f"{y} vs. {z} vs. best_val_accuracy",
    ]


def test_the_parallel_coordinates_have_an_axis_a_parameter_and_the_metric_last(
    charts: dict[str, dict[str, Any]],
) -> None:
    *axes, last = charts["Parallel Coordinates"]["axes"]

    assert sorted(axes) == sorted(AXES)
    assert last == "best_val_accuracy"


def test_every_chart_shows_every_trial(charts: dict[str, dict[str, Any]]) -> None:
    scatters = [chart for title, chart in charts.items() if title.count(" vs. ") == 1]
    contours = [chart for title, chart in charts.items() if title.count(" vs. ") == 2]

    assert charts["Parallel Coordinates"]["canvases"] > 0
    assert charts["val_accuracy"]["lines"] >= 8
    assert [chart["points"] for chart in scatters] == [8, 8, 8]
    assert [chart["points"] for chart in contours] == [8, 8, 8]
    assert all(chart["heights"] for chart in contours)


# --- the best side by side ---------------------------------------------------------------


def choose(browser: WebDriver, selector: str, option: str) -> None:
    """Picks what an axis shows."""
    browser.find_element(By.ID, selector).click()
    path = f"//*[@role='option'][normalize-space()='{option}']"
    wait(browser, lambda driver: driver.find_elements(By.XPATH, path))
    browser.find_element(By.XPATH, path).click()
    wait(browser, lambda driver: driver.find_element(By.ID, selector).text == option)


def open_tab(browser: WebDriver, title: str) -> None:
    browser.find_element(By.XPATH, f"//*[@role='tab'][.='{title}']").click()
    path = f"//*[@role='tab'][.='{title}'][@aria-selected='true']"
    wait(browser, lambda driver: driver.find_elements(By.XPATH, path))


def drawn(browser: WebDriver) -> dict[str, int]:
    found: dict[str, int] = browser.execute_script(PLOT)
    return found


def test_the_best_trials_are_compared_by_what_was_searched(
    served: Served, window: WebDriver, trials: dict[str, StoredRun]
) -> None:
    complete = sum(trial.status == "FINISHED" for trial in trials.values())
    title = f"Comparing {complete} Runs from 1 Experiment"
    visit(window, served.pages["the best side by side"], title)
    wait(window, lambda driver: drawn(driver)["canvases"])

    axes = window.find_elements(By.CSS_SELECTOR, ".parcoords .axis-title")
    ticks = window.find_elements(By.CSS_SELECTOR, ".parcoords .tick text")
    chosen, _, metrics = text_of(window, "[role=tabpanel]").partition("Metrics:")
    assert [axis.text for axis in axes] == [*sorted(NAMES), "best_val_accuracy"]
    assert [tick.text for tick in ticks if not re.fullmatch(r"\d+\.\d+", tick.text)] == []
    assert len(ticks) > 2 * len(axes)
    assert [name for name in NAMES if name not in chosen] == []
    assert metrics.strip().startswith("best_val_accuracy")

    open_tab(window, "Scatter Plot")
    choose(window, "x-axis-selector", "optimizer.learning_rate")
    choose(window, "y-axis-selector", "best_val_accuracy")
    wait(window, lambda driver: drawn(driver)["canvases"])

    open_tab(window, "Box Plot")
    choose(window, "x-axis-selector", "model.hidden_units")
    choose(window, "y-axis-selector", "best_val_accuracy")
    wait(window, lambda driver: drawn(driver)["boxes"] == complete)

    open_tab(window, "Contour Plot")
    choose(window, "xaxis-selector", "model.hidden_units")
    choose(window, "yaxis-selector", "model.dropout_rate")
    choose(window, "zaxis-selector", "best_val_accuracy")
    wait(window, lambda driver: drawn(driver)["contours"] and drawn(driver)["canvases"])


# --- the report --------------------------------------------------------------------------


def console(browser: WebDriver) -> list[str]:
    """What the console of the browser has shown since it was asked last."""
    found = browser.execute("getLog", {"type": "browser"})["value"]
    return [entry["message"] for entry in found]


def check_report(browser: WebDriver, best: StoredRun, parent: StoredRun) -> None:
    """The page that the browser shows, or its frame, is the report of the sweep, drawn."""
    wait(browser, lambda driver: len(driver.execute_script(FIGURES)) == len(PICTURES))
    wait(browser, lambda driver: all(driver.execute_script(FIGURES)))
    titles = [title.text for title in browser.find_elements(By.TAG_NAME, "h2")]
    assert titles == ["Leaderboard", *PICTURES, "Setup"]
    rank, trial, accuracy, *_ = text_of(browser, "#leaderboard tr:nth-child(2)").split()
    assert (rank, trial) == ("1", number_of(best))
    assert accuracy == f"{saved_val_accuracy(best):.4f}"
    setup = browser.find_elements(By.TAG_NAME, "table")[-1].text
    assert "model.hidden_units tag(log, int(interval(64, 512)))" in setup
    assert "data digits, 1197+240 images" in setup
    assert f"go on with {parent.tags['command']}" in setup


def test_the_report_is_shown_inline(
    served: Served, window: WebDriver, parent: StoredRun, trials: dict[str, StoredRun]
) -> None:
    best = max(trials.values(), key=saved_val_accuracy)
    visit(window, served.pages["the report"], "report.html")
    wait(window, lambda driver: driver.find_elements(By.TAG_NAME, "iframe"))
    window.switch_to.frame(window.find_element(By.TAG_NAME, "iframe"))

    check_report(window, best, parent)


def test_the_report_needs_no_network(
    swept: Path, window: WebDriver, parent: StoredRun, trials: dict[str, StoredRun]
) -> None:
    best = max(trials.values(), key=saved_val_accuracy)
    (report,) = swept.glob(f"mlruns/artifacts/{parent.run_id}/artifacts/report.html")
    console(window)  # of pages before
    visit(window, report.as_uri(), "Sweep wide")

    check_report(window, best, parent)
    asked = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    assert window.execute_script(asked) == []
    assert console(window) == []


# --- the page of a run -------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep_page(served: Served, window: WebDriver) -> SweepPage:
    visit(window, served.pages["wide"], "Finished", "See the report", "sweep.trials")
    links = window.find_elements(By.TAG_NAME, "a")
    addresses = {link.text: str(link.get_attribute("href")) for link in links}
    return SweepPage(text_of(window, "body").split("\n"), addresses)


def test_the_page_of_a_sweep_leads_to_what_there_is_to_see(
    served: Served, sweep_page: SweepPage
) -> None:
    titles = [title for title in served.pages if title not in ("wide", "home")]

    assert [sweep_page.links.get(title) for title in titles] == [
        served.pages[title] for title in titles
    ]
    assert any(line.startswith("A sweep on digits: searches") for line in sweep_page.lines)
    assert any(line.startswith("8 of 8 trials") for line in sweep_page.lines)


def test_the_parameters_of_a_sweep_are_those_that_all_its_trials_share(
    sweep_page: SweepPage,
) -> None:
    shown = {*sweep_page.lines}

    assert {"training.epochs", "optimizer.name", "sampler.name", "sweep.trials"} <= shown
    assert {*NAMES} & shown == set()


@pytest.mark.parametrize(
    ("status", "result"),
    [
        ("FINISHED", r"best validation accuracy: 0\.\d{4} \(epoch \d\)"),
        ("KILLED", r"stopped after epoch \d; best validation accuracy 0\.\d{4}"),
    ],
)
def test_the_page_of_a_trial_says_what_it_is_what_came_out_and_how_to_repeat_it(
    served: Served, window: WebDriver, trials: dict[str, StoredRun], status: str, result: str
) -> None:
    name, trial = next(each for each in trials.items() if each[1].status == status)
    page = f"{served.address}/{run_page(EXPERIMENT, trial.run_id)}"
    visit(window, page, name, status.capitalize(), "Repeat:")

    (listed,) = [
        each.text
        for each in window.find_elements(By.CSS_SELECTOR, "ul > li")
        if "validation accuracy" in each.text
    ]
    (command,) = [each.text for each in window.find_elements(By.TAG_NAME, "code")]
    assert re.search(
        r"^64-\d+-\d+-10, relu, dropout 0\.\d+; rmsprop at ", text_of(window, "body"), re.M
    )
    assert re.fullmatch(result, listed)
    assert command == trial.tags["command"]


# --- the command -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_ui_beside_another_takes_the_next_free_port_and_ends_whole_however_it_ends(
    swept: Path, served: Served, number: signal.Signals, code: int
) -> None:
    taken = int(served.address.rpartition(":")[2])
    with open_ui(f"port={taken}", folder=swept) as opened:
        process = psutil.Process(opened.process.pid)
        servers = process.children(recursive=True)
        commands = [" ".join(server.cmdline()) for server in servers]
        opened.process.send_signal(number)
        _, error = opened.process.communicate(timeout=60)

    assert taken < int(opened.address.rpartition(":")[2]) < taken + 100
    assert any("uvicorn" in command for command in commands)
    assert opened.process.returncode == code
    assert psutil.wait_procs(servers, timeout=10)[1] == []
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run=" + "0" * 32], "Error: no run has the id 0{32}\\."),
        (["tracking.directory=elsewhere"], "Error: no runs are recorded in .*elsewhere.*"),
    ],
)
def test_a_ui_with_nothing_to_show_ends_in_one_line(
    swept: Path, arguments: list[str], line: str
) -> None:
    done = call(*arguments, folder=swept, command=UI)

    assert done.returncode == 1
    assert re.fullmatch(f"{line}\n", done.stderr)
    assert done.stdout == ""
    assert not (swept / "elsewhere").exists()


def test_the_pages_on_a_server_are_printed_and_none_is_started(
    served: Served, parent: StoredRun, tmp_path: Path
) -> None:
    server = ["tracking=server", f"tracking.uri={served.address}"]

    done = run(f"run={parent.run_id}", f"port={free_port()}", *server, folder=tmp_path, command=UI)

    assert done.returncode == 0, done.stderr
    printed = dict(re.findall(r"^(.+?) {2,}(http\S+)$", done.stdout, re.M))
    assert printed == served.pages
    assert len(done.stdout.splitlines()) == len(printed)
    assert list(tmp_path.iterdir()) == []
