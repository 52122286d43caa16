"""What the compiled encoders ask of a GPU that is not present: launches, bytes and a roofline's time, layer by layer.

Inductor generates the CUDA code of our encoder, of the same encoder with PyTorch implementations of the ops, and of
transformers' with a flash attention call. The code is read, not run: every time here is a model's prediction.
"""

from __future__ import annotations

import argparse
import sys

import torch
from tqdm import tqdm
from vit_encoder.testing import fake_cuda

from experiments.common import cli
from experiments.common.roofline import ASSUMPTIONS
from experiments.launches.figure import draw
from experiments.launches.inductor import Generated, generate_cuda_code
from experiments.launches.layer import SHAPES, Row, layer_and_rest
from experiments.launches.models import ENCODERS
from experiments.launches.text import print_tables

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
    print_tables(console, rows, NOTES, "tiles")
    path = options.out / "graph_ledger.json"
    cli.write_json(path, cli.result("graph_ledger", notes=NOTES, rows=[row.described("tiles") for row in rows]))
    draw(rows, path.with_suffix(".png"))
    console.print(f"wrote {path} and {path.with_suffix('.png').name}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("python -m experiments.launches", __doc__)
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS), help="default: all")
    parser.add_argument(
        "--tiles", nargs="+", type=cli.positive, default=[1, 4, 16], metavar="N", help="default: 1 4 16"
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: both")
    cli.add_out(parser, "JSON and PNG")
    return parser


def _row(encoder: str, shapes: str, tiles: int) -> Row:
    """What one encoder asks for."""
    return Row(encoder, shapes, tiles, layer_and_rest(lambda layers: _generate(encoder, shapes, tiles, layers)))


def _generate(encoder: str, shapes: str, tiles: int, layers: int) -> Generated:
    with fake_cuda(torch.bfloat16), ENCODERS[encoder](layers) as forward:
        pixel_values = torch.empty(tiles, 3, 336, 336, device="cuda")
        return generate_cuda_code(forward, pixel_values, dynamic_tiles=shapes == "dynamic")


if __name__ == "__main__":
    sys.exit(main())
