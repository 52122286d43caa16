"""What the sizes of a batch's images and videos mean for the encoder: made once a batch, for all of them at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vit_encoder.qwen2_5_vl.config import Qwen2_5_VLVisionConfig
from vit_encoder.rotary import axial_frequencies


class VisionMetadata(NamedTuple):
    """The tensors that the encoder takes beside the pixels, under the names of its arguments.

    A unit is the square of patches that becomes one feature; window order has the units of each window together,
    window after window, frame after frame.

    Args:
        window_index: int64 [units], which unit stands at each place of the window order.
        reverse_index: int64 [units], the place of each unit in the window order.
        cu_seqlens: int32 [frames + 1], the boundaries of the frames, in patches.
        cu_window_seqlens: int32 [windows + 1], the boundaries of the windows, in patches.
        cos, sin: float32 [patches, head_dim // 2], the rotary tables, a row for each patch in window order.
    """

    window_index: Tensor
    reverse_index: Tensor
    cu_seqlens: Tensor
    cu_window_seqlens: Tensor
    cos: Tensor
    sin: Tensor


class _Units(NamedTuple):
    """For every unit the first unit of its frame, its row and column, and its frame's height and width in units."""

    start: Tensor
    row: Tensor
    column: Tensor
    height: Tensor
    width: Tensor


def vision_metadata(
    grid_thw: Tensor, config: Qwen2_5_VLVisionConfig, device: torch.device | str | None = None
) -> VisionMetadata:
    """Compute window order, boundaries and rotary tables on the host, and move them to `device`.

    The patches of a batch come as transformers' image processor puts them: image after image, frame after frame, the
    units row by row, and the patches of a unit row by row. A window is `window_units` units wide and high, less where a
    frame ends; the tables turn the first half of a head's pairs by the patch's row, the second by its column.
    Source: transformers, `vision_utils.py`, `get_vision_window_index`, and `modeling_qwen2_5_vl.py`,
    `Qwen2_5_VLVisionRotaryEmbedding`.

    Args:
        grid_thw: integers [images, 3] on the CPU: frames (pairs of them, for Qwen2.5-VL), rows and columns of patches.
        config: of the encoder.
        device: where the encoder is; PyTorch's default device when None.

    Raises:
        TypeError: `grid_thw` is no tensor of integers.
        ValueError: another shape or device, no image at all, or rows and columns that do not divide into units.
    """
    _check_grid(grid_thw, config)
    device = torch.get_default_device() if device is None else device
    frames, heights, widths = grid_thw.long().unbind(1)
    heights = (heights // config.spatial_merge_size).repeat_interleave(frames)  # [frames]
    widths = (widths // config.spatial_merge_size).repeat_interleave(frames)  # [frames]
    sizes = heights * widths  # [frames]
    units = _units(heights, widths, sizes)  # [units] each
    reverse_index, is_first = _window_order(units, config.window_units)  # [units], [units]
    window_index = torch.empty_like(reverse_index)
    window_index[reverse_index] = torch.arange(len(reverse_index), device="cpu")
    ends = torch.cat([is_first[window_index].nonzero()[1:, 0], sizes.sum()[None]])  # [windows]
    cos, sin = _tables(units, window_index, config, device)
    return VisionMetadata(
        window_index.to(device),
        reverse_index.to(device),
        _boundaries(sizes.cumsum(0), config).to(device),
        _boundaries(ends, config).to(device),
        cos,
        sin,
    )


def _units(heights: Tensor, widths: Tensor, sizes: Tensor) -> _Units:
    def of_each_unit(of_each_frame: Tensor) -> Tensor:
        return of_each_frame.repeat_interleave(sizes)

    start, width = of_each_unit(sizes.cumsum(0) - sizes), of_each_unit(widths)
    place = torch.arange(len(start), device="cpu") - start
    return _Units(start, place // width, place % width, of_each_unit(heights), width)


def _window_order(units: _Units, side: int) -> tuple[Tensor, Tensor]:
    """The place of each unit in the window order, and whether it is the first of its window."""
    top, left = units.row // side * side, units.column // side * side
    high, wide = (units.height - top).clamp(max=side), (units.width - left).clamp(max=side)
    # Before a unit come the windows above its own, those to the left of it, and the unit's elders in its window.
    above, beside = top * units.width, high * left
    within = (units.row - top) * wide + units.column - left
    return units.start + above + beside + within, within == 0


def _boundaries(ends: Tensor, config: Qwen2_5_VLVisionConfig) -> Tensor:
    return torch.nn.functional.pad(ends * config.merge_unit, (1, 0)).int()


def _tables(
    units: _Units, window_index: Tensor, config: Qwen2_5_VLVisionConfig, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    merge = config.spatial_merge_size
    corners = torch.stack([units.row, units.column], dim=-1)[window_index] * merge  # [units, 2]
    side = torch.arange(merge, device="cpu")
    inner = torch.cartesian_prod(side, side).view(-1, 2)  # [merge_unit, 2]
    positions = (corners[:, None] + inner).flatten(0, 1).to(device, torch.float32)  # [patches, 2]
    frequencies = axial_frequencies(config.head_dim, config.rope_theta, device)  # [head_dim // 4]
    angles = (positions[..., None] * frequencies).flatten(1)  # [patches, head_dim // 2]
    return angles.cos(), angles.sin()


def _check_grid(grid_thw: Tensor, config: Qwen2_5_VLVisionConfig) -> None:
    if not isinstance(grid_thw, Tensor) or grid_thw.is_floating_point() or grid_thw.dtype == torch.bool:
        received = grid_thw.dtype if isinstance(grid_thw, Tensor) else type(grid_thw).__name__
        raise TypeError(f"grid_thw: got {received}, expected a tensor of integers [images, 3]")
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3 or grid_thw.shape[0] == 0:
        raise ValueError(f"grid_thw: got shape {tuple(grid_thw.shape)}, expected [images, 3], at least one image")
    if grid_thw.device.type != "cpu":
        raise ValueError(f"grid_thw: got device {grid_thw.device}, expected cpu: reading it would wait for the device")
    merge = config.spatial_merge_size
    bad = (grid_thw < 1).any(1) | (grid_thw[:, 1:] % merge).any(1)
    if bad.any():
        raise ValueError(
            f"grid_thw: got {grid_thw[bad][0].tolist()}, expected frames, rows and columns from 1, rows and columns "
            f"multiples of {merge}"
        )
