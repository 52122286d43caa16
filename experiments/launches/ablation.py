"""What each kernel is worth, op by op: eager, Inductor alone, our Triton op, our fused Triton op.

Launches and bytes of Llama 4's vision encoder at real width in bfloat16, read off the operators that PyTorch calls and
the code that Inductor generates for an H100. Nothing is run: times are a roofline's predictions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from vit_encoder.testing import fake_cuda
from vit_kernels import (
    force_impl,
    layer_norm_pixel_shuffle,
    linear_gelu,
    pixel_shuffle,
    rotary_2d,
    rotary_2d_qkv_,
    varlen_attention,
)

from experiments.common import cli
from experiments.common.problem import GRID, HEAD_DIM, HEADS, POSITIONS, TILES, WIDTH
from experiments.common.roofline import ASSUMPTIONS
from experiments.launches.eager import eager_launches
from experiments.launches.inductor import generate_cuda_code
from experiments.launches.launch import Launch
from experiments.launches.layer import Interval, predicted
from experiments.launches.models import flash_attention

FORMS = ("eager", "Inductor alone", "Triton opaque", "Triton fused")
GPU = "H100"

Implementation = Callable[..., Any]


@dataclass(frozen=True)
class Op:
    """One step of the encoder.

    Attributes:
        inputs: for so many tiles, on "cuda".
        pytorch: run as it is, and compiled by Inductor.
        opaque: with our op in place of its PyTorch implementation.
        fused: with our op that does the whole step in one pass.
        verdict: what the figures say.
    """

    name: str
    inputs: Callable[[int], list[Tensor]]
    pytorch: Implementation
    opaque: Implementation | None
    fused: Implementation | None
    verdict: str


def main(arguments: list[str] | None = None) -> int:
    """Generate the code, print the table, write the file and return the exit status."""
    parser = cli.parser("python -m experiments.launches.ablation", __doc__)
    parser.add_argument("--tiles", type=cli.positive, default=TILES, metavar="N", help="default: %(default)s")
    cli.add_out(parser)
    options = parser.parse_args(arguments)
    rows = [_row(op, options.tiles) for op in tqdm(OPS, desc="ops", disable=None)]
    notes = [
        "An operator that PyTorch or Inductor calls is taken to be one kernel, which moves each element once. A matrix "
        "product's or attention's other costs (padding, occupancy) do not show here: see the kernel report.",
        ASSUMPTIONS,
    ]
    console = cli.console()
    _print(console, rows, options.tiles)
    for note in notes:
        console.print(note)
    path = options.out / "ablation_ledger.json"
    cli.write_json(path, cli.result("ablation_ledger", notes=notes, rows=rows))
    console.print(f"wrote {path}")
    return 0


@dataclass(frozen=True)
class Form:
    """What a step asks for in one form: a roofline's seconds by GPU."""

    launches: int
    bytes: int
    predicted_seconds: dict[str, Interval]
    kernels: list[Launch]


@dataclass(frozen=True)
class Row:
    """A step of the encoder in the forms that it has."""

    op: str
    tiles: int
    verdict: str
    forms: dict[str, Form]


def _row(op: Op, tiles: int) -> Row:
    implementations = dict(zip(FORMS, (op.pytorch, op.pytorch, op.opaque, op.fused), strict=True))
    forms = {
        form: _summary(_launches(form, implementation, op, tiles))
        for form, implementation in implementations.items()
        if implementation
    }
    return Row(op.name, tiles, op.verdict, forms)


def _launches(form: str, implementation: Implementation, op: Op, tiles: int) -> list[Launch]:
    with fake_cuda(torch.bfloat16), force_impl("triton" if form.startswith("Triton") else "eager"):
        with torch.device("cuda"):
            inputs = op.inputs(tiles)
        if form == "eager":
            return eager_launches(implementation, *inputs)
        return generate_cuda_code(implementation, *inputs).launches


def _summary(launches: list[Launch]) -> Form:
    low, high = zip(*(predicted(launch, GPU) for launch in launches), strict=True)
    return Form(len(launches), sum(launch.nbytes for launch in launches), {GPU: (sum(low), sum(high))}, launches)


def _print(console: Console, rows: list[Row], tiles: int) -> None:
    title = f"launches, MB moved, microseconds on an {GPU} predicted by a roofline; {tiles} tiles"
    table = Table(title=title, title_justify="left")
    table.add_column("op")
    for form in FORMS:
        table.add_column(form, justify="right")
    table.add_column("what it is worth")
    for row in rows:
        table.add_row(row.op, *(_cell(row.forms.get(form)) for form in FORMS), row.verdict, end_section=True)
    console.print(table)


