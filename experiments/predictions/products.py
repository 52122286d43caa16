"""The model of matrix products on an H100: the best of a few tiles in waves, fitted where n and k are 3072 or more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from experiments.common.roofline import GPUS, Efficiency, interval, tiled_seconds
from experiments.predictions.fit import Floats, fit
from experiments.predictions.measured import Product

GPU = GPUS["H100"]
RATES = {"bfloat16": GPU.flops["bfloat16"], "fp8": 2 * GPU.flops["bfloat16"]}
ITEM_BYTES = {"bfloat16": 2, "fp8": 1}
TILES = ((128, 256), (256, 128), (128, 192), (192, 128), (128, 128), (64, 256), (256, 64), (64, 128))
FITTED_FROM = 3072
START = (4e-6, 1e-6, 0.8, 0.8)


@dataclass(frozen=True)
class ProductEfficiency:
    """Of an engine's products of a dtype.

    Attributes:
        kernel: launch, tile and matrix; it computes no exponentials.
        quantising: share of the bandwidth at which the activations are read in bfloat16 and written in fp8 before.
            None of bfloat16.
    """

    kernel: Efficiency
    quantising: float | None


def seconds(row: Product, efficiency: ProductEfficiency) -> float:
    """The model's time of a measured product."""
    nbytes = ITEM_BYTES[row.dtype] * row.k * (row.m + row.n) + 2 * row.m * row.n
    best = min(
        tiled_seconds(
            GPU,
            efficiency.kernel,
            tiles=-(-row.m // high) * -(-row.n // wide),
            flops=2 * high * wide * row.k,
            exponentials=0,
            nbytes=nbytes,
            rate=RATES[row.dtype],
        )
        for high, wide in TILES
    )
    if efficiency.quantising is None:
        return best
    return best + 3 * row.m * row.k / (GPU.bandwidth * efficiency.quantising)


def bounds(row: Product) -> tuple[float, float]:
    """The roofline's interval, of the useful FLOPs; for fp8 at twice the rate, and with the quantisation's traffic."""
    fp8 = row.dtype == "fp8"
    return interval(
        GPU,
        "bfloat16",
        matrix_flops=2 * row.m * row.n * row.k / (2 if fp8 else 1),
        exponentials=0,
        nbytes=ITEM_BYTES[row.dtype] * row.k * (row.m + row.n) + 2 * row.m * row.n + (3 * row.m * row.k if fp8 else 0),
    )


def is_fitted(row: Product) -> bool:
    """Whether the model is calibrated on this row: n and k are inside the range. Those of 1536 judge it."""
    return min(row.n, row.k) >= FITTED_FROM


def calibrate(rows: Iterable[Product]) -> ProductEfficiency:
    """The efficiency of products of one dtype, fitted to the rows of `is_fitted` alone.

    Raises:
        ValueError: the rows have several dtypes, or none.
    """
    used = [row for row in rows if is_fitted(row)]
    if len(dtypes := {row.dtype for row in used}) != 1:
        raise ValueError(f"rows: got the dtypes {sorted(dtypes)}, expected one")
    fp8 = dtypes == {"fp8"}

    def predict(parameters: Floats) -> Floats:
        efficiency = _efficiency(parameters.tolist())
        return np.array([seconds(row, efficiency) for row in used])

    return _efficiency(fit(predict, np.array([row.seconds for row in used]), START if fp8 else START[:3]))


def _efficiency(parameters: list[float]) -> ProductEfficiency:
    launch, tile, matrix, *quantising = parameters
    return ProductEfficiency(Efficiency(launch, tile, matrix, 1), quantising[0] if quantising else None)
