"""The main job's result as text."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

BUSY = 0.25
"""A load average above this share of the cores, before the job starts, is other work that disturbs the times."""


def print_subject(console: Console, subject: dict[str, Any]) -> None:
    """Print what is about to be measured."""
    image = subject["image"]
    console.print(f"image    {image['name']}, {image['width']} x {image['height']} pixels")
    console.print(f"cut      {cutting(subject)}")
    if subject.get("size_chosen") and subject["device"] == "cpu":
        console.print("         by default on a CPU it is at most 256 features; --max-pixels changes that")
    if subject.get("max_tiles_chosen"):
        why = (
            "since a CPU takes seconds for each"
            if subject["device"] == "cpu"
            else "as the checkpoint, or else Llama 4, has it"
        )
        console.print(
            f"         by default the canvas has at most {image['max_tiles']}, {why}; --max-tiles changes that"
        )
    console.print(f"encoder  {encoder_text(subject)}")
    if subject["slow_dtype"]:
        console.print(f"warning: this CPU has no {subject['dtype']} instructions: expect 4 times the time of float32")


def tiling(image: dict[str, Any], image_size: int) -> str:
    """Canvas, tiles and tokens."""
    high, wide = image["canvas"]
    tiles = f"{image['tiles']} tiles, the last one global" if image["tiles"] > 1 else "1 tile"
    return (
        f"canvas of {high} x {wide} (high x wide) tiles of {image_size} x {image_size}: {tiles}; "
        f"{image['encoder_tokens']} tokens in the encoder, {image['features']} features out"
    )


def cutting(subject: dict[str, Any]) -> str:
    """Into tiles or patches, and how many tokens that makes."""
    image, encoder = subject["image"], subject["encoder"]
    if "grid" not in image:
        return tiling(image, encoder["image_size"])
    high, wide = image["grid"]
    patch = encoder["patch_size"]
    return (
        f"resized to {wide * patch} x {high * patch} pixels, {high} x {wide} (high x wide) patches of {patch}: "
        f"{image['encoder_tokens']} tokens in the encoder, {image['features']} features out"
    )


def encoder_text(subject: dict[str, Any]) -> str:
    """Size, weights, dtype and device."""
    encoder, size = subject["encoder"], f"{subject['encoder']['parameters'] / 1e6:.0f} M parameters"
    return (
        f"{encoder['config']}: {encoder['num_hidden_layers']} layers of width {encoder['hidden_size']}, {size} "
        f"({encoder['weights']}), {subject['dtype']} on {subject['device']}"
    )


def print_result(console: Console, result: dict[str, Any]) -> None:
    """Print the table and what has to be said about it."""
    image = result["image"]
    batch = f"{image['tiles']} tile(s)" if "tiles" in image else f"{image['encoder_tokens']} patches"
    table = Table(title=f"{encoder_text(result)}; {batch} a call", title_justify="left")
    for column in header(result):
        table.add_column(column, justify="right" if column else "left")
    for cells in table_rows(result):
        table.add_row(*cells)
    console.print(table)
    for line in notes(result):
        console.print(line)


HEADER = (
    "",
    "graphs",
    "breaks",
    "recompiles",
    "RMS error",
    "max error",
    "s a tile, median (range)",
    "first call, s",
    "peak GiB",
)


def header(result: dict[str, Any]) -> tuple[str, ...]:
    """HEADER, with times of what this result divides them by."""
    return tuple(column.replace("a tile", "an image") if "grids" in result else column for column in HEADER)


def seconds_of(row: dict[str, Any]) -> dict[str, Any] | None:
    """The times of a row, a tile's or an image's; None where it was not timed."""
    return next((value for name, value in row.items() if name.startswith("seconds_per_")), None)


def sweep_of(result: dict[str, Any]) -> dict[str, Any]:
    """What the calls with batches of several sizes saw."""
    sweep: dict[str, Any] = result["grids" if "grids" in result else "tile_counts"]
    return sweep


def swept_text(result: dict[str, Any]) -> str:
    """Which sizes these were."""
    sweep = sweep_of(result)
    if "grids" not in sweep:
        return f"{', '.join(map(str, sweep['tile_counts']))} tiles"
    return ", ".join(_batch_text(grids) for grids in sweep["grids"])


def _batch_text(grids: list[list[int]]) -> str:
    sizes = Counter("x".join(map(str, grid if grid[0] > 1 else grid[1:])) for grid in grids)
    return " + ".join(f"{count} of {size}" if count > 1 else size for size, count in sizes.items()) + " patches"


def table_rows(result: dict[str, Any]) -> list[list[str]]:
    """The cells of each row of the table, under HEADER."""
    return [
        [
            row["name"],
            *(_graph_cells(result) if row["name"] == "compiled" else ["-"] * 3),
            *_error_cells(row["error"]),
            *(["WRONG, not timed", "-", "-"] if row["problem"] else _cost_cells(row)),
        ]
        for row in result["rows"]
    ]


def notes(result: dict[str, Any]) -> list[str]:
    """What the table's numbers mean, and every problem."""
    sweep, timed = sweep_of(result), [times for row in result["rows"] if (times := seconds_of(row))]
    lines = [
        "Errors are against the fp64 reference on the same weights, relative to the RMS of its features. "
        f"Allowed: {result['allowed_eps']} eps, and twice what {_baseline(result)} makes.",
        f"Recompiles are over {swept_text(result)} in this order, with an encoder of "
        f"{sweep['layers']} layers of width {sweep['hidden_size']}; compiled and eager differ by at most "
        f"{sweep['deviation']:.1e} there.",
        "The compiled encoder's first call compiles, with empty caches.",
    ]
    if timed:
        rounds = len(timed[0]["samples"])
        lines.append(f"Times: {rounds} interleaved rounds after the first call. Peak: {_memory_kind(result)}.")
    return [*lines, _job_note(result["job"], result["environment"]["cpu"]["cores"]), *problems(result)]