def _cell(form: Form | None) -> str:
    if form is None:
        return "-"
    low, high = (1e6 * bound for bound in form.predicted_seconds[GPU])
    return f"{form.launches}, {form.bytes / 1e6:.1f} MB\n{low:.0f}-{high:.0f} us"


def _qkv_and_tables(tiles: int) -> list[Tensor]:
    table = (POSITIONS, HEAD_DIM // 2)
    return [*_qkv(tiles)[:1], torch.empty(table, dtype=torch.float32), torch.empty(table, dtype=torch.float32)]


def _qkv(tiles: int) -> list[Tensor]:
    return [torch.empty(tiles * POSITIONS, 3 * HEADS, HEAD_DIM), torch.empty(tiles + 1, dtype=torch.int32)]


def _tiles(tiles: int) -> list[Tensor]:
    return [torch.empty(tiles, POSITIONS, WIDTH)]


def _tiles_and_norm(tiles: int) -> list[Tensor]:
    return [*_tiles(tiles), torch.empty(WIDTH), torch.empty(WIDTH)]


def _two_streams(tiles: int) -> list[Tensor]:
    stream = (tiles * POSITIONS, WIDTH)
    return [torch.empty(stream), torch.empty(stream), torch.empty(WIDTH), torch.empty(WIDTH)]


def _tokens_and_linear(tiles: int) -> list[Tensor]:
    return [torch.empty(tiles * POSITIONS, WIDTH), torch.empty(4 * WIDTH, WIDTH), torch.empty(4 * WIDTH)]


def _rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotary_2d(qkv[:, :HEADS], qkv[:, HEADS : 2 * HEADS], cos, sin)


def _rotated_in_place(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotary_2d_qkv_(qkv, cos, sin)


def _flash(qkv: Tensor, _: Tensor) -> Tensor:
    q, k, v = qkv.unflatten(0, (-1, POSITIONS)).chunk(3, dim=2)
    return flash_attention(q, k, v)


def _by_the_formula(qkv: Tensor, _: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv.unflatten(0, (-1, POSITIONS)).chunk(3, dim=2))
    return torch.softmax(q @ k.mT * HEAD_DIM**-0.5, dim=-1) @ v


def _attention(qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
    q, k, v = qkv.chunk(3, dim=1)
    return varlen_attention(q, k, v, cu_seqlens)


def _shuffled(x: Tensor) -> Tensor:
    return pixel_shuffle(x[:, :-1], GRID, GRID)


def _normed_and_shuffled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return pixel_shuffle(F.layer_norm(x[:, :-1], (WIDTH,), weight, bias), GRID, GRID)


def _normed_and_shuffled_at_once(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm_pixel_shuffle(x[:, :-1], weight, bias, GRID, GRID)


def _linear_then_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def _added_and_normed(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    x = x + y
    return x, F.layer_norm(x, (WIDTH,), weight, bias)


OPS = (
    Op(
        "rotary of q and k, from the packed qkv",
        _qkv_and_tables,
        _rotated,
        _rotated,
        _rotated_in_place,
        "34 times. In bytes nothing over Inductor alone, which fuses the real arithmetic too. In place it needs no new "
        "memory for q and k.",
    ),
    Op(
        "attention, by the formula",
        _qkv,
        _by_the_formula,
        _attention,
        None,
        "34 times. Everything over the formula, whose scores go through memory.",
    ),
    Op(
        "attention, a flash library's",
        _qkv,
        _flash,
        _attention,
        None,
        "34 times. In bytes nothing. What differs is the matrix work along head_dim 88 (kernel report).",
    ),
    Op(
        "residual + layer norm",
        _two_streams,
        _added_and_normed,
        None,
        None,
        "67 times. Left to Inductor, which takes one pass.",
    ),
    Op(
        "linear + GELU",
        _tokens_and_linear,
        _linear_then_gelu,
        None,
        linear_gelu,
        "34 times. A launch and the GELU's 208 MB, if our matrix product is as fast as the vendor's: no GPU has said "
        "so, hence it is opt-in (fuse_gelu).",
    ),
    Op(
        "pixel shuffle, class token dropped",
        _tiles,
        _shuffled,
        _shuffled,
        None,
        "Once. Nothing: 3.2 MB a tile in bfloat16 (6.5 in float32) in any form that makes one pass.",
    ),
    Op(
        "class token dropped, layer norm, pixel shuffle",
        _tiles_and_norm,
        _normed_and_shuffled,
        _normed_and_shuffled,
        _normed_and_shuffled_at_once,
        "Once. In bytes nothing over Inductor alone, which fuses it too while the class token goes first. An opaque "
        "shuffle alone doubles them.",
    ),
)


if __name__ == "__main__":
    sys.exit(main())
