"""The whole encoder on the interpreted Triton kernels, and several images in one batch of it."""

import dataclasses

import numpy as np
import pytest
import torch
from vit_encoder import Llama4VisionConfig, Llama4VisionModel, encode_images, tile_image
from vit_encoder.llama4 import initialise_, reference_forward
from vit_kernels import force_impl
from vit_kernels.testing import assert_close_to_reference, corrected_interpreter

CONFIG = dataclasses.replace(Llama4VisionConfig.tiny(), num_hidden_layers=1, image_size=56)


def encoder(dtype: torch.dtype, *, fuse_gelu: bool = False) -> Llama4VisionModel:
    """One layer with scaled weights."""
    model = Llama4VisionModel(CONFIG, fuse_gelu=fuse_gelu)
    initialise_(model)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("fuse_gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_is_as_exact_as_on_pytorch(dtype: torch.dtype, fuse_gelu: bool) -> None:
    model = encoder(dtype, fuse_gelu=fuse_gelu)
    generator = torch.Generator().manual_seed(0)
    pixel_values = (torch.rand(3, 3, CONFIG.image_size, CONFIG.image_size, generator=generator) * 2 - 1).to(dtype)
    with corrected_interpreter() as counts, force_impl("triton"):
        features = model(pixel_values)
    product = 2 * 3 * CONFIG.tokens_per_tile * CONFIG.hidden_size * CONFIG.intermediate_size
    assert (counts.dot_flops > product) == fuse_gelu
    assert counts.dot_flops > 0
    assert_close_to_reference(features, reference_forward(model, pixel_values), model(pixel_values))


def test_each_image_of_a_batch_gets_its_own_features() -> None:
    model = encoder(torch.float32)
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((56, 56), (100, 60), (56, 112))]
    tiled = [tile_image(image, image_size=CONFIG.image_size) for image in images]
    assert len({len(image.pixel_values) for image in tiled}) == 3
    for features, image in zip(encode_images(model, images), tiled, strict=True):
        alone = model(image.pixel_values).flatten(0, 1)
        assert_close_to_reference(features, reference_forward(model, image.pixel_values).flatten(0, 1), alone)
