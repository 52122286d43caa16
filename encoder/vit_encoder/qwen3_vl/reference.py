"""A slow fp64 reference of the whole encoder, sharing no code with the model: it only reads its weights."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from tqdm import tqdm
from vit_kernels.reference import rotary_2d_reference, varlen_attention_reference

from vit_encoder.qwen3_vl.config import Qwen3VLVisionConfig

Grids = list[list[int]]


@torch.no_grad()
def reference_forward(model: nn.Module, pixel_values: Tensor, grid_thw: Tensor, *, progress: bool = False) -> Tensor:
    """`Qwen3VLVisionModel.forward` in float64.

    Weights are upcast one layer at a time, so that memory holds the model once and one layer in float64.
    Source: transformers, `models/qwen3_vl/modeling_qwen3_vl.py`.

    Args:
        model: holds the weights, in any dtype, and `config`.
        pixel_values: [patches, patch_dim].
        grid_thw: [images, 3].
        progress: show a bar over the layers.

    Returns:
        [units, (1 + deepstack layers) * out_hidden_size], float64.
    """
    config: Qwen3VLVisionConfig = model.config  # type: ignore[assignment]
    weights = dict(model.named_parameters())
    grids: Grids = grid_thw.tolist()
    lengths = [high * wide for frames, high, wide in grids for _ in range(frames)]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], device=pixel_values.device)
    tables = [table.to(pixel_values.device) for table in _tables(config, grids)]

    def weight(name: str) -> Tensor:
        return weights[f"encoder.{name}"].double()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weight(f"{name}.weight").T + weight(f"{name}.bias")

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * weight(f"{name}.weight") + weight(f"{name}.bias")

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = linear(x, f"{name}.qkv").reshape(len(x), 3, config.num_heads, config.head_dim).unbind(1)
        q, k = rotary_2d_reference(q, k, *tables, interleaved=False)
        return linear(varlen_attention_reference(q, k, v, cu_seqlens).flatten(1), f"{name}.out_proj")

    def merged(x: Tensor, name: str) -> Tensor:
        hidden = linear(x, f"{name}.fc1")
        return linear(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, f"{name}.fc2")

    def beside(x: Tensor) -> Tensor:
        return x.reshape(-1, config.merge_unit * config.hidden_size)

    x = linear(pixel_values.double(), "patch_embed")
    x = x + _position_embeddings(config, grids, weight("position_embedding"))
    norms = ["norm_in", *(f"layers.{i}.norm_out" for i in range(config.depth))]
    deepstack: list[Tensor] = []
    for i in tqdm(range(config.depth), desc="fp64 reference, layers", disable=not progress):
        x = x + attention(norm(x, norms[i]), f"layers.{i}.attention")
        hidden = linear(norm(x, f"layers.{i}.norm_2"), f"layers.{i}.mlp.fc1")
        gelu = hidden / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + linear(gelu, f"layers.{i}.mlp.fc2")
        if i in config.deepstack_visual_indexes:
            name = f"deepstack.{len(deepstack)}"
            deepstack.append(merged(norm(beside(x), f"{name}.norm"), name))
    return torch.cat([merged(beside(norm(x, norms[-1])), "merger"), *deepstack], dim=1)


def _patches(config: Qwen3VLVisionConfig, high: int, wide: int) -> list[tuple[int, int]]:
    """Row and column of each patch of a frame, in the order of the pixels."""
    merge = config.spatial_merge_size
    corners = itertools.product(range(0, high, merge), range(0, wide, merge), range(merge), range(merge))
    return [(top + row, left + column) for top, left, row, column in corners]


def _tables(config: Qwen3VLVisionConfig, grids: Grids) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles of every patch, in the order of the pixels: [patches, head_dim // 2]."""
    quarter = config.head_dim // 4
    frequencies = torch.tensor(
        [config.rope_theta ** (-i / quarter) for i in range(quarter)], dtype=torch.float64, device="cpu"
    )
    places = [place for frames, high, wide in grids for place in frames * _patches(config, high, wide)]
    angles = (torch.tensor(places, device="cpu").double()[:, :, None] * frequencies).flatten(1)
    return angles.cos(), angles.sin()


def _position_embeddings(config: Qwen3VLVisionConfig, grids: Grids, table: Tensor) -> Tensor:
    """The table, stretched over each frame from corner to corner: [patches, hidden]."""
    side = math.isqrt(config.num_position_embeddings)
    square = table.reshape(side, side, -1)
    found = []
    for frames, high, wide in grids:
        across = {size: _stretched(size, side).to(table.device) for size in (high, wide)}
        grid = torch.einsum("yr,xc,rcd->yxd", across[high], across[wide], square)
        rows, columns = torch.tensor(_patches(config, high, wide), device="cpu").unbind(1)
        found += frames * [grid[rows, columns]]
    return torch.cat(found)


def _stretched(size: int, side: int) -> Tensor:
    """How much each of `size` patches takes of each of `side` embeddings along an axis: [size, side]."""
    amounts = torch.zeros(size, side, dtype=torch.float64, device="cpu")
    for patch in range(size):
        place = patch * (side - 1) / (size - 1) if size > 1 else 0.0
        for embedding in range(side):
            amounts[patch, embedding] = max(0.0, 1 - abs(place - embedding))
    return amounts
