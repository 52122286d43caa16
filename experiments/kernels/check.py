"""Whether the figures of the kernel report got worse.

The rule: of every row that was made again, no figure may be worse than the committed one by anything at all, because
the same compiler makes the same code of the same source. A wanted trade (a few registers for fewer instructions) is
accepted by committing the new report, where a reviewer sees both figures. Rows of another version of Triton are not
compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KEY = ("kernel", "dtype", "head_dim", "target", "configuration")


def _narrowest(row: Row) -> int:
    """Bytes a lane of the narrowest load or asynchronous copy in the main loop."""
    return min(map(int, (*row["loads"], *row["async_copies"])), default=0)


def _widest_store(row: Row) -> int:
    return max(map(int, row["stores"]), default=0)


def _figure(name: str) -> Callable[[Row], Any]:
    return lambda row: row[name]


FEWER_IS_BETTER: dict[str, Callable[[Row], Any]] = {
    name: _figure(name)
    for name in (
        "registers", "spill_store_bytes", "spill_load_bytes", "shared_bytes", "tensor_memory_columns",
        "loop_instructions", "matrix_flops_over_dots", "flops_issued_over_useful", "bytes_requested_over_compulsory",
    )
}  # fmt: skip
MORE_IS_BETTER: dict[str, Callable[[Row], Any]] = {
    "ctas_per_sm": _figure("ctas_per_sm"),
    "bytes of the narrowest load in the loop": _narrowest,
    "bytes of the widest store": _widest_store,
}


def key_of(row: Row) -> str:
    """What names a row of the report."""
    configuration = " ".join(f"{name}={value}" for name, value in sorted((row["configuration"]).items()))
    return f"{row['kernel']}, {row['dtype']}, head_dim {row['head_dim']}, {row['target']}, {configuration or 'its own'}"


def kinds_of(opcodes: Iterable[str]) -> set[str]:
    """The kinds of matrix instructions: HMMA, HGMMA, UTCHMMA, v_mfma."""
    return {re.split(r"[.]|_f\d", opcode)[0] for opcode in opcodes}


def regressions(committed: list[Row], made: list[Row]) -> list[str]:
    """A line for each figure of `made` that is worse than in `committed`, and for each row that is not there."""
    known = {key_of(row): row for row in committed}
    lines = []
    for row in made:
        name = key_of(row)
        before = known.get(name)
        if before is None:
            lines.append(f"{name}: not in the committed report; make it anew and commit it")
        elif row["error"]:
            lines += [] if before["error"] else [f"{name}: compiled, and now: {row['error']}"]
        elif not before["error"]:
            lines += [f"{name}: {line}" for line in _worse(before, row)]
    return lines


def _worse(before: Row, now: Row) -> list[str]:
    found = [
        f"{figure} {was} -> {is_now}"
        for readers, sign in ((FEWER_IS_BETTER, 1), (MORE_IS_BETTER, -1))
        for figure, read in readers.items()
        if (was := read(before)) is not None and (is_now := read(now)) is not None and sign * (is_now - was) > 0
    ]
    if kinds_of(before["matrix"]) != kinds_of(now["matrix"]):
        found.append(f"matrix instructions {', '.join(before['matrix'])} -> {', '.join(now['matrix']) or 'none'}")
    return found


def read_report(path: Path) -> dict[str, Any]:
    """A report that `experiments.kernels` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        complete = report["experiment"] == "kernel_report" and report["environment"]["packages"] and report["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a report of experiments.kernels: {error}") from error
    if not complete:
        raise ValueError(f"{path}: expected a report of experiments.kernels")
    return report


def triton_version(report: dict[str, Any]) -> str:
    """That the report's kernels were compiled with."""
    return str(report["environment"]["packages"]["triton"])
