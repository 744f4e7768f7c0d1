"""On what was measured: it belongs under each table."""

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

LIBRARIES = ("tensorflow", "keras", "optuna", "mlflow", "numpy")


def describe() -> str:
    """Processors and versions, in one line."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    machine = f"{os.cpu_count()} x {cpu[1] if cpu else platform.machine()}"
    versions = [f"{name} {version(name)}" for name in LIBRARIES]
    return ", ".join([machine, f"Python {platform.python_version()}", *versions])
