"""What the sizes of a batch's images and videos mean for the encoder: made once a batch, for all of them at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vit_encoder.qwen3_vl.config import Qwen3VLVisionConfig
from vit_encoder.qwen_grids import Units, boundaries, check_grid, patch_positions, rotary_tables, units_of


class VisionMetadata(NamedTuple):
    """The tensors that the encoder takes beside the pixels, under the names of its arguments.

    A unit is the square of patches that becomes one feature. Its position embedding is interpolated bilinearly: a patch
    takes the weighted sum of four rows, its taps, of the table.

    Args:
        position_taps: int64 [units, merge_unit, 4], rows of the table of position embeddings, of each patch.
        position_weights: float32 [units, merge_unit, 4], their weights.
        cu_seqlens: int32 [frames + 1], the boundaries of the frames, in patches.
        cos, sin: float32 [patches, head_dim // 2], the rotary tables, a row for each patch.
    """

    position_taps: Tensor
    position_weights: Tensor
    cu_seqlens: Tensor
    cos: Tensor
    sin: Tensor


def vision_metadata(
    grid_thw: Tensor, config: Qwen3VLVisionConfig, device: torch.device | str | None = None
) -> VisionMetadata:
    """Compute taps, boundaries and rotary tables of a batch, in the order of `qwen_grids`.

    Where a patch lies is computed on the host; what follows from it on `device`, so that little is moved and nothing
    waits. The corners of a frame take the corners of the table, whatever its size. The rotary tables turn the first
    half of a head's pairs by the patch's row, the second by its column.
    Source: transformers, `vision_utils.py`, `get_vision_interpolation_indices_and_weights`, and `modeling_qwen3_vl.py`,
    `Qwen3VLVisionRotaryEmbedding`.

    Args:
        grid_thw: integers [images, 3] on the CPU: frames (pairs of them, for Qwen3-VL), rows and columns of patches.
        config: of the encoder.
        device: where the encoder is; PyTorch's default device when None.

    Raises:
        TypeError: `grid_thw` is no tensor of integers.
        ValueError: another shape or device, no image at all, or rows and columns that do not divide into units.
    """
    check_grid(grid_thw, config.spatial_merge_size)
    device = torch.get_default_device() if device is None else device
    units, sizes = units_of(grid_thw, config.spatial_merge_size)  # [units] each, [frames]
    positions = patch_positions(units.row, units.column, config.spatial_merge_size)  # [units, merge_unit, 2]
    places = _places_in_table(positions, units, config).to(device)  # [units, merge_unit, 2]
    return VisionMetadata(
        *_taps(places, config.position_side),
        boundaries(sizes.cumsum(0), config.merge_unit).to(device),
        *rotary_tables(positions.to(device, torch.float32), config),
    )


def _places_in_table(positions: Tensor, units: Units, config: Qwen3VLVisionConfig) -> Tensor:
    """Row and column in the table of each patch, float32: fractions but at the table's corners."""
    last = torch.stack([units.height, units.width], dim=-1) * config.spatial_merge_size - 1  # [units, 2]
    # Multiplied first, as transformers does: the roundings are the same.
    return positions.to(torch.float32) * (config.position_side - 1) / last.clamp(min=1)[:, None]


def _taps(places: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The four rows of the table around each place, [..., 2] -> [..., 4], and their weights."""
    low = places.floor()
    low_weight = 1 - (places - low)
    weights = torch.stack([low_weight, 1 - low_weight], dim=-1)  # [..., 2, 2]: axis, low and high
    first = low.long()
    ends = torch.stack([first, (first + 1).clamp(max=side - 1)], dim=-1)  # [..., 2, 2]
    rows, columns = ends.unbind(-2)  # [..., 2] each
    row_weights, column_weights = weights.unbind(-2)
    taps = rows[..., :, None] * side + columns[..., None, :]  # [..., 2, 2]
    return taps.flatten(-2), (row_weights[..., :, None] * column_weights[..., None, :]).flatten(-2)
