"""The main job's figure: the tiled image, its features, and the comparison."""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from experiments.encode.report import swept_text
from experiments.encode.result import Image, Result, Row

COLOURS = {"eager": "#8da0b6", "compiled": "#d95f02", "transformers": "#4c6a92"}
GAP = 10
"""The number of white pixels between the tiles that are shown."""


def draw(result: Result, pixel_values: Tensor, features: Tensor | None, path: Path) -> None:
    """Draw the figure into a PNG file.

    Args:
        result: what was found.
        pixel_values: [tiles, 3, image_size, image_size] in [-1, 1], or [patches, patch_dim], normalised.
        features: [tiles, tokens, width] or [units, width], or None when none are right.
        path: the path of the file.
    """
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    figure.suptitle(_title(result), x=0.01, ha="left", fontsize=11)
    photograph, seen, bars = figure.subfigures(1, 3, width_ratios=(1, 1, 1.35), squeeze=False)[0]
    image, colours = _pictures(result, pixel_values, features)
    _show(photograph.subplots(), image, _image_title(result.image))
    count, weights = result.image.features, result.encoder.weights
    _show(seen.subplots(), colours, f"its {count} features (3 principal components; weights: {weights})")
    times, first_calls, errors = bars.subplots(3, 1)
    _draw_times(times, result)
    _draw_first_calls(first_calls, result.rows)
    _draw_errors(errors, result)
    figure.savefig(path, dpi=110)


