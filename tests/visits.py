"""Visits of the doctor, in this process."""

import io
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from pipeline.compose import CONF, to_typed
from pipeline.console import open_console
from sweeps.config import DoctorConfig
from sweeps.doctor import UnwellError, main
from tests.promotions import Here


@dataclass(frozen=True, kw_only=True)
class Visit:
    """What the doctor said.

    Attributes:
        text: That it printed.
        error: Its last line, where something is wrong.
    """

    text: str
    error: str

    def of(self, state: str) -> dict[str, list[str]]:
        """What was found, by check."""
        found: dict[str, list[str]] = {}
        for check, text in re.findall(rf"^(\S+) +{state} +(.*?) *$", self.text, re.M):
            found.setdefault(check, []).append(text)
        return found

    @property
    def wrong(self) -> list[str]:
        """What is, each with the name of its check."""
        found = self.of("wrong")
        return [f"{check}: {text}" for check, texts in found.items() for text in texts]


def visit(folder: Path, *overrides: str) -> Visit:
    """What `python -m sweeps.doctor` does, here."""
    given = [f"tracking.directory={folder / 'mlruns'}", *overrides]
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = to_typed(compose("doctor", given), DoctorConfig, {})
    GlobalHydra.instance().clear()
    printed, error = io.StringIO(), ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sweeps.doctor.console", open_console(printed))
        patch.setattr("sweeps.doctor_champion.LocalExecutor", Here)
        try:
            main(config, given)
        except UnwellError as found:
            error = str(found)
    return Visit(text=printed.getvalue(), error=error)


def fix(folder: Path, *overrides: str) -> Visit:
    return visit(folder, "fix=true", *overrides)
