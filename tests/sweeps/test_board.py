"""The trials of sweeps, as they are found, read, ranked and compared, on a real store."""

import itertools
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import sqrt
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

from pipeline.compose import Value
from pipeline.config import TrackingConfig
from pipeline.store import PREDICTIONS, Recorded, open_store, read_run
from sweeps.board import (
    UnrankedError,
    compare,
    find_sweeps,
    load_board,
    objectives_of,
    searched_in,
    setting,
)
from sweeps.trial import METRICS

IMAGES = 100


def tracking(folder: Path) -> TrackingConfig:
    return TrackingConfig(
        uri=None,
        directory=str(folder),
        experiment="digits",
        run_name=None,
        system_metrics=False,
        figures=False,
    )


@dataclass(frozen=True, kw_only=True)
class Given:
    """A trial to record, as a worker does.

    Attributes:
        values: By objective.
        status: How its run ended.
        params: By dotted name.
        right: First and last of the validation images that it has right, if kept.
        images: Their digest.
        error: Why it failed.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    status: str = "FINISHED"
    params: Mapping[str, str] = field(default_factory=dict)
    right: tuple[int, int] | None = None
    images: str = "0123456789abcdef"
    error: str = ""


def accurate(value: float, **params: str) -> Given:
    """A complete trial."""
    dotted = {name.replace("__", "."): text for name, text in params.items()}
    return Given(values={"val_accuracy": value}, params=dotted)


PRUNED = Given(values={"val_accuracy": 0.99}, status="KILLED")


def failed(error: str) -> Given:
    return Given(status="FAILED", error=error)


class Store:
    """A real store to record in; each run starts a second after the one before."""

    def __init__(self, experiment_id: str) -> None:
        self.experiment_id = experiment_id
        self.client = mlflow.MlflowClient()
        self.clock = itertools.count(1_700_000_000_000, 1000)

    def sweep(
        self,
        name: str,
        *trials: Given,
        objective: str = "val_accuracy",
        space: Sequence[str] = (),
        counts: Mapping[str, float] | None = None,
    ) -> Recorded:
        """Records a sweep; it counts what it has unless told otherwise."""
        tags = {"kind": "sweep", "sweep": name, "objective": objective}
        run_id = self._create(name, tags)
        params = {f"search.space.{each}": "interval(0, 1)" for each in space}
        states = [trial.status for trial in trials]
        counted = {
            "finished": states.count("FINISHED") + states.count("KILLED"),
            "pruned": states.count("KILLED"),
            "failed": states.count("FAILED"),
        }
        self._log(run_id, counted if counts is None else counts, params)
        for number, trial in enumerate(trials):
            self.trial(run_id, name, number, trial)
        self.client.set_terminated(run_id, "FINISHED")
        return read_run(run_id)

    def trial(self, parent: str, sweep: str, number: int, trial: Given) -> str:
        tags = {"mlflow.parentRunId": parent, "sweep": sweep, "trial": str(number)}
        run_id = self._create(f"trial-{number:03}", tags)
        metrics = {"epoch": 1.0, "parameters": 99.0, "fit_seconds": 1.0}
        metrics |= {METRICS.get(name, name): value for name, value in trial.values.items()}
        self._log(run_id, metrics, trial.params)
        self._log_images(run_id, trial.images)
        if trial.right:
            self._log_predictions(run_id, *trial.right)
        if trial.error:
            self.client.set_tag(run_id, "error", trial.error)
        if trial.status != "RUNNING":
            self.client.set_terminated(run_id, trial.status)
        return run_id

    def delete(self, condition: str) -> None:
        for run in self.client.search_runs([self.experiment_id], condition):
            self.client.delete_run(run.info.run_id)

    def _create(self, name: str, tags: Mapping[str, str]) -> str:
        created = self.client.create_run(self.experiment_id, next(self.clock), dict(tags), name)
        return str(created.info.run_id)

    def _log(self, run_id: str, metrics: Mapping[str, float], params: Mapping[str, str]) -> None:
        self.client.log_batch(
            run_id,
            metrics=[Metric(name, value, 0, 0) for name, value in metrics.items()],
            params=[Param(name, text) for name, text in params.items()],
        )

    def _log_images(self, run_id: str, digest: str) -> None:
        profile = json.dumps({"num_rows": IMAGES})
        images = Dataset("digits", digest, "local", "{}", profile=profile)
        context = [InputTag("mlflow.data.context", "validation")]
        self.client.log_inputs(run_id, [DatasetInput(images, context)])

    def _log_predictions(self, run_id: str, first: int, last: int) -> None:
        wrong = np.ones(IMAGES, np.uint8)
        wrong[first:last] = 0
        labels, losses = np.zeros(IMAGES, np.uint8), wrong.astype(np.float16)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(PREDICTIONS).name
            np.savez(path, label=labels, prediction=wrong, loss=losses)
            self.client.log_artifact(run_id, str(path), str(Path(PREDICTIONS).parent))


@pytest.fixture(scope="module")
def created(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without runs: to create one takes seconds."""
    folder = tmp_path_factory.mktemp("created")
    open_store(tracking(folder))
    return folder


