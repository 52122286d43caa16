"""The encoders on a real GPU: one graph, right, the same bits twice, differentiable, and exported for it.

All is judged against fp64, and allowed twice the error of the same encoder on PyTorch's implementations of the ops.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vit_encoder import (
    CompilationConfig,
    Llama4VisionConfig,
    Llama4VisionModel,
    Qwen2_5_VLVisionConfig,
    Qwen2_5_VLVisionModel,
    export,
    load,
    whole_graph,
)
from vit_encoder.initialise import initialise_
from vit_encoder.llama4 import reference_forward as llama4_reference
from vit_encoder.qwen2_5_vl import reference_forward as qwen2_5_vl_reference
from vit_kernels import force_impl
from vit_kernels.testing import assert_close_to_reference, seeded_tensor

from tests.gpu import BACKEND, DEVICE, REHEARSING, launching
from tests.support import assert_same_bits

__all__ = ["launching"]

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("launching", "fresh_dynamo")]

COMPILED = CompilationConfig(compile_mm_encoder=True, backend=BACKEND)
HALF = [torch.float16, torch.bfloat16]
LLAMA4 = Llama4VisionConfig.tiny()
QWEN = Qwen2_5_VLVisionConfig.tiny()
if REHEARSING:
    LLAMA4 = dataclasses.replace(LLAMA4, num_hidden_layers=1, image_size=56)
    QWEN = dataclasses.replace(QWEN, depth=2, fullatt_block_indexes=(1,))
TILES = (1, 3, 2) if REHEARSING else (1, 17, 2, 33)
GRIDS = ([[1, 2, 2]], [[1, 6, 4], [2, 2, 4]]) if REHEARSING else ([[1, 2, 2]], [[1, 18, 10], [2, 8, 8]], [[1, 8, 8]])


def ready(model: Any, dtype: torch.dtype) -> Any:
    """With random weights, on the device, for inference."""
    initialise_(model)
    return model.to(DEVICE, dtype).eval().requires_grad_(False)


def tiles_of(count: int, dtype: torch.dtype) -> Tensor:
    return seeded_tensor((count, 3, LLAMA4.image_size, LLAMA4.image_size), dtype, seed=count).to(DEVICE)


def patches_of(grids: list[list[int]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    grid_thw = torch.tensor(grids)
    patches = int(grid_thw.prod(dim=1).sum())
    return seeded_tensor((patches, QWEN.patch_dim), dtype, seed=patches).to(DEVICE), grid_thw


def on_pytorch(model: Any, *inputs: Tensor) -> Tensor:
    with force_impl("eager"):
        features: Tensor = model.forward(*inputs)
        return features


@pytest.mark.parametrize("dtype", HALF)
def test_the_compiled_encoder_of_llama4_is_one_graph(dtype: torch.dtype) -> None:
    model = ready(Llama4VisionModel(LLAMA4, compilation_config=COMPILED), dtype)
    with torch.no_grad(), whole_graph():
        for tiles in TILES:
            pixel_values = tiles_of(tiles, dtype)
            expected, pytorch = llama4_reference(model, pixel_values), on_pytorch(model, pixel_values)
            compiled = model(pixel_values)
            assert_close_to_reference(compiled, expected, pytorch)
            assert_close_to_reference(model.forward(pixel_values), expected, pytorch)
            assert_same_bits(model(pixel_values), compiled)


@pytest.mark.parametrize("dtype", HALF)
def test_the_compiled_encoder_of_qwen2_5_vl_is_one_graph(dtype: torch.dtype) -> None:
    model = ready(Qwen2_5_VLVisionModel(QWEN, compilation_config=COMPILED), dtype)
    eager = ready(Qwen2_5_VLVisionModel(QWEN), dtype)
    with torch.no_grad(), whole_graph():
        for grids in GRIDS:
            inputs = patches_of(grids, dtype)
            expected, pytorch = qwen2_5_vl_reference(model, *inputs), on_pytorch(eager, *inputs)
            compiled = model(*inputs)
            assert_close_to_reference(compiled, expected, pytorch)
            assert_close_to_reference(eager(*inputs), expected, pytorch)
            assert_same_bits(model(*inputs), compiled)


def gradients_of(model: Any, *inputs: Tensor) -> dict[str, Tensor]:
    """Of the mean square of the features, for every parameter."""
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_()
    features = model(*inputs)
    gradients = torch.autograd.grad(features.double().square().mean(), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


@pytest.mark.parametrize("compilation_config", [None, COMPILED], ids=["eager", "compiled"])
@pytest.mark.parametrize("encoder", ["llama4", "qwen2_5_vl"])
def test_gradients_of_the_encoders(encoder: str, compilation_config: CompilationConfig | None) -> None:
    dtype = torch.bfloat16
    model: Any
    inputs: tuple[Tensor, ...]
    if encoder == "llama4":
        model, inputs = ready(Llama4VisionModel(LLAMA4), dtype), (tiles_of(2, dtype),)
    else:
        model, inputs = ready(Qwen2_5_VLVisionModel(QWEN), dtype), patches_of(GRIDS[1], dtype)
    exact_model = copy.deepcopy(model).double()
    with force_impl("eager"):
        exact = gradients_of(exact_model, inputs[0].double(), *inputs[1:])
        pytorch = gradients_of(model, *inputs)
    model.compilation_config = compilation_config
    for name, actual in gradients_of(model, *inputs).items():
        assert_close_to_reference(actual, exact[name], pytorch[name])


def test_an_export_gives_what_the_encoder_gives(tmp_path: Path) -> None:
    model = ready(
        Llama4VisionModel(LLAMA4, compilation_config=CompilationConfig(compile_mm_encoder=True)), torch.bfloat16
    )
    with force_impl("eager" if REHEARSING else "triton"), torch.no_grad():
        deployed = load(export(model, [tiles_of(2, torch.bfloat16)], tmp_path / "encoder"))
        for tiles in TILES:
            pixel_values = tiles_of(tiles, torch.bfloat16)
            expected = llama4_reference(model, pixel_values)
            assert_close_to_reference(deployed(pixel_values), expected, on_pytorch(model, pixel_values))
