"""The figure of `experiments.launches`: what moves the bytes of a layer, and what a roofline makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.launches.layer import Row

COLOURS = {"gemm": "#8da0b6", "opaque": "#4c6a92", "triton": "#d95f02"}
LABELS = {"gemm": "matrix products", "opaque": "opaque operators", "triton": "Inductor's Triton kernels"}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the layers with static shapes of the most tiles into a PNG file."""
    tiles = max(row.size for row in rows)
    shown = [row for row in rows if row.size == tiles and row.shapes == rows[0].shapes]
    figure = Figure(figsize=(13, 1.6 + 0.55 * len(shown)), layout="constrained")
    figure.suptitle(f"One layer of Llama 4's vision encoder, {tiles} tiles, bfloat16: generated code, nothing was run")
    moved, predicted = figure.subplots(1, 2)
    _draw_bytes(moved, shown)
    _draw_predictions(predicted, shown)
    figure.savefig(path, dpi=110)


def _draw_bytes(axes: Axes, rows: Sequence[Row]) -> None:
    for y, row in enumerate(rows):
        left = 0.0
        for kind, colour in COLOURS.items():
            width = sum(kernel.count * kernel.nbytes for kernel in row.layer.kernels if kernel.kind == kind) / 1e9
            axes.barh(y, width, left=left, color=colour, height=0.62, label=LABELS[kind] if y == 0 else None)
            left += width
        axes.annotate(f" {left:.2f} GB, {row.layer.launches:g} launches", (left, y), va="center", fontsize=8)
    axes.set_title("read and written, by kind of kernel (GB)", fontsize=9, loc="left")
    axes.legend(fontsize=8, loc="upper right", frameon=False)
    _finish(axes, rows, 1.45)


def _draw_predictions(axes: Axes, rows: Sequence[Row]) -> None:
    gpus = list(rows[0].layer.predicted_seconds)
    for y, row in enumerate(rows):
        for i, gpu in enumerate(gpus):
            low, high = (1e3 * seconds for seconds in row.layer.predicted_seconds[gpu])
            height = y + 0.18 * (i - (len(gpus) - 1) / 2)
            axes.plot([low, high], [height, height], color="black", linewidth=1.5)
            axes.annotate(f" {gpu} {low:.2f}-{high:.2f}", (high, height), va="center", fontsize=7)
    axes.set_title("predicted by a roofline (ms a layer): its interval", fontsize=9, loc="left")
    _finish(axes, rows, 1.25)


def _finish(axes: Axes, rows: Sequence[Row], room: float) -> None:
    axes.set_yticks(range(len(rows)), [row.encoder for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, axes.get_xlim()[1] * room)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
