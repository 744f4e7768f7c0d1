"""Ranked runs of one sweep or several, in the terminal or as a file."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline import fast_imports
from pipeline.compose import run_cli
from pipeline.console import open_console
from pipeline.owner import OWNER, lives
from pipeline.pages import ui_command
from sweeps.board import (
    Board,
    Comparison,
    Row,
    compare,
    find_sweeps,
    finished_trials,
    load_board,
    objectives_of,
    setting,
)
from sweeps.config import LeaderboardConfig
from sweeps.display import duration, last_part, number, short
from sweeps.trial import METRICS

if TYPE_CHECKING:  # or MLflow is imported
    from pipeline.store import Recorded

Record = dict[str, Any]

# --- one sweep, or several ---------------------------------------------------------------


def board_table(board: Board, title: str) -> Table:
    """A row a run."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    rows = [_cells(board, row) for row in board.rows]
    short_names = [_heading(name) for name in rows[0]]
    for name, heading in zip(rows[0], short_names, strict=True):
        shown = heading if short_names.count(heading) == 1 else name
        table.add_column(shown, justify="left" if name == "sweep" else "right")
    for row, cells in zip(board.rows, rows, strict=True):
        table.add_row(*cells.values(), style="bold" if row.rank == 1 else None)
    return table


def _cells(board: Board, row: Row) -> dict[str, str]:
    """Text by column."""
    run, several = row.run, len(board.sweeps) > 1
    return {
        "rank": "" if row.rank is None else str(row.rank),
        **({"sweep": row.sweep} if several else {}),
        "trial": str(row.trial),
        **dict(zip(board.objectives, map(number, row.values), strict=True)),
        **({"behind": _behind(board, row)} if row.difference is not None else {}),
        "epochs": str(int(run.metrics["epoch"])),
        "parameters": number(run.metrics["parameters"]),
        "seconds": f"{run.metrics['fit_seconds']:.1f}",
        **{
            name: short(setting(run, name)) if name in run.params else "" for name in board.settings
        },
    }


def _heading(name: str) -> str:
    """Of a group, its name: `optimizer` for `optimizer.name`."""
    return last_part(name.removesuffix(".name"))


def _behind(board: Board, row: Row) -> str:
    if not row.difference and not row.margin:
        return ""
    is_noisy = row.margin is not None and board.objectives[0] in METRICS
    margin = f" ±{row.margin:.4f}" if is_noisy else ""
    return f"{number(abs(row.difference or 0.0))}{margin}"


def board_records(board: Board) -> list[Record]:
    """A dictionary a row."""
    return [
        {
            "rank": row.rank,
            "sweep": row.sweep,
            "trial": row.trial,
            **dict(zip(board.objectives, row.values, strict=True)),
            "behind": None if row.difference is None else abs(row.difference),
            "margin": row.margin,
            "epochs": int(row.run.metrics["epoch"]),
            "parameters": int(row.run.metrics["parameters"]),
            "seconds": row.run.metrics["fit_seconds"],
            **{name: setting(row.run, name) for name in board.settings},
            "run_id": row.run.run_id,
            "command": row.run.tags["command"],
        }
        for row in board.rows
    ]


def weigh(gain: float, margin: float | None, board: Board) -> str:
    """What a difference is worth, to be put behind it."""
    if board.objectives[0] not in METRICS:
        unknown = "; how much of it is noise is unknown: each was measured once"
        return unknown if margin is None else ""
    if margin is None:
        return "; how much of it is noise is unknown: predictions are not kept"
    what = "within" if abs(gain) <= margin else "beyond"
    return f" (±{margin:.4f}): {what} the noise of the {board.images:,} validation images"


def unfinished(sweep: Recorded) -> str:
    """That a sweep is not over, in a sentence; empty for one that is."""
    if sweep.status == "FINISHED":
        return ""
    about = f"{sweep.tags['sweep']} is {sweep.status}, finished trials: {finished_trials(sweep)}"
    if sweep.status != "RUNNING":
        return f"{about}. Go on with: {sweep.tags.get('command', '')}"
    is_gone = lives(sweep.tags.get(OWNER, "")) is False
    return f"{about}{'; its process is gone, see python -m sweeps.doctor' if is_gone else ''}."


