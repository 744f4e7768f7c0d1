"""What the fork server of `sweeps.processes` does before all else; nobody else imports this."""

import signal

from sweeps.processes import die_with_parent

die_with_parent()
# Who tells a whole group of processes to end means the workers, which end themselves.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
