"""The time of our attention if it reached the peer's efficiency, at sizes that the peer was measured at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.common.roofline import GPUS, Efficiency
from experiments.predictions import attention
from experiments.predictions.attention import HEADS, Work
from experiments.predictions.measured import Attention

LABEL = "the time if our kernel reached the peer's efficiency"
SIZES = (
    # sequences, length, head_dim, what has about this size
    (16, 576, 64, "16 images of 24 x 24 patches"),
    (16, 576, 72, "16 images of 24 x 24 patches"),
    (16, 576, 80, "16 images of 24 x 24 patches"),
    (64, 64, 80, "64 windows of Qwen2.5-VL"),
    (1, 2304, 80, "an image of 48 x 48 patches"),
)


@dataclass(frozen=True)
class Compiled:
    """What the kernel report says of our default configuration: queries a block, and blocks that an SM holds."""

    block: int
    resident: int


@dataclass(frozen=True)
class Beside:
    """A size: what was measured of the peer, and what the model makes of both, in microseconds.

    Attributes:
        measured: of FlashAttention, by engine.
        peer: the model's time of the peer.
        ours: LABEL.
        interval: of the roofline for ours, which nothing was fitted for.
    """

    gpu: str
    sequences: int
    length: int
    head_dim: int
    like: str
    measured: dict[str, float]
    peer: float
    ours: float
    interval: tuple[float, float]


def compiled(report: Path) -> dict[tuple[str, int], Compiled]:
    """By target and head_dim, from the committed kernel report."""
    rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
    return {
        (row["target"], row["head_dim"]): Compiled(row["configuration"]["BLOCK_M"], row["ctas_per_sm"])
        for row in rows
        if row["kernel"] == "varlen_attention" and row["dtype"] == "bfloat16" and row["default"] and not row["error"]
    }


def work(head_dim: int, length: int, sequences: int, block: int) -> Work:
    """The work of our kernel, counted by the interpreter on one head of one sequence."""
    from vit_kernels import force_impl, varlen_attention
    from vit_kernels.testing import corrected_interpreter

    q, k, v = torch.zeros(3, length, 1, head_dim, dtype=torch.bfloat16).unbind()
    with corrected_interpreter() as counts, force_impl("triton"):
        varlen_attention(q, k, v, torch.tensor([0, length], dtype=torch.int32))
    heads = HEADS * sequences
    nbytes = attention.compulsory_bytes(head_dim, length, sequences)
    return Work(heads * -(-length // block), heads * counts.dot_flops, heads * counts.exp2, nbytes)


def beside(rows: Sequence[Attention], efficiency: Efficiency, report: Path) -> list[Beside]:
    """Every size of SIZES on every GPU, beside the peer that was measured there.

    Raises:
        ValueError: a size that no peer was measured at.
    """
    of_target = compiled(report)
    found = []
    for sequences, length, head_dim, like in SIZES:
        ours = work(head_dim, length, sequences, of_target["sm_90", head_dim].block)
        for gpu in dict.fromkeys(row.gpu for row in rows):
            size = (gpu, sequences, length, head_dim)
            measured = {
                row.engine: 1e6 * row.seconds
                for row in rows
                if row.is_flash_attention and (row.gpu, row.sequences, row.length, row.head_dim) == size
            }
            if not measured:
                raise ValueError(f"SIZES: got {size}, expected one that a peer was measured at")
            resident = of_target[GPUS[gpu].target, head_dim].resident
            peer = attention.flash_attention_work(gpu, head_dim, length, sequences)
            low, high = attention.bounds(gpu, ours)
            found.append(
                Beside(
                    *size,
                    like,
                    measured,
                    _microseconds(attention.seconds(gpu, peer, efficiency)),
                    _microseconds(attention.seconds(gpu, ours, efficiency, resident)),
                    (_microseconds(low), _microseconds(high)),
                )
            )
    return found


def _microseconds(seconds: float) -> float:
    return float(f"{1e6 * seconds:.3g}")


def as_json(rows: Sequence[Beside]) -> list[dict[str, Any]]:
    """For the result file, with the label in each row, so that no row is read without it."""
    return [{**vars(row), "label": LABEL} for row in rows]
