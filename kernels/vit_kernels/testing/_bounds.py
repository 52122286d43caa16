"""Which addresses belong to the tensors of a kernel launch."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Addresses = NDArray[np.uint64]


class OutOfBounds(IndexError):  # noqa: N818 - reads as the finding, as the message does
    """An active lane of a load or store lies outside every tensor of its kernel launch."""


@dataclass(frozen=True)
class Region:
    """The bytes of one tensor argument.

    Attributes:
        levels: (stride, span of one step) in bytes, outermost first, of the dimensions between which gaps lie: an
            offset is inside when, reduced modulo each stride in turn, it leaves an access within that span. Empty
            when the elements leave no gaps, or when they overlap (then only the whole span is checked).
    """

    name: str
    start: int
    stop: int
    levels: tuple[tuple[int, int], ...]
    description: str

    def contains(self, addresses: Addresses, access_bytes: int) -> NDArray[np.bool_]:
        """Whether each access of `access_bytes` lies on elements of the tensor."""
        offsets = addresses.astype(np.int64) - self.start
        inside = (offsets >= 0) & (offsets + access_bytes <= self.stop - self.start)
        for stride, span in self.levels:
            offsets = offsets % stride
            inside &= offsets + access_bytes <= span
        return inside

    def distance(self, address: int, access_bytes: int) -> int:
        """Bytes before the start (negative) or past the end (positive); 0 when within the span."""
        return min(address - self.start, 0) or max(address + access_bytes - self.stop, 0)


def region_of(name: str, tensor: torch.Tensor) -> Region:
    """The region of a strided tensor in host memory."""
    item = tensor.element_size()
    steps = sorted(
        (stride * item, size)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size > 1 and stride > 0
    )
    span = item if tensor.numel() else 0
    levels: list[tuple[int, int]] = []
    overlapping = False
    for stride, size in steps if span else ():
        overlapping |= stride < span
        if stride > span:
            levels.insert(0, (stride, span))
        span += (size - 1) * stride
    return Region(
        name=name,
        start=tensor.data_ptr(),
        stop=tensor.data_ptr() + span,
        levels=() if overlapping else tuple(levels),
        description=f"argument {name!r} (shape {tuple(tensor.shape)}, strides {tensor.stride()}, {tensor.dtype})",
    )


def check(
    kind: str, addresses: Addresses, access_bytes: int, regions: Sequence[Region], program: Iterable[int]
) -> None:
    """Check that every access lies in one of the regions.

    Raises:
        OutOfBounds: it does not; the message says how many lanes, and how far the first is from the nearest argument.
    """
    low, high = int(addresses.min()), int(addresses.max()) + access_bytes
    for region in regions:
        if region.start <= low and high <= region.stop and not region.levels:
            return
    outside = np.ones(addresses.shape, dtype=np.bool_)
    for region in regions:
        outside &= ~region.contains(addresses, access_bytes)
        if not outside.any():
            return
    raise OutOfBounds(
        f"{kind} of {access_bytes}-byte elements by program {tuple(program)}: {np.count_nonzero(outside)} of "
        f"{addresses.size} active lanes lie outside every tensor argument; the first is "
        f"{_whereabouts(int(addresses[outside][0]), access_bytes, regions)}"
    )


def _whereabouts(address: int, access_bytes: int, regions: Sequence[Region]) -> str:
    if not regions:
        return f"at address {address:#x}, and the launch has no tensor argument"
    nearest = min(regions, key=lambda region: abs(region.distance(address, access_bytes)))
    distance = nearest.distance(address, access_bytes)
    if distance == 0:
        return f"in a gap between the elements of {nearest.description}, {address - nearest.start} bytes past its start"
    side = "past the end of" if distance > 0 else "before the start of"
    elements = math.ceil(abs(distance) / access_bytes)
    return f"{abs(distance)} bytes ({elements} elements) {side} {nearest.description}"
