"""The figure of `experiments.compile_cost`: a bar for each form, its CPU-seconds to the first result."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from experiments.compile_cost.row import Report, Sample

COLOURS = {"plain": "#8da0b6", "transformers": "#4c6a92"}
OURS = "#d95f02"


def draw(report: Report, path: Path) -> None:
    """Draw the rows of a report into a PNG file."""
    rows = report.rows
    figure = Figure(figsize=(9, 1.4 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        if row.problem:
            axes.annotate("no figure: wrong or failed", (0, y), va="center", fontsize=8)
            continue
        axes.barh(y, row.median("cpu_seconds"), color=COLOURS.get(row.name, OURS), height=0.62)
        samples = [sample.cpu_seconds for sample in row.samples if isinstance(sample, Sample)]
        axes.plot(samples, [y] * len(samples), "o", color="black", markersize=3)
        axes.annotate(f"  {row.median('cpu_seconds'):.3g}", (max(samples), y), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"CPU-seconds to the first result: {report.title}, one thread", loc="left", fontsize=10)
    figure.savefig(path, dpi=110)
