"""A data set in memory, once for all workers of a machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config import DataConfig
from pipeline.owner import machine

if TYPE_CHECKING:  # or what takes half a second is imported
    from pipeline.data import Data


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Where other processes find a data set, as long as it is shared.

    Attributes:
        config: What it was loaded by.
        file: In the memory of the process that shares it.
        machine: On which that is.
    """

    config: DataConfig
    file: str
    machine: str

    def open(self) -> Data:
        """Maps its arrays, which nobody can write to; they stay when it is no longer shared.

        Raises:
            OSError: It is not here: on another machine, or no longer shared.
        """
        import joblib

        if self.machine != machine():
            raise OSError(f"{self.file} is on {self.machine}.")
        data: Data = joblib.load(self.file, mmap_mode="r")
        return data


@contextmanager
def share(data: Data, config: DataConfig) -> Iterator[Shared]:
    """Copies a data set into a file in memory, which ends with this process at the latest.

    Args:
        data: What `config` loads.
        config: Of it.
    """
    import joblib

    file = os.memfd_create("data")
    try:
        path = f"/proc/{os.getpid()}/fd/{file}"
        joblib.dump(data, path)
        yield Shared(config=config, file=path, machine=machine())
    finally:
        os.close(file)