def _pictures(result: Result, pixel_values: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the image and its features, each [height, width, 3] in [0, 1]."""
    image, sizes = result.image, result.encoder.sizes
    if image.canvas:
        colours = None if features is None else _principal_colours(features, len(pixel_values))
        return _mosaic(pixel_values, image.canvas), colours if colours is None else _mosaic(colours, image.canvas, 0)
    assert image.grid is not None, "an image has a canvas or a grid"
    high, wide = image.grid
    merge, patch = sizes["spatial_merge_size"], sizes["patch_size"]
    pixels = rearrange(
        pixel_values.float().cpu(),
        "(h w m n) (c t p q) -> t (h m p) (w n q) c",
        h=high // merge, w=wide // merge, m=merge, n=merge, t=sizes["temporal_patch_size"], p=patch, q=patch,
    )[0]  # fmt: skip
    low, top = pixels.amin((0, 1)), pixels.amax((0, 1))
    picture = (pixels - low) / (top - low).clamp(min=1e-6)
    if features is None:
        return picture, None
    components = _components(features.float().cpu())
    return picture, rearrange(components, "(h w) c -> h w c", h=high // merge).add(1).div(2)


def _title(result: Result) -> str:
    sizes, sweep, environment = result.encoder.sizes, result.sweep, result.environment
    device = (environment["devices"] or [{"name": environment["cpu"]["model"]}])[0]["name"]
    if result.graphs.problem or sweep.problem:
        graph = "not known to be one graph"
    else:
        tiles = result.kind.unit == "tile"
        over = swept_text(result) if tiles else f"{len(sweep.sizes)} batches of other sizes"
        graph = f"one graph, no recompile over {over}"
    if sweep.hidden_size != sizes["hidden_size"]:
        graph += f" (at width {sweep.hidden_size})"
    return (
        f"{result.kind.title} vision encoder, {sizes['num_hidden_layers']} layers of width {sizes['hidden_size']}, "
        f"{result.dtype} on {device}: {graph}"
    )


def _image_title(image: Image) -> str:
    if image.canvas:
        return f"{image.name}: {image.canvas[0]} x {image.canvas[1]} canvas, {image.tiles} tile(s)"
    high, wide = image.grid or (0, 0)
    return f"{image.name}: {high} x {wide} patches"


def _show(axes: Axes, picture: Tensor | None, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.axis("off")
    if picture is not None:
        axes.imshow(picture.numpy(), interpolation="nearest")


def _mosaic(pixel_values: Tensor, canvas: list[int], gap: int = GAP) -> Tensor:
    """Return the canvas [height, width, 3] in [0, 1] of tiles in [-1, 1], without the global tile."""
    high, wide = canvas
    pictures = pixel_values[: high * wide].float().cpu().add(1).div(2).clamp(0, 1)
    padded = torch.nn.functional.pad(pictures, (0, gap, 0, gap), value=1.0)
    return rearrange(padded, "(high wide) c h w -> (high h) (wide w) c", high=high, wide=wide)


def _principal_colours(features: Tensor, tiles: int) -> Tensor:
    """Return the first three principal components of the features as pictures [tiles, 3, grid, grid] in [-1, 1]."""
    grid = round(features.shape[1] ** 0.5)
    return rearrange(_components(features.float().cpu().flatten(0, 1)), "(n h w) c -> n c h w", n=tiles, h=grid)


def _components(features: Tensor) -> Tensor:
    """Return the first three principal components [tokens, 3] in [-1, 1]."""
    centred = features - features.mean(0)
    components = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:3].T
    return components / components.abs().amax(0).clamp(min=1e-6)


def _draw_times(axes: Axes, result: Result) -> None:
    """Draw the median as a bar, the range as a line and every sample as a dot."""
    for y, row in enumerate(result.rows):
        if (time := row.seconds) is None:
            _say_wrong(axes, y)
            continue
        axes.barh(y, time.median, color=COLOURS[row.name], height=0.62)
        axes.plot([time.low, time.high], [y, y], color="black", linewidth=1)
        axes.plot(time.samples, [y] * len(time.samples), "o", color="black", markersize=3)
        _label(axes, time.high, y, f"{time.median:.3g} s")
    part = "an image" if result.kind.part == "image" else "a tile"
    _finish(axes, result.rows, f"time {part}: median, range and samples")


def _draw_first_calls(axes: Axes, rows: list[Row]) -> None:
    for y, row in enumerate(rows):
        if (seconds := row.first_call_seconds) is None:
            _say_wrong(axes, y)
            continue
        axes.barh(y, seconds, color=COLOURS[row.name], height=0.62)
        memory = "" if row.peak_bytes is None else f" (later calls: {row.peak_bytes / 2**30:.2f} GiB)"
        _label(axes, seconds, y, f"{seconds:.3g} s{memory}")
    _finish(axes, rows, "first call (the compiled one compiles), and peak memory")


def _draw_errors(axes: Axes, result: Result) -> None:
    """Draw the errors on a logarithmic scale, with the bound on the RMS error."""
    bound = result.allowed_eps * torch.finfo(getattr(torch, result.dtype)).eps
    axes.axvline(bound, color="firebrick", linestyle="--", linewidth=1)
    axes.text(bound, -0.62, " allowed for the RMS", color="firebrick", fontsize=8, va="top")
    for y, row in enumerate(result.rows):
        if (error := row.error) is None:
            _say_wrong(axes, y)
            continue
        axes.plot([error.rms, error.maximum], [y, y], color=COLOURS[row.name], linewidth=2)
        axes.plot(error.rms, y, "o", color=COLOURS[row.name])
        axes.plot(error.maximum, y, "|", color=COLOURS[row.name], markersize=12, markeredgewidth=2)
        _label(axes, error.maximum, y, f"RMS {error.rms:.1e}, max {error.maximum:.1e}")
    axes.set_xscale("log")
    _finish(axes, result.rows, "relative error against the fp64 reference: RMS (dot), largest (tick)")


def _say_wrong(axes: Axes, y: float) -> None:
    axes.text(0.01, y, "WRONG", transform=axes.get_yaxis_transform(), color="firebrick", va="center", fontsize=9)


def _label(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(text, (x, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)


def _finish(axes: Axes, rows: list[Row], title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    # Room for the labels at the right of the bars.
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (30 if axes.get_xscale() == "log" else 1.45))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
