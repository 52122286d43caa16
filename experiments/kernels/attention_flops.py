"""Report the matrix FLOPs that attention issues, padding included, over the useful ones: ours beside peers'.

Triton's kernels are run by the corrected interpreter, which counts them; what comes compiled, or is chosen by PyTorch
on a GPU, is a model of its tiles. Nothing is run on a GPU or timed. Peers are in the table where they are installed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from experiments.common import cli, roofline
from experiments.common.problem import HEAD_DIM, HEADS, POSITIONS
from experiments.kernels.registry import version_of

if TYPE_CHECKING:
    from vit_kernels.testing.counts import OperationCounts

PREFILL = "vllm.v1.attention.ops.triton_prefill_attention"
NOTES = (
    "bfloat16. Useful: 4 * length^2 * head_dim a sequence. Requested bytes, of "
    "the counted kernels: those of every load and store over q, k, v and the output once; caches serve the rest.",
    "Counted kernels run with the blocks that they take on a GPU, ours with the default configuration, which is of "
    "64 x 64 on all five targets at these head_dims.",
    "Models: whole tiles of queries x keys at the padded head_dim. flash-attn 2: 128 x 128 at 64, 128 x 64 at 96 for "
    "head_dim 65 to 96 (csrc/flash_attn/src/flash_fwd_launch_template.h, run_mha_fwd_hdim64 and run_mha_fwd_hdim96); "
    "flash-attn 3: 192 x 192 at 64, 192 x 144 at 96 (hopper/tile_size.h, tile_size_fwd_sm90). transformers' sdpa calls "
    "PyTorch once a sequence, which takes flash-attn 2's kernel on NVIDIA. vLLM asks for flash-attn first there, then "
    "for its Triton kernel.",
    f"Microseconds, {HEADS} heads: {roofline.ASSUMPTIONS}",
)

Lengths = tuple[int, ...]
Count = Callable[[Lengths, int], "OperationCounts"]


@dataclass(frozen=True)
class Workload:
    """Layers of attention: how many there are of each kind, and the lengths of the packed sequences that they see."""

    name: str
    head_dim: int
    layers: tuple[tuple[int, Lengths], ...]

    @property
    def useful_flops(self) -> int:
        """Return the matrix FLOPs of one head."""
        return sum(4 * count * length**2 * self.head_dim for count, lengths in self.layers for length in lengths)

    @property
    def compulsory_bytes(self) -> int:
        """Return the bytes of q, k, v and the output of one head."""
        return sum(8 * count * sum(lengths) * self.head_dim for count, lengths in self.layers)


@dataclass(frozen=True)
class Attention:
    """An implementation of attention.

    Attributes:
        name: in the table.
        package: distribution that it is part of, or that chooses it.
        module: that must be importable for it to be in the table; None for a model of what nobody installed.
        how: "counted" or "model".
        count: the work of one head over sequences of these lengths; a model knows no bytes.
        launches: kernels for so many sequences.
    """

    name: str
    package: str
    module: str | None
    how: str
    count: Count
    launches: Callable[[int], int] = lambda sequences: 1


def workloads() -> tuple[Workload, ...]:
    """A tile of Llama 4; Qwen2.5-VL's windows, and its layers over a photograph of 74 x 54 patches; Qwen3-VL over a VGA
    image and a clip.
    """
    from vit_encoder import Qwen2_5_VLVisionConfig, Qwen3VLVisionConfig
    from vit_encoder.qwen2_5_vl import vision_metadata

    config = Qwen2_5_VLVisionConfig.qwen2_5_vl_7b()
    metadata = vision_metadata(torch.tensor([[1, 74, 54]]), config)
    windows, whole = (_lengths(bounds) for bounds in (metadata.cu_window_seqlens, metadata.cu_seqlens))
    full = len(config.fullatt_block_indexes)
    width = config.head_dim
    wide, narrow = Qwen3VLVisionConfig.qwen3_vl_8b(), Qwen3VLVisionConfig.qwen3_vl_2b()
    return (
        Workload("Llama 4, a tile of 577 tokens", HEAD_DIM, ((1, (POSITIONS,)),)),
        Workload("Qwen2.5-VL, windows of 64 patches", width, ((1, (64,) * 4),)),
        Workload("Qwen2.5-VL, 74 x 54 patches in windows", width, ((1, windows),)),
        Workload("Qwen2.5-VL, 74 x 54 patches whole", width, ((1, whole),)),
        Workload("Qwen2.5-VL, 74 x 54 patches, all layers", width, ((config.depth - full, windows), (full, whole))),
        Workload("Qwen3-VL 8B, 40 x 30 patches, all layers", wide.head_dim, ((wide.depth, (40 * 30,)),)),
        Workload("Qwen3-VL 8B, 8 frames of 36 x 20 patches, all layers", wide.head_dim, ((wide.depth, (720,) * 8),)),
        Workload("Qwen3-VL 2B, 40 x 30 patches, all layers", narrow.head_dim, ((narrow.depth, (40 * 30,)),)),
    )


def _lengths(cu_seqlens: Tensor) -> Lengths:
    return tuple(cu_seqlens.diff().tolist())


def _packed(lengths: Lengths, head_dim: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return q, k, v [tokens, 1, head_dim] and cu_seqlens; what is counted does not depend on the values."""
    qkv = torch.zeros(sum(lengths), 3, 1, head_dim, dtype=torch.bfloat16).unbind(1)
    return qkv, torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


