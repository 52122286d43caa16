"""Patches of images and videos: those of transformers' processors, into encoders that agree on them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from vit_encoder import Qwen2_5_VLVisionConfig
from vit_encoder.qwen2_5_vl import PatchedImage, patch_image, reference_forward
from vit_encoder.qwen2_5_vl.images import resized

from experiments.common.peers import allow_torchvision_beside_cpu_torch, transformers_qwen2_5_vl
from tests.encoder.qwen2_5_vl_batches import encoder, relative_error

CONFIG = dataclasses.replace(Qwen2_5_VLVisionConfig.tiny(), depth=2)
UNIT = 28
sides = st.integers(1, 60) | st.integers(1, 12).map(lambda n: UNIT * n) | st.integers(1, 400)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """Height and width: of any shape, and of the most extreme one, 1:200."""
    short, long = sorted((draw(sides), draw(sides)))
    if draw(st.booleans()):
        short = draw(st.integers(1, 6))
        long = 200 * short
    long = min(long, 200 * short)
    return (short, long) if draw(st.booleans()) else (long, short)


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth image with noise, whose resizes are not all the same."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def processor(min_pixels: int, max_pixels: int, *, video: bool = False) -> Any:
    """transformers' own."""
    allow_torchvision_beside_cpu_torch()
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    return Qwen2VLVideoProcessor(size=size) if video else Qwen2VLImageProcessor(size=size)


@settings(max_examples=4 * settings().max_examples)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 60), st.integers(1, 10**6), st.integers(1, 10**6))
@example(1, 200, 28, 1, 10**6)
@example(70, 42, 28, 3136, 10**6)
def test_the_size_is_that_of_transformers(height: int, width: int, factor: int, one: int, other: int) -> None:
    allow_torchvision_beside_cpu_torch()
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    bounds = {"min_pixels": min(one, other), "max_pixels": max(one, other)}
    try:
        expected = smart_resize(height, width, factor, **bounds)
    except ValueError:
        with pytest.raises(ValueError, match="image: expected an aspect ratio of at most 200, got"):
            resized(height, width, factor=factor, **bounds)
        return
    assert resized(height, width, factor=factor, **bounds) == expected


@given(sizes(), st.sampled_from([UNIT**2, 56 * 56]), st.sampled_from([40 * UNIT**2, 300 * UNIT**2]))
def test_the_patches_are_those_of_transformers(size: tuple[int, int], min_pixels: int, max_pixels: int) -> None:
    image = pixels(*size)
    expected = processor(min_pixels, max_pixels)(Image.fromarray(image), return_tensors="pt")
    ours = patch_image(image, CONFIG, min_pixels=min_pixels, max_pixels=max_pixels)
    assert torch.equal(ours.grid_thw, expected["image_grid_thw"])
    assert torch.equal(ours.pixel_values, expected["pixel_values"])


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_the_patches_of_a_video_are_those_of_transformers(frames: int) -> None:
    video = [pixels(70, 100, seed) for seed in range(frames)]
    min_pixels, max_pixels = UNIT**2, 40 * UNIT**2
    tensors = torch.stack([torch.from_numpy(frame).permute(2, 0, 1) for frame in video])
    transform = processor(min_pixels, max_pixels, video=True)
    expected = transform(videos=[tensors], return_tensors="pt", cap_pixels_per_frame=False)
    ours = patch_image(video, CONFIG, min_pixels=min_pixels, max_pixels=max_pixels)
    assert torch.equal(ours.grid_thw, expected["video_grid_thw"])
    assert torch.equal(ours.pixel_values, expected["pixel_values_videos"])


def test_images_and_videos_go_through_both_encoders_in_one_batch() -> None:
    inputs: list[Any] = [pixels(30, 200), pixels(1, 1), [pixels(90, 61, seed) for seed in range(3)], pixels(150, 230)]
    patched = [patch_image(image, CONFIG, min_pixels=UNIT**2) for image in inputs]
    pixel_values, grid_thw = (
        torch.cat([getattr(image, name) for image in patched]) for name in ("pixel_values", "grid_thw")
    )
    assert grid_thw.tolist() == [[1, 2, 14], [1, 2, 2], [2, 6, 4], [1, 10, 16]]
    model = encoder(CONFIG)
    peer = transformers_qwen2_5_vl(model)
    assert peer is not None
    with torch.no_grad():
        expected = reference_forward(model, pixel_values, grid_thw)
        theirs = peer(pixel_values, grid_thw=grid_thw).pooler_output.double()
        ours = model(pixel_values, grid_thw).double()
    assert relative_error(ours, expected) <= 1.5 * relative_error(theirs, expected)


def test_files_greys_floats_and_frames_in_a_tuple(tmp_path: Path) -> None:
    image = pixels(60, 60)
    Image.fromarray(image).save(tmp_path / "image.png")
    expected = patch_image(image, CONFIG)
    same: Any
    for same in (tmp_path / "image.png", str(tmp_path / "image.png"), (image,), (image, image)):
        # A tuple holds the frames of a video, whose bounds are others.
        assert torch.equal(patch_image(same, CONFIG, min_pixels=56 * 56).pixel_values, expected.pixel_values)
    whole = pixels(56, 56)
    levels, fractions = patch_image(whole, CONFIG), patch_image(whole.astype(np.float32) / 255, CONFIG)
    torch.testing.assert_close(fractions.pixel_values, levels.pixel_values, rtol=0, atol=1e-6)
    assert patch_image(Image.new("L", (60, 60)), CONFIG).pixel_values.shape == (16, CONFIG.patch_dim)


@pytest.mark.parametrize(
    ("image", "changes", "error", "says"),
    [
        (None, {}, TypeError, "image: expected a PIL image, a path, a numpy array or a tensor, got NoneType"),
        ([], {}, ValueError, "image: got no frames"),
        ([pixels(30, 30), pixels(30, 31)], {}, ValueError, r"got frames of \[\(30, 30\), \(30, 31\)\], expected one"),
        (pixels(1, 201), {}, ValueError, "aspect ratio of at most 200, got 1 x 201"),
        ("none.png", {}, FileNotFoundError, r"none\.png"),
        (pixels(9, 9), {"min_pixels": 0}, ValueError, "min_pixels: expected an int of at least 1, got 0"),
        (pixels(9, 9), {"max_pixels": 1e6}, TypeError, "max_pixels: expected an int"),
        (pixels(9, 9), {"min_pixels": 9, "max_pixels": 8}, ValueError, "min_pixels: expected at most max_pixels = 8"),
    ],
)
def test_what_makes_no_patches_is_refused(image: Any, changes: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        patch_image(image, CONFIG, **changes)


def test_an_encoder_of_other_channels_is_refused() -> None:
    config = dataclasses.replace(CONFIG, in_channels=1)
    with pytest.raises(ValueError, match="config: got in_channels 1, expected 3"):
        patch_image(pixels(30, 30), config)
    assert isinstance(patch_image(pixels(30, 30), CONFIG), PatchedImage)
