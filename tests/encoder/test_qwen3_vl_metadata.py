"""Position taps, boundaries and rotary tables: those of transformers, for all images at once, looking at none."""

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from vit_encoder import Qwen3VLVisionConfig, Qwen3VLVisionModel
from vit_encoder.qwen3_vl import VisionMetadata, vision_metadata

from experiments.common.peers import allow_torchvision_beside_cpu_torch
from tests.encoder.qwen2_5_vl_batches import grids
from tests.encoder.test_qwen2_5_vl_metadata import Recorded

CONFIG = Qwen3VLVisionConfig.tiny()


@st.composite
def configs_and_grids(draw: st.DrawFn) -> tuple[Qwen3VLVisionConfig, Tensor]:
    """Merges and tables of any size, and images for them."""
    merge, side = draw(st.integers(1, 3)), draw(st.integers(1, 50))
    config = Qwen3VLVisionConfig(spatial_merge_size=merge, num_position_embeddings=side**2)
    return config, draw(grids(merge))


@given(configs_and_grids())
@example((Qwen3VLVisionConfig(), torch.tensor([[1, 2, 2], [3, 48, 96], [1, 50, 256]])))
@example((Qwen3VLVisionConfig(spatial_merge_size=1), torch.tensor([[1, 1, 1], [1, 1, 48], [2, 5, 1]])))
def test_equals_what_transformers_computes(drawn: tuple[Qwen3VLVisionConfig, Tensor]) -> None:
    allow_torchvision_beside_cpu_torch()
    from transformers import vision_utils
    from transformers.models.qwen3_vl import configuration_qwen3_vl, modeling_qwen3_vl

    config, grid_thw = drawn
    merge = config.spatial_merge_size
    ours = vision_metadata(grid_thw, config)
    taps, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grid_thw, config.position_side, mode="bilinear", align_corners=True, spatial_merge_size=merge
    )
    assert torch.equal(ours.position_taps.flatten(0, 1), taps)
    assert torch.equal(ours.position_weights.flatten(0, 1), weights)
    assert torch.equal(ours.cu_seqlens, vision_utils.get_vision_cu_seqlens(grid_thw))

    sizes = {"hidden_size": config.hidden_size, "num_heads": config.num_heads}
    rotary = modeling_qwen3_vl.Qwen3VLVisionRotaryEmbedding(configuration_qwen3_vl.Qwen3VLVisionConfig(**sizes))
    positions = vision_utils.get_vision_position_ids(grid_thw, merge)
    for table, theirs in zip((ours.cos, ours.sin), rotary(torch.empty(0), positions), strict=True):
        torch.testing.assert_close(table, theirs[:, : config.head_dim // 2], rtol=0, atol=1e-6)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 50))
def test_the_taps_are_a_bilinear_resize_of_the_table(high: int, wide: int, side: int) -> None:
    config = Qwen3VLVisionConfig(spatial_merge_size=1, num_position_embeddings=side**2)
    table = torch.randn(side**2, 3, generator=torch.Generator().manual_seed(high))
    metadata = vision_metadata(torch.tensor([[1, high, wide]]), config)
    ours = (table[metadata.position_taps[:, 0]] * metadata.position_weights[:, 0, :, None]).sum(1)
    square = table.view(1, side, side, 3).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(square, (high, wide), mode="bilinear", align_corners=True)
    torch.testing.assert_close(ours, resized[0].permute(1, 2, 0).flatten(0, 1), rtol=1e-4, atol=1e-4)


@given(st.lists(grids(), min_size=2, max_size=4))
def test_a_batch_is_its_images_one_after_the_other(images: list[Tensor]) -> None:
    batch = vision_metadata(torch.cat(images), CONFIG)
    for name, tensor in batch._asdict().items():
        parts: list[Tensor] = []
        for image in images:
            part: Tensor = getattr(vision_metadata(image, CONFIG), name)
            parts.append(part[1:] + parts[-1][-1] if name == "cu_seqlens" and parts else part)
        torch.testing.assert_close(tensor, torch.cat(parts), rtol=0, atol=1e-6)


@given(grids())
def test_the_frames_of_a_video_are_alike(image: Tensor) -> None:
    frames, patches = int(image[0, 0]), int(image[0, 1:].prod())
    metadata = vision_metadata(image[:1], CONFIG)
    for tensor in (metadata.position_taps, metadata.position_weights, metadata.cos, metadata.sin):
        of_frames = tensor.reshape(frames, -1)
        assert torch.equal(of_frames, of_frames[:1].expand_as(of_frames))
    assert metadata.cu_seqlens.tolist() == [patches * i for i in range(frames + 1)]


def operators(images: int) -> int:
    """How many the metadata of so many images take."""
    with Recorded() as recorded:
        vision_metadata(torch.tensor([[2, 10, 6]] * images), CONFIG)
    return recorded.count


def test_no_image_takes_work_of_python() -> None:
    # PyTorch's repeat_interleave takes another path for one image.
    assert operators(2) == operators(3) == operators(50)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_dtypes_and_names_are_those_of_the_encoder_s_arguments(dtype: torch.dtype) -> None:
    metadata = vision_metadata(torch.tensor([[1, 4, 18]], dtype=dtype), CONFIG)
    dtypes = [torch.int64, torch.float32, torch.int32, torch.float32, torch.float32]
    assert [tensor.dtype for tensor in metadata] == dtypes
    assert all(tensor.is_contiguous() for tensor in metadata)
    names = Qwen3VLVisionModel(CONFIG).encoder.forward.__code__.co_varnames
    assert names[2:7] == VisionMetadata._fields
    assert {tensor.device.type for tensor in vision_metadata(torch.tensor([[1, 4, 4]]), CONFIG, "meta")} == {"meta"}


@pytest.mark.parametrize(
    ("grid_thw", "error", "says"),
    [
        ([[1, 4, 4]], TypeError, "grid_thw: got list, expected a tensor of integers"),
        (torch.ones(0, 3, dtype=torch.int64), ValueError, r"grid_thw: got shape \(0, 3\), .* at least one image"),
        (torch.ones(1, 3, dtype=torch.int64, device="meta"), ValueError, "grid_thw: got device meta, expected cpu"),
        (torch.tensor([[1, 4, 4], [1, 3, 4]]), ValueError, r"grid_thw: got \[1, 3, 4\], .* multiples of 2"),
    ],
)
def test_grids_that_make_no_sense_are_refused(grid_thw: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        vision_metadata(grid_thw, CONFIG)
