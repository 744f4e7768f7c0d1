"""What the doctor finds of files: spools, and what was left behind."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from filelock import FileLock, Timeout
from optuna.trial import TrialState

from pipeline.config import without_password
from sweeps.finding import (
    Check,
    Finding,
    Stores,
    count,
    few,
    note,
    process_of,
    reason,
    short_path,
    size,
    wrong,
)

if TYPE_CHECKING:  # or MLflow is imported
    from pipeline.outline import Outline

TOLD = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


# --- spools ------------------------------------------------------------------------------


def check_spool(stores: Stores) -> Check:
    """What a store that was away has yet to be told."""
    from pipeline.spool import Spool, spools

    def tell(spool: Spool) -> str:
        from pipeline.tracking import replay

        with stores.alone(_tags_of(stores, spool.about["run_id"])):
            if not spool.is_left:
                raise OSError("another process has taken it up.")
            told = replay(spool, stores.uri)
            stores.behind.discard(spool.folder.name)  # it may have had no end to tell
            return f"told {count(told, 'entry')}"

    for spool in spools(stores.directory / "spool"):
        stores.behind.add(spool.folder.name)
        try:
            about, entries, is_left = spool.about, len(spool.entries), spool.is_left
            owner = process_of(about["owner"])
            run = f"run {about['name']} ({about['run_id']})"
            other = about["uri"] if about["uri"] != without_password(stores.uri) else ""
        except (OSError, ValueError, KeyError) as error:
            if spool.is_empty:  # its owner has told it meanwhile
                continue
            yield wrong(
                f"{short_path(spool.folder)} cannot be read: {reason(error)}", "move it away"
            )
            continue
        text = f"{run}: the store has yet to be told {count(entries, 'entry')}"
        if other:
            choice = ["tracking=server"] if other.startswith("http") else []
            command = ["sweeps.doctor", "fix=true", *choice, f"tracking.uri={other}"]
            yield wrong(
                f"{text}; it is of another store, {other}",
                f"tell it: python -m {shlex.join(command)}",
            )
        elif not is_left:
            yield note(f"{text}; {owner} is there to do it, or is not seen from here")
        elif not stores.is_open:
            yield note(text, "once the store is back: fix=true tells it")
        elif holder := stores.holder(_tags_of(stores, about["run_id"])):
            yield note(f"{text}; {holder}")
        else:
            yield wrong(f"{text}, and {owner} is gone", "fix=true tells it", partial(tell, spool))
    return "" if stores.behind else "the store was told all"


def _tags_of(stores: Stores, run_id: str) -> Mapping[str, str]:
    """Of a run; none of one that the store does not have, which it says when it is told."""
    run = stores.runs.get(run_id)
    return run.tags if run else {}


# --- left behind -------------------------------------------------------------------------


def check_left_overs(stores: Stores) -> Check:
    """Files of processes that were killed, and are nobody's."""
    ended: list[Path] = []
    unfinished: list[Path] = []
    for folder in sorted((stores.directory / "checkpoints").glob("*/")):
        run = stores.runs.get(folder.name)
        if run is None:
            yield note(
                f"{short_path(folder)} is of no run of this store",
                f"where no other store is used with this folder: rm -r {short_path(folder)}",
            )
        elif stores.holder(run.tags) or _is_under_way(run):
            continue
        elif _has_ended(folder.name, stores):
            ended.append(folder)
        else:
            unfinished += folder.glob("*.tmp")
    yield from _delete(stores, "checkpoint", "of trainings that have ended", ended)
    yield from _delete(stores, "file", "of checkpoints cut short", unfinished)
    yield from _delete(stores, "file", "of holders that are gone", _holders(stores))
    yield from _delete(stores, "folder", "of spools with nothing to tell", _spools(stores))
    yield from _delete(stores, "folder", "of databases never finished", _creations(stores))
    return "none"


def _is_under_way(run: Outline) -> bool:
    from pipeline.owner import lives

    return run.status == "RUNNING" and lives(run.tags.get("owner", "")) is not False


def _has_ended(run_id: str, stores: Stores) -> bool:
    """Whether nothing goes on from the checkpoint of a run."""
    run = stores.runs[run_id]
    told = {
        trial.user_attrs.get("run_id")
        for study in stores.studies
        for trial in study.trials
        if trial.state in TOLD
    }
    return run.is_deleted or run.status == "FINISHED" or run_id in told


def _holders(stores: Stores) -> list[Path]:
    """Files `.sweep-NAME.PID.tmp` whose process is gone."""
    folders = {stores.directory, *(path.parent for path in stores.databases)}
    return [
        path
        for folder in sorted(folders)
        for path in folder.glob(".*.tmp")
        if (named := re.fullmatch(r"\.(?:sweep|promotion)-.+\.(\d+)\.tmp", path.name))
        and not psutil.pid_exists(int(named[1]))
    ]


def _spools(stores: Stores) -> list[Path]:
    """Folders that a process was killed in before it wrote the first entry."""
    from pipeline.owner import lives

    found = []
    for about in sorted((stores.directory / "spool").glob("*/run.json")):
        if not (about.parent / "journal.jsonl").exists():
            named = re.search(r'"owner": "([^"]+)"', about.read_text(encoding="utf-8"))
            if named and lives(named[1]) is False:
                found.append(about.parent)
    return found


def _creations(stores: Stores) -> list[Path]:
    """Folders in which a database was being created, by a process that is gone."""
    found = []
    for database in stores.databases:
        folders = [path for path in database.parent.glob("tmp????????/") if _is_of(path, database)]
        if folders and _nobody_creates(database.parent):
            found += folders
    return found


def _is_of(folder: Path, database: Path) -> bool:
    files = list(folder.iterdir())
    return bool(files) and all(path.name.startswith(database.name) for path in files)


def _nobody_creates(folder: Path) -> bool:
    try:
        with FileLock(folder / ".create.lock", timeout=0):
            return True
    except Timeout:
        return False


def _delete(stores: Stores, what: str, whose: str, paths: Sequence[Path]) -> Iterator[Finding]:
    if not paths:
        return
    room, named = sum(map(_room, paths)), few([short_path(path) for path in paths])

    def delete() -> str:
        for path in paths:
            run = stores.runs.get(path.name) or stores.runs.get(path.parent.name)
            with stores.alone(run.tags if run else {}):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return "deleted"

    yield wrong(
        f"{count(len(paths), what)} {whose}, {size(room)}: {named}",
        f"fix=true deletes {'it' if len(paths) == 1 else 'them'}",
        delete,
    )


def _room(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
