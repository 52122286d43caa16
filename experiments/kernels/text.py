"""The text of the kernel report."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from experiments.kernels.check import kinds_of
from experiments.kernels.row import Row

_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# Told by the other columns, or the same in all.
_UNNAMED = ("BLOCK_D0", "BLOCK_D1", "INPUT_PRECISION")
COLUMNS = (
    "dtype", "head_dim", "target", "configuration", "regs", "spills B", "shared KiB", "CTAs/SM", "matrix", "MMA/dot",
    "loads", "stores", "loop", "per 64", "FLOPs", "bytes", "model's prediction, us",
)  # fmt: skip


def print_report(console: Console, rows: Sequence[Row], notes: Sequence[str]) -> None:
    """Print a table for each kernel, and what the columns mean."""
    for kernel in dict.fromkeys(row.kernel for row in rows):
        of_kernel = [row for row in rows if row.kernel == kernel]
        table = Table(title=f"{kernel} ({of_kernel[0].package})", title_justify="left")
        for column in COLUMNS:
            table.add_column(column)
        for row in of_kernel:
            table.add_row(*cells(row))
        console.print(table)
    for note in notes:
        console.print(note)


def cells(row: Row) -> list[str]:
    """Return the cells of one row, under COLUMNS; the default configuration has a star."""
    named = [_SHORT[row.dtype], str(row.head_dim), row.target, _configuration(row)]
    if (of := row.figures) is None:
        return [*named, f"[red]{row.error}[/red]", *[""] * (len(COLUMNS) - 5)]
    return [
        *named,
        str(of.registers),
        f"{of.spill_store_bytes}+{of.spill_load_bytes}",
        f"{of.shared_bytes / 1024:.1f}",
        str(of.ctas_per_sm),
        ", ".join(sorted(kinds_of(of.matrix))) or "-",
        _number(of.matrix_flops_over_dots),
        _widths(of.loads, of.async_copies, of.bulk_copies),
        _widths(of.stores, {}, 0),
        _number(of.loop_instructions),
        _number(of.loop_instructions_per_64),
        _number(of.flops_issued_over_useful),
        _number(of.bytes_requested_over_compulsory),
        ", ".join(f"{gpu} {low:g} to {high:g}" for gpu, (low, high) in of.roofline_us.items()) or "-",
    ]


def _configuration(row: Row) -> str:
    blocks = " ".join(
        f"{name.removeprefix('BLOCK_').removeprefix('num_')}={value}"
        for name, value in row.configuration.items()
        if name not in _UNNAMED
    )
    return ("* " if row.default else "") + (blocks or f"warps={row.figures.num_warps if row.figures else '?'}")


def _widths(loads: dict[str, int], copies: dict[str, int], bulk: int) -> str:
    parts = [f"{times}x{width}" for width, times in loads.items()]
    parts += [f"{times}x{width} async" for width, times in copies.items()]
    return ", ".join(parts + ([f"{bulk} bulk"] if bulk else [])) or "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