def verdict(found: Comparison, board: Board) -> str:
    """Whether one sweep found something better than another, in a sentence or two."""
    how = "better than" if found.gain > 0 else "worse than"
    gain = f"{number(abs(found.gain))} {how}" if found.gain else "equal to"
    weight = weigh(found.gain, found.margin, board)
    text = f"The best of {found.other} is {gain} that of {found.one}{weight}"
    first, second = found.trials
    if first == second:
        return f"{text}."
    more, fewer = (found.other, found.one) if second > first else (found.one, found.other)
    luck = f"{more} had {max(first, second)} trials, {fewer} {min(first, second)}"
    return f"{text}. {luck}: more trials raise the best by luck alone."


# --- all sweeps --------------------------------------------------------------------------


def sweeps_records(sweeps: Sequence[Recorded]) -> list[Record]:
    return [
        {
            "sweep": sweep.tags["sweep"],
            "status": sweep.status,
            "started": sweep.started.isoformat(timespec="seconds"),
            "seconds": sweep.seconds,
            "data": sweep.params.get("data.name", ""),
            "objective": ", ".join(objectives_of(sweep)),
            **{name: int(sweep.metrics.get(name, 0)) for name in ("finished", "pruned", "failed")},
            "best": [sweep.metrics.get(f"best_{name}") for name in objectives_of(sweep)],
            "run_id": sweep.run_id,
            "command": sweep.tags.get("command", ""),
        }
        for sweep in sweeps
    ]


def sweeps_table(sweeps: Sequence[Recorded]) -> Table:
    """A row a sweep."""
    table = Table(box=None, pad_edge=False)
    table.add_column("sweep")
    table.add_column("started")
    table.add_column("status")
    table.add_column("data")
    for heading in ("finished", "pruned", "failed", "elapsed"):
        table.add_column(heading, justify="right")
    table.add_column("best")
    for sweep, record in zip(sweeps, sweeps_records(sweeps), strict=True):
        best = zip(objectives_of(sweep), record["best"], strict=True)
        table.add_row(
            record["sweep"],
            f"{sweep.started.astimezone():%Y-%m-%d %H:%M}",
            sweep.status.lower(),
            record["data"],
            *(str(record[name]) for name in ("finished", "pruned", "failed")),
            "" if sweep.seconds is None else duration(sweep.seconds),
            ", ".join(f"{name} {number(value)}" for name, value in best if value is not None),
        )
    return table


# --- the command line --------------------------------------------------------------------


def main(config: LeaderboardConfig, overrides: list[str]) -> None:
    with fast_imports():
        from pipeline.store import connect, search

    connect(config.tracking)
    if config.all:
        sweeps = list(search("tags.kind = 'sweep'", limit=config.rows))
        if not sweeps:
            find_sweeps([])  # says so
        _write(config, sweeps_table(sweeps), sweeps_records(sweeps))
        return
    board = load_board(
        find_sweeps(config.sweep.names), limit=config.rows, confidence=config.confidence
    )
    title = f"{len(board.rows)} of {board.total} complete trials of {names(board.sweeps)}"
    below = [*map(unfinished, board.sweeps), board.noise]
    if len(board.sweeps) > 1 and len(board.objectives) == 1:
        below += [verdict(found, board) for found in compare(board)]
    below += [f"See it: {ui_command(sweep.run_id, overrides)}" for sweep in board.sweeps]
    text = Text("\n".join(["", *filter(None, below)]))
    _write(config, Group(board_table(board, title), text), board_records(board))
    if config.kind != "table" and len(board.rows) < board.total:
        print(f"{len(board.rows)} of {board.total} rows; rows=null: all.", file=sys.stderr)


def names(sweeps: Sequence[Recorded]) -> str:
    return " and ".join(sweep.tags["sweep"] for sweep in sweeps)


def _write(config: LeaderboardConfig, shown: RenderableType, records: Sequence[Record]) -> None:
    with ExitStack() as stack:
        file: IO[str] = sys.stdout
        if config.out:
            file = stack.enter_context(_open(config.out))
        if config.kind == "json":
            file.write(json.dumps(records, indent=2) + "\n")
        elif config.kind == "csv":
            writer = csv.DictWriter(file, fieldnames=list(records[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: _cell(value) for name, value in r.items()} for r in records)
        else:
            open_console(file).print(shown)


def _open(path: str) -> IO[str]:
    try:
        return Path(path).open("w", encoding="utf-8")
    except OSError as error:
        raise OSError(f"out={path} cannot be written: {error.strerror}.") from error


def _cell(value: object) -> object:
    """Of several objectives, what a list has is one text."""
    if isinstance(value, list):
        return ", ".join(str(each) for each in value if each is not None)
    return value


if __name__ == "__main__":
    run_cli("leaderboard", LeaderboardConfig, main, interrupted="Interrupted.")
