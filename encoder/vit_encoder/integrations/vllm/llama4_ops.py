"""vLLM's own vision encoder of Llama 4 on our rotary embedding and pixel shuffle."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from vit_kernels import pixel_shuffle, rotary_2d
from vllm.config import VllmConfig
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.rotary_embedding.llama4_vision_rope import Llama4VisionRotaryEmbedding
from vllm.model_executor.models import mllama4


class RealVisionRotaryEmbedding(Llama4VisionRotaryEmbedding):
    """vLLM's 2D rotary embedding of Llama 4 as `rotary_2d`, its complex table as two real ones."""

    cos: Tensor
    sin: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        table = self.cos_sin_cache.squeeze(1)  # [tokens, head_dim // 2]
        self.register_buffer("cos", table.real.contiguous(), persistent=False)
        self.register_buffer("sin", table.imag.contiguous(), persistent=False)

    def forward_native(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes: [tiles, tokens, heads, head_dim] each, and so are the results."""
        q, k = rotary_2d(query.flatten(0, 1), key.flatten(0, 1), self.cos, self.sin)
        return q.view(query.shape), k.view(key.shape)

    forward_cuda = forward_hip = forward_cpu = forward_xpu = forward_native


def square_pixel_shuffle(x: Tensor, ratio: float) -> Tensor:
    """vLLM's `pixel_shuffle`: [tiles, side * side, channels] -> [tiles, tokens * ratio**2, channels / ratio**2]."""
    side = math.isqrt(x.shape[1])
    return pixel_shuffle(x, side, side, round(1 / ratio))


def contiguous_patches(self: mllama4.Llama4UnfoldConvolution, x: Tensor) -> Tensor:
    """The forward of vLLM's patch embedding: [tiles, 3, H, W] -> [tiles, patches, hidden].

    vLLM 0.32 hands its linear layer a permuted view, which its CPU backend refuses for a single tile.
    """
    return self.linear(self.unfold(x).permute(0, 2, 1).contiguous())[0]


def swap_in() -> None:
    """Put Llama 4's ops in the place of vLLM's, in this process; once more changes nothing."""
    # vLLM refuses to register an op twice.
    if "Llama4VisionRotaryEmbedding" not in op_registry_oot:
        CustomOp.register_oot(RealVisionRotaryEmbedding, name="Llama4VisionRotaryEmbedding")
    mllama4.pixel_shuffle = square_pixel_shuffle
    mllama4.Llama4UnfoldConvolution.forward = contiguous_patches


class Llama4ForConditionalGeneration(mllama4.Llama4ForConditionalGeneration):
    """vLLM's model; its vision encoder is built of our ops."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        swap_in()
        super().__init__(vllm_config=vllm_config, prefix=prefix)
