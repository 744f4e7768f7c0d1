"""The trials of a sweep or several, read from MLflow and ranked."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pipeline.compose import Value
from sweeps.config import OBJECTIVES
from sweeps.noise import Score, are_paired, quantile, ranks, standard_error
from sweeps.trial import METRICS

if TYPE_CHECKING:  # or MLflow is imported
    from pipeline.store import Recorded

SHOWN = ("epoch", "parameters", "fit_seconds")  # metrics; a run without is not one of ours
CONFIDENCE = 0.95  # of what a sweep itself prints
# Parameters of a run that tell where it ran and was recorded, not what it was.
_ELSEWHERE = ("data.path", "tracking.")


class UnrankedError(ValueError):
    """There is no such sweep, or nothing in it to rank, or nothing in common."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A ranked run.

    Attributes:
        rank: From 1, shared within the noise; of several objectives, 1 is the Pareto front and
            what is dominated has none.
        run: As recorded.
        values: One an objective.
        difference: From the best value; None with several objectives.
        margin: Half the interval around it; None where the noise is unknown.
    """

    rank: int | None
    run: Recorded
    values: tuple[float, ...]
    difference: float | None = None
    margin: float | None = None

    @property
    def trial(self) -> int:
        return int(self.run.tags["trial"])

    @property
    def sweep(self) -> str:
        return self.run.tags["sweep"]


@dataclass(frozen=True, kw_only=True)
class Board:
    """Ranked runs of sweeps with the same objectives and validation images.

    Attributes:
        sweeps: Runs of the sweeps themselves, in the order asked for.
        objectives: What they optimize.
        rows: The best ones, the best first.
        best: The best of each sweep.
        total: Complete trials, of which the rows are some.
        images: Validation images; 0 where that is not recorded.
        is_paired: Whether the predictions of all rows are kept, for these images.
        confidence: Of the ranks and margins.
        settings: Dotted names in which the rows differ, those searched first.
    """

    sweeps: Sequence[Recorded]
    objectives: tuple[str, ...]
    rows: Sequence[Row]
    best: Sequence[Recorded]
    total: int
    images: int
    is_paired: bool
    confidence: float
    settings: Sequence[str]

    @property
    def noise(self) -> str:
        """What the ranks mean, in words."""
        if len(self.objectives) > 1:
            return "Rank 1 is the Pareto front: no other is better in one value and as good in all."
        if self.objectives[0] == "parameters":
            return ""
        if self.objectives[0] == "fit_seconds":
            return "Each time was measured once, so its noise is unknown: ranks may be chance."
        if self.objectives[0] == "val_loss" and not self.is_paired:
            return "Some predictions are not kept, so the noise is unknown: ranks may be chance."
        how = "paired" if self.is_paired else "binomial: some predictions are not kept"
        return (
            "An equal rank is no difference beyond the noise of the "
            f"{self.images:,} validation images ({100 * self.confidence:.6g}%, {how}); "
            "another seed adds noise of its own."
        )


def find_sweeps(names: Sequence[str]) -> list[Recorded]:
    """The runs of sweeps, by their names; without any, the latest.

    Raises:
        UnrankedError: There is none; the message names the nearest.
    """
    from pipeline.store import search

    if not names:
        found = list(search("tags.kind = 'sweep'", limit=1))
        if not found:
            raise UnrankedError("no sweep is recorded here: run python -m sweeps.run data=digits.")
        return found
    return [_find_sweep(name) for name in names]


def _find_sweep(name: str) -> Recorded:
    from pipeline.store import search

    for run in search(f"tags.kind = 'sweep' and tags.sweep = '{name}'", limit=1):
        return run
    known = dict.fromkeys(run.tags["sweep"] for run in search("tags.kind = 'sweep'"))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the latest are {_few(known)}."
    if not known:
        hint = "no sweep is recorded here."
    raise UnrankedError(f"sweep.name={name}: no such sweep; {hint}")


def _few(names: Iterable[str]) -> str:
    return ", ".join(itertools.islice(names, 5))


def objectives_of(sweep: Recorded) -> tuple[str, ...]:
    """What the sweep optimizes; one that was recorded without the tag has it as a parameter."""
    given = sweep.tags.get("objective") or sweep.params.get("sweep.objective", "val_accuracy")
    return tuple(given.split(", "))


def searched_in(sweep: Recorded) -> list[str]:
    """Dotted names that the sweep searches."""
    start = "search.space."
    return [name.removeprefix(start) for name in sweep.params if name.startswith(start)]


def load_board(
    sweeps: Sequence[Recorded], *, limit: int | None, confidence: float = CONFIDENCE
) -> Board:
    """Reads and ranks the best complete trials.

    Args:
        sweeps: As `find_sweeps` gives them.
        limit: Rows at most.
        confidence: Of the ranks and margins, in (0, 1).

    Raises:
        UnrankedError: No trial is complete, or the sweeps differ in objective or images.
    """
    objectives = _in_common(sweeps)
    found = [_complete(sweep, objectives, limit) for sweep in sweeps]
    if empty := [sweep for sweep, runs in zip(sweeps, found, strict=True) if not runs]:
        raise UnrankedError(_why_none(empty[0]))
    runs = list(itertools.chain.from_iterable(found))
    judged = {run.validation for run in runs if run.validation}
    if len(judged) > 1:
        raise UnrankedError(
            f"sweep.name=[{','.join(sweep.tags['sweep'] for sweep in sweeps)}]: they were judged "
            "on different validation images, so their values do not compare."
        )
    images = next(iter(judged), None)
    rows, is_paired = _rank(objectives, runs, confidence, limit)
    return Board(
        sweeps=sweeps,
        objectives=objectives,
        rows=rows,
        best=[runs[0] for runs in found],
        total=sum(map(_count_complete, sweeps, found)),
        images=images[1] if images else 0,
        is_paired=is_paired,
        confidence=confidence,
        settings=_differing(sweeps, [row.run for row in rows]),
    )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The best of one sweep against the best of another.

    Attributes:
        one: Name of the sweep compared with.
        other: Name of the sweep that is compared.
        gain: By how much the other's best is better; negative where it is worse.
        margin: Half the interval around it; None where the noise is unknown.
        trials: Finished trials of either sweep, of which its best is the best.
    """

    one: str
    other: str
    gain: float
    margin: float | None
    trials: tuple[int, int]


