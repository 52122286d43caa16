"""The model of attention: FlashAttention's tiles in waves, fitted on an H100 at head_dim 64 and 80."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from experiments.common.roofline import GPUS, Efficiency, interval, tiled_seconds
from experiments.predictions.fit import Floats, fit
from experiments.predictions.measured import Attention

HEADS = 16
FITTED_GPU, FITTED_HEAD_DIMS = "H100", (64, 80)
START = (8e-6, 1e-6, 0.7, 0.9)


@dataclass(frozen=True)
class Tile:
    """A block of threads: the queries that it keeps, the keys of a step, and head_dim as padded."""

    queries: int
    keys: int
    head_dim: int

    @classmethod
    def of_flash_attention(cls, gpu: str, head_dim: int) -> Tile:
        """Of FlashAttention 3 (hopper/tile_size.h, not causal) or, on a B200, 4 (flash_attn/cute/flash_fwd_sm100.py).

        Raises:
            ValueError: a head_dim beyond 96, where the tiles are others.
        """
        if not 0 < head_dim <= 96:
            raise ValueError(f"head_dim: got {head_dim}, expected at most 96")
        if gpu == "B200":
            return cls(2 * 128, 128, -(-head_dim // 16) * 16)
        return cls(192, 192, 64) if head_dim <= 64 else cls(192, 144, 96)


@dataclass(frozen=True)
class Work:
    """What a call asks for.

    Attributes:
        tiles: blocks of threads.
        flops, exponentials: issued by all of them.
        nbytes: of q, k, v and the output.
    """

    tiles: int
    flops: float
    exponentials: float
    nbytes: float


def flash_attention_work(gpu: str, head_dim: int, length: int, sequences: int) -> Work:
    """The work of FlashAttention: whole tiles, both products at the padded head_dim."""
    tile = Tile.of_flash_attention(gpu, head_dim)
    tiles = HEADS * sequences * -(-length // tile.queries)
    area = tiles * tile.queries * tile.keys * -(-length // tile.keys)
    return Work(tiles, 4 * area * tile.head_dim, area, compulsory_bytes(head_dim, length, sequences))


def compulsory_bytes(head_dim: int, length: int, sequences: int) -> float:
    """q, k, v and the output in bfloat16."""
    return 4 * 2 * HEADS * sequences * length * head_dim


def seconds(gpu: str, work: Work, efficiency: Efficiency, resident: int = 1) -> float:
    """The model's time; `resident` blocks share a multiprocessor."""
    return tiled_seconds(
        GPUS[gpu],
        efficiency,
        tiles=work.tiles,
        flops=work.flops / work.tiles,
        exponentials=work.exponentials / work.tiles,
        nbytes=work.nbytes,
        rate=GPUS[gpu].flops["bfloat16"],
        resident=resident,
    )


def bounds(gpu: str, work: Work) -> tuple[float, float]:
    """The interval of the roofline, which nothing was fitted for."""
    return interval(
        GPUS[gpu],
        "bfloat16",
        matrix_flops=work.flops,
        exponentials=work.exponentials,
        nbytes=work.nbytes,
    )


def work_of(row: Attention) -> Work:
    """The work of a measured call: FlashAttention's tiles, whatever the kernel; those of TensorRT-LLM are unknown."""
    return flash_attention_work(row.gpu, row.head_dim, row.length, row.sequences)


def is_fitted(row: Attention) -> bool:
    """Whether the model is calibrated on this row. All others judge it."""
    return row.is_flash_attention and row.gpu == FITTED_GPU and row.head_dim in FITTED_HEAD_DIMS


def calibrate(rows: Iterable[Attention]) -> Efficiency:
    """The efficiency of FlashAttention, fitted to the rows of `is_fitted` alone."""
    used = [row for row in rows if is_fitted(row)]
    works = [work_of(row) for row in used]

    def predict(parameters: Floats) -> Floats:
        efficiency = Efficiency(*parameters.tolist())
        return np.array([seconds(FITTED_GPU, work, efficiency) for work in works])

    return Efficiency(*fit(predict, np.array([row.seconds for row in used]), START))
