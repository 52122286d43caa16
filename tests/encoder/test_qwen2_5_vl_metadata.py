"""Window order, boundaries and rotary tables: those of transformers, for all images at once, without looking at any."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vit_encoder import Qwen2_5_VLVisionConfig, Qwen2_5_VLVisionModel
from vit_encoder.qwen2_5_vl import VisionMetadata, vision_metadata

from experiments.common.peers import allow_torchvision_beside_cpu_torch
from tests.encoder.qwen2_5_vl_batches import grids

CONFIG = Qwen2_5_VLVisionConfig.tiny()


@st.composite
def configs(draw: st.DrawFn) -> Qwen2_5_VLVisionConfig:
    """Merges and windows of any size."""
    merge, patch = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    window = merge * patch * draw(st.integers(1, 5))
    return Qwen2_5_VLVisionConfig(patch_size=patch, spatial_merge_size=merge, window_size=window, hidden_size=256)


@given(configs(), st.data())
def test_equals_what_transformers_computes(config: Qwen2_5_VLVisionConfig, data: st.DataObject) -> None:
    allow_torchvision_beside_cpu_torch()
    from transformers import vision_utils
    from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl, modeling_qwen2_5_vl

    grid_thw, merge = data.draw(grids(config.spatial_merge_size)), config.spatial_merge_size
    ours = vision_metadata(grid_thw, config)
    window_index, cu_window_seqlens = vision_utils.get_vision_window_index(
        grid_thw, merge, config.window_size, config.patch_size
    )
    assert torch.equal(ours.window_index, window_index)
    assert torch.equal(ours.reverse_index, window_index.argsort())
    assert torch.equal(ours.cu_window_seqlens, cu_window_seqlens)
    assert torch.equal(ours.cu_seqlens, vision_utils.get_vision_cu_seqlens(grid_thw))

    sizes = {"hidden_size": config.hidden_size, "num_heads": config.num_heads}
    rotary = modeling_qwen2_5_vl.Qwen2_5_VLVisionRotaryEmbedding(
        configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(**sizes)
    )
    positions = vision_utils.get_vision_position_ids(grid_thw, merge)
    for table, theirs in zip((ours.cos, ours.sin), rotary(torch.empty(0), positions), strict=True):
        half = theirs[:, : config.head_dim // 2].unflatten(0, (-1, config.merge_unit))[window_index].flatten(0, 1)
        torch.testing.assert_close(table, half, rtol=0, atol=1e-6)


@given(st.lists(grids(), min_size=2, max_size=4))
def test_a_batch_is_its_images_one_after_the_other(images: list[Tensor]) -> None:
    batch = vision_metadata(torch.cat(images), CONFIG)
    for name, tensor in batch._asdict().items():
        units = patches = 0
        parts: list[Tensor] = []
        for image in images:
            part: Tensor = getattr(vision_metadata(image, CONFIG), name)
            offset = {"window_index": units, "reverse_index": units, "cos": 0, "sin": 0}.get(name, patches)
            parts.append(part[1:] + offset if name.startswith("cu") and parts else part + offset)
            patches += int(image.prod(dim=1).sum())
            units = patches // CONFIG.merge_unit
        torch.testing.assert_close(tensor, torch.cat(parts), rtol=0, atol=1e-6)


class Recorded(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


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
    dtypes = [torch.int64] * 2 + [torch.int32] * 2 + [torch.float32] * 2
    assert [tensor.dtype for tensor in metadata] == dtypes
    assert all(tensor.is_contiguous() for tensor in metadata)
    names = Qwen2_5_VLVisionModel(CONFIG).encoder.forward.__code__.co_varnames
    assert names[2:8] == VisionMetadata._fields
    assert {tensor.device.type for tensor in vision_metadata(torch.tensor([[1, 4, 4]]), CONFIG, "meta")} == {"meta"}


@pytest.mark.parametrize(
    ("grid_thw", "error", "says"),
    [
        ([[1, 4, 4]], TypeError, "grid_thw: got list, expected a tensor of integers"),
        (torch.ones(1, 3), TypeError, "grid_thw: got torch.float32, expected a tensor of integers"),
        (torch.ones(1, 3, dtype=torch.bool), TypeError, "grid_thw: got torch.bool"),
        (torch.tensor([1, 4, 4]), ValueError, r"grid_thw: got shape \(3,\), expected \[images, 3\]"),
        (torch.ones(2, 2, dtype=torch.int64), ValueError, r"grid_thw: got shape \(2, 2\)"),
        (torch.ones(0, 3, dtype=torch.int64), ValueError, r"grid_thw: got shape \(0, 3\), .* at least one image"),
        (torch.ones(1, 3, dtype=torch.int64, device="meta"), ValueError, "grid_thw: got device meta, expected cpu"),
        (torch.tensor([[1, 4, 4], [1, 3, 4]]), ValueError, r"grid_thw: got \[1, 3, 4\], .* multiples of 2"),
        (torch.tensor([[1, 4, 4], [1, 4, 5]]), ValueError, r"grid_thw: got \[1, 4, 5\]"),
        (torch.tensor([[0, 4, 4]]), ValueError, r"grid_thw: got \[0, 4, 4\], expected frames, rows and columns from 1"),
        (torch.tensor([[1, 4, -2]]), ValueError, r"grid_thw: got \[1, 4, -2\]"),
    ],
)
def test_grids_that_make_no_sense_are_refused(grid_thw: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        vision_metadata(grid_thw, CONFIG)
