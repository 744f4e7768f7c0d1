"""Pages of MLflow's UI: their addresses, and views of its list of runs.

A view is what the UI's own Share button makes: a tag of the experiment, in the JSON that the UI
reads (MLflow 3.17: `ExperimentPageUIState`, `RunsChartsCardConfig`).
"""

import base64
import json
import shlex
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from pipeline.config import without_password

# Without it, the UI opens on its pages for language models.
_KIND = {"workflowType": "machine_learning"}
_SECTION = "charts"
WIDE = 150  # pixels of a column: the headings are long
NAME, NAME_WIDE = "attributes.`Run Name`", 330  # or the names of trials are cut

CHOICE = {"tracking", "tracking.uri", "tracking.directory"}  # overrides that choose a store

Chart = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class View:
    """How the UI shows a list of runs.

    Attributes:
        condition: Which runs, in MLflow's grammar; empty: all.
        order_by: Column they are ordered by.
        ascending: Whether the least comes first.
        columns: Shown, in this order; see `metric`, `param` and `attribute`.
        charts: Shown on the page of charts, in this order.
        title: Above the charts.
    """

    condition: str = ""
    order_by: str = "attributes.start_time"
    ascending: bool = False
    columns: Sequence[str]
    charts: Sequence[Chart] = ()
    title: str = ""

    @property
    def text(self) -> str:
        """As the UI reads it."""
        state: dict[str, Any] = {
            "searchFilter": self.condition,
            "orderByKey": self.order_by,
            "orderByAsc": self.ascending,
            "selectedColumns": list(self.columns),
            "columnOrder": [NAME, *self.columns],  # one that is not in it has no width
            "columnWidths": {NAME: NAME_WIDE, **dict.fromkeys(self.columns, WIDE)},
            "runsHiddenMode": "SHOW_ALL",
        }
        if self.charts:
            state["compareRunCharts"] = [
                {
                    "uuid": f"chart{number}",
                    "metricSectionId": _SECTION,
                    "deleted": False,
                    "isGenerated": False,
                    **chart,
                }
                for number, chart in enumerate(self.charts)
            ]
            section = {"uuid": _SECTION, "name": self.title, "display": True, "isReordered": False}
            state["compareRunSections"] = [{**section, "columns": 2}]
            state["isAccordionReordered"] = True
        packed = zlib.compress(json.dumps(state).encode())  # a tag holds 5,000 characters
        return f"deflate;{base64.b64encode(packed).decode()}"


def metric(name: str) -> str:
    return f"metrics.`{name}`"


def param(name: str) -> str:
    return f"params.`{name}`"


def attribute(name: str) -> str:
    return f"attributes.`{name}`"


def parallel_coordinates(axes: Sequence[str], height: str) -> Chart:
    """A line a run across the axes, which are written as columns are; coloured by the last."""
    named = [_axis(column) for column in [*axes, height]]
    return {
        "type": "PARALLEL",
        "selectedParams": [axis["key"] for axis in named if axis["type"] == "PARAM"],
        "selectedMetrics": [axis["key"] for axis in named if axis["type"] == "METRIC"],
        "showAllRuns": True,
    }


def scatter(x: str, y: str) -> Chart:
    """A point a run."""
    return {"type": "SCATTER", "runsCountToCompare": 100, "xaxis": _axis(x), "yaxis": _axis(y)}


def contour(x: str, y: str, z: str) -> Chart:
    """Heights `z` over two axes."""
    return {"type": "CONTOUR", "xaxis": _axis(x), "yaxis": _axis(y), "zaxis": _axis(z)}


def curves(name: str) -> Chart:
    """A metric by epoch, a line a run."""
    return {
        "type": "LINE",
        "metricKey": name,
        "selectedMetricKeys": [name],
        "displayName": name,
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "xAxisKey": "step",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "range": {},
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def _axis(column: str) -> Mapping[str, str]:
    kind, _, name = column.partition(".")
    return {"type": {"metrics": "METRIC", "params": "PARAM"}[kind], "key": name.strip("`")}


# Of any run of an experiment.
RUNS = View(
    columns=[
        metric("best_val_accuracy"),
        metric("test_accuracy"),
        metric("epoch"),
        param("model.hidden_units"),
        param("model.dropout_rate"),
        param("optimizer.name"),
        param("optimizer.learning_rate"),
        attribute("Dataset"),
    ]
)
RUNS_KEY = "runs"


def runs_page(experiment_id: str, view: str, *, charts: bool = False) -> str:
    """The list of an experiment's runs in a view that was saved, or its charts."""
    mode = {"compareRunsMode": "CHART"} if charts else {}
    return _page(f"experiments/{experiment_id}/runs", viewStateShareKey=view, **mode)


def run_page(experiment_id: str, run_id: str, artifact: str = "") -> str:
    """A run, or one of its artifacts."""
    inside = f"/artifacts/{quote(artifact)}" if artifact else ""
    return _page(f"experiments/{experiment_id}/runs/{run_id}{inside}")


def version_page(name: str, number: int) -> str:
    """A version of a registered model."""
    return _page(f"models/{quote(name)}/versions/{number}")


def compare_page(experiment_id: str, run_ids: Sequence[str]) -> str:
    """Some runs side by side."""
    given = {"runs": list(run_ids), "experiments": [experiment_id]}
    packed = {name: json.dumps(ids, separators=(",", ":")) for name, ids in given.items()}
    return _page("compare-runs", **packed)


def ui_command(run_id: str, overrides: Sequence[str]) -> str:
    """The command that shows a run of the store that a command line chose."""
    return store_command(overrides, "pipeline.ui", f"run={run_id}")


def store_command(overrides: Sequence[str], module: str, *arguments: str) -> str:
    """Another command on the store that a command line chose."""
    chosen = [each for each in overrides if each.lstrip("+").partition("=")[0] in CHOICE]
    return without_password(shlex.join(["python", "-m", module, *arguments, *chosen]))


def _page(path: str, **query: str) -> str:
    return f"#/{path}?{urlencode({**query, **_KIND}, quote_via=quote)}"
