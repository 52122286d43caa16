"""The text of the main job's result."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from experiments.common.comparison import Error
from experiments.encode.result import Result, Row, Task

BUSY = 0.25
"""A load average above this share of the cores before the job starts means other work, which disturbs the times."""

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


def print_task(console: Console, task: Task) -> None:
    """Print what is about to be measured."""
    image = task.image
    console.print(f"image    {image.name}, {image.width} x {image.height} pixels")
    console.print(f"cut      {cutting(task)}")
    if task.size_chosen and image.max_tiles:
        on_cpu = task.device == "cpu"
        why = "since a CPU takes seconds for each" if on_cpu else "as the checkpoint, or else Llama 4, has it"
        console.print(f"         by default the canvas has at most {image.max_tiles}, {why}; --max-tiles changes that")
    elif task.size_chosen and task.device == "cpu":
        console.print(f"         by default on a CPU at most {task.kind.on_cpu} pixels; --max-pixels changes that")
    console.print(f"encoder  {encoder_text(task)}")
    if task.slow_dtype:
        console.print(f"warning: this CPU has no {task.dtype} instructions: expect 4 times the time of float32")


def cutting(task: Task) -> str:
    """Describe how the image is cut into tiles or patches, and how many tokens that makes."""
    image, sizes = task.image, task.encoder.sizes
    tokens = f"{image.encoder_tokens} tokens in the encoder, {image.features} features out"
    if image.canvas:
        high, wide = image.canvas
        side = sizes["image_size"]
        tiles = f"{image.tiles} tiles, the last one global" if image.tiles != 1 else "1 tile"
        return f"canvas of {high} x {wide} (high x wide) tiles of {side} x {side}: {tiles}; {tokens}"
    high, wide = image.grid or (0, 0)
    patch = sizes["patch_size"]
    return (
        f"resized to {wide * patch} x {high * patch} pixels, {high} x {wide} (high x wide) patches of {patch}: {tokens}"
    )


def encoder_text(task: Task) -> str:
    """Describe the encoder's size, weights, dtype and device."""
    encoder = task.encoder
    return (
        f"{encoder.config}: {encoder.sizes['num_hidden_layers']} layers of width {encoder.sizes['hidden_size']}, "
        f"{encoder.parameters / 1e6:.0f} M parameters ({encoder.weights}), {task.dtype} on {task.device}"
    )


def print_result(console: Console, result: Result) -> None:
    """Print the table and what has to be said about it."""
    image = result.image
    batch = f"{image.tiles} tile(s)" if image.tiles else f"{image.encoder_tokens} patches"
    table = Table(title=f"{encoder_text(result)}; {batch} a call", title_justify="left")
    for column in header(result):
        table.add_column(column, justify="right" if column else "left")
    for cells in table_rows(result):
        table.add_row(*cells)
    console.print(table)
    for line in notes(result):
        console.print(line)


def header(result: Result) -> tuple[str, ...]:
    """Return the table's column titles, which name what the times are divided by."""
    return tuple(column.replace("a tile", "an image") if result.kind.part == "image" else column for column in HEADER)


def swept_text(result: Result) -> str:
    """Describe the sizes of the batches that one graph served."""
    sizes = result.sweep.sizes
    if result.kind.unit == "tile":
        return f"{', '.join(map(str, sizes))} tiles"
    return ", ".join(_batch_text(grids) for grids in sizes)


def _batch_text(grids: list[list[int]]) -> str:
    sizes = Counter("x".join(map(str, grid if grid[0] > 1 else grid[1:])) for grid in grids)
    return " + ".join(f"{count} of {size}" if count > 1 else size for size, count in sizes.items()) + " patches"


def table_rows(result: Result) -> list[list[str]]:
    """Return the cells of each row of the table, under `header`."""
    return [
        [
            row.name,
            *(_graph_cells(result) if row.name == "compiled" else ["-"] * 3),
            *_error_cells(row.error),
            *(["WRONG, not timed", "-", "-"] if row.problem else _cost_cells(row)),
        ]
        for row in result.rows
    ]


def notes(result: Result) -> list[str]:
    """Return lines that say what the table's numbers mean, and name every problem."""
    sweep, timed = result.sweep, [row.seconds for row in result.rows if row.seconds]
    baseline = "transformers" if any(row.name == "transformers" for row in result.rows) else "eager"
    memory = "allocated on the GPU" if result.device.startswith("cuda") else "resident in the whole process"
    lines = [
        "Errors are against the fp64 reference on the same weights, relative to the RMS of its features. "
        f"Allowed: {result.allowed_eps} eps, and twice what {baseline} makes.",
        f"Recompiles are over {swept_text(result)} in this order, with an encoder of {sweep.layers} layers of width "
        f"{sweep.hidden_size}; compiled and eager differ by at most {sweep.deviation:.1e} there.",
        "The compiled encoder's first call compiles, with empty caches.",
    ]
    if timed:
        lines.append(f"Times: {len(timed[0].samples)} interleaved rounds after the first call. Peak: {memory}.")
    wrong = [f"WRONG: {name}: {problem}" for name, problem in result.problems.items()]
    return [*lines, _job_note(result), *wrong]


def _job_note(result: Result) -> str:
    job, cores = result.job, result.environment["cpu"]["cores"]
    note = f"The whole job: {job.seconds:.0f} s, peak {_gib(job.peak_bytes)} GiB."
    if job.load_before > BUSY * cores:
        note += (
            f" Other work ran on the machine (load {job.load_before:.1f} on {cores} cores before the start): "
            "the times of the rows cannot be compared."
        )
    return note


def _graph_cells(result: Result) -> list[str]:
    graphs, sweep = result.graphs, result.sweep
    breaks = sum(graphs.graph_breaks.values()) + sum(sweep.graphs.graph_breaks.values())
    return [str(graphs.graphs), str(breaks), "unknown" if sweep.problem or result.graphs.problem else "0"]


def _error_cells(error: Error | None) -> list[str]:
    return [f"{error.rms:.1e}", f"{error.maximum:.1e}"] if error else ["-", "-"]


def _cost_cells(row: Row) -> list[str]:
    time = row.seconds
    assert time is not None, "a row without a problem was timed"
    spread = f"{time.median:.3g} ({time.low:.3g} to {time.high:.3g})"
    return [spread, f"{row.first_call_seconds:.3g}", _gib(row.peak_bytes)]


def _gib(nbytes: int | None) -> str:
    return "?" if nbytes is None else f"{nbytes / 2**30:.2f}"