@pytest.fixture
def store(created: Path, tmp_path: Path) -> Store:
    """A store without runs, of this test alone."""
    shutil.copy(created / "mlflow.db", tmp_path / "mlflow.db")
    return Store(open_store(tracking(tmp_path)).experiment_id)


def trials_in(sweeps: Sequence[Recorded], limit: int | None = None) -> list[tuple[str, int]]:
    return [(row.sweep, row.trial) for row in load_board(sweeps, limit=limit).rows]


def names_of(sweeps: Sequence[Recorded]) -> list[str]:
    return [sweep.tags["sweep"] for sweep in sweeps]


# --- sweeps by their names ---------------------------------------------------------------


def test_without_a_name_the_latest_sweep_is_found(store: Store) -> None:
    for name in ("first", "second", "third"):
        store.sweep(name, accurate(0.9))

    assert names_of(find_sweeps([])) == ["third"]


def test_sweeps_are_found_in_the_order_asked_for(store: Store) -> None:
    for name in ("a", "b", "c"):
        store.sweep(name)

    assert names_of(find_sweeps(["b", "c", "a"])) == ["b", "c", "a"]


def test_sweeps_are_found_in_any_experiment(store: Store) -> None:
    store.sweep("here")
    store.experiment_id = store.client.create_experiment("another")
    store.sweep("there")

    assert names_of(find_sweeps(["here", "there"])) == ["here", "there"]


def test_of_several_sweeps_of_one_name_the_latest_is_found(store: Store) -> None:
    store.sweep("again", accurate(0.5))
    latest = store.sweep("again", accurate(0.6))

    assert [sweep.run_id for sweep in find_sweeps(["again"])] == [latest.run_id]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("narow", "did you mean narrow?"),
        ("wid", "did you mean wide or widest?"),
        ("qqqq", "the latest are widest, wide, narrow."),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest(name: str, told: str, store: Store) -> None:
    for known in ("narrow", "wide", "widest"):
        store.sweep(known)

    with pytest.raises(UnrankedError) as raised:
        find_sweeps(["narrow", name])

    assert str(raised.value) == f"sweep.name={name}: no such sweep; {told}"


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([], "no sweep is recorded here: run python -m sweeps.run data=digits."),
        (["wide"], "sweep.name=wide: no such sweep; no sweep is recorded here."),
    ],
)
def test_a_store_without_sweeps_is_told(names: list[str], told: str, store: Store) -> None:
    store.sweep("deleted")
    store.delete("tags.kind = 'sweep'")

    with pytest.raises(UnrankedError) as raised:
        find_sweeps(names)

    assert str(raised.value) == told


def test_a_sweep_tells_its_objectives_and_what_it_searches(store: Store) -> None:
    objectives = "val_accuracy, parameters"
    sweep = store.sweep("wide", objective=objectives, space=["model.hidden_units", "optimizer"])

    assert objectives_of(sweep) == ("val_accuracy", "parameters")
    assert searched_in(sweep) == ["model.hidden_units", "optimizer"]


