"""What holds after any sweep that reached its budget, whatever happened on the way."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from tests.stores import (
    StoredRun,
    Stores,
    processes_in,
    query,
    runs_of,
    seconds_until_quiet,
    trials_of,
)

# How a run ends whose trial ends so.
RUN_STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
READY = 2  # of a logged model, in MLflow's database
QUIET = 5.0  # seconds after which no process is left


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found of an invariant.

    Attributes:
        invariant: What must hold.
        found: In a few words.
        broken: Where it does not hold, one line each.
    """

    invariant: str
    found: str
    broken: Sequence[str]


def check_invariants(folder: Path, name: str, budget: int) -> None:
    """Fails unless all holds.

    Args:
        folder: From where the sweep was run.
        name: Of the sweep.
        budget: Finished trials, complete or pruned, it was to reach.
    """
    for finding in find(Stores.local(folder), name, budget):
        assert not finding.broken, finding


def check_whole(folder: Path) -> None:
    """Both databases are intact."""
    finding = find_whole(Stores.local(folder))
    assert not finding.broken, finding


def find(stores: Stores, name: str, budget: int) -> Iterator[Finding]:
    """All that can be told from the stores and the processes of a sweep."""
    trials, runs = trials_of(stores, name), runs_of(stores, name)
    children: dict[int, list[StoredRun]] = {}
    for run in runs:
        if "trial" in run.tags:
            children.setdefault(int(run.tags["trial"]), []).append(run)
    parents = [run for run in runs if run.tags.get("kind") == "sweep"]
    yield find_values(trials, children)
    yield find_pairs(trials, children, parents)
    yield find_epochs(trials, children)
    yield find_running(stores, trials)
    yield find_numbers(trials)
    yield find_budget(trials, budget)
    yield find_parent(trials, parents)
    yield find_whole(stores)
    yield find_left_over(stores)
    yield find_processes(stores)


def find_values(trials: Sequence[FrozenTrial], children: dict[int, list[StoredRun]]) -> Finding:
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    broken = []
    for trial in complete:
        runs = [run for run in children.get(trial.number, []) if run.status == "FINISHED"]
        values = [run.metrics.get("saved_val_accuracy") for run in runs]
        if values != [trial.values[0]]:
            broken.append(f"trial {trial.number} is {trial.values[0]}, its FINISHED runs {values}")
    return Finding(
        invariant="every COMPLETE trial has exactly one FINISHED run with the same value",
        found=f"{len(complete) - len(broken)} of {len(complete)}",
        broken=broken,
    )


def find_pairs(
    trials: Sequence[FrozenTrial],
    children: dict[int, list[StoredRun]],
    parents: Sequence[StoredRun],
) -> Finding:
    broken = [
        f"run {run.run_id} is of trial {number}, which is not there"
        for number in children.keys() - {trial.number for trial in trials}
        for run in children[number]
    ]
    for trial in trials:
        runs = children.get(trial.number, [])
        broken += [f"trial {trial.number}: {what}" for what in _differences(trial, runs, parents)]
    return Finding(
        invariant="every trial has exactly one run, which ended as it did",
        found=f"{len(trials)} trials, {sum(map(len, children.values()))} runs",
        broken=broken,
    )


def _differences(
    trial: FrozenTrial, runs: Sequence[StoredRun], parents: Sequence[StoredRun]
) -> Iterator[str]:
    """Where a trial and its run are not linked both ways, or say something else."""
    if len(runs) != 1:
        yield f"{len(runs)} runs"
        return
    (run,) = runs
    status = RUN_STATUS.get(trial.state.name)
    if trial.user_attrs.get("run_id") != run.run_id:
        yield f"its run_id is {trial.user_attrs.get('run_id')}, not {run.run_id}"
    if run.tags.get("mlflow.parentRunId") not in {parent.run_id for parent in parents}:
        yield f"its run {run.run_id} is not nested under the sweep's"
    if run.status != status:
        yield f"{trial.state.name}, its run {run.run_id} is {run.status}"
    if run.models != ([READY] if status == "FINISHED" else []):
        yield f"{trial.state.name}, the models of its run have the status {run.models}"
    if trial.state == TrialState.FAIL and not run.tags.get("error"):
        yield "FAIL, its run does not say why"