def problems(result: dict[str, Any]) -> list[str]:
    """A line for each thing that is not as it must be."""
    found = {row["name"]: row["problem"] for row in result["rows"]}
    sizes = "sizes" if "grids" in result else "tile counts"
    found |= {"one graph": result["graphs"]["problem"], sizes: sweep_of(result)["problem"]}
    return [f"WRONG: {name}: {problem}" for name, problem in found.items() if problem]


def _job_note(job: dict[str, Any], cores: int) -> str:
    note = f"The whole job: {job['seconds']:.0f} s, peak {_gib(job['peak_bytes'])} GiB."
    if job["load_before"] > BUSY * cores:
        note += (
            f" Other work ran on the machine (load {job['load_before']:.1f} on {cores} cores before the start): "
            "the times of the rows cannot be compared."
        )
    return note


def _baseline(result: dict[str, Any]) -> str:
    return "transformers" if any(row["name"] == "transformers" for row in result["rows"]) else "eager"


def _memory_kind(result: dict[str, Any]) -> str:
    return "allocated on the GPU" if result["device"].startswith("cuda") else "resident in the whole process"


def _graph_cells(result: dict[str, Any]) -> list[str]:
    graphs, sweep = result["graphs"], sweep_of(result)
    breaks = sum(graphs["graph_breaks"].values()) + sum(sweep["graphs"]["graph_breaks"].values())
    recompiles = "not proved 0" if sweep["problem"] or graphs["problem"] else "0"
    return [str(graphs["graphs"]), str(breaks), recompiles]


def _error_cells(error: dict[str, float] | None) -> list[str]:
    return [f"{error['rms']:.1e}", f"{error['maximum']:.1e}"] if error else ["-", "-"]


def _cost_cells(row: dict[str, Any]) -> list[str]:
    time = seconds_of(row)
    assert time is not None, "a row without a problem was timed"
    spread = f"{time['median']:.3g} ({time['low']:.3g} to {time['high']:.3g})"
    return [spread, f"{row['first_call_seconds']:.3g}", _gib(row["peak_bytes"])]


def _gib(nbytes: int | None) -> str:
    return "?" if nbytes is None else f"{nbytes / 2**30:.2f}"
