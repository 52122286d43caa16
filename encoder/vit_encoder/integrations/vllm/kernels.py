"""vLLM's own vision encoders on our ops: all of Llama 4's, and the attention of Qwen2.5-VL."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from vit_kernels import pixel_shuffle, rotary_2d, varlen_attention
from vllm.config import VllmConfig
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.layers.rotary_embedding.llama4_vision_rope import Llama4VisionRotaryEmbedding
from vllm.model_executor.models import mllama4, qwen2_5_vl
from vllm.v1.attention.backends.registry import AttentionBackendEnum


class VarlenEncoderAttention(MMEncoderAttention):
    """vLLM's attention of vision encoders as one call of `varlen_attention`."""

    @classmethod
    def maybe_recompute_cu_seqlens(cls, attn_backend: AttentionBackendEnum, *args: Any, **kwargs: Any) -> Tensor:
        """The boundaries in tokens, whatever vLLM's own backend would count."""
        return super().maybe_recompute_cu_seqlens(AttentionBackendEnum.TORCH_SDPA, *args, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.fp8_enabled:
            raise ValueError("mm_encoder_attn_dtype: got 'fp8', expected none: varlen_attention has no fp8")

    def forward_native(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: Tensor | None = None,
        sequence_lengths: Tensor | None = None,
    ) -> Tensor:
        """Shapes: [batch, tokens, heads * head_dim], or with these two apart -> the shape of query.

        Args:
            query, key, value: of one dtype.
            cu_seqlens: int32 [sequences + 1], where a batch of one packs sequences; None where each row is one.
            max_seqlen, sequence_lengths: for other backends.
        """
        batch, tokens = query.shape[:2]
        split = self.view_qkv_to_4d(query, key, value, batch, tokens, key.shape[1])
        q, k, v = (x.flatten(0, 1) for x in split)  # [batch * tokens, heads, head_dim]
        if cu_seqlens is None:
            cu_seqlens = tokens * torch.arange(batch + 1, dtype=torch.int32, device=query.device)
        return varlen_attention(q, k, v, cu_seqlens, scale=self.scale).view(query.shape)

    forward_cuda = forward_hip = forward_cpu = forward_xpu = forward_native


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


def swap_in_attention() -> None:
    """Put ours in the place of vLLM's, in this process; once more changes nothing."""
    # vLLM refuses to register an op twice.
    if "MMEncoderAttention" not in op_registry_oot:
        CustomOp.register_oot(VarlenEncoderAttention, name="MMEncoderAttention")


def swap_in() -> None:
    """Put attention and Llama 4's ops in the place of vLLM's, in this process; once more changes nothing."""
    swap_in_attention()
    if "Llama4VisionRotaryEmbedding" not in op_registry_oot:
        CustomOp.register_oot(RealVisionRotaryEmbedding, name="Llama4VisionRotaryEmbedding")
    mllama4.pixel_shuffle = square_pixel_shuffle
    mllama4.Llama4UnfoldConvolution.forward = contiguous_patches


class Llama4ForConditionalGeneration(mllama4.Llama4ForConditionalGeneration):
    """vLLM's model; its vision encoder is built of our ops."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        swap_in()
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # On a CPU vLLM 0.32 compiles with gradients on, and such a graph keeps what a backward pass would need.
        self.vision_model.requires_grad_(False)


class Qwen2_5_VLForConditionalGeneration(qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):  # noqa: N801 (vLLM's name)
    """vLLM's model; its vision encoder is built on our attention."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        swap_in_attention()
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # As above; and such a graph refuses the inference tensors that Qwen2.5-VL's blocks get.
        self.visual.requires_grad_(False)
