"""The exported Qwen3-VL encoder gives what it gives uncompiled, for images and videos of any size."""

import dataclasses
from pathlib import Path

import pytest
import torch
from vit_encoder import Qwen3VLVisionConfig, export, load
from vit_encoder.qwen3_vl import reference_forward, vision_metadata

from tests.encoder.qwen2_5_vl_batches import patches, relative_error
from tests.encoder.qwen3_vl_batches import encoder

pytestmark = pytest.mark.costly

CONFIG = dataclasses.replace(Qwen3VLVisionConfig.tiny(), depth=2, patch_size=4)
BATCHES = [[[1, 2, 2]], [[2, 8, 8], [1, 2, 40], [1, 6, 4]], [[1, 10, 18]], [[3, 4, 4]], [[1, 2, 2]] * 5]


@torch.no_grad()
def test_one_package_is_for_all_sizes(tmp_path: Path) -> None:
    model = encoder(CONFIG)
    example = torch.tensor([[2, 4, 6], [1, 2, 8]])
    arguments = patches(CONFIG, example), *vision_metadata(example, CONFIG)
    folder = export(model.encoder, arguments, tmp_path / "encoder")
    deployed = load(folder, configuration=CONFIG)
    for grids in BATCHES:
        grid_thw = torch.tensor(grids)
        pixel_values = patches(CONFIG, grid_thw)
        metadata = vision_metadata(grid_thw, CONFIG)
        expected = reference_forward(model, pixel_values, grid_thw)
        error = relative_error(deployed(pixel_values, *metadata).double(), expected)
        assert error <= max(2 * relative_error(model(pixel_values, grid_thw).double(), expected), 1e-6)
    with pytest.raises(ValueError, match="pixel_values: got shape"):
        deployed(pixel_values[1:], *metadata)
    with pytest.raises(ValueError, match="num_position_embeddings"):
        load(folder, configuration=dataclasses.replace(CONFIG, num_position_embeddings=64))
