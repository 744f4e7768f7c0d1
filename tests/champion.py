"""The champion of a swept store, as a user gets it: promoted, and asked for digits."""

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir

from pipeline.compose import CONF, to_config
from pipeline.data import load
from tests.invariants import Finding
from tests.launching import run
from tests.stores import Stores, query

PROMOTE = [sys.executable, "-m", "sweeps.promote"]
PREDICT = [sys.executable, "-m", "pipeline.predict"]
PREDICTIONS = "predictions.csv"
CLOSE = 1e-6  # what single precision leaves of an accuracy


def promote_and_predict(
    sweep: str, folder: Path, overrides: Sequence[str], environment: Mapping[str, str]
) -> list[tuple[int, str]]:
    """Promotes the best trial on one fresh seed, and has the champion predict all that is judged.

    Args:
        sweep: Name of a sweep of `data=digits`.
        folder: From where it was run; gets `predictions.csv`.
        overrides: That lead to its store.
        environment: Of the processes.

    Returns:
        Exit status of each command and all that it wrote.
    """
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        data = load(to_config(compose("run", ["data=digits"])).data)
    files = []
    for name, split in data.splits.items():
        files.append(f"{name}.npz")
        np.savez(folder / files[-1], images=split.images, labels=split.labels)
    cheap = ["promote.top=1", "promote.seeds=[1001]", "promote.floor=0"]
    commands = [
        [*PROMOTE, f"sweep.name={sweep}", *cheap, *overrides],
        [*PREDICT, *files, "--out", PREDICTIONS, *overrides],
    ]
    done = [
        run(folder=folder, command=command, timeout=1800, environment=environment)
        for command in commands
    ]
    return [(each.returncode, each.stdout + each.stderr) for each in done]


def find_champion(stores: Stores) -> Finding:
    """Whether what was predicted is as accurate as was recorded of the champion."""
    logged, answered = _logged(stores), _answered(stores.folder / PREDICTIONS)
    broken = [
        f"its {split} accuracy is {answered.get(split)}, {figure} was logged"
        for split, figure in logged.items()
        if abs(answered.get(split, -1.0) - figure) > CLOSE
    ]
    if not logged:
        broken.append("there is no champion")
    return Finding(
        invariant="the champion loads and gives its logged figures again",
        found=", ".join(f"{split} {figure:.4f}" for split, figure in answered.items()),
        broken=broken,
    )


def _logged(stores: Stores) -> dict[str, float]:
    """The champion's accuracy on the validation and on the test split."""
    of_champion = "registered_model_aliases AS alias JOIN {} AS it USING (name, version)"
    validation = query(
        stores.runs,
        "SELECT metric.value FROM latest_metrics AS metric JOIN "
        f"({of_champion.format('model_versions')}) ON metric.run_uuid = it.run_id "
        "WHERE alias.alias = 'champion' AND metric.key = 'saved_val_accuracy'",
    )
    test = query(
        stores.runs,
        f"SELECT it.value FROM {of_champion.format('model_version_tags')} "
        "WHERE alias.alias = 'champion' AND it.key = 'test_accuracy'",
    )
    found = {"validation": validation, "test": test}
    return {split: float(rows[0][0]) for split, rows in found.items() if rows}


def _answered(predictions: Path) -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    if predictions.exists():
        with predictions.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                split = Path(row["file"].split(":")[0]).stem
                right.setdefault(split, []).append(row["prediction"] == row["label"])
    return {split: sum(each) / len(each) for split, each in right.items()}