def compare(board: Board) -> list[Comparison]:
    """Each further sweep of a board with the first one; of one objective."""
    found = []
    for sweep, best in zip(board.sweeps[1:], board.best[1:], strict=True):
        gain, margin = gain_over(board, board.best[0], best)
        found.append(
            Comparison(
                one=board.sweeps[0].tags["sweep"],
                other=sweep.tags["sweep"],
                gain=gain,
                margin=margin,
                trials=(finished_trials(board.sweeps[0]), finished_trials(sweep)),
            )
        )
    return found


def gain_over(board: Board, one: Recorded, other: Recorded) -> tuple[float, float | None]:
    """By how much another run is better than one, and half the interval around that."""
    (objective,) = board.objectives
    sign = 1 if OBJECTIVES[objective] == "maximize" else -1
    first, second = _score(one, objective), _score(other, objective)
    error = standard_error(objective, first, second)
    margin = None if error is None else quantile(board.confidence) * error
    return sign * (second.value - first.value), margin


def finished_trials(sweep: Recorded) -> int:
    """Complete or pruned, as the sweep's run has it, a second late."""
    return int(sweep.metrics.get("finished", 0))


def _in_common(sweeps: Sequence[Recorded]) -> tuple[str, ...]:
    objectives = {sweep.tags["sweep"]: objectives_of(sweep) for sweep in sweeps}
    if len(set(objectives.values())) > 1:
        each = "; ".join(f"{name} has {', '.join(names)}" for name, names in objectives.items())
        raise UnrankedError(f"sweep.name: the sweeps optimize different objectives: {each}.")
    return next(iter(objectives.values()))


