"""Patches and units of a batch's images and videos, for the Qwen encoders: on the host, for all of them at once.

A unit is the square of patches that becomes one feature. The patches of a batch come as transformers' image processor
puts them: image after image, frame after frame, the units row by row, and the patches of a unit row by row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vit_encoder.qwen_configs import QwenVisionConfig
from vit_encoder.rotary import axial_frequencies


class Units(NamedTuple):
    """For every unit the first unit of its frame, its row and column, and its frame's height and width in units."""

    start: Tensor
    row: Tensor
    column: Tensor
    height: Tensor
    width: Tensor


def check_grid(grid_thw: Tensor, merge: int) -> None:
    """The sizes of a batch are integers [images, 3] on the CPU, from 1, rows and columns multiples of `merge`.

    Raises:
        TypeError: no tensor of integers.
        ValueError: another shape or device, no image at all, or rows and columns that do not divide into units.
    """
    if not isinstance(grid_thw, Tensor) or grid_thw.is_floating_point() or grid_thw.dtype == torch.bool:
        received = grid_thw.dtype if isinstance(grid_thw, Tensor) else type(grid_thw).__name__
        raise TypeError(f"grid_thw: got {received}, expected a tensor of integers [images, 3]")
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3 or grid_thw.shape[0] == 0:
        raise ValueError(f"grid_thw: got shape {tuple(grid_thw.shape)}, expected [images, 3], at least one image")
    if grid_thw.device.type != "cpu":
        raise ValueError(f"grid_thw: got device {grid_thw.device}, expected cpu: reading it would wait for the device")
    bad = (grid_thw < 1).any(1) | (grid_thw[:, 1:] % merge).any(1)
    if bad.any():
        raise ValueError(
            f"grid_thw: got {grid_thw[bad][0].tolist()}, expected frames, rows and columns from 1, rows and columns "
            f"multiples of {merge}"
        )


def units_of(grid_thw: Tensor, merge: int) -> tuple[Units, Tensor]:
    """Every unit of a batch whose sizes are checked, [units] each, and how many a frame has, [frames]."""
    frames, heights, widths = grid_thw.long().unbind(1)
    heights, widths = ((side // merge).repeat_interleave(frames) for side in (heights, widths))  # [frames]
    sizes = heights * widths  # [frames]

    def of_each_unit(of_each_frame: Tensor) -> Tensor:
        return of_each_frame.repeat_interleave(sizes)

    start, width = of_each_unit(sizes.cumsum(0) - sizes), of_each_unit(widths)
    place = torch.arange(len(start), device="cpu") - start
    return Units(start, place // width, place % width, of_each_unit(heights), width), sizes


def boundaries(ends: Tensor, merge_unit: int) -> Tensor:
    """Where sequences end in units, [sequences], as cu_seqlens in patches: int32 [sequences + 1]."""
    return torch.nn.functional.pad(ends * merge_unit, (1, 0)).int()


def patch_positions(row: Tensor, column: Tensor, merge: int) -> Tensor:
    """Row and column of the patches of units at these places, [units] each: [units, merge_unit, 2]."""
    corners = torch.stack([row, column], dim=-1) * merge  # [units, 2]
    side = torch.arange(merge, device="cpu")
    return corners[:, None] + torch.cartesian_prod(side, side).view(-1, 2)


def rotary_tables(positions: Tensor, config: QwenVisionConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of patches' rows and columns, where these are: float32 [patches, head_dim // 2].

    Args:
        positions: float32 [units, merge_unit, 2].
        config: of the encoder.
    """
    frequencies = axial_frequencies(config.head_dim, config.rope_theta, positions.device)  # [head_dim // 4]
    angles = (positions.flatten(0, 1)[..., None] * frequencies).flatten(1)  # [patches, head_dim // 2]
    return angles.cos(), angles.sin()
