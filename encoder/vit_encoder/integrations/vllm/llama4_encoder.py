"""Our Llama 4 vision encoder inside vLLM: its parallel layers, weight loading and compile decorator."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models import mllama4

from vit_encoder.integrations.vllm.parallel import Linear
from vit_encoder.llama4 import Llama4VisionConfig
from vit_encoder.llama4 import Llama4VisionModel as Encoder


class VisionModel(mllama4.Llama4VisionModel):
    """vLLM's module, so its parameters, their names, sharding and loading; but the computation is ours.

    vLLM's class is compiled by its own decorator, which a subclass inherits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # In a list: the parameters have their places, and names, in vLLM's modules.
        self._encoder = [_encoder_on(self)]

    def forward(self, images_flattened: Tensor) -> Tensor:
        """Shapes: [tiles, 3, image_size, image_size] -> [tiles, tokens, vision_output_dim]."""
        return self._encoder[0](images_flattened)


class _Encoder(Encoder):
    def validate_inputs(self, pixel_values: Tensor, cu_seqlens: Tensor | None = None) -> None:
        """vLLM checks its inputs, and its quantised weights have dtypes of their own."""


def _encoder_on(vision: Any) -> Encoder:
    """Our encoder made of the modules of vLLM's."""
    with torch.device("meta"):
        encoder = _Encoder(Llama4VisionConfig.from_hf(vision.config))
    encoder.class_embedding = vision.class_embedding
    encoder.position_embedding = vision.positional_embedding_vlm
    encoder.rotary.to(vision.class_embedding.device)
    encoder.patch_embed = Linear(vision.patch_embedding, "linear")  # type: ignore[assignment]
    norms = [*(theirs.input_layernorm for theirs in vision.model.layers), vision.layernorm_post]
    encoder.norm_pre, encoder.norm_in = vision.layernorm_pre, norms[0]
    _take_mlp(encoder.adapter, vision.vision_adapter.mlp)
    ours: Any
    for ours, theirs, norm_out in zip(encoder.layers, vision.model.layers, norms[1:], strict=True):
        ours.norm_2, ours.norm_out = theirs.post_attention_layernorm, norm_out
        ours.attention.heads = theirs.self_attn.num_local_heads
        ours.attention.qkv = Linear(theirs.self_attn, "qkv_proj")
        ours.attention.out_proj = Linear(theirs.self_attn, "o_proj")
        _take_mlp(ours.mlp, theirs.mlp)
    return encoder


def _take_mlp(ours: Any, theirs: Any) -> None:
    ours.fc1, ours.fc2 = Linear(theirs, "fc1"), Linear(theirs, "fc2")


class Llama4ForConditionalGeneration(mllama4.Llama4ForConditionalGeneration):
    """vLLM's model with our vision encoder."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with mock.patch.object(mllama4, "Llama4VisionModel", VisionModel):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
