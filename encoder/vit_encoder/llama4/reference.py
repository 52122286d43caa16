"""A slow fp64 reference of the whole encoder, sharing no code with the model: it only reads its weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from tqdm import tqdm
from vit_kernels.reference import pixel_shuffle_reference, rotary_2d_reference, varlen_attention_reference

from vit_encoder.llama4.config import Llama4VisionConfig


@torch.no_grad()
def reference_forward(model: nn.Module, pixel_values: Tensor, *, progress: bool = False) -> Tensor:
    """`Llama4VisionModel.forward` in float64.

    Weights are upcast one layer at a time, so that memory holds the model once and one layer in float64.
    Source: transformers, `models/llama4/modeling_llama4.py`.

    Args:
        model: holds the weights, in any dtype, and `config`.
        pixel_values: [tiles, num_channels, image_size, image_size].
        progress: show a bar over the layers.

    Returns:
        [tiles, output_tokens_per_tile, vision_output_dim], float64.
    """
    config: Llama4VisionConfig = model.config  # type: ignore[assignment]
    weights = dict(model.named_parameters())
    tokens = config.tokens_per_tile

    def weight(name: str) -> Tensor:
        return weights[name].double()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weight(f"{name}.weight").T + (weight(f"{name}.bias") if f"{name}.bias" in weights else 0)

    def layer_norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / deviation * weight(f"{name}.weight") + weight(f"{name}.bias")

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = linear(x, f"{name}.qkv").chunk(3, dim=-1)
        q, k, v = (part.reshape(len(x), config.num_attention_heads, config.head_dim) for part in (q, k, v))
        q, k = rotary_2d_reference(q, k, *_tables(config, x.device))
        cu_seqlens = torch.arange(0, len(x) + 1, tokens, device=x.device)
        return linear(varlen_attention_reference(q, k, v, cu_seqlens).flatten(1), f"{name}.out_proj")

    patches = nn.functional.unfold(pixel_values.double(), config.patch_size, stride=config.patch_size).transpose(1, 2)
    x = linear(patches, "patch_embed")
    x = torch.cat([x, weight("class_embedding").expand(len(x), 1, -1)], dim=1) + weight("position_embedding")
    x = layer_norm(x, "norm_pre").flatten(0, 1)
    norms = ["norm_in", *(f"layers.{i}.norm_out" for i in range(config.num_hidden_layers))]
    for i in tqdm(range(config.num_hidden_layers), desc="fp64 reference, layers", disable=not progress):
        x = x + attention(layer_norm(x, norms[i]), f"layers.{i}.attention")
        hidden = _gelu(linear(layer_norm(x, f"layers.{i}.norm_2"), f"layers.{i}.mlp.fc1"))
        x = x + linear(hidden, f"layers.{i}.mlp.fc2")
    x = layer_norm(x, norms[-1]).reshape(-1, tokens, config.hidden_size)[:, :-1]
    x = pixel_shuffle_reference(x, config.grid, config.grid, config.shuffle_factor)
    return _gelu(linear(_gelu(linear(x, "adapter.fc1")), "adapter.fc2"))


def _gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _tables(config: Llama4VisionConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Angles one patch and one frequency at a time; the class token, last, stays where it is."""
    half = config.head_dim // 2
    angles = torch.zeros(config.tokens_per_tile, half, dtype=torch.float64, device="cpu")
    for patch in range(config.patches_per_tile):
        y, x = divmod(patch, config.grid)
        for i in range(half // 2):
            frequency = config.rope_theta ** (-2 * i / half)
            angles[patch, i] = (x + 1) * frequency
            angles[patch, half // 2 + i] = (y + 1) * frequency
    return angles.cos().to(device), angles.sin().to(device)
