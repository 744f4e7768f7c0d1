"""A sweep under random faults, and whether all that must hold afterwards does.

    python -m tests.chaos                                     # 50 faults, some 15 minutes
    python -m tests.chaos --seed 7 --kills 20 --workers 2-4
    python -m tests.chaos --server                            # its runs behind an MLflow server
    python -m tests.chaos --storage postgresql                # needs root and PostgreSQL 15

The sweep is real, `python -m sweeps.run data=digits`, in a folder of its own. Processes are killed,
terminated and paused, databases locked, the disk filled up (as root: it is a small one of its own),
servers taken away; some points of its space diverge besides. Whenever the launcher has ended, the
same command is started again, until the budget is reached. Then the best trial is promoted, the
champion predicts, and the invariants are checked. Exit status 0: all hold; 1: some do not, and the
folder is kept.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

from tests.champion import find_champion, promote_and_predict
from tests.faults import counts, draw, kinds_of
from tests.invariants import Finding, find
from tests.ordeal import NAME, Ordeal, Place
from tests.servers import POSTGRESQL, MLflowServer, Postgresql
from tests.stores import Stores, trials_of

DISK = "256m"  # of the small disk: many times what a sweep needs
SHOWN = 10  # of what is broken, of each invariant
# Python's own, of a process whose parent was killed while it started: no line of ours has run.
ORPHANED = re.compile(
    r"""Traceback \(most recent call last\):
