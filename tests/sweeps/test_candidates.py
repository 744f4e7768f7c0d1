"""What may be promoted, and its trainings on fresh seeds: real runs, real workers that die."""

import shlex
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
import psutil
import pytest

from pipeline.store import Recorded, open_store, read_run
from pipeline.tracking import Run, create_run
from sweeps.candidates import (
    Candidate,
    NothingToPromoteError,
    Retrained,
    Retraining,
    Source,
    best_of,
    candidates_of,
    checked_data,
    find_source,
)
from sweeps.config import PromotionConfig
from sweeps.executors import LocalExecutor
from sweeps.trial import warm_up
from tests.launching import wait_until, workers_of
from tests.promotions import NARROW, TINY, Bench, composed
from tests.stores import query

SGD = ("training.batch_size=512", "training.epochs=2", "optimizer=sgd")
HOT = (NARROW, *SGD, "optimizer.learning_rate=1e30")  # diverges
# Diverges with seed 0, not with 2 or 1002: so large, only networks without a dead layer do.
EDGE = (NARROW, *SGD, "optimizer.learning_rate=1e19", "seed=2")
UNJUDGED = (
    "evaluate_test=true",
    "data.validation_size=0",
    "training.early_stopping_patience=null",
    "training.restore_best_weights=false",
)
SEEDS = (1001, 1002)


@dataclass(frozen=True)
class Stock:
    """A store with all kinds of runs; to be left as it is."""

    bench: Bench
    ids: Mapping[str, str]

    def config(self, *overrides: str) -> PromotionConfig:
        self.bench.connect()
        folder = f"tracking.directory={self.bench.folder / 'mlruns'}"
        return composed(*overrides, folder)

    def source(self, *overrides: str) -> Source:
        return find_source(self.config(*overrides))

    def candidates(self, *overrides: str) -> list[Candidate]:
        config = self.config(*overrides)
        return candidates_of(find_source(config), config, "digits")


def end(bench: Bench, status: str, tags: Mapping[str, object], parent: Run | None = None) -> str:
    """A run that trained nothing."""
    run = create_run(open_store(bench.configure().tracking), status.lower(), tags, parent=parent)
    if status != "RUNNING":
        run.end(status)
    return run.run_id


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, tensorflow: None) -> Stock:
    bench = Bench(tmp_path_factory.mktemp("stock"))
    bench.sweep("failed", HOT)
    pruned = bench.sweep("pruned")
    parent = Run(run_id=pruned.run_id, name="pruned", store=open_store(bench.configure().tracking))
    end(bench, "KILLED", {"sweep": "pruned", "trial": 0}, parent)
    parent.log_metrics({"finished": 1, "pruned": 1})
    ids = {
        "failed": bench.train(*HOT).run_id,
        "killed": end(bench, "KILLED", {}),
        "running": end(bench, "RUNNING", {}),
        "empty": end(bench, "FINISHED", {}),
        "promotion": end(bench, "FINISHED", {"kind": "promotion"}),
        "deleted": end(bench, "FINISHED", {}),
        "edge": bench.train(*EDGE).run_id,
        "single": bench.train(NARROW, "seed=7").run_id,
        "unjudged": bench.train(NARROW, *UNJUDGED).run_id,
        "long": bench.train(NARROW, "training.epochs=40", "seed=8").run_id,
    }
    mlflow.delete_run(ids["deleted"])
    bench.sweep("good", (NARROW,), ("model.hidden_units=32",), (NARROW,))
    return Stock(bench, ids)


# --- finding -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tells"),
    [
        ("goood", r"sweep\.name=goood: no such sweep; did you mean good\?"),
        ("failed", r"sweep\.name=failed: no trial is complete, 1 failed; .* diverged in epoch 1"),
        ("pruned", r"sweep\.name=pruned: no trial is complete yet; 1 were pruned"),
    ],
)
def test_a_sweep_with_nothing_to_promote_ends_with_status_3(
    stock: Stock, name: str, tells: str
) -> None:
    with pytest.raises(NothingToPromoteError, match=tells) as told:
        stock.source(f"sweep.name={name}")

    assert told.value.exit_status == 3
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "tells"),
    [
        ("failed", r"\) is FAILED \(DivergedError: the training diverged in epoch 1"),
        ("killed", r"\(killed\) is KILLED: only a FINISHED run can be promoted\.$"),
        ("running", r"\(running\) is RUNNING: only a FINISHED run can be promoted\.$"),
        ("empty", r"\(finished\) was judged on no validation images\."),
        ("unjudged", r"was judged on no validation images\."),
        ("deleted", r"\(finished\) was deleted: restore it\."),
        ("promotion", r"is a promotion: give a run that trained a model\."),
    ],
)
def test_a_run_that_cannot_be_promoted_ends_with_status_3(
    stock: Stock, kind: str, tells: str
) -> None:
    with pytest.raises(NothingToPromoteError, match=f"run={stock.ids[kind]} .*?{tells}") as told:
        stock.source(f"run={stock.ids[kind]}")

    assert told.value.exit_status == 3


