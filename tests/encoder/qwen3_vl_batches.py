"""What the tests of the Qwen3-VL encoder share beside those of Qwen2.5-VL: encoders with scaled weights, and peers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vit_encoder import Qwen3VLVisionConfig, Qwen3VLVisionModel
from vit_encoder.qwen3_vl import initialise_

from experiments.common.peers import side_by_side, transformers_qwen3_vl


def encoder(
    config: Qwen3VLVisionConfig, seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> Qwen3VLVisionModel:
    """An encoder with scaled weights, rounded to `dtype`, without gradients.

    Its position embeddings are a third of the embedded patches, so that one that is misplaced is seen.
    """
    model = Qwen3VLVisionModel(config, **kwargs)
    initialise_(model, seed)
    with torch.no_grad():
        model.encoder.position_embedding.mul_(0.3 * config.hidden_size**0.5)
    return model.to(dtype).eval().requires_grad_(False)


def peer_of(model: Qwen3VLVisionModel) -> Callable[[Tensor, Tensor], Tensor]:
    """transformers' encoder on the same parameters: its features side by side, as ours."""
    peer = transformers_qwen3_vl(model)
    assert peer is not None
    return lambda pixel_values, grid_thw: side_by_side(peer(pixel_values, grid_thw=grid_thw))
