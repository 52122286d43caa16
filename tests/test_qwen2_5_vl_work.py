"""The Triton kernels in Qwen2.5-VL's encoder: its features, and the matrix work that attention issues for an image."""

import dataclasses

import pytest
import torch
from torch import Tensor
from vit_encoder import Qwen2_5_VLVisionConfig
from vit_encoder.qwen2_5_vl import reference_forward, vision_metadata
from vit_kernels import force_impl, varlen_attention
from vit_kernels.testing import assert_close_to_reference, corrected_interpreter, seeded_tensor

from tests.qwen2_5_vl_batches import encoder, patches

CONFIG = Qwen2_5_VLVisionConfig.qwen2_5_vl_7b()
METADATA = vision_metadata(torch.tensor([[1, 74, 54]]), CONFIG)
"""A photograph of 1036 x 756 pixels: windows of 64 patches and, along two edges, of 48, 16 and 12."""


def issued(cu_seqlens: Tensor) -> float:
    """FLOPs of the dots of one head."""
    shape = (int(cu_seqlens[-1]), 3, 1, CONFIG.head_dim)
    q, k, v = seeded_tensor(shape, dtype=torch.bfloat16, seed=0).unbind(1)
    with corrected_interpreter() as counts, force_impl("triton"):
        varlen_attention(q, k, v, cu_seqlens)
    return counts.dot_flops


def useful(cu_seqlens: Tensor) -> int:
    """4 * length**2 * head_dim a sequence."""
    return int(4 * cu_seqlens.long().diff().square().sum() * CONFIG.head_dim)


def test_whole_windows_pad_nothing_to_speak_of() -> None:
    windows = torch.arange(0, 5 * 64, 64, dtype=torch.int32)
    assert issued(windows) <= 1.10 * useful(windows)


def test_a_photograph_with_ragged_windows_and_full_attention() -> None:
    lengths = METADATA.cu_window_seqlens.diff().unique().tolist()
    assert lengths == [12, 16, 48, 64]
    full = len(CONFIG.fullatt_block_indexes)
    layers = {METADATA.cu_window_seqlens: CONFIG.depth - full, METADATA.cu_seqlens: full}
    work = sum(count * issued(cu_seqlens) for cu_seqlens, count in layers.items())
    assert work <= 1.15 * sum(count * useful(cu_seqlens) for cu_seqlens, count in layers.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_kernels_the_encoder_is_as_exact_as_on_pytorch(dtype: torch.dtype) -> None:
    config = dataclasses.replace(Qwen2_5_VLVisionConfig.tiny(), depth=2, patch_size=4, window_size=32)
    model = encoder(config, 0, dtype)
    grid_thw = torch.tensor([[1, 10, 4], [2, 4, 8], [1, 2, 2]])
    pixel_values = patches(config, grid_thw, 0, dtype)
    with corrected_interpreter() as counts, force_impl("triton"):
        features = model(pixel_values, grid_thw)
    assert counts.dot_flops > 0
    expected = reference_forward(model, pixel_values, grid_thw)
    assert_close_to_reference(features, expected, model(pixel_values, grid_thw))
