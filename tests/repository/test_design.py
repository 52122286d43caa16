"""DESIGN.md's table of tools and encoders names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from experiments.common.encoders import ENCODERS

ROOT = Path(__file__).parents[2]
NONE = "-"


def table(text: str) -> dict[tuple[str, str], str]:
    """The cells of the table by tool and encoder."""
    section = text.partition("## Which tool takes which encoder")[2].partition("\n## ")[0]
    lines = [line.strip().strip("|") for line in section.splitlines() if line.startswith("|")]
    (_, *encoders), _, *rows = ([cell.strip() for cell in line.split("|")] for line in lines)
    cells: dict[tuple[str, str], str] = {}
    for tool, *of_encoders in rows:
        cells |= {(tool, encoder): cell for encoder, cell in zip(encoders, of_encoders, strict=True)}
    return cells


def problem(cell: str) -> str | None:
    """What is wrong with a cell that is not empty."""
    if cell == NONE:
        return None
    if (named := re.fullmatch(r"`([\w/]+\.py)::(test_\w+)`", cell)) is None:
        return "expected `path.py::test_name`, or a dash"
    path = ROOT / "tests" / named[1]
    if not path.exists():
        return "the file does not exist"
    functions = ast.parse(path.read_text(encoding="utf-8")).body
    names = {function.name for function in functions if isinstance(function, ast.FunctionDef)}
    return None if named[2] in names else "the file has no such test"


CELLS = table((ROOT / "DESIGN.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("place", "cell"), [pytest.param(*each, id=" of ".join(each[0])) for each in CELLS.items()])
def test_a_cell_names_a_test_that_exists(place: tuple[str, str], cell: str) -> None:
    assert not cell or problem(cell) is None


def test_every_encoder_has_a_column_without_an_empty_cell() -> None:
    for kind in ENCODERS.values():
        column = [cell for (_, encoder), cell in CELLS.items() if encoder == kind.title]
        assert column
        assert all(column), kind.title


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ("`repository/test_design.py::test_a_cell_names_a_test_that_exists`", None),
        (NONE, None),
        ("`repository/test_design.py::test_another`", "the file has no such test"),
        ("`repository/test_plan.py::test_another`", "the file does not exist"),
        ("yes", "expected `path.py::test_name`, or a dash"),
    ],
)
def test_what_is_wrong_with_a_cell_is_told(cell: str, told: str | None) -> None:
    assert problem(cell) == told