# --- what is ranked ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "order"),
    [("val_accuracy", [1, 2, 0]), ("val_loss", [0, 2, 1]), ("parameters", [0, 2, 1])],
)
def test_the_best_comes_first(objective: str, order: list[int], store: Store) -> None:
    trials = [Given(values={objective: value}) for value in (0.1, 0.9, 0.5)]

    board = load_board([store.sweep("wide", *trials, objective=objective)], limit=None)

    assert [row.trial for row in board.rows] == order
    assert board.rows[0].difference == 0.0
    assert board.best == [board.rows[0].run]


@pytest.mark.parametrize(("limit", "shown"), [(1, [3]), (2, [3, 1]), (9, [3, 1, 2, 0])])
def test_a_limit_takes_the_best_and_the_total_counts_all(
    limit: int, shown: list[int], store: Store
) -> None:
    values = (0.1, 0.8, 0.5, 0.9)
    sweep = store.sweep("wide", *map(accurate, values), PRUNED, PRUNED, failed("no memory"))

    board = load_board([sweep], limit=limit)

    assert [row.trial for row in board.rows] == shown
    assert board.total == 4


def test_only_complete_trials_of_the_sweep_are_ranked(store: Store) -> None:
    running = Given(values={"val_accuracy": 0.99}, status="RUNNING")
    sweep = store.sweep("wide", accurate(0.5), PRUNED, running, failed("diverged"))
    store.sweep("another", accurate(0.99))
    store.trial(sweep.run_id, "wide", 9, accurate(0.98))
    store.delete("tags.trial = '9'")

    assert trials_in([sweep]) == [("wide", 0)]


def test_equal_trials_are_in_their_order(store: Store) -> None:
    sweep = store.sweep("wide", accurate(0.5), accurate(0.7), accurate(0.7), accurate(0.7))

    assert trials_in([sweep]) == [("wide", 1), ("wide", 2), ("wide", 3), ("wide", 0)]


def test_a_row_has_its_rank_its_difference_and_a_margin(store: Store) -> None:
    kept = [(0, 90), (2, 90), (0, 60)]
    trials = [
        Given(values={"val_accuracy": (last - first) / IMAGES}, right=(first, last))
        for first, last in kept
    ]

    board = load_board([store.sweep("wide", *trials)], limit=None)

    rows = board.rows
    margins = [0.0, 1.959964 * sqrt(3 - 4 / 102) / 102, 1.959964 * sqrt(31 - 900 / 102) / 102]
    assert [row.rank for row in rows] == [1, 1, 3]
    assert [row.values for row in rows] == [(0.9,), (0.88,), (0.6,)]
    assert [row.difference for row in rows] == pytest.approx([0.0, -0.02, -0.3])
    assert [row.margin for row in rows] == pytest.approx(margins)
    assert (board.is_paired, board.images) == (True, IMAGES)
    assert board.noise == (
        "An equal rank is no difference beyond the noise of the 100 validation images "
        "(95%, paired); another seed adds noise of its own."
    )


def test_where_one_has_no_predictions_the_noise_is_called_binomial(store: Store) -> None:
    kept = Given(values={"val_accuracy": 0.9}, right=(0, 90))
    board = load_board([store.sweep("wide", kept, accurate(0.8))], limit=None)

    variance = (91 / 102 * 11 / 102 + 81 / 102 * 21 / 102) / 102
    assert board.rows[1].margin == pytest.approx(1.959964 * sqrt(variance))
    assert not board.is_paired
    assert "(95%, binomial: some predictions are not kept)" in board.noise


def test_the_noise_of_losses_is_not_called_binomial_where_it_is_unknown(store: Store) -> None:
    trials = [Given(values={"val_loss": value}) for value in (0.2, 0.21)]
    board = load_board([store.sweep("wide", *trials, objective="val_loss")], limit=None)

    assert [(row.rank, row.margin) for row in board.rows] == [(1, 0.0), (2, None)]
    assert "binomial" not in board.noise


def test_what_is_not_measured_on_images_has_no_noise_to_tell_of(store: Store) -> None:
    trials = [Given(values={"parameters": value}) for value in (650.0, 651.0)]
    board = load_board([store.sweep("small", *trials, objective="parameters")], limit=None)

    assert [(row.rank, row.margin) for row in board.rows] == [(1, 0.0), (2, 0.0)]
    assert board.noise == ""


