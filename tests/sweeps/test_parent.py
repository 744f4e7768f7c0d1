"""The sweep's own run: what is recorded on it, its view of the trials, its note, its report."""

import base64
import functools
import json
import math
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import hydra
import optuna
import pytest
from mlflow import MlflowClient
from optuna.trial import FrozenTrial, TrialState, create_trial

from pipeline.compose import CONF, to_typed
from pipeline.config import RunConfig, flatten
from pipeline.data import Data, load
from pipeline.store import NOTE, Store, open_store, read_run
from pipeline.tracking import Run, create_run
from pipeline.ui import _LINK
from sweeps.config import VARIANTS, SweepConfig
from sweeps.display import Progress
from sweeps.parent import (
    REPORT,
    logarithms,
    open_parent,
    publish,
    read_board,
    view,
    what,
)
from sweeps.plan import Plan, build_plan
from sweeps.space import Values, split_command_line
from sweeps.storage import open_storage
from sweeps.study import check_identity, open_study
from tests.stores import parent_of

COMMAND = "python -m sweeps.run data=digits sweep.name=mine"
TWO_OBJECTIVES = "sweep.objective=[val_accuracy, parameters]"
FIXED = ["model.dropout_rate=0.3", "optimizer.learning_rate=0.01"]
RUN_ID = "0123456789abcdef" * 2


@pytest.fixture(autouse=True)
def initialized() -> Iterator[None]:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield


@functools.cache
def plan_of(*arguments: str) -> Plan:
    overrides, searched = split_command_line(["data=digits", "sweep.trials=4", *arguments])
    config = to_typed(hydra.compose("sweep", overrides), SweepConfig, VARIANTS)
    return build_plan(config, overrides, searched)


def decode(text: str) -> dict[str, Any]:
    kind, _, packed = text.partition(";")
    assert kind == "deflate"
    return dict(json.loads(zlib.decompress(base64.b64decode(packed))))


# --- a sweep's stores --------------------------------------------------------------------