@pytest.mark.parametrize("run_id", ["0" * 32, "../x", "x" * 40])
def test_a_run_that_is_not_there_is_told_by_its_id(stock: Stock, run_id: str) -> None:
    with pytest.raises(ValueError, match=f"no run has the id {run_id}"):
        stock.source(f"run={run_id}")


def test_the_latest_sweep_is_promoted_unless_one_is_named(stock: Stock) -> None:
    source = stock.source()

    assert (source.title, source.objective) == ("sweep good", "val_accuracy")
    values = [run.metrics["saved_val_accuracy"] for run in source.best]
    assert values == sorted(values, reverse=True)
    assert len(values) == 2


def test_a_configuration_that_a_sweep_tried_twice_is_one_candidate(stock: Stock) -> None:
    widths = [run.params["model.hidden_units"] for run in stock.source("promote.top=3").best]

    assert sorted(widths) == ["32", "4"]


def test_at_most_the_top_of_a_sweep_is_trained_again(stock: Stock) -> None:
    (best,) = stock.source("promote.top=1").best

    assert best.run_id == stock.source().best[0].run_id


def test_a_sweep_may_be_named_by_its_own_run(stock: Stock) -> None:
    named = stock.source("sweep.name=good")

    assert stock.source(f"run={named.run.run_id}") == named


def test_a_single_run_is_its_own_candidate(stock: Stock) -> None:
    (candidate,) = stock.candidates(f"run={stock.ids['single']}")

    assert candidate.title == read_run(stock.ids["single"]).name
    assert candidate.config.seed == 7
    assert not candidate.config.evaluate_test
    assert candidate.config.tracking.experiment == "digits"


def test_a_seed_of_the_search_is_not_fresh(stock: Stock) -> None:
    with pytest.raises(ValueError, match=r"promote\.seeds must be fresh, got 7, which .* searched"):
        stock.candidates(f"run={stock.ids['single']}", "promote.seeds=[1001, 7]")


def test_a_run_whose_configuration_is_gone_is_told(stock: Stock, tmp_path: Path) -> None:
    bench = stock.bench.copy(tmp_path)
    run = read_run(stock.ids["single"])
    (Path(run.artifacts.removeprefix("file://")) / "config.yaml").unlink()
    copied = Stock(bench, stock.ids)

    with pytest.raises(ValueError, match=r"has no readable config\.yaml"):
        copied.candidates(f"run={run.run_id}")


@pytest.mark.parametrize(
    "given",
    [
        "data=digits",
        "data=digits seed=3",
        "data=digits evaluate_test=false seed=3",
        "seed=3 data=digits evaluate_test=true",
    ],
)
def test_the_command_of_a_training_has_its_seed_and_leaves_the_test_split_alone(
    stock: Stock, given: str
) -> None:
    (candidate,) = stock.candidates(f"run={stock.ids['single']}")
    tags = {**candidate.run.tags, "command": f"python -m pipeline.run {given}"}
    told = replace(candidate, run=replace(candidate.run, tags=tags)).command(1001)

    words = shlex.split(told)

    assert sorted(words[3:]) == ["data=digits", "evaluate_test=false", "seed=1001"]


# --- choosing ----------------------------------------------------------------------------


@pytest.fixture
def example(stock: Stock) -> Candidate:
    (candidate,) = stock.candidates(f"run={stock.ids['single']}")
    return candidate


def retrained(
    example: Candidate, *values: float, objective: str = "val_accuracy", failed: int = 0
) -> Retrained:
    """A candidate whose runs have these values."""
    runs = {
        1001 + number: replace(example.run, run_id=f"r{number}", metrics={f"saved_{objective}": x})
        for number, x in enumerate(values)
    }
    failures = {2001 + number: "diverged" for number in range(failed)}
    candidate = replace(example, objective=objective)
    return Retrained(candidate=candidate, runs=runs, failures=failures)


@pytest.mark.parametrize(
    ("values", "place"),
    [([0.5], 0), ([0.9, 0.1], 1), ([0.2, 0.9, 0.5], 2), ([0.4, 0.1, 0.3, 0.2], 3), ([0.5] * 3, 1)],
)
def test_the_challenger_is_the_middle_run_the_lower_of_two(
    example: Candidate, values: list[float], place: int
) -> None:
    seed, run = retrained(example, *values).median

    assert (seed, run.run_id) == (1001 + place, f"r{place}")


