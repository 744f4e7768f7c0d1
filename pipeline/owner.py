"""Which process records a run, and whether it still lives."""

import os
import platform
import re

import psutil

OWNER = "owner"  # tag of a run

_SLACK = 2.0  # seconds that setting the clock may move the start of a process


def me() -> str:
    """This process, told from any other: `HOST PID START`, the start in seconds since 1970."""
    return f"{platform.node()} {os.getpid()} {psutil.Process().create_time():.0f}"


def lives(owner: str) -> bool | None:
    """Whether a process that `me` named is there; None where that cannot be seen from here."""
    found = re.fullmatch(r"(\S+) (\d+) (\d+)", owner)
    if found is None or found[1] != platform.node():
        return None
    try:
        process = psutil.Process(int(found[2]))
        is_same = abs(process.create_time() - int(found[3])) <= _SLACK
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
