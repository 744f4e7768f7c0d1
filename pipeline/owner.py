"""Which process records a run, and whether it still lives."""

import os
import platform
import re
from pathlib import Path

import psutil

OWNER = "owner"  # tag of a run

_SLACK = 2  # seconds, of rounding


def me() -> str:
    """This process, told from any other: `HOST PID START BOOT`.

    The start is in seconds since that of the machine, which setting the clock does not move; the
    last is what Linux calls this start of the machine.
    """
    return f"{platform.node()} {os.getpid()} {start_of(psutil.Process())} {_boot()}"


def machine() -> str:
    """This machine, or container, since its start."""
    return f"{platform.node()} {_boot()}"


def start_of(process: psutil.Process) -> int:
    """Of a process, in seconds since the machine's start."""
    return round(process.create_time() - psutil.boot_time())


def lives(owner: str) -> bool | None:
    """Whether a process that `me` named is there; None where that cannot be seen from here."""
    found = re.fullmatch(r"(\S+) (\d+) (\d+) (\S+)", owner)
    if found is None or found[1] != platform.node():
        return None
    if found[4] != _boot():
        return False
    try:
        process = psutil.Process(int(found[2]))
        is_same = abs(start_of(process) - int(found[3])) <= _SLACK
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # another user's
        return None


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
