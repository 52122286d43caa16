"""The main job's figure: the tiled image, its features, and the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

COLOURS = {"eager": "#8da0b6", "compiled": "#d95f02", "transformers": "#4c6a92"}
GAP = 10
"""White pixels between the tiles that are shown."""


def draw(result: dict[str, Any], pixel_values: Tensor, features: Tensor | None, path: Path) -> None:
    """Draw the figure into a PNG file.

    Args:
        result: as written to the JSON file.
        pixel_values: [tiles, 3, image_size, image_size] in [-1, 1].
        features: [tiles, tokens, width], or None when there are none to be trusted.
    """
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    figure.suptitle(_title(result), x=0.01, ha="left", fontsize=11)
    photograph, seen, bars = figure.subfigures(1, 3, width_ratios=(1, 1, 1.35), squeeze=False)[0]
    canvas = result["image"]["canvas"]
    _show(photograph.subplots(), _mosaic(pixel_values, canvas), _image_title(result))
    shown = None if features is None else _mosaic(_principal_colours(features, len(pixel_values)), canvas, gap=0)
    _show(seen.subplots(), shown, _features_title(result))
    times, first_calls, errors = bars.subplots(3, 1)
    _draw_times(times, result["rows"])
    _draw_first_calls(first_calls, result["rows"])
    _draw_errors(errors, result)
    figure.savefig(path, dpi=110)


def _title(result: dict[str, Any]) -> str:
    encoder, sweep = result["encoder"], result["tile_counts"]
    device = (result["environment"]["devices"] or [{"name": result["environment"]["cpu"]["model"]}])[0]["name"]
    if result["graphs"]["problem"] or sweep["problem"]:
        graph = "not proved to be one graph"
    else:
        graph = f"one graph, no recompile over {', '.join(map(str, sweep['tile_counts']))} tiles"
    if sweep["hidden_size"] != encoder["hidden_size"]:
        graph += f" (at width {sweep['hidden_size']})"
    return (
        f"Llama 4 vision encoder, {encoder['num_hidden_layers']} layers of width {encoder['hidden_size']}, "
        f"{result['dtype']} on {device}: {graph}"
    )


def _image_title(result: dict[str, Any]) -> str:
    image = result["image"]
    high, wide = image["canvas"]
    return f"{image['name']}: {high} x {wide} canvas, {image['tiles']} tile(s)"


def _features_title(result: dict[str, Any]) -> str:
    count, weights = result["image"]["features"], result["encoder"]["weights"]
    return f"its {count} features (3 principal components; weights: {weights})"


def _show(axes: Axes, picture: Tensor | None, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.axis("off")
    if picture is not None:
        axes.imshow(picture.numpy(), interpolation="nearest")


def _mosaic(pixel_values: Tensor, canvas: list[int], gap: int = GAP) -> Tensor:
    """The canvas [height, width, 3] in [0, 1] from tiles in [-1, 1], the global tile left out."""
    high, wide = canvas
    pictures = pixel_values[: high * wide].float().cpu().add(1).div(2).clamp(0, 1)
    padded = torch.nn.functional.pad(pictures, (0, gap, 0, gap), value=1.0)
    return rearrange(padded, "(high wide) c h w -> (high h) (wide w) c", high=high, wide=wide)


def _principal_colours(features: Tensor, tiles: int) -> Tensor:
    """The first three principal components of the features as pictures [tiles, 3, grid, grid] in [-1, 1]."""
    flat = features.float().cpu().flatten(0, 1)
    centred = flat - flat.mean(0)
    components = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:3].T
    grid = round(features.shape[1] ** 0.5)
    return rearrange(components / components.abs().amax(0), "(n h w) c -> n c h w", n=tiles, h=grid)


def _draw_times(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Median as a bar, range as a line, every sample as a dot."""
    for y, row in enumerate(rows):
        if (time := row["seconds_per_tile"]) is None:
            _say_wrong(axes, y)
            continue
        median, samples = time["median"], time["samples"]
        axes.barh(y, median, color=COLOURS[row["name"]], height=0.62)
        axes.plot([time["low"], time["high"]], [y, y], color="black", linewidth=1)
        axes.plot(samples, [y] * len(samples), "o", color="black", markersize=3)
        _label(axes, time["high"], y, f"{median:.3g} s")
    _finish(axes, rows, "time a tile: median, range and samples")


def _draw_first_calls(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for y, row in enumerate(rows):
        if (seconds := row["first_call_seconds"]) is None:
            _say_wrong(axes, y)
            continue
        axes.barh(y, seconds, color=COLOURS[row["name"]], height=0.62)
        memory = "" if row["peak_bytes"] is None else f" (later calls: {row['peak_bytes'] / 2**30:.2f} GiB)"
        _label(axes, seconds, y, f"{seconds:.3g} s{memory}")
    _finish(axes, rows, "first call (the compiled one compiles), and peak memory")


def _draw_errors(axes: Axes, result: dict[str, Any]) -> None:
    """On a logarithmic scale, with the bound on the RMS error."""
    rows = result["rows"]
    bound = result["allowed_eps"] * torch.finfo(getattr(torch, result["dtype"])).eps
    axes.axvline(bound, color="firebrick", linestyle="--", linewidth=1)
    axes.text(bound, -0.62, " allowed for the RMS", color="firebrick", fontsize=8, va="top")
    for y, row in enumerate(rows):
        if row["error"] is None:
            _say_wrong(axes, y)
            continue
        rms, maximum = row["error"]["rms"], row["error"]["maximum"]
        axes.plot([rms, maximum], [y, y], color=COLOURS[row["name"]], linewidth=2)
        axes.plot(rms, y, "o", color=COLOURS[row["name"]])
        axes.plot(maximum, y, "|", color=COLOURS[row["name"]], markersize=12, markeredgewidth=2)
        _label(axes, maximum, y, f"RMS {rms:.1e}, max {maximum:.1e}")
    axes.set_xscale("log")
    _finish(axes, rows, "relative error against the fp64 oracle: RMS (dot), largest (tick)")


def _say_wrong(axes: Axes, y: float) -> None:
    axes.text(0.01, y, "WRONG", transform=axes.get_yaxis_transform(), color="firebrick", va="center", fontsize=9)


def _label(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)


def _finish(axes: Axes, rows: list[dict[str, Any]], title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    # Room for the labels at the right of the bars.
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (30 if axes.get_xscale() == "log" else 1.45))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
