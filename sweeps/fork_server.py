"""What the fork server of `sweeps.processes` does before all else; nobody else imports this."""

import os
import signal
import sys
from types import TracebackType

from sweeps.processes import die_with_parent

_parent = [0]


def _before_fork() -> None:
    _parent[0] = os.getpid()


def _after_fork() -> None:
    """In the worker, before it could outlive a server that is killed now."""
    die_with_parent()
    if os.getppid() != _parent[0]:
        os._exit(1)
    sys.excepthook = sys.__excepthook__


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In one line, as where no process can be forked any more; the launcher starts another one."""
    print(f"the server of the workers ended: {kind.__name__}: {error}", file=sys.stderr)


die_with_parent()
os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
sys.excepthook = _tell
# Who tells a whole group of processes to end means the workers, which end themselves.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
