"""Images and video frames to patches: resize, normalisation and patch order of Qwen2.5-VL, on the CPU.

The behaviour is that of transformers' `Qwen2VLImageProcessor` and `Qwen2VLVideoProcessor`, and of `qwen-vl-utils`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from torch import Tensor

from vit_encoder.images import ImageInput, check_positive_int, resize, to_rgb
from vit_encoder.qwen2_5_vl.config import Qwen2_5_VLVisionConfig

MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 1280
MAX_ASPECT_RATIO = 200
# CLIP's, as the published preprocessor_config.json have them.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, eq=False)
class PatchedImage:
    """An image or video cut into patches, as the vision encoder takes it.

    Attributes:
        pixel_values: float32 [patches, patch_dim], normalised, in the encoder's order.
        grid_thw: int64 [1, 3]: temporal patches, rows and columns of patches.
    """

    pixel_values: Tensor
    grid_thw: Tensor


def patch_image(
    image: ImageInput | Sequence[ImageInput],
    config: Qwen2_5_VLVisionConfig,
    *,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> PatchedImage:
    """Resize an image, or the frames of a video, to whole units and cut it into patches.

    Resized antialiased and bicubic, in uint8 where the image has 8 bits (see `llama4.tile_image` for other kinds), and
    normalised in float32 with CLIP's mean and deviation. A patch covers `temporal_patch_size` frames: an image, and the
    last frame of a video, are repeated to fill it.

    Args:
        image: anything that `llama4.tile_image` takes; or a list or tuple of that, frames of the same size.
        config: of the encoder; its patches have 3 channels.
        min_pixels, max_pixels: bounds of a frame's size after the resize, where whole units allow.

    Returns:
        The patches, on the CPU.

    Raises:
        TypeError: `image` is of another type or dtype, or a bound is not an int.
        ValueError: no frames or of different sizes, an aspect ratio above 200, bounds that are below 1 or crossed, a
            config with other channels; and what `llama4.tile_image` raises it for.
        OSError: a file that is missing or cannot be decoded.
    """
    if config.in_channels != 3:
        raise ValueError(f"config: got in_channels {config.in_channels}, expected 3")
    frames = image if isinstance(image, list | tuple) else [cast(ImageInput, image)]
    if not frames:
        raise ValueError("image: got no frames, expected at least one")
    pixels = [to_rgb(frame) for frame in frames]
    if len({frame.shape for frame in pixels}) > 1:
        raise ValueError(f"image: got frames of {[tuple(frame.shape[1:]) for frame in pixels]}, expected one size")
    size = resized(
        *pixels[0].shape[1:],
        factor=config.patch_size * config.spatial_merge_size,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
    )
    normalised = [_normalise(resize(frame, *size, "bicubic")) for frame in pixels]
    missing = -len(frames) % config.temporal_patch_size
    video = torch.stack([*normalised, *missing * [normalised[-1]]])  # [frames, 3, height, width]
    patch, merge = config.patch_size, config.spatial_merge_size
    pixel_values = rearrange(
        video,
        "(t s) c (h m p) (w n q) -> (t h w m n) (c s p q)",
        s=config.temporal_patch_size, m=merge, n=merge, p=patch, q=patch,
    )  # fmt: skip
    grid = [len(video) // config.temporal_patch_size, size[0] // patch, size[1] // patch]
    return PatchedImage(pixel_values, torch.tensor([grid]))


def resized(
    height: int, width: int, *, factor: int = 28, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """The size that an image gets: sides that are multiples of `factor`, its aspect ratio nearly kept.

    Source: transformers, `image_processing_qwen2_vl.py`, `smart_resize`.

    Args:
        height, width: of the image.
        factor: of both sides, the side of a unit in pixels.
        min_pixels, max_pixels: bounds of the size, where the factor allows: an image smaller or larger is scaled.

    Raises:
        TypeError: an argument is no int.
        ValueError: an argument is below 1, min_pixels is above max_pixels, or one side is over 200 times the other.
    """
    sizes = {"height": height, "width": width, "factor": factor, "min_pixels": min_pixels, "max_pixels": max_pixels}
    for name, value in sizes.items():
        check_positive_int(name, value)
    if min_pixels > max_pixels:
        raise ValueError(f"min_pixels: expected at most max_pixels = {max_pixels}, got {min_pixels}")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(f"image: expected an aspect ratio of at most {MAX_ASPECT_RATIO}, got {height} x {width}")
    high, wide = (round(side / factor) * factor for side in (height, width))
    if high * wide > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        high, wide = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    elif high * wide < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        high, wide = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return high, wide


def _normalise(pixels: Tensor) -> Tensor:
    # One subtraction and one division of the levels, as transformers has it: the roundings are the same.
    scale = 1 if pixels.is_floating_point() else 255
    mean, std = (torch.tensor(values)[:, None, None] * scale for values in (_MEAN, _STD))
    return (pixels.to(torch.float32) - mean) / std
