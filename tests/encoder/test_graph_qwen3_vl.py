"""Qwen3-VL behind captured graphs, by its layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vit_encoder import CompilationConfig, Qwen3VLVisionConfig, whole_graph
from vit_encoder.cuda_graphs import QWEN3_VL_BUDGETS, EncoderGraphRunner
from vit_encoder.cuda_graphs.patches import LAYOUTS
from vit_encoder.qwen3_vl import PatchedImage, VisionMetadata, reference_forward
from vit_kernels.testing import assert_close_to_reference

from tests.encoder.qwen2_5_vl_batches import grids, patches
from tests.encoder.qwen3_vl_batches import encoder

CONFIG = dataclasses.replace(Qwen3VLVisionConfig.tiny(), patch_size=4)
BUDGETS = (64, 128, 320)


def images_of(sizes: Any, seed: int = 0) -> list[PatchedImage]:
    """Images and videos of these sizes."""
    return [
        PatchedImage(patches(CONFIG, torch.tensor([size]), seed + i), torch.tensor([size]))
        for i, size in enumerate(sizes)
    ]


@settings(max_examples=10)
@given(grids(max_images=5), st.integers(0, 100))
def test_every_image_is_as_exact_as_alone(grid_thw: Tensor, seed: int) -> None:
    model = encoder(CONFIG)
    runner = EncoderGraphRunner(model, budgets=BUDGETS)
    for tensor in runner._inputs.static(BUDGETS[-1]):
        tensor.fill_(torch.nan if tensor.is_floating_point() else -7)
    images = images_of(grid_thw.tolist(), seed)
    for image, features in zip(images, runner(images), strict=True):
        with torch.no_grad():
            alone = model(image.pixel_values, image.grid_thw)
        expected = reference_forward(model, image.pixel_values, image.grid_thw)
        assert_close_to_reference(features, expected, alone)


@pytest.mark.usefixtures("fresh_dynamo")
def test_all_budgets_and_what_is_beyond_are_one_compiled_graph() -> None:
    model = encoder(CONFIG, compilation_config=CompilationConfig(compile_mm_encoder=True, backend="aot_eager"))
    images = images_of([[1, 8, 8], [2, 6, 10], [1, 2, 2], [1, 18, 10], [1, 20, 20]])
    with whole_graph():
        runner = EncoderGraphRunner(model, budgets=BUDGETS)
        runner(images)


def test_a_layout_names_what_the_encoder_takes() -> None:
    layout = LAYOUTS[Qwen3VLVisionConfig]
    assert set(layout.sequences) == {name for name in VisionMetadata._fields if name.startswith("cu_")}
    assert layout.orders == ()
    assert all(budget % 4 == 0 for budget in QWEN3_VL_BUDGETS)
