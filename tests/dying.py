"""Processes of a sweep that die, or are paused, at an exact moment of the product's own code.

A test writes `moments` into a folder and gives `environment(folder)` to the command. The
`sitecustomize` there, which each Python process imports first, has the functions in question
wrapped as soon as their modules are imported.
"""

import importlib.machinery
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.launching import ENVIRONMENT

FOLDER = "DYING"


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When a process dies, and which.

    Attributes:
        trial: Number of the trial that the process is busy with.
        function: As `module:name` or `module:class.name`.
        end: Whether it is when the function returns, not when it begins.
        call: Which call of that trial in that process, from 1.
        fate: `die`: by SIGKILL; `exit`: by `os._exit`; `orphaned`: its parent by SIGKILL, while
            it sleeps; `frozen`: likewise, while it is stopped; `paused`: none, it is stopped.
        times: How often.
    """

    trial: int
    function: str
    end: bool = False
    call: int = 1
    fate: str = "die"
    times: int = 1


def prepare(folder: Path, moments: Sequence[Moment]) -> dict[str, str]:
    """Writes the moments; returns the environment of the processes."""
    folder.mkdir()
    described = json.dumps([asdict(moment) for moment in moments])
    (folder / "moments.json").write_text(described, encoding="utf-8")
    text = "from tests.dying import lie_in_wait\nlie_in_wait()\n"
    (folder / "sitecustomize.py").write_text(text, encoding="utf-8")
    path = os.pathsep.join([str(folder), ENVIRONMENT["PYTHONPATH"]])
    return {**ENVIRONMENT, "PYTHONPATH": path, FOLDER: str(folder)}


def happened(folder: Path, number: int) -> list[int]:
    """Processes that the moment of this number came to, in their order."""
    found = sorted(folder.glob(f"{number}.*"))
    return [int(path.read_text(encoding="utf-8") or 0) for path in found]


# --- in the processes --------------------------------------------------------------------

# Which of its arguments tells the trial that a process is busy with from then on.
BUSY: dict[str, Callable[..., int]] = {
    "sweeps.trial:run_trial": lambda job: int(job.trial_id) - 1,  # of the only study
    "sweeps.launcher:Launcher.run_of": lambda launcher, trial, values: int(trial.number),
    "sweeps.launcher:Launcher.tell": lambda launcher, trial, *rest, **more: int(trial.number),
}
_calls: Counter[str] = Counter()
_trial = [-1]


def lie_in_wait() -> None:
    if folder := os.environ.get(FOLDER):
        described = json.loads((Path(folder) / "moments.json").read_text(encoding="utf-8"))
        sys.meta_path.insert(0, _Wrapping(Path(folder), [Moment(**each) for each in described]))


class _Wrapping(MetaPathFinder):
    """Wraps functions of a module when it has been imported."""

    def __init__(self, folder: Path, moments: Sequence[Moment]) -> None:
        self.folder, self.moments = folder, moments
        self.functions = {moment.function for moment in moments} | BUSY.keys()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        mine = [each.partition(":")[2] for each in self.functions if each.startswith(f"{name}:")]
        spec = PathFinder.find_spec(name, path) if mine else None
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for function in mine:
                    self.wrap(module, function)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def wrap(self, module: ModuleType, function: str) -> None:
        owner_name, _, name = function.rpartition(".")
        owner = getattr(module, owner_name) if owner_name else module
        wrapped, known = getattr(owner, name), f"{module.__name__}:{function}"

        @wraps(wrapped)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if known in BUSY and _trial != [BUSY[known](*args, **kwargs)]:
                _trial[:] = [BUSY[known](*args, **kwargs)]
                _calls.clear()
            _calls[known] += 1
            call = _calls[known]
            self.meet(known, call, end=False)
            result = wrapped(*args, **kwargs)
            self.meet(known, call, end=True)
            return result

        setattr(owner, name, wrapper)

    def meet(self, function: str, call: int, *, end: bool) -> None:
        for number, moment in enumerate(self.moments):
            here = (moment.trial, moment.function, moment.call, moment.end)
            if here == (_trial[0], function, call, end) and self.is_due(number, moment.times):
                befall(moment.fate)

    def is_due(self, number: int, times: int) -> bool:
        """Whether it has not yet happened so often; it has, from now on."""
        for time_ in range(times):
            try:
                with (self.folder / f"{number}.{time_}").open("x", encoding="utf-8") as file:
                    file.write(str(os.getpid()))
                return True
            except FileExistsError:
                continue
        return False


def befall(fate: str) -> None:
    if fate == "exit":
        os._exit(7)
    if fate in ("orphaned", "frozen"):
        launcher = multiprocessing.parent_process()  # of the worker that this is
        os.kill(launcher.pid if launcher and launcher.pid else os.getppid(), signal.SIGKILL)
    if fate == "orphaned":
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGKILL if fate == "die" else signal.SIGSTOP)