@pytest.mark.parametrize(
    ("confidence", "told"), [(0.9, "90%"), (0.95, "95%"), (0.995, "99.5%"), (0.999, "99.9%")]
)
def test_the_confidence_is_told_as_it_is(confidence: float, told: str, store: Store) -> None:
    sweep = store.sweep("wide", accurate(0.9))

    assert f"({told}, " in load_board([sweep], limit=None, confidence=confidence).noise


def test_sweeps_are_ranked_together(store: Store) -> None:
    wide = store.sweep("wide", accurate(0.9), accurate(0.7))
    narrow = store.sweep("narrow", accurate(0.8), accurate(0.5))

    board = load_board([narrow, wide], limit=3)

    assert [(row.sweep, row.trial) for row in board.rows] == [
        ("wide", 0), ("narrow", 0), ("wide", 1)
    ]  # fmt: skip
    assert [run.tags["sweep"] for run in board.best] == ["narrow", "wide"]
    assert board.total == 4


# --- several objectives ------------------------------------------------------------------


def test_of_several_objectives_the_front_has_rank_1_and_the_others_none(store: Store) -> None:
    trials = [
        Given(values={"val_accuracy": accuracy, "parameters": parameters})
        for accuracy, parameters in [
            (0.7, 100.0),
            (0.9, 500.0),
            (0.8, 500.0),  # no more accurate than the one before, and as large
            (0.95, 900.0),
            (0.6, 200.0),
            (0.9, 500.0),
        ]
    ]
    sweep = store.sweep("both", *trials, objective="val_accuracy, parameters")

    board = load_board([sweep], limit=None)

    assert [(row.trial, row.rank) for row in board.rows] == [
        (3, 1), (1, 1), (5, 1), (0, 1), (2, None), (4, None)
    ]  # fmt: skip
    assert board.rows[0].values == (0.95, 900.0)
    assert {(row.difference, row.margin) for row in board.rows} == {(None, None)}
    assert board.noise == (
        "Rank 1 is the Pareto front: no other is better in one value and as good in all."
    )
    assert [row.trial for row in load_board([sweep], limit=4).rows] == [3, 1, 5, 0]


# --- nothing to rank ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trials", "told"),
    [
        ([], "no trial is complete yet; 0 were pruned."),
        ([PRUNED, PRUNED], "no trial is complete yet; 2 were pruned."),
        (
            [failed("no memory"), PRUNED, failed("val_loss is nan at epoch 1")],
            "no trial is complete, 2 failed; the last one: val_loss is nan at epoch 1",
        ),
        ([failed("")], "no trial is complete, 1 failed; the last one: no reason is recorded"),
    ],
)
def test_a_sweep_without_a_complete_trial_tells_why(
    trials: list[Given], told: str, store: Store
) -> None:
    full, empty = store.sweep("full", accurate(0.9)), store.sweep("empty", *trials)

    with pytest.raises(UnrankedError) as raised:
        load_board([full, empty], limit=20)

    assert str(raised.value) == f"sweep.name=empty: {told}"


def test_a_sweep_that_has_recorded_nothing_yet_is_told(store: Store) -> None:
    with pytest.raises(UnrankedError, match="no trial is complete yet; 0 were pruned"):
        load_board([store.sweep("begun", counts={})], limit=20)


def test_a_sweep_whose_failed_runs_were_deleted_is_told(store: Store) -> None:
    sweep = store.sweep("failing", failed("no memory"))
    store.delete("tags.error = 'no memory'")

    with pytest.raises(UnrankedError, match="no reason is recorded"):
        load_board([sweep], limit=20)


@pytest.mark.parametrize("counts", [{}, {"finished": 1, "pruned": 0, "failed": 0}])
def test_a_sweep_under_way_is_ranked_though_it_has_not_counted_its_last_trials(
    counts: dict[str, float], store: Store
) -> None:
    sweep = store.sweep("under-way", accurate(0.9), accurate(0.8), counts=counts)

    board = load_board([sweep], limit=20)

    assert len(board.rows) == 2
    assert board.total == 2


def test_sweeps_of_different_objectives_are_refused(store: Store) -> None:
    accurate_, small = (
        store.sweep("accurate", accurate(0.9)),
        store.sweep("small", objective="val_accuracy, parameters"),
    )

    with pytest.raises(UnrankedError) as raised:
        load_board([accurate_, small], limit=20)

    assert str(raised.value) == (
        "sweep.name: the sweeps optimize different objectives: "
        "accurate has val_accuracy; small has val_accuracy, parameters."
    )


