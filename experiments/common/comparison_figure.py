"""The figure at the top of README.md: what a layer and its attention cost beside peers, as SVG."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours that are legible on one of GitHub's two backgrounds."""

    ink: str
    ours: str
    peers: str


THEMES = {
    "light": Theme(ink="#1f2328", ours="#d9480f", peers="#9aa4af"),
    "dark": Theme(ink="#e6edf3", ours="#ff8c42", peers="#5c6773"),
}


def svg(layers: dict[str, tuple[float, float]], attention: dict[str, dict[str, float]], theme: str) -> str:
    """Draw the figure; the same numbers and version of matplotlib give the same text.

    Args:
        layers: launches and GB of a layer, by encoder.
        attention: matrix FLOPs issued over useful, by workload and implementation.
        theme: one of `THEMES`.
    """
    colours = THEMES[theme]
    plain = {name.replace("`", ""): cost for name, cost in layers.items()}
    # Text stays text: small, sharp, and in the reader's own font.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "vit-kernels", "font.size": 11, "text.color": colours.ink}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9.6, 4.6), layout="constrained")
        (launches, moved), below = figure.subplots(2, 2, height_ratios=(len(layers), 2 + len(attention)))
        grid = below[0].get_gridspec()
        for axes in below:
            axes.remove()
        _bars(launches, {name: cost[0] for name, cost in plain.items()}, "launches a layer (Llama 4)", "{:g}", colours)
        _bars(moved, {name: cost[1] for name, cost in plain.items()}, "GB moved a layer, 16 tiles", "{:.2f}", colours)
        moved.set_yticks([])
        _groups(figure.add_subplot(grid[1, :]), attention, colours)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return re.sub(r"[ \t]+$", "", file.getvalue(), flags=re.MULTILINE)


def _bars(axes: Axes, values: dict[str, float], title: str, form: str, colours: Theme) -> None:
    for y, (name, value) in enumerate(values.items()):
        axes.barh(y, value, color=colours.ours if name.startswith("vit-kernels") else colours.peers, height=0.66)
        axes.annotate(f" {form.format(value)}", (value, y), va="center", color=colours.ink)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)
    _finish(axes, title, colours)


def _groups(axes: Axes, attention: dict[str, dict[str, float]], colours: Theme) -> None:
    """Draw a group of bars for each workload, and a line at 1, where nothing is wasted."""
    place, ticks = 0.0, {}
    for workload, ratios in attention.items():
        ticks[place + (len(ratios) - 1) / 2] = workload.replace(" (", "\n(").replace(", all", ",\nall")
        for name, ratio in ratios.items():
            axes.barh(place, ratio, color=colours.ours if name == "vit-kernels" else colours.peers, height=0.8)
            axes.annotate(f" {ratio:.2f}  {name}", (ratio, place), va="center", fontsize=9, color=colours.ink)
            place += 1
        place += 0.7
    axes.axvline(1, color=colours.ink, linewidth=0.8, linestyle=":")
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(place - 1, -0.7)
    _finish(axes, "attention: matrix FLOPs issued over useful (1 is no waste)", colours)


def _finish(axes: Axes, title: str, colours: Theme) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=colours.ink)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.2)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(colours.peers)
    axes.tick_params(colors=colours.ink, length=0)
