"""Images in memory, from where all workers of a machine have them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from pipeline.config import DataConfig

if TYPE_CHECKING:
    from pipeline.data import Array, Data

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A data set, as a worker is told of it.

    Attributes:
        config: What it was loaded by.
        rest: All but its images.
        files: Of the images of each split.
    """

    config: DataConfig
    rest: Data
    files: Mapping[str, File]

    def open(self) -> Data:
        """The data set; its images are mapped, read-only, and stay when they are shared no more.

        Raises:
            OSError: The files are not here: on another machine, or shared no more.
        """
        splits = {
            name: replace(getattr(self.rest, name), images=file.map())
            for name, file in self.files.items()
        }
        return replace(self.rest, **splits)


@dataclass(frozen=True, kw_only=True)
class File:
    """An array in a file in memory.

    Attributes:
        path: Of the open file, below `/proc` of the process that has it.
        target: To what that leads there; elsewhere, another process may have that number.
    """

    path: Path
    target: str

    def map(self) -> Array:
        if str(self.path.readlink()) != self.target:
            raise OSError(f"{self.path} is not {self.target}.")
        array: Array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return array


@contextmanager
def share(data: Data, config: DataConfig) -> Iterator[Shared | None]:
    """Inside, the images are in files in memory too, which end with this process at the latest.

    None where the system has no such files: workers load the images themselves then.

    Args:
        data: What `config` loads.
        config: What workers are asked to load.
    """
    with ExitStack() as stack:
        try:
            shared = _share(data, config, stack)
        except (AttributeError, OSError) as error:  # Python, or the system, has none
            log.debug("the images are not shared: %s", error)
            shared = None
        yield shared


def _share(data: Data, config: DataConfig, stack: ExitStack) -> Shared:
    from pipeline.data import Split

    splits = {name: value for name, value in vars(data).items() if isinstance(value, Split)}
    files = {name: _write(split.images, stack) for name, split in splits.items()}
    rest: dict[str, Any] = {
        name: replace(split, images=split.images[:0]) for name, split in splits.items()
    }
    return Shared(config=config, rest=replace(data, **rest), files=files)


def _write(array: Array, stack: ExitStack) -> File:
    name = f"images-{uuid4().hex}"
    file = stack.enter_context(os.fdopen(os.memfd_create(name), "wb"))
    np.save(file, array, allow_pickle=False)
    file.flush()
    path = Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")
    return File(path=path, target=f"/memfd:{name} (deleted)")
