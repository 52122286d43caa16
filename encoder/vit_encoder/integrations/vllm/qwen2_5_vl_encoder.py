"""Our Qwen2.5-VL vision encoder inside vLLM: its parallel layers, weight loading and compile decorator."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import should_torch_compile_mm_encoder, support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.models import qwen2_5_vl

from vit_encoder.integrations.vllm.parallel import Linear
from vit_encoder.qwen2_5_vl import Qwen2_5_VLVisionConfig
from vit_encoder.qwen2_5_vl.metadata import VisionMetadata, vision_metadata
from vit_encoder.qwen2_5_vl.model import Qwen2_5_VLVisionEncoder as Encoder

_EVERY_LENGTH = dict.fromkeys(("pixel_values", *VisionMetadata._fields), 0)


class _Encoder(Encoder):
    def validate_inputs(self, *inputs: Tensor) -> None:
        """vLLM checks its inputs, and its quantised weights have dtypes of their own."""


# Of vLLM's encoder only the blocks are compiled, each by itself. No length is special, though vLLM drops all guards.
@support_torch_compile(
    dynamic_arg_dims=_EVERY_LENGTH,
    mark_unbacked_dims=_EVERY_LENGTH,
    enable_if=should_torch_compile_mm_encoder,
    is_encoder=True,
)
class WholeEncoder(nn.Module):
    """What vLLM compiles: our encoder as one graph.

    Args:
        encoder: made of vLLM's modules.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self,
        pixel_values: Tensor,
        window_index: Tensor,
        reverse_index: Tensor,
        cu_seqlens: Tensor,
        cu_window_seqlens: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """As our encoder's."""
        return self.encoder(pixel_values, window_index, reverse_index, cu_seqlens, cu_window_seqlens, cos, sin)


class VisionModel(qwen2_5_vl.Qwen2_5_VisionTransformer):
    """vLLM's module, so its parameters, their names, sharding and loading; but the computation is ours."""

    def __init__(self, vision_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vision_config, *args, **kwargs)
        self.vit_config = Qwen2_5_VLVisionConfig.from_hf(vision_config)
        # In a list: the parameters have their places, and names, in vLLM's modules.
        self.whole = [WholeEncoder(_encoder_on(self, self.vit_config))]

    def forward(
        self,
        x: Tensor,
        grid_thw: list[list[int]] | None,
        *,
        encoder_metadata: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Shapes: [patches, patch_dim] -> [units, out_hidden_size].

        Args:
            grid_thw: frames, rows and columns of each image or video.
            encoder_metadata: instead of the former, what `prepare_encoder_metadata` made, padded for a CUDA graph.
        """
        pixel_values = self.input_norm(x.to(self.device), self.dtype)
        if encoder_metadata is not None:
            metadata = _of_vllm(encoder_metadata)
        else:
            metadata = vision_metadata(torch.tensor(grid_thw, device="cpu"), self.vit_config, self.device)
        return self.whole[0](pixel_values, **metadata._asdict())


def _of_vllm(metadata: dict[str, Tensor]) -> VisionMetadata:
    """vLLM's metadata under our names; its rotary tables are in the model's dtype."""
    return VisionMetadata(
        metadata["window_index"],
        metadata["reverse_indices"],
        metadata["cu_seqlens"],
        metadata["cu_window_seqlens"],
        metadata["rotary_pos_emb_cos"].float(),
        metadata["rotary_pos_emb_sin"].float(),
    )


class _FiniteNorm(nn.Module):
    """A norm of hidden states that may overflow in float16, as those of the last layer do in a long batch.

    vLLM makes them finite too, but looks for them on the host.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            largest = torch.finfo(x.dtype).max
            x = x.nan_to_num(nan=math.nan, posinf=largest, neginf=-largest)
        return self.norm(x)


def _encoder_on(vision: Any, config: Qwen2_5_VLVisionConfig) -> Encoder:
    """Our encoder made of the modules of vLLM's."""
    with torch.device("meta"):
        encoder = _Encoder(config)
    encoder.patch_embed = vision.patch_embed
    norms = [*(theirs.norm1 for theirs in vision.blocks), _FiniteNorm(vision.merger.ln_q)]
    encoder.norm_in = norms[0]
    ours: Any
    for ours, theirs, norm_out in zip(encoder.layers, vision.blocks, norms[1:], strict=True):
        ours.norm_2, ours.norm_out = theirs.norm2, norm_out
        ours.attention.heads = theirs.attn.num_attention_heads_per_partition
        ours.attention.qkv, ours.attention.out_proj = Linear(theirs.attn, "qkv"), Linear(theirs.attn, "proj")
        ours.mlp.gate_up, ours.mlp.down = Linear(theirs.mlp, "gate_up_proj"), Linear(theirs.mlp, "down_proj")
    merger: Any = encoder.merger
    merger.fc1, merger.fc2 = Linear(vision.merger.mlp, "0"), Linear(vision.merger.mlp, "2")
    return encoder


class Qwen2_5_VLForConditionalGeneration(qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):  # noqa: N801 (vLLM's name)
    """vLLM's model with our vision encoder."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with mock.patch.object(qwen2_5_vl, "Qwen2_5_VisionTransformer", VisionModel):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
