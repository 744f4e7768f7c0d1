"""Who may import what, and who may look at the test split."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
    for package in ("pipeline", "sweeps")
    for path in sorted((ROOT / package).rglob("*.py"))
}
OWNERS = {
    "mlflow": {
        "pipeline/entries.py",
        "pipeline/outline.py",
        "pipeline/store.py",
        "pipeline/tracking.py",
        "pipeline/registry.py",
    },
    "omegaconf": {"pipeline/compose.py"},
    "hydra": {"pipeline/compose.py", "sweeps/space.py", "sweeps/plan.py"},
    "optuna": {name for name in SOURCES if name.startswith("sweeps/")},
    "sweeps": {name for name in SOURCES if name.startswith("sweeps/")},
}
PAGES = [
    ROOT / name / "README.md" for name in (".", "mlruns", "sweeps/cluster", "tests/benchmarks")
]
TRAINING = ("tensorflow", "keras", "matplotlib", "sklearn")


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level packages that a module imports, at any depth of its code."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name.partition(".")[0] for alias in names)
            case ast.ImportFrom(module=module, level=level):
                yield (module or "").partition(".")[0] if level == 0 else "a relative import"


@pytest.mark.parametrize(("library", "owners"), OWNERS.items())
def test_a_library_is_imported_only_by_its_owners(library: str, owners: set[str]) -> None:
    users = {name for name, tree in SOURCES.items() if library in imported(tree)}

    assert users <= owners


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_links_of_a_page_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))

    assert [link for link in links if not (page.parent / link).exists()] == []


def test_imports_are_absolute() -> None:
    users = {name for name, tree in SOURCES.items() if "a relative import" in imported(tree)}

    assert users == set()


def test_the_configuration_imports_only_the_standard_library() -> None:
    libraries = set(imported(SOURCES["pipeline/config.py"]))

    assert libraries <= sys.stdlib_module_names


def test_only_the_evaluation_reads_the_test_split() -> None:
    readers = {
        name
        for name, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "test"
    }

    assert readers <= {"pipeline/evaluate.py", "pipeline/data.py"}


def test_only_the_record_of_a_run_asks_for_all_splits_by_name() -> None:
    readers = {
        name
        for name, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "splits"
    }

    assert readers <= {"pipeline/tracking.py"}


@pytest.mark.parametrize(
    ("modules", "libraries"),
    [
        ("pipeline.run", (*TRAINING, "mlflow", "optuna")),
        ("sweeps.sweep", (*TRAINING, "mlflow")),
        ("sweeps.promote, sweeps.doctor, pipeline.predict, pipeline.repeat", (*TRAINING, "mlflow")),
        # What a launcher needs: its workers alone train.
        ("sweeps.sweep, sweeps.launcher, sweeps.trial, pipeline.tracking", TRAINING),
    ],
)
def test_what_only_composes_or_launches_imports_no_slow_library(
    modules: str, libraries: tuple[str, ...]
) -> None:
    code = f"import sys, {modules}; print([name for name in {libraries} if name in sys.modules])"

    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert ended.stdout.strip() == "[]"
