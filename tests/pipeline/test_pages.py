"""Addresses of the UI's pages, and the text of a view, as the UI reads both."""

import base64
import json
import zlib
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from pipeline.pages import (
    RUNS,
    View,
    attribute,
    compare_page,
    contour,
    curves,
    metric,
    parallel_coordinates,
    param,
    run_page,
    runs_page,
    scatter,
)

TEXTS = ["0af3", "a b", "a&b=c", "50%", "é/#?+", '"quoted"']


def parse(page: str) -> tuple[str, dict[str, str]]:
    """Path and query of an address within the UI, as a browser parses them."""
    assert page.startswith("#/")
    assert not set(page) & set(' "<>')
    inside = urlsplit(page.removeprefix("#"))
    query = parse_qs(inside.query, strict_parsing=True)
    return unquote(inside.path), {name: value for name, (value,) in query.items()}


def state_of(view: View) -> dict[str, Any]:
    """What the UI reads of it."""
    kind, _, packed = view.text.partition(";")
    assert kind == "deflate"
    return dict(json.loads(zlib.decompress(base64.b64decode(packed, validate=True))))


# --- addresses ---------------------------------------------------------------------------


@pytest.mark.parametrize("view", TEXTS)
def test_a_list_of_runs_has_the_key_of_its_view_in_its_address(view: str) -> None:
    assert parse(runs_page("7", view)) == (
        "/experiments/7/runs",
        {"viewStateShareKey": view, "workflowType": "machine_learning"},
    )


def test_the_charts_of_a_view_are_the_same_address_in_another_mode() -> None:
    path, query = parse(runs_page("7", "mine", charts=True))

    listed = parse(runs_page("7", "mine"))
    assert (path, query.pop("compareRunsMode")) == (listed[0], "CHART")
    assert query == listed[1]


def test_the_page_of_a_run_is_that_of_machine_learning() -> None:
    path, query = parse(run_page("7", "0af3"))

    assert (path, query) == ("/experiments/7/runs/0af3", {"workflowType": "machine_learning"})


@pytest.mark.parametrize("artifact", ["report.html", "figures/digits.png", "50% é?.txt", "a#b"])
def test_an_artifact_is_part_of_the_path_of_its_run(artifact: str) -> None:
    page = run_page("7", "0af3", artifact)

    assert parse(page)[0] == f"/experiments/7/runs/0af3/artifacts/{artifact}"
    assert page.count("/") == run_page("7", "0af3").count("/") + 2 + artifact.count("/")


@pytest.mark.parametrize("run_ids", [["0af3"], ["0af3", "77b1"], []], ids=len)
def test_runs_side_by_side_are_lists_in_json(run_ids: list[str]) -> None:
    path, query = parse(compare_page("7", run_ids))

    assert path == "/compare-runs"
    assert json.loads(query["runs"]) == run_ids
    assert json.loads(query["experiments"]) == ["7"]


# --- views -------------------------------------------------------------------------------


def test_a_view_decodes_to_what_it_was_made_of() -> None:
    columns = [metric("val_loss"), param("model.l2"), attribute("Duration")]

    state = state_of(
        View(condition="tags.a = 'é'", order_by=columns[0], ascending=True, columns=columns)
    )

    assert state["searchFilter"] == "tags.a = 'é'"
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`val_loss`", True)
    assert state["selectedColumns"] == ["metrics.`val_loss`", "params.`model.l2`", columns[2]]
    assert state["columnOrder"] == ["attributes.`Run Name`", *state["selectedColumns"]]
    assert state["columnWidths"].keys() == set(state["columnOrder"])


def test_a_view_without_charts_leaves_them_to_the_ui() -> None:
    keys = state_of(View(columns=[metric("loss")])).keys()

    assert not keys & {"compareRunCharts", "compareRunSections", "isAccordionReordered"}


def test_the_newest_runs_come_first_unless_the_view_says_otherwise() -> None:
    state = state_of(View(columns=[]))

    assert (state["searchFilter"], state["orderByKey"]) == ("", "attributes.start_time")
    assert state["orderByAsc"] is False


def test_charts_are_shown_in_their_order_in_one_section_of_their_title() -> None:
    charts = [curves("loss"), scatter(param("a"), metric("b")), curves("accuracy")]

    state = state_of(View(columns=[], charts=charts, title="digits"))

    (section,) = state["compareRunSections"]
    shown = state["compareRunCharts"]
    assert (section["name"], section["display"]) == ("digits", True)
    assert [chart["type"] for chart in shown] == ["LINE", "SCATTER", "LINE"]
    assert {chart["metricSectionId"] for chart in shown} == {section["uuid"]}
    assert len({chart["uuid"] for chart in shown}) == 3
    assert not any(chart["deleted"] for chart in shown)


def test_a_scatter_plot_tells_parameters_from_metrics() -> None:
    chart = scatter(param("model.hidden_units"), metric("val_loss"))

    assert chart["xaxis"] == {"type": "PARAM", "key": "model.hidden_units"}
    assert chart["yaxis"] == {"type": "METRIC", "key": "val_loss"}


def test_a_contour_plot_has_three_axes() -> None:
    chart = contour(metric("log10/optimizer.learning_rate"), param("model.l2"), metric("val_loss"))

    assert [chart[axis]["key"] for axis in ("xaxis", "yaxis", "zaxis")] == [
        "log10/optimizer.learning_rate",
        "model.l2",
        "val_loss",
    ]
    assert [chart[axis]["type"] for axis in ("xaxis", "yaxis", "zaxis")] == [
        "METRIC",
        "PARAM",
        "METRIC",
    ]


def test_parallel_coordinates_end_with_what_they_are_coloured_by() -> None:
    axes = [param("model.l2"), metric("log10/optimizer.learning_rate"), param("optimizer.name")]

    chart = parallel_coordinates(axes, metric("val_accuracy"))

    assert chart["selectedParams"] == ["model.l2", "optimizer.name"]
    assert chart["selectedMetrics"] == ["log10/optimizer.learning_rate", "val_accuracy"]


def test_curves_are_of_one_metric_by_epoch() -> None:
    chart = curves("val_accuracy")

    assert chart["metricKey"] == "val_accuracy"
    assert chart["selectedMetricKeys"] == ["val_accuracy"]
    assert chart["xAxisKey"] == "step"


@pytest.mark.parametrize("column", [attribute("Duration"), "val_loss"])
def test_an_axis_is_a_metric_or_a_parameter(column: str) -> None:
    with pytest.raises(KeyError):
        scatter(column, metric("val_loss"))


def test_a_view_reads_the_same_as_often_as_it_is_asked() -> None:
    view = View(columns=[], charts=[curves("loss")])

    assert view.text == view.text
    assert len(state_of(view)["compareRunCharts"]) == 1


def test_the_view_of_all_runs_fits_into_a_tag() -> None:
    assert len(RUNS.text) < 5_000
    assert state_of(RUNS)["searchFilter"] == ""
