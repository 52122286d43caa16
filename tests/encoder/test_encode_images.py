"""encode_images: one batch, each image its own features, and input that must be refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from vit_encoder.llama4.encode import encode_images
from vit_encoder.llama4.images import TiledImage, tile_image

IMAGE_SIZE, TOKENS, WIDTH = 14, 4, 6


class Encoder(nn.Module):
    """Stands in for Llama4VisionModel: tiles to TOKENS tokens of WIDTH, each tile by itself."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=IMAGE_SIZE)
        weight = torch.randn(3 * IMAGE_SIZE**2, TOKENS * WIDTH, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(weight.to(dtype))
        self.batches: list[Tensor] = []

    def forward(self, pixel_values: Tensor) -> Tensor:
        self.batches.append(pixel_values)
        return (pixel_values.flatten(1) @ self.weight).tanh().unflatten(1, (TOKENS, WIDTH))


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


sides = st.integers(1, 80)


@given(sizes=st.lists(st.tuples(sides, sides), min_size=1, max_size=5), seed=st.integers(0, 2**32 - 1))
def test_each_image_has_the_features_it_gets_alone(sizes: list[tuple[int, int]], seed: int) -> None:
    model, images = Encoder(), [pixels(*size, seed=seed + n) for n, size in enumerate(sizes)]
    together = encode_images(model, images)
    assert len(model.batches) == 1
    assert len(together) == len(images)
    for features, image in zip(together, images, strict=True):
        tiles = len(tile_image(image, image_size=IMAGE_SIZE).pixel_values)
        assert features.shape == (tiles * TOKENS, WIDTH)
        torch.testing.assert_close(features, encode_images(model, [image])[0])


def test_features_follow_the_order_of_the_images_and_of_their_tiles() -> None:
    model, images = Encoder(), [pixels(28, 42), pixels(5, 5), pixels(14, 28)]
    tiled = [tile_image(image, image_size=IMAGE_SIZE).pixel_values for image in images]
    assert [len(tiles) for tiles in tiled] == [7, 1, 3]
    for features, tiles in zip(encode_images(model, images), tiled, strict=True):
        torch.testing.assert_close(features.unflatten(0, (-1, TOKENS)), model(tiles.double()))


def test_every_kind_of_image_goes_into_one_batch(tmp_path: Path) -> None:
    array = pixels(20, 30)
    Image.fromarray(array).save(tmp_path / "image.png")
    tensor, tiled = torch.from_numpy(array).permute(2, 0, 1), tile_image(array, image_size=IMAGE_SIZE)
    images = (array, Image.fromarray(array), str(tmp_path / "image.png"), tmp_path / "image.png", tensor, tiled)
    first, *others = encode_images(Encoder(), images)
    for features in others:
        torch.testing.assert_close(features, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pixels_take_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    model = Encoder(dtype)
    (features,) = encode_images(model, [pixels(20, 30)])
    assert model.batches[0].dtype == features.dtype == dtype


def test_pixels_go_to_the_device_of_the_weights() -> None:
    model = Encoder().to("meta")
    (features,) = encode_images(model, [pixels(20, 30)])
    assert model.batches[0].device.type == features.device.type == "meta"


def test_the_projector_sees_the_features_of_all_tiles() -> None:
    model, projector = Encoder(), nn.Linear(WIDTH, 9, dtype=torch.float64)
    images = [pixels(28, 42), pixels(5, 5)]
    projected = encode_images(model, images, projector)
    for features, plain in zip(projected, encode_images(model, images), strict=True):
        torch.testing.assert_close(features, projector(plain))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_grad_mode_is_the_callers(enabled: bool) -> None:
    with torch.set_grad_enabled(enabled):
        (features,) = encode_images(Encoder(), [pixels(20, 30)])
    assert features.requires_grad == enabled


@pytest.mark.parametrize("images", [[], ()])
def test_no_images_are_refused(images: Any) -> None:
    with pytest.raises(ValueError, match="images: expected at least one image, got an empty sequence"):
        encode_images(Encoder(), images)


@pytest.mark.parametrize(
    "image",
    [
        "photo.png",
        b"photo.png",
        Path("photo.png"),
        Image.new("RGB", (5, 5)),
        pixels(5, 5),
        torch.zeros(3, 5, 5),
        torch.zeros(2, 3, 5, 5),
        tile_image(pixels(5, 5), image_size=IMAGE_SIZE),
        iter([pixels(5, 5)]),
        None,
    ],
    ids=lambda image: type(image).__name__,
)
def test_one_image_without_a_sequence_is_refused(image: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"images: expected a sequence .* got one {type(image).__name__}; pass \[image"
    ):
        encode_images(Encoder(), image)


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (np.full((5, 5), np.nan), ValueError, r"images\[1\]: image: expected floats in \[0, 1\].*nan"),
        (np.zeros((5, 5), np.int32), TypeError, r"images\[1\]: image: expected a numpy array.*int32"),
        (None, TypeError, r"images\[1\]: image: expected a PIL image.*NoneType"),
        ("none.png", FileNotFoundError, r"images\[1\]: image: .*none\.png.*does not exist"),
        (tile_image(pixels(5, 5), image_size=7), ValueError, r"images\[1\]: .*\[tiles, 3, 14, 14\].*\(1, 3, 7, 7\)"),
        (TiledImage(torch.zeros(0, 3, 14, 14), (1, 1)), ValueError, r"images\[1\]: .*got \(0, 3, 14, 14\)"),
        (TiledImage(torch.zeros(3, 14, 14), (1, 1)), ValueError, r"images\[1\]: .*got \(3, 14, 14\)"),
        (TiledImage(torch.tensor(0.0), (1, 1)), ValueError, r"images\[1\]: .*got \(\)"),
        (TiledImage(torch.zeros(1, 3, 14, 14).byte(), (1, 1)), TypeError, r"images\[1\]: .*floats.*got torch.uint8"),
    ],
)
def test_a_bad_image_is_named_by_its_index(bad: Any, error: type[Exception], says: str) -> None:
    model = Encoder()
    with pytest.raises(error, match=says):
        encode_images(model, [pixels(5, 5), bad, pixels(5, 5)])
    assert model.batches == []


def encoder_without_parameters() -> nn.Module:
    model = Encoder()
    del model.weight
    return model


@pytest.mark.parametrize("model", [None, nn.Linear(3, 3), encoder_without_parameters(), Encoder().forward])
def test_what_is_no_encoder_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model: expected a module with parameters and config\.image_size, got"):
        encode_images(model, [pixels(5, 5)])