def test_the_finalist_has_the_best_mean_not_the_best_run(example: Candidate) -> None:
    steady, lucky = retrained(example, 0.8, 0.8), retrained(example, 0.99, 0.5)

    assert best_of([lucky, steady]) is steady


def test_where_the_smaller_takes_the_place_the_finalist_is_among_the_smaller_ones(
    example: Candidate,
) -> None:
    def of_size(parameters: float, value: float) -> Retrained:
        metrics = {**example.run.metrics, "parameters": parameters}
        sized = replace(example, run=replace(example.run, metrics=metrics))
        return retrained(sized, value)

    large, medium, small = of_size(300, 0.9), of_size(200, 0.8), of_size(100, 0.7)

    assert best_of([large, medium, small], below=300) is medium
    assert best_of([large, medium, small], below=200) is small
    assert best_of([large, medium, small], below=100) is large


def test_of_losses_the_lowest_mean_is_the_best(example: Candidate) -> None:
    low = retrained(example, 0.1, 0.2, objective="val_loss")
    high = retrained(example, 0.3, 0.4, objective="val_loss")

    assert best_of([high, low]) is low


def test_a_candidate_of_which_a_seed_failed_is_out(example: Candidate) -> None:
    best, other = retrained(example, 0.99, failed=1), retrained(example, 0.5, 0.6)

    assert best_of([best, other]) is other
    assert best_of([best, retrained(example, failed=2)]) is None


@pytest.mark.parametrize(("objective", "luck"), [("val_accuracy", -0.1), ("val_loss", 0.1)])
def test_luck_is_what_the_search_was_better_by(
    example: Candidate, objective: str, luck: float
) -> None:
    found = retrained(example, 0.6, 0.8, objective=objective)
    searched = replace(example.run, metrics={f"saved_{objective}": 0.6})
    found = replace(found, candidate=replace(found.candidate, run=searched))

    assert found.mean == pytest.approx(0.7)
    assert found.spread == pytest.approx(0.02**0.5)
    assert found.luck == pytest.approx(luck)
    assert replace(found, runs={1001: found.runs[1001]}).spread is None


# --- training again ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def executor() -> Iterator[LocalExecutor]:
    """One worker for all: it takes seconds to start."""
    with LocalExecutor(1, warm_up) as executor:
        yield executor


@dataclass
class Session:
    """A promotion's trainings in a store of their own."""

    stock: Stock
    retraining: Retraining
    parent: Run
    executor: LocalExecutor
    said: list[str]

    def run(self, candidates: Sequence[Candidate], received: Sequence[int] = ()) -> list[Retrained]:
        missing = self.retraining.missing(candidates)
        self.retraining.run(
            missing, self.parent, self.executor, received=received, show=self.said.append
        )
        return [self.retraining.result(candidate) for candidate in candidates]

    def again(self) -> "Session":
        """As another process would go on."""
        fresh = replace(
            self.retraining, flights={}, deaths=Counter(), failures={}, is_landing=False
        )
        return replace(self, retraining=fresh, said=[])


@pytest.fixture
def session(stock: Stock, executor: LocalExecutor, tmp_path: Path) -> Session:
    copied = Stock(stock.bench.copy(tmp_path), stock.ids)
    store = open_store(copied.bench.configure().tracking)
    parent = create_run(store, "promotion", {"kind": "promotion"})
    retraining = Retraining(store=store, name="digits", seeds=SEEDS)
    return Session(copied, retraining, parent, executor, [])


def test_each_candidate_is_trained_on_each_fresh_seed_once_as_the_command_would(
    session: Session,
) -> None:
    candidates = session.stock.candidates("sweep.name=good")

    found = session.run(candidates)

    assert [list(each.runs) for each in found] == [[1001, 1002]] * 2
    assert len(session.said) == 4
    run = found[0].runs[1001]
    assert (run.status, run.parent) == ("FINISHED", session.parent.run_id)
    assert run.tags["retrains"] == candidates[0].run.run_id
    assert run.tags["retrained.seed"] == run.tags["seed"] == "1001"
    assert run.validation == candidates[0].run.validation
    assert "test_split" not in run.tags
    words = shlex.split(run.tags["command"])
    assert words[:3] == ["python", "-m", "pipeline.run"]
    assert set(TINY) < set(words)
    repeated = session.stock.bench.train(*(word for word in words[3:] if word not in TINY))
    assert measured(repeated) == measured(run)
    later = session.again()
    assert (later.retraining.missing(candidates), later.run(candidates)) == ([], found)
    assert later.said == []