def _complete(sweep: Recorded, objectives: Sequence[str], limit: int | None) -> list[Recorded]:
    """Of one objective the best ones, else all: any may be on the front."""
    from pipeline.store import search

    metric, first = METRICS.get(objectives[0], objectives[0]), objectives[0]
    order = "DESC" if OBJECTIVES[first] == "maximize" else "ASC"
    found = search(
        f"tags.`mlflow.parentRunId` = '{sweep.run_id}' and attributes.status = 'FINISHED'",
        order_by=[f"metrics.`{metric}` {order}", "attributes.start_time ASC"],
        limit=limit if len(objectives) == 1 else None,
    )
    needed = {*(METRICS.get(name, name) for name in objectives), *SHOWN}
    return [
        run
        for run in found
        if "trial" in run.tags
        and needed <= run.metrics.keys()
        and (None in (run.validation, sweep.validation) or run.validation == sweep.validation)
    ]


def _count_complete(sweep: Recorded, found: Sequence[Recorded]) -> int:
    """What the sweep recorded last, which while it runs may be older than its trials."""
    counts = sweep.metrics
    return max(len(found), int(counts.get("finished", 0) - counts.get("pruned", 0)))


def _why_none(sweep: Recorded) -> str:
    from pipeline.store import search

    name = sweep.tags["sweep"]
    pruned, failed = (int(sweep.metrics.get(each, 0)) for each in ("pruned", "failed"))
    if not failed:
        return f"sweep.name={name}: no trial is complete yet; {pruned} were pruned."
    condition = f"tags.`mlflow.parentRunId` = '{sweep.run_id}' and attributes.status = 'FAILED'"
    last = next(search(condition, limit=1), None)  # none where its run was deleted
    error = last.tags.get("error") if last else None
    error = error or "no reason is recorded"
    return f"sweep.name={name}: no trial is complete, {failed} failed; the last one: {error}"


def _values(run: Recorded, objectives: Sequence[str]) -> tuple[float, ...]:
    return tuple(run.metrics[METRICS.get(name, name)] for name in objectives)


def _rank(
    objectives: tuple[str, ...], runs: Sequence[Recorded], confidence: float, limit: int | None
) -> tuple[list[Row], bool]:
    signs = [-1 if OBJECTIVES[name] == "maximize" else 1 for name in objectives]
    costs = {
        run.run_id: [
            sign * value for sign, value in zip(signs, _values(run, objectives), strict=True)
        ]
        for run in runs
    }
    ordered = sorted(runs, key=lambda run: (costs[run.run_id], int(run.tags["trial"])))
    if len(objectives) > 1:
        front = [
            run
            for run in ordered
            if not any(_dominates(other, costs[run.run_id]) for other in costs.values())
        ]
        rest = [run for run in ordered if run not in front]
        rows = [Row(rank=1, run=run, values=_values(run, objectives)) for run in front]
        rows += [Row(rank=None, run=run, values=_values(run, objectives)) for run in rest]
        return rows[:limit], False
    (objective,) = objectives
    shown = ordered[:limit]
    scores = [_score(run, objective) for run in shown]
    best = scores[0]
    errors = [0.0, *(standard_error(objective, best, score) for score in scores[1:])]
    rows = [
        Row(
            rank=rank,
            run=run,
            values=(score.value,),
            difference=score.value - best.value,
            margin=None if error is None else quantile(confidence) * error,
        )
        for rank, run, score, error in zip(
            ranks(objective, scores, confidence), shown, scores, errors, strict=True
        )
    ]
    return rows, all(are_paired(best, score) for score in scores)


def _score(run: Recorded, objective: str) -> Score:
    from pipeline.store import read_predictions

    return Score(
        value=_values(run, [objective])[0],
        images=run.validation[1] if run.validation else 0,
        read=partial(read_predictions, run),
    )


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _differing(sweeps: Sequence[Recorded], runs: Sequence[Recorded]) -> list[str]:
    searched = [name for sweep in sweeps for name in searched_in(sweep)]
    names = dict.fromkeys(name for run in runs for name in run.params)
    differing = [
        name
        for name in names
        if len({run.params.get(name) for run in runs}) > 1 and not name.startswith(_ELSEWHERE)
    ]
    options = [each for name in searched for each in (name, f"{name}.name") if each in names]
    return list(dict.fromkeys([*options, *differing]))


def setting(run: Recorded, name: str) -> Value:
    """A setting as the value it is, of which MLflow keeps the text."""
    text = run.params.get(name)
    for kind in (int, float):
        try:
            return kind(text) if text is not None else None
        except ValueError:
            continue
    return {"null": None, "true": True, "false": False}.get(str(text), text)