def find_epochs(trials: Sequence[FrozenTrial], children: dict[int, list[StoredRun]]) -> Finding:
    broken, count = [], 0
    for trial in trials:
        for run in children.get(trial.number, []):
            steps = [step for step, _ in run.accuracies]
            count += len(steps)
            if steps != list(range(1, len(steps) + 1)):
                broken.append(f"trial {trial.number}: its run has the epochs {steps}")
            # Of several objectives none is reported, and the last epoch of a failed trial need not.
            is_reported = trial.state != TrialState.FAIL and len(trial.values or []) == 1
            reported = sorted(trial.intermediate_values.items())
            if is_reported and run.accuracies != reported:
                broken.append(f"trial {trial.number}: {reported} in the study, {run.accuracies}")
    return Finding(
        invariant="every epoch is recorded once, in the run and in the study",
        found=f"{count} epochs",
        broken=broken,
    )


def find_running(stores: Stores, trials: Sequence[FrozenTrial]) -> Finding:
    statuses = query(stores.runs, "SELECT run_uuid, status FROM runs")
    broken = [f"trial {each.number} is {each.state.name}" for each in _unfinished(trials)]
    broken += [f"run {run_id} is {status}" for run_id, status in statuses if _is_open(status)]
    return Finding(
        invariant="nothing is RUNNING",
        found=f"{len(trials)} trials and all {len(statuses)} runs have ended",
        broken=broken,
    )


def _unfinished(trials: Sequence[FrozenTrial]) -> Iterable[FrozenTrial]:
    return [trial for trial in trials if trial.state.name not in RUN_STATUS]


def _is_open(status: str) -> bool:
    return status not in RUN_STATUS.values()


def find_numbers(trials: Sequence[FrozenTrial]) -> Finding:
    numbers = [trial.number for trial in trials]
    is_whole = numbers == list(range(len(trials)))
    return Finding(
        invariant="trial numbers are unique and without gaps",
        found=f"0 to {len(trials) - 1}",
        broken=[] if is_whole else [f"the numbers are {numbers}"],
    )


def find_budget(trials: Sequence[FrozenTrial], budget: int) -> Finding:
    finished = sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials)
    return Finding(
        invariant="the number of finished trials is exactly the budget",
        found=f"{finished} of {budget}",
        broken=[] if finished == budget else [f"{finished} trials are finished"],
    )


def find_parent(trials: Sequence[FrozenTrial], parents: Sequence[StoredRun]) -> Finding:
    values = [trial.values[0] for trial in trials if trial.state == TrialState.COMPLETE]
    best = max(values, default=None)
    ends = [(run.status, run.metrics.get("best_val_accuracy")) for run in parents]
    is_right = ends == [("FINISHED", best)]
    return Finding(
        invariant="the sweep has one run of its own, FINISHED with the best value",
        found=", ".join(f"{status} {value}" for status, value in ends),
        broken=[] if is_right else [f"the best value is {best}"],
    )


def find_whole(stores: Stores) -> Finding:
    """Of SQLite its own check; PostgreSQL shows nothing of the kind to a client."""
    addresses = [each for each in (stores.study, stores.runs) if each.startswith("sqlite")]
    broken = []
    for address in addresses:
        try:
            rows = query(address, "PRAGMA integrity_check")
        except SQLAlchemyError as error:
            rows = [(f"{type(error).__name__}: {error}",)]
        broken += [f"{address}: {row[0]}" for row in rows if row != ("ok",)]
    return Finding(
        invariant="integrity_check of both databases is ok",
        found=f"of {len(addresses)} in SQLite",
        broken=broken,
    )


def find_left_over(stores: Stores) -> Finding:
    folder = stores.folder / "mlruns"
    left = [path for name in ("checkpoints", "spool") for path in (folder / name).glob("*")]
    return Finding(
        invariant="no checkpoint and nothing spooled is left over",
        found=f"{len(left)} files",
        broken=[str(path) for path in left],
    )


def find_processes(stores: Stores) -> Finding:
    seconds = seconds_until_quiet(stores.folder, limit=QUIET)
    left = processes_in(stores.folder) if seconds >= QUIET else []
    return Finding(
        invariant="no process is left",
        found=f"none after {seconds:.1f} s" if not left else f"{len(left)} after {seconds:.1f} s",
        broken=[f"process {process.pid}" for process in left],
    )
