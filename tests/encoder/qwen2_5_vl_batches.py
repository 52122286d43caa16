"""What the tests of the Qwen2.5-VL encoder share: encoders with scaled weights, and batches of awkward sizes."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from vit_encoder import Qwen2_5_VLVisionConfig, Qwen2_5_VLVisionModel
from vit_encoder.qwen2_5_vl import initialise_
from vit_encoder.qwen_configs import QwenVisionConfig


@st.composite
def grids(draw: st.DrawFn, merge: int = 2, max_images: int = 4) -> Tensor:
    """Images and videos, from a single unit to 1:200 or a few windows either way, whole and ragged."""
    side = st.integers(1, 9)
    frame = (
        st.tuples(side, side) | st.tuples(st.just(1), st.integers(1, 200)) | st.tuples(st.integers(1, 200), st.just(1))
    )
    shape = st.tuples(st.just(1), frame) | st.tuples(st.integers(2, 3), st.tuples(side, side))
    images = draw(st.lists(shape, min_size=1, max_size=max_images))
    return torch.tensor([[frames, merge * high, merge * wide] for frames, (high, wide) in images])


def encoder(
    config: Qwen2_5_VLVisionConfig, seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> Qwen2_5_VLVisionModel:
    """An encoder with scaled weights, rounded to `dtype`, without gradients."""
    model = Qwen2_5_VLVisionModel(config, **kwargs)
    initialise_(model, seed)
    return model.to(dtype).eval().requires_grad_(False)


def patches(config: QwenVisionConfig, grid_thw: Tensor, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalised pixels [patches, patch_dim]."""
    generator = torch.Generator().manual_seed(seed)
    count = int(grid_thw.prod(dim=1).sum())
    return (torch.rand(count, config.patch_dim, generator=generator) * 4 - 2).to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """RMS error relative to the RMS of what is expected."""
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())
