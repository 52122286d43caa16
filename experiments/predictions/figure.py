"""The figure: the calibrated model against every measured row, its error by size, and ours beside the peer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common.roofline import Efficiency
from experiments.predictions import attention
from experiments.predictions.measured import Attention

COLOURS = {64: "#8da0b6", 72: "#d95f02", 80: "#1b3558"}
MARKERS = {"H100": "o", "H200": "^", "B200": "s"}
LABELS = {
    "interval": "roofline's interval for ours",
    "measured": "FlashAttention, measured by others",
    "ours": "ours, if it reached the peer's efficiency",
}


def draw(rows: Sequence[Attention], efficiency: Efficiency, result: dict[str, Any], path: Path) -> None:
    """Draw the three panels into a PNG file.

    Args:
        rows: measured.
        efficiency: fitted.
        result: the content of the result file.
        path: of the file.
    """
    figure = Figure(figsize=(17, 5.4), layout="constrained")
    ratio, sizes, beside = figure.subplots(1, 3, width_ratios=(1.1, 0.8, 1.1))
    _draw_ratios(ratio, [row for row in rows if row.is_flash_attention], efficiency)
    _draw_sizes(sizes, result["attention_sizes"])
    _draw_beside(beside, result["ours"])
    figure.savefig(path, dpi=100)


def _draw_ratios(axes: Axes, rows: Sequence[Attention], efficiency: Efficiency) -> None:
    for head_dim, colour in COLOURS.items():
        for gpu, marker in MARKERS.items():
            chosen = [row for row in rows if (row.gpu, row.head_dim) == (gpu, head_dim)]
            measured = [row.seconds for row in chosen]
            predicted = [attention.seconds(row.gpu, attention.work_of(row), efficiency) for row in chosen]
            fitted = any(map(attention.is_fitted, chosen))
            axes.scatter(
                [1e6 * seconds for seconds in measured],
                [time / seconds for time, seconds in zip(predicted, measured, strict=True)],
                s=14,
                marker=marker,
                color=colour,
                alpha=0.35 if fitted else 0.8,
                linewidths=0,
                label=f"{gpu}, {head_dim}" + (" (fitted)" if fitted else ""),
            )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_ylim(0.5, 2.2)
    axes.set_xlabel("measured by others, us", fontsize=9)
    axes.legend(fontsize=7, ncols=3, frameon=False, title="GPU, head_dim", title_fontsize=7)
    _finish(axes, "FlashAttention 3 and 4: the model's time / the measured")


def _draw_sizes(axes: Axes, groups: Sequence[dict[str, Any]]) -> None:
    for head_dim, colour in COLOURS.items():
        chosen = [group for group in groups if group["key"]["head_dim"] == head_dim]
        lengths = [group["key"]["length"] for group in chosen]
        for quantile, style in (("median", "-"), ("ninetieth", ":")):
            label = f"head_dim {head_dim}" if quantile == "median" else None
            heights = [100 * group["errors"][quantile] for group in chosen]
            axes.plot(lengths, heights, style, color=colour, marker=".", label=label)
    axes.set_xscale("log")
    axes.set_ylim(0)
    axes.set_xlabel("tokens of a sequence", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    _finish(axes, "held-out error, %: median (line), 90th percentile (dots)")


def _draw_beside(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    names = [f"{row['gpu']}: {row['sequences']} x {row['length']}, {row['head_dim']}" for row in rows]
    for y, row in enumerate(rows):
        label = LABELS if y == 0 else dict.fromkeys(LABELS)
        axes.plot(row["interval"], [y, y], color="#c3cad2", linewidth=5, label=label["interval"], zorder=1)
        times = list(row["measured"].values())
        axes.scatter(times, [y] * len(times), color="#1b3558", s=26, label=label["measured"], zorder=2)
        axes.scatter([row["ours"]], [y], color="#d95f02", marker="D", s=22, label=label["ours"], zorder=3)
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlabel("us", fontsize=9)
    axes.legend(fontsize=7, frameon=False, loc="lower left")
    _finish(axes, "sequences x tokens, head_dim; none of ours was run")


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
