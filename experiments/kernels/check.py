"""Check whether the figures of the kernel report got worse.

The rule: of every row that was made again, no figure may be worse than the committed one by anything at all, because
the same compiler makes the same code of the same source. A wanted trade (a few registers for fewer instructions) is
accepted by committing the new report, where a reviewer sees both figures. Rows of another version of Triton are not
compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from experiments.kernels.row import Figures, Row, row_of


@dataclass(frozen=True)
class Report:
    """A kernel report: the version of Triton that compiled it, and its rows."""

    triton: str
    rows: list[Row]


def _narrowest(figures: Figures) -> int:
    """Return the bytes a lane of the narrowest load or asynchronous copy in the main loop."""
    return min(map(int, (*figures.loads, *figures.async_copies)), default=0)


def _widest_store(figures: Figures) -> int:
    return max(map(int, figures.stores), default=0)


FEWER_IS_BETTER: dict[str, Callable[[Figures], Any]] = {
    name: attrgetter(name)
    for name in (
        "registers", "spill_store_bytes", "spill_load_bytes", "shared_bytes", "tensor_memory_columns",
        "loop_instructions", "matrix_flops_over_dots", "flops_issued_over_useful", "bytes_requested_over_compulsory",
    )
}  # fmt: skip
MORE_IS_BETTER: dict[str, Callable[[Figures], Any]] = {
    "ctas_per_sm": attrgetter("ctas_per_sm"),
    "bytes of the narrowest load in the loop": _narrowest,
    "bytes of the widest store": _widest_store,
}


def kinds_of(opcodes: Iterable[str]) -> set[str]:
    """Return the kinds of matrix instructions: HMMA, HGMMA, UTCHMMA, v_mfma."""
    return {re.split(r"[.]|_f\d", opcode)[0] for opcode in opcodes}


def regressions(committed: Sequence[Row], made: Sequence[Row]) -> list[str]:
    """Return a line for each figure of `made` that is worse than in `committed`, and for each row missing there."""
    known = {row.key: row for row in committed}
    lines = []
    for row in made:
        before = known.get(row.key)
        if before is None:
            lines.append(f"{row.key}: not in the committed report; make it anew and commit it")
        elif row.figures is None:
            lines += [f"{row.key}: compiled, and now: {row.error}"] if before.figures else []
        elif before.figures:
            lines += [f"{row.key}: {line}" for line in _worse(before.figures, row.figures)]
    return lines


def _worse(before: Figures, now: Figures) -> list[str]:
    found = [
        f"{figure} {was} -> {is_now}"
        for readers, sign in ((FEWER_IS_BETTER, 1), (MORE_IS_BETTER, -1))
        for figure, read in readers.items()
        if (was := read(before)) is not None and (is_now := read(now)) is not None and sign * (is_now - was) > 0
    ]
    if kinds_of(before.matrix) != kinds_of(now.matrix):
        found.append(f"matrix instructions {', '.join(before.matrix)} -> {', '.join(now.matrix) or 'none'}")
    return found


def read_report(path: Path) -> Report:
    """Read a report that `experiments.kernels` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no such report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        rows = [row_of(row) for row in report["rows"]]
        triton = str(report["environment"]["packages"]["triton"])
        complete = report["experiment"] == "kernel_report" and rows
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a report of experiments.kernels: {error}") from error
    if not complete:
        raise ValueError(f"{path}: expected a report of experiments.kernels")
    return Report(triton, rows)