@functools.cache
def ours(lengths: Lengths, head_dim: int) -> OperationCounts:
    """Count the work of `varlen_attention`."""
    from vit_kernels import force_impl, varlen_attention
    from vit_kernels.testing import corrected_interpreter

    (q, k, v), cu_seqlens = _packed(lengths, head_dim)
    with corrected_interpreter() as counts, force_impl("triton"):
        varlen_attention(q, k, v, cu_seqlens)
    return counts


@functools.cache
def vllm_prefill(lengths: Lengths, head_dim: int) -> OperationCounts:
    """Count the work of vLLM's Triton kernel for encoders."""
    from vit_kernels.testing import corrected_interpreter

    from experiments.kernels.registry import PEERS

    (kernel,) = (kernel for kernel in PEERS if kernel.launcher.startswith(PREFILL))
    _, launch = kernel.load()
    qkv, cu_seqlens = _packed(lengths, head_dim)
    with corrected_interpreter() as counts:
        launch(*qkv, torch.empty_like(qkv[0]), cu_seqlens[:-1], cu_seqlens.diff(), max(lengths), is_causal=False)
    return counts


def tiles(shapes: dict[int, tuple[int, int]]) -> Count:
    """A model: whole tiles, both products at the padded head_dim.

    Args:
        shapes: queries and keys of a tile for each head_dim that others are padded to, the smallest first.
    """

    def count(lengths: Lengths, head_dim: int) -> OperationCounts:
        from vit_kernels.testing.counts import OperationCounts

        padded = next(size for size in shapes if size >= head_dim)
        queries, keys = shapes[padded]
        area = sum(-(-length // queries) * queries * -(-length // keys) * keys for length in lengths)
        return OperationCounts(dot_flops=4 * area * padded, exp2=area)

    return count


_FLASH_2, _FLASH_3 = tiles({64: (128, 128), 96: (128, 64)}), tiles({64: (192, 192), 96: (192, 144)})

ATTENTIONS = (
    Attention("ours", "vit-kernels", "vit_kernels", "counted", ours),
    Attention("vLLM's Triton kernel", "vllm", PREFILL, "counted", vllm_prefill),
    Attention("flash-attn 2", "flash-attn", None, "model", _FLASH_2),
    Attention("flash-attn 3", "flash-attn", None, "model", _FLASH_3),
    Attention("transformers, sdpa", "transformers", "transformers", "model", _FLASH_2, lambda n: n),
)


def installed() -> list[Attention]:
    """Return the implementations whose module can be imported, and those that need none."""
    return [a for a in ATTENTIONS if a.module is None or importlib.util.find_spec(a.module.partition(".")[0])]


def row(workload: Workload, attention: Attention) -> dict[str, Any]:
    """Return the figures of one implementation on one workload."""
    counts = [attention.count(lengths, workload.head_dim) for _, lengths in workload.layers]
    times = [times for times, _ in workload.layers]
    issued = sum(n * count.dot_flops for n, count in zip(times, counts, strict=True))
    requested = sum(n * (count.bytes_loaded + count.bytes_stored) for n, count in zip(times, counts, strict=True))
    counted = attention.how == "counted"
    return {
        "workload": workload.name,
        "head_dim": workload.head_dim,
        "sequences": sum(n * len(lengths) for n, lengths in workload.layers),
        "attention": attention.name,
        "package": f"{attention.package} {version_of(attention.package)}" if counted else attention.package,
        "how": attention.how,
        "launches": sum(n * attention.launches(len(lengths)) for n, lengths in workload.layers),
        "flops_issued_over_useful": round(issued / workload.useful_flops, 4),
        "bytes_requested_over_compulsory": round(requested / workload.compulsory_bytes, 4) if counted else None,
        "roofline_us": {name: _microseconds(gpu, workload, counts) for name, gpu in roofline.GPUS.items()},
    }


def _microseconds(gpu: roofline.Gpu, workload: Workload, counts: list[OperationCounts]) -> list[float]:
    """Return the model's least and most time of all heads, one kind of layer after the other."""
    total = torch.zeros(2, dtype=torch.float64)
    for (times, lengths), count in zip(workload.layers, counts, strict=True):
        alone = Workload(workload.name, workload.head_dim, ((1, lengths),))
        seconds = roofline.interval(
            gpu,
            "bfloat16",
            matrix_flops=HEADS * count.dot_flops,
            exponentials=HEADS * count.exp2,
            nbytes=HEADS * alone.compulsory_bytes,
        )
        total += times * torch.tensor(seconds, dtype=torch.float64)
    return [float(f"{1e6 * seconds:.4g}") for seconds in total.tolist()]


def main(arguments: list[str] | None = None) -> int:
    """Count, print the table, write the file and return the exit status."""
    parser = cli.parser("python -m experiments.kernels.attention_flops", __doc__)
    cli.add_out(parser)
    options = parser.parse_args(arguments)
    cases = [(workload, attention) for workload in workloads() for attention in installed()]
    rows = [row(*case) for case in tqdm(cases, desc="counting", unit="row", disable=None)]
    console = cli.console()
    print_table(console, rows)
    path = options.out / "attention_work.json"
    cli.write_json(path, cli.result("attention_work", notes=NOTES, rows=rows))
    console.print(f"wrote {path}")
    return 0


def print_table(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print the rows, and what the columns mean."""
    table = Table()
    for column in ("workload", "head_dim", "sequences", "attention", "how", "launches", "FLOPs", "bytes", "H100, us"):
        table.add_column(column)
    for figures in rows:
        requested = figures["bytes_requested_over_compulsory"]
        table.add_row(
            *(str(figures[name]) for name in ("workload", "head_dim", "sequences", "attention", "how", "launches")),
            f"{figures['flops_issued_over_useful']:.3f}",
            "-" if requested is None else f"{requested:.2f}",
            "{:g} to {:g}".format(*figures["roofline_us"]["H100"]),
        )
    console.print(table)
    console.print("FLOPs: issued over useful; bytes: requested over compulsory; us: predicted.", *NOTES, sep="\n")


if __name__ == "__main__":
    # Read when Triton is first imported, which nothing above has done.
    os.environ["TRITON_INTERPRET"] = "1"
    sys.exit(main())
