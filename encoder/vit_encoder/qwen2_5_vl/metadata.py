"""What the sizes of a batch's images and videos mean for the encoder: made once a batch, for all of them at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vit_encoder.qwen2_5_vl.config import Qwen2_5_VLVisionConfig
from vit_encoder.qwen_grids import Units, boundaries, check_grid, patch_positions, rotary_tables, units_of


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
    check_grid(grid_thw, config.spatial_merge_size)
    device = torch.get_default_device() if device is None else device
    units, sizes = units_of(grid_thw, config.spatial_merge_size)  # [units] each, [frames]
    reverse_index, is_first = _window_order(units, config.window_units)  # [units], [units]
    window_index = torch.empty_like(reverse_index)
    window_index[reverse_index] = torch.arange(len(reverse_index), device="cpu")
    ends = torch.cat([is_first[window_index].nonzero()[1:, 0], sizes.sum()[None]])  # [windows]
    rows, columns = units.row[window_index], units.column[window_index]  # [units] each
    positions = patch_positions(rows, columns, config.spatial_merge_size)  # [units, merge_unit, 2]
    return VisionMetadata(
        window_index.to(device),
        reverse_index.to(device),
        boundaries(sizes.cumsum(0), config.merge_unit).to(device),
        boundaries(ends, config.merge_unit).to(device),
        *rotary_tables(positions.to(device, torch.float32), config),
    )


def _window_order(units: Units, side: int) -> tuple[Tensor, Tensor]:
    """The place of each unit in the window order, and whether it is the first of its window."""
    top, left = units.row // side * side, units.column // side * side
    high, wide = (units.height - top).clamp(max=side), (units.width - left).clamp(max=side)
    # Before a unit come the windows above its own, those to the left of it, and the unit's elders in its window.
    above, beside = top * units.width, high * left
    within = (units.row - top) * wide + units.column - left
    return units.start + above + beside + within, within == 0