def measured(run: Recorded) -> dict[str, float]:
    """What a training comes to, but for its time."""
    return {
        name: value
        for name, value in run.metrics.items()
        if not name.endswith("_seconds") and "per_second" not in name
    }


def test_a_candidate_that_diverges_on_a_fresh_seed_is_out_and_that_is_said(
    session: Session,
) -> None:
    (edge,) = session.stock.candidates(f"run={session.stock.ids['edge']}", "promote.seeds=[0]")
    (single,) = session.stock.candidates(f"run={session.stock.ids['single']}")
    session.retraining.seeds = (0, 1002)

    found = session.run([edge, single])

    assert found[0].failures.keys() == {0}
    assert "the training diverged in epoch" in found[0].failures[0]
    assert found[0].runs.keys() == {1002}
    assert best_of(found) is found[1]
    (told,) = [line for line in session.said if "failed" in line]
    assert told.startswith(f"{edge.title}  seed 0  failed: the training diverged")


def test_a_network_that_does_not_fit_any_more_is_out(session: Session) -> None:
    (single,) = session.stock.candidates(f"run={session.stock.ids['single']}")
    model = replace(single.config.model, hidden_units=10**9)
    large = replace(single, config=replace(single.config, model=model))

    (found,) = session.run([large])

    assert found.failures.keys() == set(SEEDS)
    assert all("model.hidden_units" in reason for reason in found.failures.values())
    assert best_of([found]) is None


def test_trainings_of_other_images_than_the_search_are_refused(session: Session) -> None:
    (single,) = session.stock.candidates(f"run={session.stock.ids['single']}")
    data = replace(single.config.data, split_seed=1)
    session.retraining.seeds = (1001,)

    with pytest.raises(ValueError, match=r"the validation images are not those of .* data\.path"):
        session.run([replace(single, config=replace(single.config, data=data))])


def test_data_that_the_search_did_not_see_is_refused_before_anything_is_trained(
    stock: Stock,
) -> None:
    (single,) = stock.candidates(f"run={stock.ids['single']}")
    data = replace(single.config.data, split_seed=1)

    with pytest.raises(ValueError, match=r"is not what .* was searched on: set data\.path to"):
        checked_data(replace(single, config=replace(single.config, data=data)))
    assert checked_data(single).validation is not None


def test_a_signal_that_came_before_leaves_all_to_be_trained(session: Session) -> None:
    candidates = session.stock.candidates(f"run={session.stock.ids['single']}")
    session.retraining.run(
        session.retraining.missing(candidates),
        session.parent,
        session.executor,
        received=[signal.SIGTERM],
        show=session.said.append,
    )

    assert len(session.retraining.missing(candidates)) == len(SEEDS)
    assert session.said == []


# Last: the worker that all share has to be started again.


def kill_a_worker(session: Session, epoch: int, times: int = 1) -> threading.Thread:
    """Kills the worker each time a training is some epochs further."""

    def reached() -> int:
        sql = (
            "SELECT coalesce(max(metrics.value), 0) FROM metrics JOIN tags USING (run_uuid) WHERE "
            "metrics.key = 'epoch' AND tags.key = 'retrained.seed' AND tags.value = '1001'"
        )
        return int(query(session.stock.bench.database, sql)[0][0])

    def kill() -> None:
        for _ in range(times):
            target = reached() + epoch
            wait_until(lambda target=target: reached() >= target)  # type: ignore[misc]
            (worker,) = workers_of(psutil.Process())
            worker.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_a_training_whose_worker_is_killed_goes_on_to_the_same_result(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    (long,) = session.stock.candidates(f"run={session.stock.ids['long']}")
    session.retraining.seeds = (1001,)
    thread = kill_a_worker(session, 3)

    (found,) = session.run([long])

    thread.join()
    assert "It is tried again." in caplog.text
    undisturbed = session.stock.bench.train(NARROW, "training.epochs=40", "seed=1001")
    assert measured(found.runs[1001]) == measured(undisturbed)


def test_a_training_that_costs_two_workers_their_lives_is_out(session: Session) -> None:
    (long,) = session.stock.candidates(f"run={session.stock.ids['long']}")
    session.retraining.seeds = (1001,)
    thread = kill_a_worker(session, 3, times=2)

    (found,) = session.run([long])

    thread.join()
    assert found.failures[1001].endswith("2 workers died in this training.")
    assert best_of([found]) is None
    sql = "SELECT status FROM runs JOIN tags USING (run_uuid) WHERE tags.key = 'retrained.seed'"
    assert query(session.stock.bench.database, sql) == [("FAILED",)]
