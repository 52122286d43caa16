"""What encoders ask of a GPU, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from experiments.launches.layer import PREDICTED, Interval, Row


def print_tables(console: Console, rows: Sequence[Row], notes: Sequence[str], sizes: str) -> None:
    """A table of all rows, of the kernels of the largest ones, and the notes; `sizes` is what `Row.size` counts."""
    table = Table(title="A layer, as generated; ms predicted by a roofline, never measured", title_justify="left")
    for column in ("encoder", "shapes", sizes, "launches", "Triton", "GEMM", "opaque", "GB", "TFLOP", *PREDICTED):
        table.add_column(column, justify="left" if column in ("encoder", "shapes") else "right")
    for row in rows:
        layer = row.layer
        counts = [f"{count:g}" for count in (layer.launches, layer.triton, layer.gemm, layer.opaque)]
        work = [f"{layer.bytes / 1e9:.3f}", f"{layer.flops / 1e12:.3f}"]
        table.add_row(row.encoder, row.shapes, str(row.size), *counts, *work, *_times(layer.predicted_seconds))
    console.print(table)
    for row in rows:
        if row.shapes == "static" and row.size == max(row.size for row in rows):
            _print_kernels(console, row, sizes)
    for note in notes:
        console.print(note)


def _print_kernels(console: Console, row: Row, sizes: str) -> None:
    table = Table(title=f"{row.encoder}: the kernels of a layer at {row.size} {sizes}", title_justify="left")
    for column in ("", "kernel", "kind", "MB read", "MB written", "GFLOP", *PREDICTED):
        table.add_column(column, justify="left" if column in ("kernel", "kind") else "right")
    for kernel in row.layer.kernels:
        work = (kernel.read_bytes / 1e6, kernel.written_bytes / 1e6, kernel.flops / 1e9)
        named = (f"{kernel.count:g}", kernel.kernel[:58], kernel.kind)
        table.add_row(*named, *(f"{figure:.1f}" for figure in work), *_times(kernel.predicted_seconds))
    console.print(table)


def _times(predicted_seconds: dict[str, Interval]) -> list[str]:
    return ["{:.3f}-{:.3f}".format(*(1e3 * bound for bound in predicted_seconds[gpu])) for gpu in PREDICTED]
