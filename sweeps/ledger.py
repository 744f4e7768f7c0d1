"""Who was champion when; and the way back to the one before."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from rich.table import Table

from pipeline import start_libraries
from pipeline.console import open_console
from sweeps.config import PromotionConfig

if TYPE_CHECKING:  # or MLflow is imported
    from pipeline.registry import Version

SMOKE = "smoke"  # tag of a version: the classes it predicts for its input example

console = open_console()


def roll_back(config: PromotionConfig, uri: str) -> None:
    """Makes the previous champion the champion again, if it still answers as at its promotion.

    Raises:
        ValueError: There is none, or it does not load, or answers otherwise; the champion stays.
    """
    from pipeline.registry import (
        deciding,
        find_version,
        lock_uri,
        move_champion,
        previous_champion,
        read_version,
    )

    name = find_version(config.name).name
    with deciding(lock_uri(uri, config.tracking), name):
        champion, number = find_version(name), previous_champion(name)
        if number is None:
            raise ValueError(f"name={name}: {champion} has no champion before it.")
        version = read_version(name, number)
        images = _smoke(version)
        evidence = f"takes back version {champion.number}; {images} images predicted as before"
        move_champion(version, action="rollback", promotion="", evidence=evidence)
    console.print(
        f"{version} is the champion again, in place of version {champion.number}: it predicts its "
        f"{images} example images as at its promotion."
    )


def _smoke(version: Version) -> int:
    """Predicts the input example; returns how many images that are.

    Raises:
        ValueError: The model is not what was promoted.
    """
    from pipeline.registry import DIGEST, example_of, load_served, model_digest

    with console.status("starting TensorFlow for a smoke prediction"):
        start_libraries()
    from pipeline.train import initialize

    initialize(threads=1, seed=0)
    classes = load_served(version.uri)(example_of(version.uri)).argmax(axis=1)
    found = " ".join(map(str, classes))
    if found != version.tags.get(SMOKE, found):
        raise ValueError(
            f"{version} predicts {found} for its example, at its promotion "
            f"{version.tags[SMOKE]}: the champion stays."
        )
    if version.tags.get(DIGEST) != model_digest(version.uri):
        raise ValueError(f"the file of {version} is not what was promoted: the champion stays.")
    return len(classes)


def show_history(config: PromotionConfig) -> None:
    """Prints the ledger of a model, or of all that have one."""
    from pipeline.registry import find_version, read_ledger, registered_models

    names = [config.name] if config.name else registered_models()
    ledgers = {name: moves for name in names if (moves := read_ledger(name))}
    if not ledgers:
        find_version(config.name)  # says so
    for name, moves in ledgers.items():
        table = Table(title=name, title_justify="left", box=None, pad_edge=False)
        for heading in ("when", "action", "version", "replaced", "run", "evidence"):
            table.add_column(heading)
        for move in moves:
            table.add_row(
                f"{datetime.fromisoformat(move.at).astimezone():%Y-%m-%d %H:%M}",
                move.action if move.happened else f"{move.action}, broken off",
                str(move.version),
                str(move.replaced or ""),
                move.run_id,
                move.evidence,
            )
        console.print(table)
