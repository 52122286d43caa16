"""What a layer of an encoder asks of a GPU, and the rest of the encoder: launches, bytes, FLOPs, a roofline's time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from experiments.common.roofline import GPUS, interval
from experiments.launches.inductor import Generated
from experiments.launches.launch import Launch

SHAPES = ("static", "dynamic")
PREDICTED = ("H100", "H200", "B200", "MI300X")
LAYERS = (2, 4)
"""Two depths: a layer is half of the difference (transformers' odd and even layers fuse differently)."""

Interval = tuple[float, float]
"""Lower and upper seconds."""


@dataclass(frozen=True, kw_only=True)
class Kernel(Launch):
    """A kernel of a layer: how often it is launched, and what one launch takes by a roofline, by GPU."""

    count: float
    predicted_seconds: dict[str, Interval]


@dataclass(frozen=True)
class Part:
    """A layer, or what an encoder has besides its layers.

    Attributes:
        launches: of all kinds.
        triton, gemm, opaque: as `Launch.kind`.
        bytes: read and written.
        predicted_seconds: of all launches one after the other, by GPU.
    """

    launches: float
    triton: float
    gemm: float
    opaque: float
    bytes: float
    flops: float
    predicted_seconds: dict[str, Interval]
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True)
class Asked:
    """What an encoder asks for."""

    layer: Part
    rest: Part
    cudagraphs_refused: str | None


@dataclass(frozen=True)
class Row:
    """What an encoder asks for at one size of its input, which the graph knows ("static") or not ("dynamic")."""

    encoder: str
    shapes: str
    size: int
    asked: Asked

    @property
    def layer(self) -> Part:
        """One of its layers."""
        return self.asked.layer

    def described(self, sizes: str) -> dict[str, Any]:
        """As the result has it; `sizes` is what `size` counts."""
        return {"encoder": self.encoder, "shapes": self.shapes, sizes: self.size, **vars(self.asked)}


def layer_and_rest(generate: Callable[[int], Generated]) -> Asked:
    """What a layer asks for, and the rest of an encoder, of which `generate` makes one with so many layers."""
    fewer, more = (generate(layers) for layers in LAYERS)
    counts = [Counter(map(_merged, generated.launches)) for generated in (fewer, more)]
    kinds = {**counts[0], **counts[1]}
    layer = {launch: (counts[1][launch] - counts[0][launch]) / (LAYERS[1] - LAYERS[0]) for launch in kinds}
    rest = {launch: counts[0][launch] - LAYERS[0] * count for launch, count in layer.items()}
    return Asked(_part(layer), _part(rest), more.cudagraphs_refused)


def _merged(launch: Launch) -> Launch:
    """The launch without the number in its kernel's name, which differs between encoders of different depth."""
    return replace(launch, kernel=launch.kernel.rstrip("0123456789").rstrip("_"), region="")


def _part(launches: dict[Launch, float]) -> Part:
    kernels = tuple(
        Kernel(**vars(launch), count=count, predicted_seconds={gpu: predicted(launch, gpu) for gpu in PREDICTED})
        for launch, count in launches.items()
        if count
    )

    def of_kind(kind: str) -> float:
        return sum(kernel.count for kernel in kernels if kernel.kind == kind)

    return Part(
        launches=sum(kernel.count for kernel in kernels),
        triton=of_kind("triton"),
        gemm=of_kind("gemm"),
        opaque=of_kind("opaque"),
        bytes=sum(kernel.count * kernel.nbytes for kernel in kernels),
        flops=sum(kernel.count * kernel.flops for kernel in kernels),
        predicted_seconds={
            gpu: (
                sum(kernel.count * kernel.predicted_seconds[gpu][0] for kernel in kernels),
                sum(kernel.count * kernel.predicted_seconds[gpu][1] for kernel in kernels),
            )
            for gpu in PREDICTED
        },
        kernels=kernels,
    )


def predicted(launch: Launch, gpu: str) -> Interval:
    """Lower and upper seconds of a launch, in bfloat16."""
    work = {"matrix_flops": launch.flops, "exponentials": launch.exponentials, "nbytes": launch.nbytes}
    return interval(GPUS[gpu], "bfloat16", **work)
