"""What the compiled encoders ask of a GPU that is not there: launches, bytes and a roofline's time, layer by layer.

Inductor generates the CUDA code of our encoder, of the same encoder with PyTorch bodies for the ops, and of
transformers' with a flash attention call. The code is read, not run: every time here is a model's prediction.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm  # type: ignore[import-untyped]
from vit_encoder.testing import fake_cuda

from experiments.common import cli
from experiments.common.roofline import ASSUMPTIONS, GPUS, interval
from experiments.launches.figure import draw
from experiments.launches.inductor import Generated, generate_cuda_code
from experiments.launches.launch import Launch
from experiments.launches.models import ENCODERS

SHAPES = ("static", "dynamic")
PREDICTED = ("H100", "H200", "B200", "MI300X")
LAYERS = (2, 4)
"""Two depths: a layer is half of the difference (transformers' odd and even layers fuse differently)."""
NOTES = (
    "Read off the generated code; nothing was run.",
    "Bytes: each element that a kernel touches once, whatever the L2 cache keeps between kernels; opaque operators by "
    "what they really read and write. FLOPs: of matrix products and attention, without padding.",
    "An opaque operator is taken to be one kernel, and so is a matrix product.",
    "A layer is half of the difference between encoders of 4 and 2 layers of Llama 4 Scout's width, bfloat16; the rest "
    "is what remains without its layers.",
    "'ours, fused GELU' is opt-in and unmeasured: whether our matrix product is as fast as the vendor's, only a GPU "
    "can say.",
    "Seconds are those of the kernels one after the other: nothing between launches, as in a CUDA graph at best.",
    ASSUMPTIONS,
)


def main(arguments: list[str] | None = None) -> int:
    """Generate the code, print the tables, write the files and return the exit status."""
    options = _parser().parse_args(arguments)
    cases = [(name, shapes, tiles) for name in options.encoders for shapes in options.shapes for tiles in options.tiles]
    rows = [_row(*case) for case in tqdm(cases, desc="generating", unit="graph", disable=None)]
    console = cli.console()
    print_tables(console, rows, NOTES)
    path = options.out / "graph_ledger.json"
    cli.write_json(path, cli.result("graph_ledger", notes=NOTES, rows=rows))
    draw(rows, path.with_suffix(".png"))
    console.print(f"wrote {path} and {path.with_suffix('.png').name}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("python -m experiments.launches", __doc__)
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS), help="default: all")
    parser.add_argument("--tiles", nargs="+", type=int, default=[1, 4, 16], metavar="N", help="default: 1 4 16")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: both")
    cli.add_out(parser, "JSON and PNG")
    return parser


def _row(encoder: str, shapes: str, tiles: int) -> dict[str, Any]:
    """What one encoder asks for."""
    asked = layer_and_rest(lambda layers: _generate(encoder, shapes, tiles, layers))
    return {"encoder": encoder, "shapes": shapes, "tiles": tiles, **asked}


def layer_and_rest(generate: Callable[[int], Generated]) -> dict[str, Any]:
    """What a layer asks for, and the rest of an encoder, of which `generate` makes one with so many layers."""
    fewer, more = (generate(layers) for layers in LAYERS)
    counts = [Counter(map(_merged, generated.launches)) for generated in (fewer, more)]
    kinds = {**counts[0], **counts[1]}
    layer = {launch: (counts[1][launch] - counts[0][launch]) / (LAYERS[1] - LAYERS[0]) for launch in kinds}
    rest = {launch: counts[0][launch] - LAYERS[0] * count for launch, count in layer.items()}
    return {
        "layer": _summary(layer),
        "rest": _summary(rest),
        "cudagraphs_refused": more.cudagraphs_refused,
    }


def _generate(encoder: str, shapes: str, tiles: int, layers: int) -> Generated:
    with fake_cuda(torch.bfloat16), ENCODERS[encoder](layers) as forward:
        pixel_values = torch.empty(tiles, 3, 336, 336, device="cuda")
        return generate_cuda_code(forward, pixel_values, dynamic_tiles=shapes == "dynamic")


