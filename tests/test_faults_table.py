"""FAULTS.md names tests that are there."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROWS = re.findall(
    r"^\| (\d+) \|[^|]*\|[^|]*\|([^|]*)\|$", (TESTS / "FAULTS.md").read_text("utf-8"), re.M
)


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_fault_has_a_row() -> None:
    assert [int(number) for number, _ in ROWS] == list(range(1, 26))


@pytest.mark.parametrize(("number", "named"), ROWS, ids=[number for number, _ in ROWS])
def test_every_fault_has_tests_that_are_there(number: str, named: str) -> None:
    file, names = "", re.findall(r"`([^`]+)`", named)

    assert names
    for name in names:
        file = name.partition("::")[0] or file
        assert name.partition("::")[2] in functions(TESTS / file)
