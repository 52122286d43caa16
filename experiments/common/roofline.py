"""How long a kernel must take on a GPU at least, and about at most, by a model: a prediction, never a measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass

ACHIEVABLE_RATE = 0.6
ACHIEVABLE_BANDWIDTH = 0.8

ASSUMPTIONS = (
    "A model's prediction; nothing was run. Lower: matrix products, exponentials and compulsory HBM traffic at their "
    "data-sheet peaks, perfectly overlapped (the longest of the three). Upper: not overlapped at all (their sum), at "
    f"{ACHIEVABLE_RATE:.0%} of the peak rates and {ACHIEVABLE_BANDWIDTH:.0%} of the bandwidth. Matrix products are "
    "those that the compiled code issues, padding and repeats in other warps included. Every compulsory byte moves "
    "once (caches serve the rest). Not in the model: launches, the last wave of blocks, latency, other arithmetic, "
    "spills, power limits. How far such intervals are from what others measured: experiments/results/predictions.md."
)


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one GPU, dense, at boost clock.

    Attributes:
        target: the architecture, as in `vit_kernels.inspection.TARGETS`.
        flops: matrix FLOP/s by dtype; float32 on NVIDIA is tf32's rate, and each product is made of three; "int8" and
            "float8" are twice the half precisions on all of them.
        bandwidth: HBM, bytes/s.
        exponentials: exp2 a second: 16 a clock and multiprocessor.
        processors: multiprocessors (compute units on AMD).
        source: of the figures.
    """

    target: str
    flops: dict[str, float]
    bandwidth: float
    exponentials: float
    processors: int
    source: str


@dataclass(frozen=True)
class Efficiency:
    """What a kernel makes of a GPU: fitted to measurements, see `experiments.predictions`.

    Attributes:
        launch: seconds of a call before and after any work.
        tile: seconds that a tile takes beyond its arithmetic: its first loads and its last stores.
        matrix: share of the peak rate of matrix products. Above 1 where the exponentials overlap with them, whose
            time is added.
        exponentials: share of the peak rate of exponentials, likewise.
    """

    launch: float
    tile: float
    matrix: float
    exponentials: float


def _nvidia(target: str, half: float, tf32: float, bandwidth: float, processors: int, clock: float, source: str) -> Gpu:
    rates = {"bfloat16": half, "float16": half, "float32": tf32, "int8": 2 * half}
    # sm_80 has no fp8.
    rates |= {} if target == "sm_80" else {"float8": 2 * half}
    return Gpu(target, rates, bandwidth, 16 * processors * clock, processors, source)


# Exponentials: "Arithmetic Instructions" of the CUDA C++ Programming Guide; for CDNA 3 a quarter of the rate of other
# fp32 instructions (its ISA guide). Clocks: the data sheet's peak divided by its FLOPs a clock.
GPUS = {
    "A100": _nvidia("sm_80", 312e12, 156e12, 2.039e12, 108, 1.41e9, "NVIDIA A100 data sheet, SXM 80 GB"),
    "H100": _nvidia("sm_90", 989.4e12, 494.7e12, 3.35e12, 132, 1.83e9, "NVIDIA H100 data sheet, SXM5"),
    "H200": _nvidia("sm_90", 989.4e12, 494.7e12, 4.8e12, 132, 1.83e9, "NVIDIA H200 data sheet, SXM"),
    "B200": _nvidia("sm_100", 2250e12, 1125e12, 8e12, 148, 1.86e9, "NVIDIA HGX and DGX B200 data sheets, per GPU"),
    "MI300X": Gpu(
        "gfx942",
        {"bfloat16": 1307.4e12, "float16": 1307.4e12, "float32": 163.4e12, "int8": 2614.9e12, "float8": 2614.9e12},
        5.3e12,
        16 * 304 * 2.1e9,
        304,
        "AMD Instinct MI300X data sheet",
    ),
}


def interval(gpu: Gpu, dtype: str, *, matrix_flops: float, exponentials: float, nbytes: float) -> tuple[float, float]:
    """Lower and upper seconds of a kernel under ASSUMPTIONS.

    Args:
        gpu: one of GPUS.
        dtype: of the factors: "bfloat16", "float16", "float32", "int8" or "float8".
        matrix_flops: issued.
        exponentials: computed.
        nbytes: compulsory traffic.
    """
    seconds = (matrix_flops / gpu.flops[dtype], exponentials / gpu.exponentials, nbytes / gpu.bandwidth)
    *computing, moving = seconds
    return max(seconds), sum(computing) / ACHIEVABLE_RATE + moving / ACHIEVABLE_BANDWIDTH


def tiled_seconds(
    gpu: Gpu,
    efficiency: Efficiency,
    *,
    tiles: int,
    flops: float,
    exponentials: float,
    nbytes: float,
    rate: float,
    resident: int = 1,
) -> float:
    """Seconds of a kernel whose equal tiles go to the multiprocessors in waves, the last of which may be partly empty.

    Args:
        gpu: one of GPUS.
        efficiency: of the kernel.
        tiles: blocks of threads.
        flops, exponentials: of one tile, issued.
        nbytes: compulsory traffic of the kernel, at `ACHIEVABLE_BANDWIDTH`: a lower bound behind the launch.
        rate: matrix FLOP/s of the GPU at its peak.
        resident: blocks that share a multiprocessor. They begin and end together, and share its arithmetic.
    """
    of_tile = gpu.processors * (
        flops / (rate * efficiency.matrix) + exponentials / (gpu.exponentials * efficiency.exponentials)
    )
    starts = math.ceil(tiles / (gpu.processors * resident))
    computing = starts * efficiency.tile + math.ceil(tiles / gpu.processors) * of_tile
    return efficiency.launch + max(computing, nbytes / (gpu.bandwidth * ACHIEVABLE_BANDWIDTH))