def _merged(launch: Launch) -> Launch:
    """The launch without the number in its kernel's name, which differs between encoders of different depth."""
    return replace(launch, kernel=launch.kernel.rstrip("0123456789").rstrip("_"), region="")


def _summary(launches: dict[Launch, float]) -> dict[str, Any]:
    counted = {launch: count for launch, count in launches.items() if count}
    kinds = {
        kind: sum(n for launch, n in counted.items() if launch.kind == kind) for kind in ("triton", "gemm", "opaque")
    }
    return {
        "launches": sum(counted.values()),
        **kinds,
        "bytes": sum(n * launch.nbytes for launch, n in counted.items()),
        "flops": sum(n * launch.flops for launch, n in counted.items()),
        "predicted_seconds": {gpu: _predicted(counted, gpu) for gpu in PREDICTED},
        "kernels": [
            {"count": n, **asdict(launch), "predicted_seconds": _of_each(launch)} for launch, n in counted.items()
        ],
    }


def _of_each(launch: Launch) -> dict[str, Sequence[float]]:
    return {gpu: _predicted({launch: 1}, gpu) for gpu in PREDICTED}


def _predicted(launches: dict[Launch, float], gpu: str) -> tuple[float, float]:
    """Lower and upper seconds of all the launches, one after the other."""
    low = high = 0.0
    for launch, count in launches.items():
        least, most = interval(
            GPUS[gpu],
            "bfloat16",
            matrix_flops=launch.flops,
            exponentials=launch.exponentials,
            nbytes=launch.nbytes,
        )
        low, high = low + count * least, high + count * most
    return low, high


def print_tables(console: Console, rows: list[dict[str, Any]], notes: Sequence[str], sizes: str = "tiles") -> None:
    """A table of all rows, of the kernels of those with the largest of `sizes`, and the notes."""
    table = Table(title="A layer, as generated; ms predicted by a roofline, never measured", title_justify="left")
    for column in ("encoder", "shapes", sizes, "launches", "Triton", "GEMM", "opaque", "GB", "TFLOP", *PREDICTED):
        table.add_column(column, justify="left" if column in ("encoder", "shapes") else "right")
    for row in rows:
        layer = row["layer"]
        counts = [f"{layer[name]:g}" for name in ("launches", "triton", "gemm", "opaque")]
        times = [_milliseconds(layer["predicted_seconds"][gpu]) for gpu in PREDICTED]
        work = [f"{layer['bytes'] / 1e9:.3f}", f"{layer['flops'] / 1e12:.3f}"]
        table.add_row(row["encoder"], row["shapes"], str(row[sizes]), *counts, *work, *times)
    console.print(table)
    for row in rows:
        if row["shapes"] == "static" and row[sizes] == max(row[sizes] for row in rows):
            _print_kernels(console, row, sizes)
    for note in notes:
        console.print(note)


def _print_kernels(console: Console, row: dict[str, Any], sizes: str) -> None:
    table = Table(title=f"{row['encoder']}: the kernels of a layer at {row[sizes]} {sizes}", title_justify="left")
    for column in ("", "kernel", "kind", "MB read", "MB written", "GFLOP", *PREDICTED):
        table.add_column(column, justify="left" if column in ("kernel", "kind") else "right")
    for kernel in row["layer"]["kernels"]:
        work = [
            f"{kernel[name] / unit:.1f}" for name, unit in (("read_bytes", 1e6), ("written_bytes", 1e6), ("flops", 1e9))
        ]
        times = [_milliseconds(kernel["predicted_seconds"][gpu]) for gpu in PREDICTED]
        table.add_row(f"{kernel['count']:g}", kernel["kernel"][:58], kernel["kind"], *work, *times)
    console.print(table)


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{1e3 * seconds[0]:.3f}-{1e3 * seconds[1]:.3f}"


if __name__ == "__main__":
    sys.exit(main())
