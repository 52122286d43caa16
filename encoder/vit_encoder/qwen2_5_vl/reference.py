"""A slow fp64 reference of the whole encoder, sharing no code with the model: it only reads its weights."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from tqdm import tqdm
from vit_kernels.reference import rotary_2d_reference, varlen_attention_reference

from vit_encoder.qwen2_5_vl.config import Qwen2_5_VLVisionConfig


@torch.no_grad()
def reference_forward(model: nn.Module, pixel_values: Tensor, grid_thw: Tensor, *, progress: bool = False) -> Tensor:
    """`Qwen2_5_VLVisionModel.forward` in float64.

    Weights are upcast one layer at a time, so that memory holds the model once and one layer in float64.
    Source: transformers, `models/qwen2_5_vl/modeling_qwen2_5_vl.py`.

    Args:
        model: holds the weights, in any dtype, and `config`.
        pixel_values: [patches, patch_dim].
        grid_thw: [images, 3].
        progress: show a bar over the layers.

    Returns:
        [units, out_hidden_size], float64.
    """
    config: Qwen2_5_VLVisionConfig = model.config  # type: ignore[assignment]
    weights = dict(model.named_parameters())
    windows = _windows(config, grid_thw.tolist())
    order = [patch for window in windows for patch in window]
    by_window = _boundaries([len(window) for window in windows])
    by_frame = _boundaries([high * wide for frames, high, wide in grid_thw.tolist() for _ in range(frames)])
    angles = _angles(config, grid_thw.tolist())[order]
    tables = angles.cos().to(pixel_values.device), angles.sin().to(pixel_values.device)

    def weight(name: str) -> Tensor:
        return weights[f"encoder.{name}"].double()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weight(f"{name}.weight").T + weight(f"{name}.bias")

    def rms_norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight(f"{name}.weight")

    def attention(x: Tensor, name: str, cu_seqlens: Tensor) -> Tensor:
        q, k, v = linear(x, f"{name}.qkv").reshape(len(x), 3, config.num_heads, config.head_dim).unbind(1)
        q, k = rotary_2d_reference(q, k, *tables, interleaved=False)
        return linear(varlen_attention_reference(q, k, v, cu_seqlens.to(x.device)).flatten(1), f"{name}.out_proj")

    x = (pixel_values.double() @ weight("patch_embed.weight").T)[order]
    norms = ["norm_in", *(f"layers.{i}.norm_out" for i in range(config.depth))]
    for i in tqdm(range(config.depth), desc="fp64 reference, layers", disable=not progress):
        cu_seqlens = by_frame if i in config.fullatt_block_indexes else by_window
        x = x + attention(rms_norm(x, norms[i]), f"layers.{i}.attention", cu_seqlens)
        gate, up = linear(rms_norm(x, f"layers.{i}.norm_2"), f"layers.{i}.mlp.gate_up").tensor_split(2, dim=-1)
        x = x + linear(gate * torch.sigmoid(gate) * up, f"layers.{i}.mlp.down")
    back = torch.empty_like(x)
    back[order] = rms_norm(x, norms[-1])
    hidden = linear(back.reshape(-1, config.hidden_size * config.merge_unit), "merger.fc1")
    return linear(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, "merger.fc2")


def _boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], device="cpu")


def _patches(config: Qwen2_5_VLVisionConfig, high: int, wide: int) -> list[tuple[int, int]]:
    """Row and column of each patch of a frame, in the order of the pixels."""
    merge = config.spatial_merge_size
    corners = itertools.product(range(0, high, merge), range(0, wide, merge), range(merge), range(merge))
    return [(top + row, left + column) for top, left, row, column in corners]


def _windows(config: Qwen2_5_VLVisionConfig, grids: list[list[int]]) -> list[list[int]]:
    """The patches of every window, one patch at a time."""
    side = config.window_size // config.patch_size
    windows: list[list[int]] = []
    start = 0
    for frames, high, wide in grids:
        for _ in range(frames):
            found: dict[tuple[int, int], list[int]] = {}
            for i, (row, column) in enumerate(_patches(config, high, wide)):
                found.setdefault((row // side, column // side), []).append(start + i)
            windows += [found[window] for window in sorted(found)]
            start += high * wide
    return windows


def _angles(config: Qwen2_5_VLVisionConfig, grids: list[list[int]]) -> Tensor:
    """The angles of every patch, in the order of the pixels: [patches, head_dim // 2]."""
    quarter = config.head_dim // 4
    frequencies = torch.tensor(
        [config.rope_theta ** (-i / quarter) for i in range(quarter)], dtype=torch.float64, device="cpu"
    )
    places = [place for frames, high, wide in grids for place in frames * _patches(config, high, wide)]
    return (torch.tensor(places, device="cpu").double()[:, :, None] * frequencies).flatten(1)
