"""What a tracking store that was away has yet to be told of a run: kept on disk, in order."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock

from pipeline.owner import lives, me

Entry = Mapping[str, Any]  # `kind` and what it needs; of a file or folder its path in `FILE`

FILE = "file"


@dataclass(frozen=True, kw_only=True)
class Spool:
    """Of one run.

    `journal.jsonl` has an entry a line, `files/` what these name, `run.json` which run it is. Only
    the process that records the run adds to it; once that is gone, any may replay it.

    Attributes:
        folder: Of it, named after the run; missing while there is nothing to tell.
    """

    folder: Path

    @property
    def is_empty(self) -> bool:
        return not self._journal.exists()

    @property
    def about(self) -> dict[str, str]:
        """Of the run: `run_id`, `name`, `experiment_id`, `uri` without its password, `owner`."""
        return dict(json.loads((self.folder / "run.json").read_text(encoding="utf-8")))

    @property
    def is_left(self) -> bool:
        """Whether the process that added to it is gone."""
        return lives(self.about["owner"]) is False

    @property
    def entries(self) -> list[Entry]:
        """In the order they were added; a last one that a kill cut short is left out."""
        if self.is_empty:
            return []
        whole = self._journal.read_bytes().rpartition(b"\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def add(self, entry: Entry, about: Mapping[str, str], source: Path | None = None) -> None:
        """Appends an entry, which a kill of this process does not lose when this has returned.

        Args:
            entry: As JSON can say it.
            about: The run, as in the attribute.
            source: File or folder that belongs to the entry, which is copied.

        Raises:
            OSError: It cannot be written.
        """
        with self.lock():  # or who replays it would forget this entry with those it told
            self.folder.mkdir(parents=True, exist_ok=True)
            if source is not None:
                entry = {**entry, FILE: self._keep(source)}
            _replace(self.folder / "run.json", json.dumps({**about, "owner": me()}))
            self._cut()
            with self._journal.open("a", encoding="utf-8") as journal:
                journal.write(json.dumps(entry) + "\n")
                journal.flush()
                os.fsync(journal.fileno())

    def path_of(self, entry: Entry) -> Path | None:
        """The file or folder that belongs to an entry."""
        return self.folder / "files" / entry[FILE] if FILE in entry else None

    def keep(self, entries: Sequence[Entry]) -> None:
        """Forgets all entries but these, the last ones; without any, the spool is gone."""
        if entries:
            _replace(self._journal, "".join(json.dumps(entry) + "\n" for entry in entries))
        else:
            self._journal.unlink()
            shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by who replays it or adds to it; beside the folder, which comes and goes."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder.with_suffix(".lock"))
        with lock:
            yield
            if self.is_empty:
                Path(lock.lock_file).unlink(missing_ok=True)

    @property
    def _journal(self) -> Path:
        return self.folder / "journal.jsonl"

    def _keep(self, source: Path) -> str:
        target = self.folder / "files" / uuid4().hex / source.name
        target.parent.mkdir(parents=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
        return str(target.relative_to(self.folder / "files"))

    def _cut(self) -> None:
        """Cuts off a last line that a kill left without an end."""
        if self.is_empty:
            return
        whole, newline, rest = self._journal.read_bytes().rpartition(b"\n")
        if rest:
            os.truncate(self._journal, len(whole) + len(newline))


def spools(folder: Path) -> list[Spool]:
    """All that have something to tell, in a folder of them."""
    return [Spool(folder=path.parent) for path in sorted(folder.glob("*/journal.jsonl"))]


def _replace(path: Path, text: str) -> None:
    new = path.with_suffix(".tmp")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