@pytest.fixture(scope="module")
def empty_databases(
    configure: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of both, made once: it takes the libraries seconds."""
    folder = tmp_path_factory.mktemp("empty")
    open_store(configure("data=npz", f"tracking.directory={folder}", "data.path=none").tracking)
    open_storage(f"sqlite:///{folder / 'optuna.db'}").engine.dispose()
    return folder


@pytest.fixture(scope="module")
def digits(configure: Callable[..., RunConfig]) -> Data:
    return load(configure("data=digits").data)


@dataclass(frozen=True)
class Sweep:
    """A sweep as a launcher has opened it; its trials are told, not trained."""

    plan: Plan
    study: optuna.Study
    store: Store
    parent: Run
    progress: Progress

    def add(
        self, values: Values, *results: float, state: str = "COMPLETE", run_id: str = ""
    ) -> FrozenTrial:
        """Records a trial in the study alone."""
        spreads = {each.name: each.distribution for each in self.plan.space.parameters}
        self.study.add_trial(
            create_trial(
                state=TrialState[state],
                values=list(results) or None,
                params=values,
                distributions={name: spreads[name] for name in values},
                intermediate_values={1: 0.5},
                user_attrs={"seconds": 1.0, "run_id": run_id},
            )
        )
        return self.study.trials[-1]

    def tell(self, values: Values, *results: float, state: str = "COMPLETE") -> FrozenTrial:
        """Records a trial and its run."""
        number = len(self.study.trials)
        tags = {"sweep": "mine", "trial": number, "command": self.plan.command(values)}
        run = create_run(self.store, f"trial-{number}", tags, parent=self.parent)
        trial = self.add(values, *results, state=state, run_id=run.run_id)
        measured = {"epoch": 1.0, "parameters": 99.0, "fit_seconds": 1.0}
        names = {"val_accuracy": "saved_val_accuracy", "val_loss": "saved_val_loss"}
        for name, result in zip(self.progress.objectives, results, strict=False):
            measured[names.get(name, name)] = result
        run.log_metrics(measured)
        run.end({"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}[state])
        self.progress.add(trial)
        self.parent.log_metrics(self.progress.metrics, step=number + 1)
        return trial

    def publish(self) -> None:
        publish(self.plan, self.study, self.parent, self.progress, COMMAND)

    @property
    def note(self) -> str:
        return read_run(self.parent.run_id).tags[NOTE]

    @property
    def links(self) -> dict[str, str]:
        """Pages by title, as `pipeline.ui` finds them in the note."""
        return dict(_LINK.findall(self.note))

    @property
    def artifacts(self) -> Path:
        folder = MlflowClient().get_run(self.parent.run_id).info.artifact_uri
        assert folder is not None
        return Path(folder.removeprefix("file://"))


Open = Callable[..., Sweep]


@pytest.fixture
def sweep_of(tmp_path: Path, empty_databases: Path, digits: Data) -> Open:
    """Opens a sweep of the given arguments, anew or again."""
    folder = tmp_path / "mlruns"
    shutil.copytree(empty_databases, folder)

    def sweep_of(*arguments: str) -> Sweep:
        plan = plan_of(*arguments)
        tracking = replace(plan.config.tracking, directory=str(folder))
        plan = replace(plan, config=replace(plan.config, tracking=tracking))
        storage = open_storage(f"sqlite:///{folder / 'optuna.db'}")
        study = open_study("mine", storage, plan.config.sweep.directions)
        check_identity(study, {**plan.identity, "data": "960+240 images 12ab"})
        store = open_store(plan.config.tracking)
        parent = open_parent(plan, study, store, digits, COMMAND)
        progress = Progress(budget=plan.trials, objectives=plan.config.sweep.objectives)
        return Sweep(plan, study, store, parent, progress)

    return sweep_of


def mlp(units: int, learning_rate: float = 1e-3) -> Values:
    return {
        "model.hidden_units": units,
        "model.dropout_rate": 0.25,
        "optimizer.learning_rate": learning_rate,
    }


# --- settings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["search=deep"],  # with a group, and with conditions
        ["model=choice(mlp, wide)", "training.batch_size=16,32"],
    ],
    ids=str,
)
def test_what_is_searched_is_no_setting_of_the_sweep_but_declared(
    sweep_of: Open, arguments: list[str]
) -> None:
    sweep = sweep_of(*arguments)

    params = dict(read_run(sweep.parent.run_id).params)

    searched = {f"search.space.{name}": text for name, text in sweep.plan.declarations.items()}
    assert {name: params.get(name) for name in searched} == searched
    names = tuple(sweep.plan.declarations)
    assert [name for name in params if name in names] == []
    groups = tuple(f"{name}." for name in names if "." not in name)
    assert [name for name in params if groups and name.startswith(groups)] == []
    assert (params["data.name"], params["seed"]) == ("digits", "0")


def test_the_condition_of_a_name_is_part_of_its_declaration(sweep_of: Open) -> None:
    params = read_run(sweep_of("search=deep").parent.run_id).params

    assert params["search.space.optimizer.momentum"] == (
        "interval(0.0, 0.9) when optimizer=rmsprop"
    )


def test_what_the_space_fixes_is_a_setting_of_the_sweep(sweep_of: Open) -> None:
    sweep = sweep_of("+search.space={model.activation: gelu, optimizer: adam}")

    params = read_run(sweep.parent.run_id).params

    assert (params["model.activation"], params["optimizer.name"]) == ("gelu", "adam")
    assert "optimizer.rho" not in params


def test_the_run_of_a_sweep_says_what_it_is_before_the_first_trial(sweep_of: Open) -> None:
    sweep = sweep_of()

    run = read_run(sweep.parent.run_id)
    assert (run.name, run.status, run.parent) == ("mine", "RUNNING", None)
    assert (run.tags["kind"], run.tags["sweep"]) == ("sweep", "mine")
    assert (run.tags["objective"], run.tags["command"]) == ("val_accuracy", COMMAND)
    assert run.tags["mlflow.source.name"] == "sweeps.run"
    assert run.tags[NOTE] == what(sweep.plan)
    assert run.validation is not None


def test_a_sweep_that_is_opened_again_has_the_same_run(sweep_of: Open) -> None:
    first = sweep_of()
    before = read_run(first.parent.run_id)

    again = sweep_of()

    assert again.parent == first.parent
    assert read_run(again.parent.run_id) == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            [],
            "A sweep on digits: searches model.hidden_units, model.dropout_rate, "
            "optimizer.learning_rate for val_accuracy, with the sampler tpe and the pruner asha.",
        ),
        (
            [TWO_OBJECTIVES, "sampler=random", "pruner=none", *FIXED],
            "A sweep on digits: searches model.hidden_units for val_accuracy and parameters, with "
            "the sampler random and no pruner.",
        ),
        (
            ["+search.space={model.activation: gelu, training.early_stopping_patience: null}"],
            "A sweep on digits: searches model.hidden_units, model.dropout_rate, "
            "optimizer.learning_rate for val_accuracy, with the sampler tpe and the pruner asha. "
            "The space fixes model.activation=gelu training.early_stopping_patience=null.",
        ),
    ],
)
def test_a_sweep_is_told_in_a_sentence(arguments: list[str], told: str) -> None:
    assert what(plan_of(*arguments)) == told


# --- the view of the trials --------------------------------------------------------------

VALUE = "metrics.`saved_val_accuracy`"
MLP = ["model.hidden_units", "model.dropout_rate", "optimizer.learning_rate"]
REST = ["metrics.`best_val_accuracy`", "metrics.`epoch`", "metrics.`parameters`"]
DURATION = "attributes.`Duration`"


def state_of(*arguments: str) -> dict[str, Any]:
    return decode(view(plan_of(*arguments), RUN_ID).text)


def types(state: dict[str, Any]) -> list[str]:
    return [chart["type"] for chart in state["compareRunCharts"]]


def test_the_view_of_a_sweep_shows_its_trials_alone_the_best_first() -> None:
    state = state_of()

    assert state["searchFilter"] == f"tags.`mlflow.parentRunId` = '{RUN_ID}'"
    assert (state["orderByKey"], state["orderByAsc"]) == (VALUE, False)
    settings = [f"params.`{name}`" for name in MLP]
    assert state["selectedColumns"] == [VALUE, *settings, *REST, DURATION]


@pytest.mark.parametrize(
    ("objective", "column", "ascending"),
    [
        ("val_accuracy", VALUE, False),
        ("val_loss", "metrics.`saved_val_loss`", True),
        ("parameters", "metrics.`parameters`", True),
        ("fit_seconds", "metrics.`fit_seconds`", True),
        ("[val_loss, val_accuracy]", "metrics.`saved_val_loss`", True),
        ("[val_accuracy, parameters]", VALUE, False),
    ],
)
def test_the_best_trials_come_first_whatever_the_objective(
    objective: str, column: str, ascending: bool
) -> None:
    state = state_of(f"sweep.objective={objective}")

    assert (state["orderByKey"], state["orderByAsc"]) == (column, ascending)
    assert state["selectedColumns"][0] == column
    assert len(set(state["selectedColumns"])) == len(state["selectedColumns"])


def test_the_charts_of_the_default_space_have_logarithms_where_these_are_searched() -> None:
    parallel, curves, *others = state_of()["compareRunCharts"]

    assert parallel["selectedParams"] == ["model.dropout_rate"]
    assert parallel["selectedMetrics"] == [
        "log10/model.hidden_units",
        "log10/optimizer.learning_rate",
        "best_val_accuracy",
    ]
    assert (curves["type"], curves["metricKey"]) == ("LINE", "val_accuracy")
    assert [chart["type"] for chart in others] == ["SCATTER"] * 3 + ["CONTOUR"] * 3
    assert {chart["zaxis"]["key"] for chart in others[3:]} == {"best_val_accuracy"}
    assert {chart["yaxis"]["key"] for chart in others[:3]} == {"best_val_accuracy"}


def test_the_charts_of_a_loss_show_that_loss() -> None:
    parallel, curves, *others = state_of("sweep.objective=val_loss")["compareRunCharts"]

    assert parallel["selectedMetrics"][-1] == curves["metricKey"] == "val_loss"
    assert {chart["yaxis"]["key"] for chart in others[:3]} == {"val_loss"}


def test_an_objective_of_a_whole_run_has_no_curves() -> None:
    assert "LINE" not in types(state_of("sweep.objective=fit_seconds"))


def test_two_objectives_have_a_plot_of_one_over_the_other() -> None:
    state = state_of(TWO_OBJECTIVES)

    front = state["compareRunCharts"][2]
    assert types(state)[:3] == ["PARALLEL", "LINE", "SCATTER"]
    assert front["xaxis"] == {"type": "METRIC", "key": "saved_val_accuracy"}
    assert front["yaxis"] == {"type": "METRIC", "key": "parameters"}


def test_the_view_of_the_deep_space_has_a_column_for_each_searched_name() -> None:
    state = state_of("search=deep")

    columns = state["selectedColumns"]
    searched = plan_of("search=deep").declarations
    assert "params.`optimizer.name`" in columns
    assert {f"params.`{name}`" for name in searched if "." in name} <= set(columns)
    kinds = types(state)
    assert (kinds.count("SCATTER"), kinds.count("CONTOUR")) == (4, 3)


@pytest.mark.parametrize("group", ["model=choice(mlp, wide)", "training=choice(default, quick)"])
def test_a_view_names_no_parameter_that_no_trial_has(group: str) -> None:
    """Not every group has a name among its settings."""
    plan = plan_of("+search.space={model.l2: 'interval(0.0, 0.5)'}", group)
    settings = dict(flatten(asdict(plan.trial_config(plan.known[0]))))

    columns = decode(view(plan, RUN_ID).text)["selectedColumns"]

    named = {column.split("`")[1] for column in columns if column.startswith("params.")}
    assert named - settings.keys() == set()


WIDEST = ["search=deep", "sweep.objective=[val_loss, val_accuracy, parameters, fit_seconds]"]


def test_the_view_of_the_widest_space_fits_into_a_tag() -> None:
    text = view(plan_of(*WIDEST), RUN_ID).text

    assert len(text) < 5_000
    assert len(decode(text)["compareRunCharts"]) == 1 + 1 + 1 + 4 + 3


def test_the_view_is_stored_whole_with_the_experiment(sweep_of: Open) -> None:
    sweep = sweep_of(*WIDEST)

    tags = MlflowClient().get_experiment(sweep.store.experiment_id).tags

    stored = decode(tags[f"mlflow.sharedViewState.{sweep.parent.run_id}"])
    assert stored == decode(view(sweep.plan, sweep.parent.run_id).text)


def test_a_view_reads_the_same_as_often_as_it_is_asked() -> None:
    shown = view(plan_of(), RUN_ID)

    assert decode(shown.text) == decode(shown.text)


# --- logarithms --------------------------------------------------------------------------


def test_what_is_searched_on_a_logarithmic_scale_has_its_logarithm() -> None:
    assert logarithms(plan_of(), mlp(100, 1e-3)) == {
        "log10/model.hidden_units": 2.0,
        "log10/optimizer.learning_rate": pytest.approx(-3.0),
    }


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, {}),
        ({"model.dropout_rate": 0.2}, {}),
        ({"model.hidden_units": 1}, {"log10/model.hidden_units": 0.0}),
        ({"model.hidden_units": 50}, {"log10/model.hidden_units": math.log10(50)}),
    ],
)
def test_a_name_that_a_trial_lacks_has_no_logarithm(
    values: Values, found: dict[str, float]
) -> None:
    assert logarithms(plan_of("search=deep"), values) == found


# --- the note ----------------------------------------------------------------------------


def test_a_note_links_to_the_report_the_trials_and_their_charts(sweep_of: Open) -> None:
    sweep = sweep_of()
    experiment, run_id = sweep.store.experiment_id, sweep.parent.run_id

    sweep.publish()

    links = {title: unquote(page) for title, page in sweep.links.items()}
    assert list(links) == ["the report", "the trials, best first", "charts of the trials"]
    assert links["the report"].startswith(
        f"#/experiments/{experiment}/runs/{run_id}/artifacts/{REPORT}?"
    )
    assert f"viewStateShareKey={run_id}&" in links["the trials, best first"]
    assert "compareRunsMode=CHART" in links["charts of the trials"]


def test_a_note_links_to_the_best_side_by_side_where_there_are_two(sweep_of: Open) -> None:
    sweep = sweep_of()
    sweep.tell(mlp(40), 0.5)
    sweep.tell(mlp(50), 0.9)

    sweep.publish()

    board = read_board(sweep.parent)
    assert board is not None
    ids = [row.run.run_id for row in board.rows]
    assert [row.trial for row in board.rows] == [1, 0]
    page = unquote(sweep.links["the best side by side"])
    assert json.dumps(ids, separators=(",", ":")) in page


def test_a_note_says_what_came_out_how_to_repeat_it_and_how_to_go_on(sweep_of: Open) -> None:
    sweep = sweep_of()
    sweep.tell(mlp(40), 0.5)
    best = sweep.tell(mlp(50), 0.9)
    sweep.tell(mlp(60), state="PRUNED")

    sweep.publish()

    see, told, go_on, lines = sweep.note.split("\n\n")
    assert see.startswith("See [the report](#/")
    assert told == what(sweep.plan)
    assert lines.splitlines() == [
        "- 3 of 4 trials, 1 pruned",
        "- best val_accuracy 0.9000 (trial 1)",
        "- Baseline, as configured (trial 0): 0.5000; the best is 0.4000 better; "
        "how much of it is noise is unknown: predictions are not kept.",
        f"- repeat trial 1: `{sweep.plan.command(best.params)}`",
    ]
    assert go_on == f"Go on, with a larger `sweep.trials`: `{COMMAND}`"


def test_a_baseline_is_as_configured_but_for_what_the_space_fixes(sweep_of: Open) -> None:
    sweep = sweep_of("+search.space={model.activation: gelu}")
    sweep.tell(mlp(40), 0.5)

    sweep.publish()

    told = "\n- Baseline, as configured but for what the space fixes (trial 0): 0.5000"
    assert told in sweep.note


def test_a_note_before_the_first_complete_trial_says_so(sweep_of: Open) -> None:
    sweep = sweep_of()
    sweep.tell(mlp(40), state="FAIL")

    sweep.publish()

    assert sweep.note.endswith("- 0 of 4 trials, 0 pruned, 1 failed\n- no trial is complete yet")
    assert "side by side" not in sweep.note


def deep(number: int) -> Values:
    """A point of the widest space that takes the longest command."""
    return {
        "model.hidden_units": 1_000 + number,
        "model.hidden_layers": 4,
        "model.dropout_rate": 0.123456789012345 + number / 1_000,
        "model.activation": "gelu",
        "model.batch_normalization": False,
        "optimizer": "rmsprop",
        "optimizer.learning_rate": 0.00123456789012345 + number / 1e6,
        "optimizer.momentum": 0.123456789012345,
        "optimizer.schedule": "cosine",
        "optimizer.warmup_epochs": 1.23456789012345,
        "training.batch_size": 256,
    }


def test_a_note_of_a_wide_front_is_recorded_to_its_end(sweep_of: Open) -> None:
    sweep = sweep_of("search=deep", TWO_OBJECTIVES)
    for number in range(10):
        sweep.add(deep(number), 0.5 + number / 100, 1_000.0 + number)

    sweep.publish()

    assert f"Go on, with a larger `sweep.trials`: `{COMMAND}`" in sweep.note
    assert sweep.note.count("repeat trial") == 3
    assert sweep.note.endswith("training.batch_size=256`")


# --- publishing --------------------------------------------------------------------------


def test_a_sweep_is_published_at_any_time(sweep_of: Open) -> None:
    sweep = sweep_of()

    sweep.publish()
    first = (sweep.artifacts / REPORT).read_text(encoding="utf-8")
    sweep.tell(mlp(40), 0.5)
    sweep.publish()

    assert "No trial is complete yet." in first
    assert 'id="leaderboard"' in (sweep.artifacts / REPORT).read_text(encoding="utf-8")


def test_what_is_published_is_returned_for_the_terminal(sweep_of: Open) -> None:
    sweep = sweep_of()
    for number, value in enumerate([0.1, 0.5, 0.9]):
        sweep.tell(mlp(40 + 8 * number, 1e-4 * (number + 1)), value)

    board, shares = publish(sweep.plan, sweep.study, sweep.parent, sweep.progress, COMMAND)

    assert board is not None
    assert [row.trial for row in board.rows] == [2, 1, 0]
    assert shares.keys() == {"model.hidden_units", "optimizer.learning_rate"}  # what varied
    assert sum(shares.values()) == pytest.approx(1.0)


def test_a_report_that_cannot_be_recorded_is_a_warning_in_one_line(
    sweep_of: Open, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = sweep_of()
    sweep.tell(mlp(40), 0.5)
    folder = sweep.artifacts
    shutil.rmtree(folder)
    folder.write_text("where a folder should be")

    board, _ = publish(sweep.plan, sweep.study, sweep.parent, sweep.progress, COMMAND)

    (warning,) = [record for record in caplog.records if record.name == "sweeps.parent"]
    assert warning.getMessage().startswith("the report is not refreshed: ")
    assert len(warning.getMessage().splitlines()) == 1
    assert board is not None
    assert "- best val_accuracy 0.5000 (trial 0)" in sweep.note


def test_predictions_that_are_damaged_do_not_keep_a_sweep_from_its_report(
    sweep_of: Open,
) -> None:
    sweep = sweep_of()
    sweep.tell(mlp(40), 0.5)
    sweep.tell(mlp(50), 0.9)
    for row in MlflowClient().search_runs([sweep.store.experiment_id], "tags.trial != ''"):
        MlflowClient().log_text(row.info.run_id, "cut short", "predictions/validation.npz")

    sweep.publish()

    page = (sweep.artifacts / REPORT).read_text(encoding="utf-8")
    assert "binomial: some predictions are not kept" in page


def test_no_password_of_a_configuration_is_published(sweep_of: Open) -> None:
    sweep = sweep_of()

    publish(
        sweep.plan,
        sweep.study,
        sweep.parent,
        sweep.progress,
        f"{COMMAND} study.storage=postgresql://me:hush-7f3a@host/db",
    )

    page = (sweep.artifacts / REPORT).read_text(encoding="utf-8")
    assert "hush-7f3a" not in page + sweep.note
    assert "postgresql://me:***@host/db" in page


def test_a_sweep_whose_own_run_was_deleted_is_published_as_a_warning_in_one_line(
    sweep_of: Open, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = sweep_of()
    sweep.tell(mlp(40), 0.5)
    MlflowClient().delete_run(sweep.parent.run_id)

    publish(sweep.plan, sweep.study, sweep.parent, sweep.progress, COMMAND)

    (warning,) = [record for record in caplog.records if record.name == "sweeps.parent"]
    assert len(warning.getMessage().splitlines()) == 1


def test_a_sweep_whose_own_run_was_deleted_gets_another_with_its_trials(sweep_of: Open) -> None:
    sweep = sweep_of()
    sweep.tell(mlp(40), 0.5)
    MlflowClient().delete_run(sweep.parent.run_id)

    again = sweep_of()

    assert again.parent.run_id != sweep.parent.run_id
    board = read_board(again.parent)
    assert board is not None
    assert [row.trial for row in board.rows] == [0]


# --- of a real sweep ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["narrow", "wide"])
def test_the_note_of_a_real_sweep_has_all_its_links(swept: Path, name: str) -> None:
    parent = parent_of(swept, name)

    links = dict(re.findall(r"\[([^]]+)\]\((#[^)]+)\)", parent.tags[NOTE]))

    assert list(links) == [
        "the report",
        "the trials, best first",
        "charts of the trials",
        "the best side by side",
    ]
    assert all(parent.run_id in page for title, page in list(links.items())[:3])
    assert (swept / "mlruns" / "artifacts" / parent.run_id / "artifacts" / REPORT).exists()


@pytest.mark.parametrize("name", ["narrow", "wide"])
def test_every_trial_of_a_real_sweep_that_ended_has_its_logarithms(swept: Path, name: str) -> None:
    client = MlflowClient(f"sqlite:///{swept / 'mlruns' / 'mlflow.db'}")
    parent = client.get_run(parent_of(swept, name).run_id)

    runs = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )

    assert len(runs) == 8
    for run in runs:
        for setting in ("model.hidden_units", "optimizer.learning_rate"):
            logarithm = math.log10(float(run.data.params[setting]))
            assert run.data.metrics[f"log10/{setting}"] == pytest.approx(logarithm)
