"""Images and video frames to patches: resize, normalisation and patch order of the Qwen encoders, on the CPU.

The behaviour is that of transformers' `Qwen2VLImageProcessor`, `Qwen2VLVideoProcessor` and `Qwen3VLVideoProcessor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from vit_encoder.image_settings import Normalisation, Section, changed, check_positive_int, given_settings, naming
from vit_encoder.images import ImageInput, normalise, resize, to_rgb
from vit_encoder.qwen_configs import QwenVisionConfig

MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 1280
MAX_ASPECT_RATIO = 200
# The encoder's names of the sizes of a patch, and a processor's.
_PATCH_SIZES = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "spatial_merge_size": "merge_size",
}
_BOUNDS = ("min_pixels", "max_pixels")
_NAMES = _PATCH_SIZES | {name: name for name in (*_BOUNDS, "size", "image_mean", "image_std", "rescale_factor")}


@dataclass(frozen=True, kw_only=True)
class PatchSettings(Normalisation):
    """How an image, or each frame of a video, becomes patches.

    Args:
        min_pixels, max_pixels: bounds of its area after the resize, where whole units allow. That they are not crossed
            is checked where they are used: a file with one bound may cross the default of the other, for videos only.
        of_the_clip: they bound the sum over all frames of a video, as Qwen3-VL has it, and not each frame.
        image_mean, image_std, rescale_factor: as in `Normalisation`; CLIP's by default.
        patch_size, temporal_patch_size, spatial_merge_size: what the checkpoint says of them, compared with the
            encoder's; None leaves them to it.

    Raises:
        TypeError: a value of another type.
        ValueError: a number below 1, or one that is not finite or divides by zero.
    """

    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    of_the_clip: bool = False
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    patch_size: int | None = None
    temporal_patch_size: int | None = None
    spatial_merge_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (*_BOUNDS, *_PATCH_SIZES):
            if getattr(self, name) is not None or name not in _PATCH_SIZES:
                object.__setattr__(self, name, check_positive_int(name, getattr(self, name)))
        if not isinstance(self.of_the_clip, bool):
            raise TypeError(f"of_the_clip: got {type(self.of_the_clip).__name__}, expected a bool")


@dataclass(frozen=True, kw_only=True)
class QwenImageSettings:
    """How images and videos become patches; a subclass has the defaults of its encoder.

    Which frames of a video are sampled is the caller's choice: `fps` and the like are not read.

    Args:
        image: of a still image.
        video: of each frame of a video, or of the frames together.

    Raises:
        TypeError: these are no `PatchSettings`.
        ValueError: bounds of a clip for a still image.
    """

    image: PatchSettings
    video: PatchSettings

    def __post_init__(self) -> None:
        for name in ("image", "video"):
            if not isinstance(value := getattr(self, name), PatchSettings):
                raise TypeError(f"{name}: got {type(value).__name__}, expected PatchSettings")
        if self.image.of_the_clip:
            raise ValueError("image: got bounds of the clip, expected those of a still image")


def read_settings(section: Section | None, defaults: PatchSettings, types: Sequence[str]) -> PatchSettings:
    """What a section of a checkpoint's files says, the rest as in `defaults`.

    Args:
        section: None where the files say nothing.
        defaults: those of the processor.
        types: of the processors that work as ours does, where the section names one.

    Raises:
        TypeError: a value of another type.
        ValueError: a setting that cannot be followed, named with its source; and what `PatchSettings` raises it for.
    """
    if section is None:
        return defaults
    # transformers' processor of whole clips takes bounds from a size alone.
    names = _NAMES if not defaults.of_the_clip else {n: of for n, of in _NAMES.items() if n not in _BOUNDS}
    given = given_settings(section, types=types, resample=Image.Resampling.BICUBIC, names=names)
    with naming(section.source):
        bounds = _bounds(given.pop("size")) if "size" in given else {}
        return replace(defaults, **bounds | given)


def _bounds(size: object) -> dict[str, Any]:
    """The bounds in a `size`, under either pair of names that it was written with."""
    for low, high in (("shortest_edge", "longest_edge"), ("min_pixels", "max_pixels")):
        if isinstance(size, Mapping) and {low, high} <= {key for key, value in size.items() if value is not None}:
            return {"min_pixels": size[low], "max_pixels": size[high]}
    raise ValueError(f"size: got {size!r}, expected shortest_edge and longest_edge, areas in pixels")


@dataclass(frozen=True, eq=False)
class PatchedImage:
    """An image or video cut into patches, as the vision encoder takes it.

    Attributes:
        pixel_values: float32 [patches, patch_dim], normalised, in the encoder's order.
        grid_thw: int64 [1, 3]: temporal patches, rows and columns of patches.
    """

    pixel_values: Tensor
    grid_thw: Tensor


def patches(
    image: ImageInput | Sequence[ImageInput],
    config: QwenVisionConfig,
    settings: QwenImageSettings,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> PatchedImage:
    """Resize an image, or the frames of a video, to whole units and cut it into patches.

    Args and errors: as for each encoder's `patch_image`.
    """
    frames = _frames(image)
    of_frames = settings.image if frames is None else settings.video
    of_frames = changed(of_frames, {"min_pixels": min_pixels, "max_pixels": max_pixels})
    _check_config(config, of_frames)
    return _patched([cast(ImageInput, image)] if frames is None else frames, config, of_frames)


def _frames(image: object) -> list[ImageInput] | None:
    """The frames of a video; None for an image."""
    is_array = isinstance(image, np.ndarray | Tensor) and image.ndim == 4
    if not is_array and not isinstance(image, list | tuple):
        return None
    frames = list(cast(Sequence[ImageInput], image))
    if not frames:
        raise ValueError("image: got no frames, expected at least one")
    return frames


def _check_config(config: QwenVisionConfig, settings: PatchSettings) -> None:
    if config.in_channels != 3:
        raise ValueError(f"config: got in_channels {config.in_channels}, expected 3")
    for name in _PATCH_SIZES:
        if (size := getattr(settings, name)) not in (None, getattr(config, name)):
            raise ValueError(f"settings: got {name} {size}, expected the encoder's, {getattr(config, name)}")


def _patched(frames: list[ImageInput], config: QwenVisionConfig, settings: PatchSettings) -> PatchedImage:
    pixels = [to_rgb(frame) for frame in frames]
    if len({frame.shape for frame in pixels}) > 1:
        raise ValueError(f"image: got frames of {[tuple(frame.shape[1:]) for frame in pixels]}, expected one size")
    height, width = pixels[0].shape[1:]
    bounds: dict[str, int] = {
        "factor": config.patch_size * config.spatial_merge_size,
        "min_pixels": settings.min_pixels,
        "max_pixels": settings.max_pixels,
    }
    if settings.of_the_clip:
        size = resized_clip(len(pixels), height, width, temporal_factor=config.temporal_patch_size, **bounds)
    else:
        size = resized(height, width, **bounds)
    normalised = [normalise(resize(frame, *size, "bicubic"), settings) for frame in pixels]
    missing = -len(frames) % config.temporal_patch_size
    video = torch.stack([*normalised, *missing * [normalised[-1]]])  # [frames, 3, height, width]
    patch, merge = config.patch_size, config.spatial_merge_size
    pixel_values = rearrange(
        video,
        "(t s) c (h m p) (w n q) -> (t h w m n) (c s p q)",
        s=config.temporal_patch_size, m=merge, n=merge, p=patch, q=patch,
    )  # fmt: skip
    grid = [len(video) // config.temporal_patch_size, size[0] // patch, size[1] // patch]
    # The device is given because the one that PyTorch takes by default is the user's.
    return PatchedImage(pixel_values, torch.tensor([grid], device="cpu"))


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
    _check_sizes(height=height, width=width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
    return _bounded(height, width, 1, 1, factor, min_pixels, max_pixels)


def resized_clip(
    frames: int, height: int, width: int, *, factor: int, temporal_factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size that each frame of a video gets where one budget is for all of them.

    A frame of which one side is below `factor` is scaled up first. Of an odd number of frames as many are counted as
    transformers counts, which rounds half to even: 3 count as 4, and 5 do too.
    Source: transformers, `video_processing_qwen3_vl.py`, `smart_resize`.

    Args:
        frames: of the video.
        height, width, factor: as for `resized`.
        temporal_factor: frames in a patch.
        min_pixels, max_pixels: bounds of the sum of the frames' areas, where the factor allows.

    Raises:
        TypeError: an argument is no int.
        ValueError: as for `resized`, and fewer frames than a patch has.
    """
    _check_sizes(
        frames=frames, height=height, width=width, factor=factor, temporal_factor=temporal_factor,
        min_pixels=min_pixels, max_pixels=max_pixels,
    )  # fmt: skip
    if frames < temporal_factor:
        raise ValueError(f"image: expected a video of at least {temporal_factor} frames, got {frames}")
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    counted = round(frames / temporal_factor) * temporal_factor
    return _bounded(height, width, frames, counted, factor, min_pixels, max_pixels)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        check_positive_int(name, value)
    if sizes["min_pixels"] > sizes["max_pixels"]:
        raise ValueError(f"min_pixels: expected at most max_pixels = {sizes['max_pixels']}, got {sizes['min_pixels']}")


def _bounded(
    height: int, width: int, frames: int, counted: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Whole units; `counted` frames of them are compared with the bounds, and all frames scaled to meet them."""
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(f"image: expected an aspect ratio of at most {MAX_ASPECT_RATIO}, got {height} x {width}")
    high, wide = (round(side / factor) * factor for side in (height, width))
    if counted * high * wide > max_pixels:
        scale = math.sqrt(frames * height * width / max_pixels)
        high, wide = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    elif counted * high * wide < min_pixels:
        scale = math.sqrt(min_pixels / (frames * height * width))
        high, wide = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return high, wide
