"""What is wrong with both stores, and mending it; the command line of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from optuna.exceptions import StorageInternalError
from rich.table import Table

from pipeline import fast_imports
from pipeline.compose import run_cli
from pipeline.config import printable, without_password
from pipeline.console import open_console
from pipeline.database import sqlite_path, sqlite_uri
from sweeps.config import DoctorConfig
from sweeps.doctor_champion import check_champions
from sweeps.doctor_files import check_left_overs, check_spool
from sweeps.doctor_runs import check_runs
from sweeps.doctor_stores import (
    NoTableError,
    check_disk,
    server_findings,
    size_of,
    sqlite_findings,
)
from sweeps.doctor_trials import check_trials
from sweeps.finding import (
    MENDED,
    NOTE,
    OK,
    WRONG,
    Check,
    Finding,
    Stores,
    count,
    few,
    reason,
    size,
    wrong,
)
from sweeps.storage import storage_uri
from sweeps.study import HeldError

console = open_console()

Report = Mapping[str, Sequence[Finding]]  # by check


class UnwellError(OSError):
    """Something is wrong with a store."""


def _errors() -> tuple[type[Exception], ...]:
    """What goes wrong with a store: one check then cannot be made, the others can."""
    from pipeline.store import STORE_ERRORS

    return (*STORE_ERRORS, StorageInternalError, RuntimeError, ValueError)


# --- the databases, which all else is read from ------------------------------------------


def check_databases(stores: Stores) -> Check:
    """Whether both databases are whole, and who keeps others from writing."""
    from pipeline.store import connect

    hurdles = 0
    for finding in _of_database(stores.uri, "runs"):
        hurdles += finding.state == WRONG and finding.mend is None
        yield finding
    if not hurdles:
        try:
            connect(stores.tracking)
            stores.is_open = True
        except _errors() as error:
            yield wrong(reason(error), "start it, or correct its address")
    hurdles = 0
    if not (path := sqlite_path(stores.storage)) or path.exists():
        with suppress(NoTableError):  # a database on a server that has no study yet
            for finding in _of_database(stores.storage, "trials"):
                hurdles += finding.state == WRONG and finding.mend is None
                yield finding
            stores.has_studies = not hurdles
    files = [f"{path.name} ({size(size_of(path))})" for path in stores.databases]
    others = dict.fromkeys(uri for uri in (stores.uri, stores.storage) if not sqlite_path(uri))
    parts = [*([f"{few(files)}: whole, and can be written"] if files else [])]
    return "; ".join([*parts, *(f"{uri} answers" for uri in others)])


def _of_database(uri: str, table: str) -> Iterator[Finding]:
    from pipeline.store import is_server

    if path := sqlite_path(uri):
        yield from sqlite_findings(path, table)
    elif not is_server(uri):
        yield from server_findings(uri, table)


CHECKS: Mapping[str, Callable[[Stores], Check]] = {
    "databases": check_databases,
    "disk": check_disk,
    "spool": check_spool,  # ends runs, so before these
    "runs": check_runs,
    "trials": check_trials,
    "left-overs": check_left_overs,
    "champion": check_champions,
}
UNOPENED = ("databases", "disk", "spool")  # looked at also where MLflow's store is away


# --- looking and mending -----------------------------------------------------------------


def look(stores: Stores, *, fix: bool, show: Callable[[str], object]) -> Report:
    """Makes all checks, and mends what they find.

    Args:
        stores: To look at.
        fix: Whether to mend; otherwise nothing is changed.
        show: Called with the name of each check before it is made.
    """
    report: dict[str, list[Finding]] = {}
    for name, check in CHECKS.items():
        if stores.is_open or name in UNOPENED:
            show(f"looking at the {name}")
            report[name] = _made(check(stores), stores, fix=fix)
        else:
            report[name] = [Finding(state=NOTE, text="not looked at: the store is not open")]
    return report


def _made(check: Check, stores: Stores, *, fix: bool) -> list[Finding]:
    found: list[Finding] = []
    try:
        while True:
            finding = next(check)
            found.append(_mended(finding, stores) if fix else finding)
    except StopIteration as end:
        is_well = not any(finding.state in (WRONG, MENDED) for finding in found)
        if end.value and is_well:
            found.insert(0, Finding(state=OK, text=str(end.value)))
    except _errors() as error:
        found.append(wrong(f"it cannot be looked at: {reason(error)}"))
    return found


def _mended(finding: Finding, stores: Stores) -> Finding:
    if finding.mend is None:
        return finding
    try:
        did = finding.mend()
    except HeldError as error:
        return Finding(state=NOTE, text=f"{finding.text}; left alone: {error}")
    except _errors() as error:
        return wrong(f"{finding.text}; it cannot be mended: {reason(error)}")
    stores.forget()
    return Finding(state=MENDED, text=f"{finding.text}: {did}")


# --- the command line --------------------------------------------------------------------


def main(config: DoctorConfig, overrides: list[str]) -> None:
    with fast_imports():
        from pipeline.store import connect
    database = Path(config.tracking.directory).absolute() / "mlflow.db"
    uri = config.tracking.uri or sqlite_uri(database)
    if (path := sqlite_path(uri)) and not path.exists():
        connect(config.tracking)  # says so
    stores = Stores(
        tracking=config.tracking,
        data=config.data,
        uri=f"sqlite:///{path}" if path else uri,
        storage=storage_uri(config.study, config.tracking),
        overrides=overrides,
    )
    with console.status("looking") as status:
        try:
            report = look(stores, fix=config.fix, show=status.update)
        except NoTableError as error:
            raise FileNotFoundError(
                f"no runs are recorded in {error}: run python -m sweeps.run data=digits, "
                "or set tracking.uri to where there are some."
            ) from error
    show(report)
    if any(finding.state == WRONG for found in report.values() for finding in found):
        raise UnwellError(verdict(report, fix=config.fix))


def show(report: Report) -> None:
    """Prints a line a finding, then what to do about them."""
    table = Table(box=None, pad_edge=False)
    for heading in ("check", "state", "what was found"):
        table.add_column(heading, overflow="fold")
    lines = [(name, finding) for name, found in report.items() for finding in found]
    for name, finding in lines:
        style = {WRONG: "bold red", MENDED: "green", NOTE: "yellow"}.get(finding.state)
        table.add_row(name, finding.state, _shown(finding.text), style=style)
    console.print(table)
    todo = dict.fromkeys(f"{name}: {finding.todo}" for name, finding in lines if finding.todo)
    if todo:
        console.print()
    for line in todo:  # outside the table, in which a terminal would break them
        console.print(_shown(line))


def _shown(text: str) -> str:
    return printable(without_password(text))


def verdict(report: Report, *, fix: bool) -> str:
    """What is wrong, in one line."""
    by_check = {
        name: [finding for finding in found if finding.state == WRONG]
        for name, found in report.items()
    }
    found = [finding for findings in by_check.values() for finding in findings]
    names = few([name for name, findings in by_check.items() if findings])
    how = "is" if len(found) == 1 else "are"
    if fix:
        return f"{count(len(found), 'thing')} {how} still wrong: {names}."
    mendable = sum(finding.mend is not None for finding in found)
    if not mendable:
        return f"{count(len(found), 'thing')} {how} wrong: {names}."
    mends = "it" if len(found) == 1 else f"{mendable} of them"
    return f"{count(len(found), 'thing')} {how} wrong: {names}; fix=true mends {mends}."


if __name__ == "__main__":
    run_cli("doctor", DoctorConfig, main, interrupted="Interrupted.")