(?:  File "<string>", line 1, in <module>
)?(?:  File ".*multiprocessing.(?:forkserver|spawn)\.py", line \d+, in \w+\n(?:    .*\n)*)+"""
    r"EOFError: Ran out of input\n"
)

console = Console(highlight=False, soft_wrap=True, markup=False, width=160)


def main(given: Sequence[str] | None = None) -> int:
    """Runs the sweep and prints what was found; returns the exit status."""
    options = parse(given)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where a shell's `&` has it ignored
    signal.signal(signal.SIGTERM, _terminate)
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))).resolve()
    is_kept = True
    try:
        findings = suffer(options, folder)
        is_whole = not any(finding.broken for finding in findings)
        is_kept = bool(options.folder or options.keep or not is_whole)
    except KeyboardInterrupt:
        is_kept = bool(options.folder or options.keep)
        return 130
    finally:
        if is_kept:
            console.print(f"Kept: {folder}")
        else:
            shutil.rmtree(folder)
    return 0 if is_whole else 1


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    about, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m tests.chaos",
        description=f"{about}\n\n{more}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the faults: which, when, for how long (default 0)")
    add("--kills", type=int, default=50, metavar="N", help="number of faults (default 50)")
    add("--workers", type=_range, default=(2, 4), metavar="N-M", help="of a launch (default 2-4)")
    add("--trials", type=int, metavar="N", help="budget at first (default: 8 and half the faults)")
    add("--longest", type=float, default=55.0, metavar="S", help="seconds of a fault (default 55)")
    add("--storage", choices=("sqlite", "postgresql"), default="sqlite", help="of study and runs")
    add("--server", action="store_true", help="keep the runs behind an MLflow server")
    add("--folder", type=Path, help="where to do it: new or empty; it is kept")
    add("--keep", action="store_true", help="keep the folder though all invariants hold")
    options = parser.parse_args(given)
    if options.folder and options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"--folder {options.folder} is not empty.")
    if options.storage == "postgresql" and not (POSTGRESQL.exists() and os.geteuid() == 0):
        parser.error(f"--storage postgresql needs root and the programs in {POSTGRESQL}.")
    if not 1.0 <= options.longest < 60.0:
        parser.error("--longest must be at least 1 and less than 60, as long as a sweep waits.")
    return options


def _range(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", text)
    if not found or int(found[2] or found[1]) < int(found[1]):
        raise argparse.ArgumentTypeError(f"{text} is no number and no range as 2-4.")
    return int(found[1]), int(found[2] or found[1])


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def suffer(options: argparse.Namespace, folder: Path) -> list[Finding]:
    """The whole of it."""
    with ExitStack() as stack:
        has_disk = stack.enter_context(small_disk(folder / "sweep"))
        place = stack.enter_context(open_place(options, folder))
        kinds = kinds_of(
            small_disk=has_disk,
            postgresql=place.postgresql is not None,
            server=place.server is not None,
        )
        ordeal = Ordeal(
            place=place,
            faults=draw(options.seed, options.kills, kinds, options.longest),
            workers=options.workers,
            budget=options.trials or 8 + options.kills // 2,
            seed=options.seed,
        )
        stack.callback(ordeal.stop)
        console.print(f"Seed {options.seed}, {options.kills} faults, in {folder}")
        if not has_disk:
            console.print("A full disk is left out: it needs root, to mount a small one.")
        ordeal.run()
        outputs = {f"launch-{n:02}": each.text for n, each in enumerate(ordeal.launches, 1)}
        findings = judge(ordeal, outputs)
        for name, text in outputs.items():
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        show(ordeal, findings)
    return findings


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Creates the folder; whether it is a disk of its own. What it holds at the end is kept."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "tmpfs", str(folder), "-o", f"size={DISK}"]
    mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
    (folder / "tmp").mkdir()
    try:
        yield mounted
    finally:
        if mounted:
            kept = folder.with_name("kept")
            sockets = shutil.ignore_patterns("pymp-*")  # of Python, which a kill leaves
            shutil.copytree(folder, kept, symlinks=True, ignore=sockets)
            # Lazily: where somebody looks into it, that must not keep it here.
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
            folder.rmdir()
            kept.rename(folder)


@contextmanager
def open_place(options: argparse.Namespace, folder: Path) -> Iterator[Place]:
    """Starts the servers that are asked for."""
    with ExitStack() as stack:
        postgresql, server = None, None
        stores, study, tracking = Stores.local(folder / "sweep"), [], []
        study_uri, runs_uri = stores.study, stores.runs
        if options.storage == "postgresql":
            postgresql = stack.enter_context(Postgresql())
            study_uri, runs_uri = postgresql.new_database(), postgresql.new_database()
            study, tracking = [f"study.storage={study_uri}"], [f"tracking.uri={runs_uri}"]
        if options.server:
            backend = runs_uri if postgresql else None
            server = stack.enter_context(MLflowServer(folder / "server", backend))
            runs_uri = server.backend
            tracking = ["tracking=server", f"tracking.uri={server.uri}"]
        yield Place(
            stores=Stores(folder=stores.folder, study=study_uri, runs=runs_uri),
            study=study,
            tracking=tracking,
            postgresql=postgresql,
            server=server,
        )


# --- what came of it ---------------------------------------------------------------------


def judge(ordeal: Ordeal, outputs: dict[str, str]) -> list[Finding]:
    """Promotes, predicts, and checks all.

    Args:
        ordeal: That is over.
        outputs: Of the launchers; those of promotion and prediction are added.
    """
    place = ordeal.place
    if ordeal.standstill:
        ordeal.stop()
    ordeal.say("promoting the best trial; the champion predicts")
    done = promote_and_predict(NAME, place.sweep, place.tracking, place.environment)
    outputs |= {
        name: text for name, (_, text) in zip(("promotion", "prediction"), done, strict=True)
    }
    return [
        find_ends(ordeal, [status for status, _ in done]),
        *find(place.stores, NAME, ordeal.budget),
        find_champion(place.stores),
        find_outlived(ordeal),
        find_tracebacks(outputs),
        *([find_dumps(place.postgresql, place.stores)] if place.postgresql else []),
    ]


def find_ends(ordeal: Ordeal, statuses: Sequence[int]) -> Finding:
    ends = [launch.process.poll() for launch in ordeal.launches]
    # To a shell, -15 is 143: a process that is just starting answers SIGTERM so.
    known = {0, 1, -signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM}
    broken = [f"launch {n} ended with {end}" for n, end in enumerate(ends, 1) if end not in known]
    if ordeal.standstill:
        broken.append(ordeal.standstill)
    if any(statuses):
        broken.append(f"promotion and prediction ended with {statuses}")
    counted = Counter(map(str, ends))
    return Finding(
        invariant="the same command goes on to the end, and ends as it should",
        found=", ".join(f"{times} with {end}" for end, times in sorted(counted.items())),
        broken=broken,
    )


def find_outlived(ordeal: Ordeal) -> Finding:
    return Finding(
        invariant="workers end within 5 s (of processor time) of their launcher",
        found=f"{len(ordeal.outlived)} did not",
        broken=ordeal.outlived,
    )


def find_tracebacks(outputs: dict[str, str]) -> Finding:
    broken = [name for name, text in outputs.items() if "Traceback" in ORPHANED.sub("", text)]
    return Finding(
        invariant="no traceback in any output",
        found=f"{len(outputs)} outputs",
        broken=broken,
    )


def find_dumps(postgresql: Postgresql, stores: Stores) -> Finding:
    broken = []
    for address in (stores.study, stores.runs):
        try:
            postgresql.program("pg_dump", *postgresql.here, address.rpartition("/")[2])
        except subprocess.CalledProcessError as error:
            broken.append(str(error))
    return Finding(
        invariant="pg_dump reads both databases of PostgreSQL",
        found=f"{2 - len(broken)} of 2",
        broken=broken,
    )


def show(ordeal: Ordeal, findings: Sequence[Finding]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("holds", "invariant", "found"):
        table.add_column(heading)
    for finding in findings:
        table.add_row("NO" if finding.broken else "yes", finding.invariant, finding.found)
    console.print()
    console.print(table)
    for finding in findings:
        for line in [*finding.broken[:SHOWN], *(["..."] if len(finding.broken) > SHOWN else [])]:
            console.print(f"NO: {finding.invariant}: {line}")
    states = Counter(t.state.name.lower() for t in trials_of(ordeal.place.stores, NAME))
    trials = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    console.print(
        f"\nSeed {ordeal.seed}: {len(ordeal.happened)} faults ({counts(ordeal.happened)}), "
        f"{len(ordeal.launches)} launches, {states.total()} trials ({trials}), "
        f"{ordeal.seconds / 60:.1f} minutes"
    )


if __name__ == "__main__":
    sys.exit(main())
