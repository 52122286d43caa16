"""The figure of the kernel report, which shows the default configurations in bf16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common.problem import HEAD_DIM
from experiments.common.roofline import GPUS
from experiments.kernels.row import Figures, Row

COLOURS = {"sm_80": "#8da0b6", "sm_90": "#4c6a92", "sm_100": "#1b3558", "gfx942": "#e69f5c", "gfx950": "#d95f02"}
PEER = "vLLM prefill attention"
ATTENTION = "varlen_attention"
Shown = Sequence[tuple[Row, Figures]]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the figure into a PNG file; a panel without rows stays empty.

    Args:
        rows: the rows of the report.
        path: the path of the file.
    """
    shown = [(row, row.figures) for row in rows if row.default and row.dtype == "bfloat16" and row.figures]
    figure = Figure(figsize=(14, 10), layout="constrained")
    figure.suptitle(
        "Kernels as compiled for five targets, bf16, default configurations; nothing was run on a GPU",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    (work, loop), (registers, roof) = figure.subplots(2, 2)
    _draw_work(work, shown)
    keys = "instructions a warp for 64 keys in the main loop"
    _draw_by_target(loop, shown, lambda of: of.loop_instructions_per_64, keys)
    threads = "registers a thread (AMD: VGPRs and AGPRs), and blocks an SM"
    _draw_by_target(registers, shown, lambda of: of.registers, threads, blocks=True)
    _draw_roofline(roof, shown)
    figure.savefig(path, dpi=110)


def _draw_work(axes: Axes, shown: Shown) -> None:
    """Draw issued over useful FLOPs by head_dim, with a line for each kernel."""
    points = [
        (row.kernel, row.head_dim, of.flops_issued_over_useful)
        for row, of in shown
        if of.flops_issued_over_useful and row.target == "sm_90"
    ]
    for kernel in dict.fromkeys(name for name, _, _ in points):
        line = sorted((head_dim, issued) for name, head_dim, issued in points if name == kernel)
        style = "--" if kernel == PEER else "-"
        axes.plot(*zip(*line, strict=True), style, marker="o", markersize=4, label=kernel)
    axes.axhline(1, color="black", linewidth=0.6)
    axes.set_xticks(sorted({head_dim for _, head_dim, _ in points}))
    axes.set_xlabel("head_dim", fontsize=8)
    _finish(axes, "matrix FLOPs issued / useful, 577 tokens (blocks for sm_90)")


def _draw_by_target(
    axes: Axes, shown: Shown, read: Callable[[Figures], float | None], title: str, *, blocks: bool = False
) -> None:
    """Draw a figure of attention's rows as bars, by head_dim and target, and the peer's as a line across its bar."""
    head_dims = sorted({row.head_dim for row, _ in shown})
    width = 0.8 / len(COLOURS)
    for row, of in shown:
        if row.kernel not in (ATTENTION, PEER) or (height := read(of)) is None:
            continue
        x = head_dims.index(row.head_dim) + ([*COLOURS].index(row.target) - 2) * width
        if row.kernel == PEER:
            axes.plot([x - width / 2, x + width / 2], [height] * 2, color="firebrick", linewidth=2)
            continue
        axes.bar(x, height, width, color=COLOURS[row.target])
        if blocks:
            axes.text(x, height, str(of.ctas_per_sm), ha="center", va="bottom", fontsize=7)
    for target, colour in COLOURS.items():
        axes.bar(0, 0, color=colour, label=target)
    if any(row.kernel == PEER for row, _ in shown):
        axes.plot([], [], color="firebrick", linewidth=2, label=PEER)
    axes.set_xticks(range(len(head_dims)), [str(head_dim) for head_dim in head_dims])
    axes.set_xlabel("head_dim", fontsize=8)
    _finish(axes, f"{ATTENTION}: {title}")


def _draw_roofline(axes: Axes, shown: Shown) -> None:
    """Draw the model's intervals at Llama 4's head_dim, a group for each kernel and a bar for each GPU."""
    shown = [(row, of) for row, of in shown if row.head_dim == HEAD_DIM and of.roofline_us]
    kernels = list(dict.fromkeys(row.kernel for row, _ in shown))
    height = 0.8 / len(GPUS)
    for row, of in shown:
        for gpu, (low, high) in of.roofline_us.items():
            y = kernels.index(row.kernel) + ([*GPUS].index(gpu) - (len(GPUS) - 1) / 2) * height
            axes.barh(y, high - low, left=low, height=height, color=COLOURS[row.target])
            axes.text(high, y, f" {gpu}", fontsize=5, va="center")
    axes.set_yticks(range(len(kernels)), kernels)
    axes.set_ylim(len(kernels) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlabel("microseconds: 16 tiles of 577 tokens, 16 heads", fontsize=8)
    _finish(axes, f"head_dim {HEAD_DIM}: a roofline model's interval, not a measurement", legend=False)


def _finish(axes: Axes, title: str, legend: bool = True) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    if legend and axes.get_legend_handles_labels()[0]:
        # Room above what is drawn.
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.25 * (high - low))
        axes.legend(fontsize=7, frameon=False, ncols=3, loc="upper left")
