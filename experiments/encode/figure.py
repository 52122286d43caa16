"""The main job's figure: the tiled image, its features, and the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from experiments.encode.report import seconds_of, sweep_of, swept_text

NAMES = {"llama4": "Llama 4", "qwen2_5_vl": "Qwen2.5-VL"}
COLOURS = {"eager": "#8da0b6", "compiled": "#d95f02", "transformers": "#4c6a92"}
GAP = 10
"""White pixels between the tiles that are shown."""


def draw(result: dict[str, Any], pixel_values: Tensor, features: Tensor | None, path: Path) -> None:
    """Draw the figure into a PNG file.

    Args:
        result: as written to the JSON file.
        pixel_values: [tiles, 3, image_size, image_size] in [-1, 1], or [patches, patch_dim], normalised.
        features: [tiles, tokens, width] or [units, width], or None when there are none to be trusted.
    """
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    figure.suptitle(_title(result), x=0.01, ha="left", fontsize=11)
    photograph, seen, bars = figure.subfigures(1, 3, width_ratios=(1, 1, 1.35), squeeze=False)[0]
    image, colours = _pictures(result, pixel_values, features)
    _show(photograph.subplots(), image, _image_title(result))
    _show(seen.subplots(), colours, _features_title(result))
    times, first_calls, errors = bars.subplots(3, 1)
    _draw_times(times, result["rows"])
    _draw_first_calls(first_calls, result["rows"])
    _draw_errors(errors, result)
    figure.savefig(path, dpi=110)


def _pictures(result: dict[str, Any], pixel_values: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The image and its features, each [height, width, 3] in [0, 1]."""
    image = result["image"]
    if "grid" not in image:
        colours = None if features is None else _principal_colours(features, len(pixel_values))
        return _mosaic(pixel_values, image["canvas"]), (
            None if colours is None else _mosaic(colours, image["canvas"], gap=0)
        )
    encoder, (high, wide) = result["encoder"], image["grid"]
    merge, patch = encoder["spatial_merge_size"], encoder["patch_size"]
    pixels = rearrange(
        pixel_values.float().cpu(),
        "(h w m n) (c t p q) -> t (h m p) (w n q) c",
        h=high // merge, w=wide // merge, m=merge, n=merge, t=encoder["temporal_patch_size"], p=patch, q=patch,
    )[0]  # fmt: skip
    low, top = pixels.amin((0, 1)), pixels.amax((0, 1))
    picture = (pixels - low) / (top - low).clamp(min=1e-6)
    if features is None:
        return picture, None
    components = _components(features.float().cpu())
    return picture, rearrange(components, "(h w) c -> h w c", h=high // merge).add(1).div(2)


def _title(result: dict[str, Any]) -> str:
    encoder, sweep = result["encoder"], sweep_of(result)
    device = (result["environment"]["devices"] or [{"name": result["environment"]["cpu"]["model"]}])[0]["name"]
    if result["graphs"]["problem"] or sweep["problem"]:
        graph = "not proved to be one graph"
    else:
        sizes = f"{len(sweep['grids'])} batches of other sizes" if "grids" in sweep else swept_text(result)
        graph = f"one graph, no recompile over {sizes}"
    if sweep["hidden_size"] != encoder["hidden_size"]:
        graph += f" (at width {sweep['hidden_size']})"
    return (
        f"{NAMES[result.get('model', 'llama4')]} vision encoder, {encoder['num_hidden_layers']} layers of width "
        f"{encoder['hidden_size']}, {result['dtype']} on {device}: {graph}"
    )


def _image_title(result: dict[str, Any]) -> str:
    image = result["image"]
    if "grid" in image:
        return f"{image['name']}: {image['grid'][0]} x {image['grid'][1]} patches"
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
    grid = round(features.shape[1] ** 0.5)
    return rearrange(_components(features.float().cpu().flatten(0, 1)), "(n h w) c -> n c h w", n=tiles, h=grid)


def _components(features: Tensor) -> Tensor:
    """The first three principal components [tokens, 3] in [-1, 1]."""
    centred = features - features.mean(0)
    components = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:3].T
    return components / components.abs().amax(0).clamp(min=1e-6)


def _draw_times(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Median as a bar, range as a line, every sample as a dot."""
    for y, row in enumerate(rows):
        if (time := seconds_of(row)) is None:
            _say_wrong(axes, y)
            continue
        median, samples = time["median"], time["samples"]
        axes.barh(y, median, color=COLOURS[row["name"]], height=0.62)
        axes.plot([time["low"], time["high"]], [y, y], color="black", linewidth=1)
        axes.plot(samples, [y] * len(samples), "o", color="black", markersize=3)
        _label(axes, time["high"], y, f"{median:.3g} s")
    part = "an image" if "seconds_per_image" in rows[0] else "a tile"
    _finish(axes, rows, f"time {part}: median, range and samples")


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
    _finish(axes, rows, "relative error against the fp64 reference: RMS (dot), largest (tick)")


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
