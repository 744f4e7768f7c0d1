"""What the doctor finds of runs that are under way: who records them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from optuna.trial import TrialState

from pipeline.config import printable
from sweeps.finding import (
    PARENT,
    Check,
    Finding,
    Stores,
    count,
    few,
    note,
    process_of,
    trials,
    wrong,
)

if TYPE_CHECKING:  # or MLflow is imported
    from pipeline.outline import Outline

# How a run ends whose trial ends so.
STATUS = {
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "KILLED",
    TrialState.FAIL: "FAILED",
}
_END = "python -c 'import mlflow; mlflow.MlflowClient({}).set_terminated({}, {})'"


def check_runs(stores: Stores) -> Check:
    """Runs that are RUNNING, and no process records them."""
    stores.read()
    told = {
        trial.user_attrs.get("run_id")
        for study in stores.studies
        for trial in study.trials
        if trial.state in STATUS
    }
    running = [
        run
        for run in stores.runs.values()
        if run.status == "RUNNING" and not run.is_deleted
        if run.run_id not in told and run.run_id not in stores.behind
    ]
    groups: dict[tuple[str, ...], list[Outline]] = defaultdict(list)
    for run in running:
        groups[stores.lock_of(run.tags) or (run.run_id,)].append(run)
    owned = 0
    for runs in groups.values():
        if holder := stores.holder(runs[0].tags):
            owned += len(runs)
            yield note(f"{holder} {count(len(runs), 'run')} under way")
            continue
        by_life = _by_life(runs, stores)
        owned += len(by_life[True])
        # Some may have ended since they were read, with the sweep they are of.
        if gone := [run for run in by_life[False] if _is_as_before(run)]:
            yield _orphans(stores, gone)
        for run in by_life[None]:
            yield _unseen(stores, run)
    stored = sum(not run.is_deleted for run in stores.runs.values())
    return f"{count(stored, 'run')}, {owned or 'none'} under way"


def _by_life(runs: Sequence[Outline], stores: Stores) -> Mapping[bool | None, list[Outline]]:
    from pipeline.owner import lives

    found: dict[bool | None, list[Outline]] = {True: [], False: [], None: []}
    for run in runs:
        life = lives(run.tags.get("owner", ""))
        parent = stores.runs.get(run.tags.get(PARENT, ""))
        if parent and parent.status == "RUNNING" and lives(parent.tags.get("owner", "")):
            life = True  # a launcher whose lock is kept elsewhere: study.storage was not given
        found[life].append(run)
    return found


def title(run: Outline) -> str:
    return f"{run.name} ({run.run_id})"


def _orphans(stores: Stores, runs: Sequence[Outline]) -> Finding:
    sweep, owners = runs[0].tags.get("sweep"), [process_of(run.tags.get("owner")) for run in runs]
    gone = list(dict.fromkeys(owners))
    return wrong(
        f"{_named(runs)} {_are(runs)} RUNNING, and {few(gone)} {_are(gone)} gone",
        f"fix=true ends {'it' if len(runs) == 1 else 'them'} as KILLED"
        + ("; the sweep can be gone on with" if sweep else ""),
        partial(_end_orphans, stores, runs),
    )


def _are(things: Sequence[object]) -> str:
    return "is" if len(things) == 1 else "are"


def is_trial(run: Outline) -> bool:
    return run.tags.get("trial", "").isdecimal()


def _named(runs: Sequence[Outline]) -> str:
    """Runs of one sweep, of one promotion, or a single one."""
    tags = runs[0].tags
    what = "run" if len(runs) == 1 else "runs"
    if "sweep" in tags:
        numbers = [int(run.tags["trial"]) for run in runs if is_trial(run)]
        named = [
            *(["its own run"] if len(numbers) < len(runs) else []),
            *([f"the run of {trials(numbers)}"] if numbers else []),
        ]
        return f"sweep {tags['sweep']}: {' and '.join(named)}"
    of = f"promotion of {tags['promotion.model']}: " if "promotion.model" in tags else ""
    return f"{of}{what} {few([title(run) for run in runs])}"


def _end_orphans(stores: Stores, runs: Sequence[Outline]) -> str:
    ended = 0
    for run in runs:
        error = f"{process_of(run.tags.get('owner'))} is gone, and left it RUNNING."
        ended += end(stores, run, "KILLED", error=error)
    return f"ended {count(ended, 'run')} as KILLED"


def end(
    stores: Stores, run: Outline, status: str, *, error: str = "", at: float | None = None
) -> bool:
    """Ends a run that no process records, unless it was changed meanwhile.

    Args:
        stores: It is of.
        run: As it was found.
        status: FINISHED, KILLED or FAILED.
        error: Recorded as the reason.
        at: When, in seconds since 1970; None: now.

    Raises:
        HeldError: Somebody has gone on with its sweep or promotion.
    """
    from pipeline.entries import tell

    with stores.alone(run.tags):
        if not _is_as_before(run):
            return False
        if error:
            tell(run.run_id, {"kind": "tags", "tags": {"error": error}})
        milliseconds = int(1000 * (at or time.time()))
        tell(run.run_id, {"kind": "end", "status": status, "time": milliseconds})
        return True


def _is_as_before(run: Outline) -> bool:
    from pipeline.store import read_run

    now, owner = read_run(run.run_id), printable(run.tags.get("owner", ""))
    return (now.status, now.tags.get("owner", "")) == (run.status, owner)


def _unseen(stores: Stores, run: Outline) -> Finding:
    owner = run.tags.get("owner")
    host = owner.split()[0] if owner else ""
    end_it = _END.format(f'"{stores.uri}"', f'"{run.run_id}"', '"KILLED"')
    return note(
        f"run {title(run)} is RUNNING in {process_of(owner)}, which cannot be seen from here",
        f"if that is gone: the doctor on {host} mends it" if host else f"if it is dead: {end_it}",
    )
