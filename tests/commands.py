"""Commands of this repository in process, as `python -m` starts them, and how they ended."""

import contextlib
import gc
import hashlib
import importlib.abc
import importlib.machinery
import io
import logging
import os
import runpy
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, settings
from optuna.exceptions import ExperimentalWarning

import pipeline  # noqa: F401  # sets variables of the environment, which stay
from sweeps.processes import LIBRARIES, start_server
from tests.launching import SWEEP

# What a command imports once it has found nothing wrong with its command line.
SLOW = ("tensorflow", "pipeline.store", "pipeline.registry", "pipeline.tracking")


EXAMPLES = int(os.environ.get("EXAMPLES", "0"))


def fuzzed(examples: int) -> settings:
    """The same few examples each time; with `EXAMPLES=10000`, as many, and others each time."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=[*HealthCheck],
    )


class Accepted(BaseException):
    """The command goes on to import what takes seconds. No command catches it."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended.

    Attributes:
        status: Of its process; None: it would have gone on to train, read or serve.
        out: What it wrote on standard output.
        err: Likewise, on standard error.
    """

    status: int | None
    out: str
    err: str


class _Trap(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in SLOW:
            raise Accepted(fullname)
        return None


@contextlib.contextmanager
def _slow_imports_trapped() -> Iterator[None]:
    hidden = {name: sys.modules.pop(name) for name in SLOW if name in sys.modules}
    trap = _Trap()
    sys.meta_path.insert(0, trap)
    try:
        yield
    finally:
        sys.meta_path.remove(trap)
        sys.modules.update(hidden)


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Puts back what a command changes of its process."""
    environment, arguments, folder = dict(os.environ), sys.argv, Path.cwd()
    handler, raises = signal.getsignal(signal.SIGTERM), logging.raiseExceptions
    root, level = list(logging.root.handlers), logging.root.level
    # Hydra closes every handler there is: that of absl, which comes with TensorFlow, would close
    # pytest's own standard error, as it is not that of the command.
    handlers: list[Any] = vars(logging)["_handlerList"]
    hidden = handlers[:]
    handlers.clear()
    os.environ.pop("HYDRA_FULL_ERROR", None)
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = arguments
        os.chdir(folder)
        signal.signal(signal.SIGTERM, handler)
        logging.raiseExceptions = raises
        logging.root.handlers[:], logging.root.level = root, level
        handlers[:] = hidden
        gc.unfreeze()


def start(module: str, *arguments: str, folder: Path, trapped: bool = True) -> Ended:
    """Starts `python -m module arguments` in a folder.

    An error that is not handled, and would end in a traceback, is raised.

    Args:
        module: Such as `pipeline.run`.
        arguments: Of the command line.
        folder: In which it is started.
        trapped: Whether it ends where it goes on to import what takes seconds.
    """
    if module == "sweeps.run" or not trapped:
        start_server(LIBRARIES)  # for all workers to come: not in that folder
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    status: int | None = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(_as_it_was())
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*found in sys.modules after import")
        warnings.filterwarnings("ignore", category=ExperimentalWarning)  # as `sweeps.study` has it
        if trapped:
            stack.enter_context(_slow_imports_trapped())
        os.chdir(folder)
        sys.argv = [module, *arguments]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = _status(end.code, err)
        except Accepted:
            status = None
    return Ended(status=status, out=_text(out), err=_text(err))


def call(*arguments: str, folder: Path, command: Sequence[str] = SWEEP) -> CompletedProcess[str]:
    """As `tests.launching.run`, in this process, which has the libraries already: seconds less.

    Args:
        arguments: Of the command line.
        folder: In which it is started.
        command: Of this repository.
    """
    ended = start(command[-1], *arguments, folder=folder, trapped=False)
    assert ended.status is not None
    return CompletedProcess([*command, *arguments], ended.status, ended.out, ended.err)


def _status(code: Any, err: io.TextIOWrapper) -> int:
    if isinstance(code, str):  # which Python prints
        err.write(f"{code}\n")
        return 1
    return code or 0


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode()


def content_of(folder: Path) -> dict[str, str]:
    """What is in a folder: kind and digest by name."""
    return {str(path.relative_to(folder)): _digest(path) for path in folder.rglob("*")}


def _digest(path: Path) -> str:
    if path.is_symlink() or not path.is_file():
        return "link or folder"
    return hashlib.sha256(path.read_bytes()).hexdigest()
