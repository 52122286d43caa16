"""What compiled kernels ask of the memories: sectors, wavefronts and instructions, counted by executing the PTX.

Every kernel, in the layouts that users have, for the targets whose PTX can be executed. Nothing is run on a GPU or
timed.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from experiments.common import cli
from experiments.kernels.registry import DTYPES, HEAD_DIMS

if TYPE_CHECKING:
    from vit_kernels.testing.ptx.report import Launch

TARGETS = ("sm_80", "sm_90")
TOKENS = 193
"""Of one sequence: three blocks of 64 and a lone class token, as nine and one of a tile's 577."""

NOTES = (
    "Sectors: bytes of the 32-byte sectors that a kernel's global requests touch, over the bytes that they use; a "
    "request is a warp's, and what several of its lanes ask for counts once. Wavefronts: passes over the banks of "
    "shared memory over the fewest. Copies: whether global memory is read by cp.async.",
    "Instructions: of a warp, times 32, for a thousand useful matrix FLOPs.",
    "Packed heads: of one rank. All even numbers of heads, 16, 8, 4 and 2, are compiled to the same code, for row "
    "strides that are multiples of 16 elements; an odd number is that of 16 heads over 16 ranks.",
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How q, k and v lie in memory."""

    name: str
    heads: int
    kv_heads: int
    packed: bool

    def qkv(self, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q [TOKENS, heads, head_dim], k and v [TOKENS, kv_heads, head_dim]."""
        counts = [self.heads, self.kv_heads, self.kv_heads]
        if self.packed:
            q, k, v = torch.zeros(TOKENS, sum(counts), head_dim, dtype=dtype).split(counts, dim=1)
        else:
            q, k, v = (torch.zeros(TOKENS, heads, head_dim, dtype=dtype) for heads in counts)
        return q, k, v


LAYOUTS = (
    Layout("packed, even", 2, 2, packed=True),
    Layout("packed, odd", 1, 1, packed=True),
    Layout("separate", 2, 2, packed=False),
    Layout("grouped", 4, 2, packed=False),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Some kernels, launched together."""

    op: str
    layout: Layout | None
    dtype: str
    head_dim: int
    target: str


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one kernel; see NOTES. None where it has no such requests, or no matrix FLOPs."""

    kernel: str
    sectors: float
    wavefronts: float | None
    instructions: float | None
    copies: bool


def _attention(case: Case) -> int:
    from vit_kernels._triton import varlen_attention

    q, k, v, cu_seqlens = *_qkv(case), _boundaries()
    varlen_attention.launch(q, k, v, cu_seqlens, cu_seqlens, 0.1)
    return 4 * q.shape[1] * TOKENS**2 * case.head_dim


def _gradients(case: Case) -> int:
    from vit_kernels._triton import varlen_attention_backward

    q, k, v, cu_seqlens = *_qkv(case), _boundaries()
    out, lse = torch.zeros(q.shape, dtype=q.dtype), torch.zeros(q.shape[1], TOKENS)
    varlen_attention_backward.launch(out, None, q, k, v, out, lse, cu_seqlens, cu_seqlens, 0.1)
    return 0


def _rotary(interleaved: bool, case: Case) -> int:
    from vit_kernels._triton import rotary_2d

    q, k, _ = _qkv(case)
    table = torch.zeros(TOKENS, case.head_dim // 2)
    rotary_2d.launch_in_place(q, k, table, table, interleaved)
    return 0


def _grid(case: Case) -> Tensor:
    return torch.zeros(1, 8 * 8 + 1, 16 * case.head_dim, dtype=getattr(torch, case.dtype))[:, :-1]


def _shuffle(case: Case) -> int:
    from vit_kernels._triton import pixel_shuffle

    pixel_shuffle.launch_backward(pixel_shuffle.launch(_grid(case), 8, 8, 2), 8, 8, 2)
    return 0


def _norm(case: Case) -> int:
    from vit_kernels._triton import layer_norm_pixel_shuffle

    x = _grid(case)
    weight = torch.ones(x.shape[2], dtype=x.dtype)
    layer_norm_pixel_shuffle.launch(x, weight, weight, 8, 8, 2, 1e-5)
    return 0


def _product(case: Case) -> int:
    from vit_kernels._triton import linear_gelu

    dtype, width = getattr(torch, case.dtype), 4 * case.head_dim
    x, weight, bias = (torch.zeros(*shape, dtype=dtype) for shape in ((128, width), (256, width), (256,)))
    linear_gelu.launch(x, weight, bias)
    return 2 * 128 * 256 * width


def _qkv(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    assert case.layout is not None
    return case.layout.qkv(case.head_dim, getattr(torch, case.dtype))


def _boundaries() -> Tensor:
    return torch.tensor([0, TOKENS], dtype=torch.int32)


OPS: dict[str, tuple[bool, Callable[[Case], int]]] = {
    "varlen_attention": (True, _attention),
    "gradients of varlen_attention": (True, _gradients),
    "rotary_2d interleaved": (True, functools.partial(_rotary, True)),
    "rotary_2d halves": (True, functools.partial(_rotary, False)),
    "pixel_shuffle": (False, _shuffle),
    "layer_norm_pixel_shuffle": (False, _norm),
    "linear_gelu": (False, _product),
}
"""Op -> whether it has heads, and its launch, which returns its useful matrix FLOPs (0: none, or not given)."""


def cases(
    ops: Sequence[str], dtypes: Sequence[str], head_dims: Sequence[int], targets: Sequence[str]
) -> Iterator[Case]:
    """Every layout of each."""
    for op in ops:
        for layout in LAYOUTS if OPS[op][0] else (None,):
            for dtype in dtypes:
                for head_dim in head_dims:
                    for target in targets:
                        yield Case(op, layout, dtype, head_dim, target)


def measure(case: Case) -> list[Figures]:
    """Execute a case: the figures of each kernel that it launches, in this process, which must compile kernels."""
    from vit_kernels.testing.ptx import executed_ptx

    with executed_ptx(case.target) as report:
        flops = OPS[case.op][1](case)
    return [figures(launch, flops) for launch in report.launches]


def figures(launch: Launch, useful_flops: int) -> Figures:
    """Those of one launch."""
    sectors = sum(counts.sectors for counts in launch.sectors.values())
    used = sum(counts.bytes for counts in launch.sectors.values())
    requests = sum(counts.requests for counts in launch.wavefronts.values())
    wavefronts = sum(counts.wavefronts for counts in launch.wavefronts.values())
    instructions = launch.opcodes.total() * 32
    return Figures(
        kernel=launch.name.removesuffix("_kernel"),
        sectors=round(32 * sectors / used, 3),
        wavefronts=round(wavefronts / requests, 3) if requests else None,
        instructions=round(1000 * instructions / useful_flops, 3) if useful_flops else None,
        copies=any(opcode.startswith("cp.async.c") for opcode in launch.opcodes),
    )


def rows_of(case: Case) -> list[dict[str, Any]]:
    """The rows of a case, as they are written."""
    shared = {
        "op": case.op,
        "layout": case.layout.name if case.layout else "-",
        "dtype": case.dtype,
        "head_dim": case.head_dim,
        "target": case.target,
    }
    return [shared | dataclasses.asdict(of_kernel) for of_kernel in measure(case)]


def main(arguments: list[str] | None = None) -> int:
    """Execute, print the table, write the file and return the exit status."""
    parser = cli.parser("python -m experiments.kernels.requests", __doc__)
    cli.add_out(parser)
    parser.add_argument("--op", action="append", choices=OPS, help="repeat it for several (default: all)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="likewise")
    parser.add_argument("--head-dim", action="append", type=int, choices=HEAD_DIMS, help="likewise")
    parser.add_argument("--target", action="append", choices=TARGETS, help="likewise")
    options = parser.parse_args(arguments)
    chosen = cases(
        options.op or list(OPS), options.dtype or DTYPES, options.head_dim or HEAD_DIMS, options.target or TARGETS
    )
    rows = [row for case in tqdm(list(chosen), desc="executing", unit="case", disable=None) for row in rows_of(case)]
    console = cli.console()
    print_table(console, rows)
    path = options.out / "kernel_requests.json"
    cli.write_json(path, cli.result("kernel_requests", notes=NOTES, rows=rows))
    console.print(f"wrote {path}")
    return 0


def print_table(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print the rows, and what the columns mean."""
    table = Table()
    columns = ["op", "layout", "dtype", "head_dim", "target", *(field.name for field in dataclasses.fields(Figures))]
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*("-" if row[column] is None else str(row[column]) for column in columns))
    console.print(table)
    console.print(*NOTES, sep="\n")


if __name__ == "__main__":
    # Read when Triton is first imported, which nothing above has done.
    os.environ["TRITON_INTERPRET"] = "0"
    sys.exit(main())