def test_sweeps_judged_on_different_images_are_refused(store: Store) -> None:
    one = store.sweep("one", accurate(0.9))
    other = store.sweep("other", Given(values={"val_accuracy": 0.9}, images="fedcba9876543210"))

    with pytest.raises(UnrankedError) as raised:
        load_board([one, other], limit=20)

    assert str(raised.value) == (
        "sweep.name=[one,other]: they were judged on different validation images, "
        "so their values do not compare."
    )


# --- settings ----------------------------------------------------------------------------


def test_what_was_searched_is_shown_first_then_what_differs_besides(store: Store) -> None:
    shared = {"training__batch_size": "128", "model__hidden_units": "8"}
    sweep = store.sweep(
        "wide",
        accurate(0.9, seed="1", optimizer__name="adam", **shared),
        accurate(0.8, seed="2", optimizer__name="sgd", **shared),
        space=["model.hidden_units", "optimizer"],
    )

    settings = load_board([sweep], limit=None).settings

    # Searched first, also where all have the same; of a group, what has its name.
    assert settings == ["model.hidden_units", "optimizer.name", "seed"]


def test_where_it_ran_is_no_setting(store: Store) -> None:
    here = {"data__path": "/here", "tracking__directory": "a"}
    there = {"data__path": "/there", "tracking__directory": "b"}
    sweep = store.sweep("wide", accurate(0.9, **here), accurate(0.8, **there))

    assert load_board([sweep], limit=None).settings == []


def test_only_what_differs_among_the_rows_shown_is_a_setting(store: Store) -> None:
    sweep = store.sweep(
        "wide", accurate(0.9, seed="1"), accurate(0.8, seed="1"), accurate(0.1, seed="2")
    )

    assert load_board([sweep], limit=2).settings == []
    assert load_board([sweep], limit=3).settings == ["seed"]


def test_what_one_run_alone_has_is_a_setting(store: Store) -> None:
    sweep = store.sweep("wide", accurate(0.9, optimizer__momentum="0.9"), accurate(0.8))

    board = load_board([sweep], limit=None)

    assert board.settings == ["optimizer.momentum"]
    assert [setting(row.run, "optimizer.momentum") for row in board.rows] == [0.9, None]


def recorded(**params: str) -> Recorded:
    return Recorded(
        run_id="0",
        name="trial-000",
        experiment_id="1",
        parent=None,
        status="FINISHED",
        started=datetime.now(UTC),
        seconds=1.0,
        params=params,
        metrics={},
        tags={},
        artifacts="file:///nowhere",
        validation=None,
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64", 64),
        ("-1", -1),
        ("0", 0),
        ("0.5", 0.5),
        ("1.0", 1.0),
        ("8.1e-04", 8.1e-4),
        ("1e-05", 1e-5),
        ("true", True),
        ("false", False),
        ("null", None),
        ("adam", "adam"),
        ("True", "True"),
        ("", ""),
    ],
)
def test_a_setting_is_the_value_that_its_text_stands_for(text: str, value: Value) -> None:
    found = setting(recorded(name=text), "name")

    assert (type(found), found) == (type(value), value)


def test_a_setting_that_a_run_does_not_have_is_none() -> None:
    assert setting(recorded(name="64"), "another") is None


# --- one sweep against another -----------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "first", "second", "gain"),
    [
        ("val_accuracy", 0.8, 0.9, 0.1),
        ("val_accuracy", 0.9, 0.8, -0.1),
        ("val_loss", 0.3, 0.2, 0.1),
        ("val_loss", 0.2, 0.3, -0.1),
        ("parameters", 500.0, 400.0, 100.0),
        ("val_accuracy", 0.8, 0.8, 0.0),
    ],
)
def test_a_gain_is_positive_where_the_second_is_better(
    objective: str, first: float, second: float, gain: float, store: Store
) -> None:
    sweeps = [
        store.sweep(name, Given(values={objective: value}), objective=objective)
        for name, value in (("first", first), ("second", second))
    ]

    (found,) = compare(load_board(sweeps, limit=None))

    assert (found.one, found.other) == ("first", "second")
    assert found.gain == pytest.approx(gain)


