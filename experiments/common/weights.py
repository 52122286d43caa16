"""Encoders with random weights."""

from __future__ import annotations

from typing import TypeAlias, overload

import torch
from vit_encoder import (
    Llama4VisionConfig,
    Llama4VisionModel,
    Qwen2_5_VLVisionConfig,
    Qwen2_5_VLVisionModel,
    Qwen3VLVisionConfig,
    Qwen3VLVisionModel,
)
from vit_encoder.initialise import initialise_

VisionEncoder: TypeAlias = Llama4VisionModel | Qwen2_5_VLVisionModel | Qwen3VLVisionModel
_ENCODERS: dict[type, type[VisionEncoder]] = {
    Llama4VisionConfig: Llama4VisionModel,
    Qwen2_5_VLVisionConfig: Qwen2_5_VLVisionModel,
    Qwen3VLVisionConfig: Qwen3VLVisionModel,
}

SEED = 0


@overload
def random_encoder(config: Llama4VisionConfig, *, dtype: torch.dtype, device: torch.device) -> Llama4VisionModel: ...
@overload
def random_encoder(
    config: Qwen2_5_VLVisionConfig, *, dtype: torch.dtype, device: torch.device
) -> Qwen2_5_VLVisionModel: ...
@overload
def random_encoder(config: Qwen3VLVisionConfig, *, dtype: torch.dtype, device: torch.device) -> Qwen3VLVisionModel: ...
@torch.no_grad()
def random_encoder(
    config: Llama4VisionConfig | Qwen2_5_VLVisionConfig | Qwen3VLVisionConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> VisionEncoder:
    """Make an encoder with the scaled random weights of `initialise_`, with queries and keys at half their gain.

    At the full gain attention is so sharp that 34 layers amplify every rounding several hundred times, and two right
    implementations differ by most of the features in bfloat16. At half of it they do not amplify at all, and
    an encoder without rotary embedding is still wrong by a third of the features.
    """
    model: VisionEncoder
    with torch.device("meta"):
        model = _ENCODERS[type(config)](config)  # type: ignore[arg-type]
    model = model.to(dtype).to_empty(device=device).eval()
    initialise_(model, SEED)
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.weight"):
            parameter[: 2 * config.hidden_size] /= 2
    return model