def test_the_best_are_compared_with_a_paired_margin_and_the_trials_of_either(store: Store) -> None:
    one = store.sweep("one", Given(values={"val_accuracy": 0.8}, right=(0, 80)), accurate(0.1))
    best = Given(values={"val_accuracy": 0.85}, right=(2, 87))
    other = store.sweep("other", accurate(0.2), best, PRUNED, failed("no memory"))

    (found,) = compare(load_board([one, other], limit=None, confidence=0.9))

    assert found.gain == pytest.approx(0.05)
    assert found.margin == pytest.approx(1.644854 * sqrt(10 - 25 / 102) / 102)
    assert found.trials == (2, 3)


def test_a_margin_is_none_where_the_noise_is_unknown(store: Store) -> None:
    sweeps = [
        store.sweep(name, Given(values={"val_loss": 0.1}), objective="val_loss") for name in "ab"
    ]

    (found,) = compare(load_board(sweeps, limit=None))

    assert found.margin is None


def test_each_further_sweep_is_compared_with_the_first(store: Store) -> None:
    values = {"a": 0.5, "b": 0.6, "c": 0.4}
    sweeps = [store.sweep(name, accurate(value)) for name, value in values.items()]

    found = compare(load_board(sweeps, limit=None))

    assert [(each.one, each.other) for each in found] == [("a", "b"), ("a", "c")]
    assert [each.gain for each in found] == pytest.approx([0.1, -0.1])


def test_sweeps_are_compared_also_where_one_has_no_row_among_those_shown(store: Store) -> None:
    wide = store.sweep("wide", accurate(0.9), accurate(0.8))
    narrow = store.sweep("narrow", accurate(0.2))

    (found,) = compare(load_board([narrow, wide], limit=1))

    assert found.gain == pytest.approx(0.7)


# --- real sweeps -------------------------------------------------------------------------


@pytest.fixture
def real(swept: Path) -> list[Recorded]:
    """`narrow` and `wide`."""
    open_store(tracking(swept / "mlruns"))
    return find_sweeps(["narrow", "wide"])


def test_real_trials_are_paired_and_what_was_searched_are_their_settings(
    real: list[Recorded],
) -> None:
    board = load_board(real, limit=20)

    searched = ["model.hidden_units", "model.dropout_rate", "optimizer.learning_rate"]
    values = [row.values[0] for row in board.rows]
    assert board.objectives == ("val_accuracy",)
    assert (board.is_paired, board.images) == (True, 240)
    assert len(board.rows) == board.total
    assert values == sorted(values, reverse=True)
    assert board.rows[0].rank == 1
    assert board.settings == searched == searched_in(real[0])
    assert all(row.run.metrics["saved_val_accuracy"] == row.values[0] for row in board.rows)


def test_real_sweeps_differ_beyond_the_noise_of_their_images(real: list[Recorded]) -> None:
    (found,) = compare(load_board(real, limit=20))

    assert found.margin is not None
    assert found.gain > found.margin > 0
    assert found.trials == (8, 8)


# --- what somebody else left in a store --------------------------------------------------


def test_a_sweep_recorded_without_its_objective_has_it_as_a_parameter(store: Store) -> None:
    sweep = store.sweep("old", accurate(0.9))
    store.client.delete_tag(sweep.run_id, "objective")
    store.client.log_param(sweep.run_id, "sweep.objective", "val_accuracy")

    assert load_board(find_sweeps(["old"]), limit=None).objectives == ("val_accuracy",)


def test_a_run_that_no_worker_recorded_is_passed_over(store: Store) -> None:
    sweep = store.sweep("mixed", accurate(0.8))
    tags = {"mlflow.parentRunId": sweep.run_id, "sweep": "mixed", "trial": "1"}
    by_hand = store.client.create_run(store.experiment_id, tags=tags)
    store.client.log_metric(by_hand.info.run_id, "saved_val_accuracy", 0.99)
    store.client.set_terminated(by_hand.info.run_id, "FINISHED")

    assert trials_in([sweep]) == [("mixed", 0)]
