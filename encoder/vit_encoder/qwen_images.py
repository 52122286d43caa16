"""Images and video frames to patches: resize, normalisation and patch order of Qwen2.5-VL, on the CPU.

The behaviour is that of transformers' `Qwen2VLImageProcessor` and `Qwen2VLVideoProcessor`, and of `qwen-vl-utils`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from vit_encoder.configs import HfConfig
from vit_encoder.image_settings import (
    Normalisation,
    Section,
    changed,
    check_positive_int,
    given_settings,
    naming,
    processor_sections,
)
from vit_encoder.images import ImageInput, normalise, resize, to_rgb
from vit_encoder.qwen2_5_vl.config import Qwen2_5_VLVisionConfig

MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 1280
MAX_ASPECT_RATIO = 200
# The encoder's names of the sizes of a patch, and a processor's.
_PATCH_SIZES = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "spatial_merge_size": "merge_size",
}
_NAMES = _PATCH_SIZES | {
    name: name for name in ("min_pixels", "max_pixels", "size", "image_mean", "image_std", "rescale_factor")
}
_PROCESSORS = (
    "Qwen2VLImageProcessor",
    "Qwen2VLImageProcessorFast",
    "Qwen2VLImageProcessorPil",
    "Qwen2_5_VLImageProcessor",
    "Qwen2VLVideoProcessor",
)


@dataclass(frozen=True, kw_only=True)
class PatchSettings(Normalisation):
    """How an image, or each frame of a video, becomes patches.

    Args:
        min_pixels, max_pixels: bounds of its area after the resize, where whole units allow. That they are not crossed
            is checked where they are used: a file with one bound may cross the default of the other, for videos only.
        image_mean, image_std, rescale_factor: as in `Normalisation`; CLIP's by default.
        patch_size, temporal_patch_size, spatial_merge_size: what the checkpoint says of them, compared with the
            encoder's; None leaves them to it.

    Raises:
        TypeError: a value of another type.
        ValueError: a number below 1, or one that is not finite or divides by zero.
    """

    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    patch_size: int | None = None
    temporal_patch_size: int | None = None
    spatial_merge_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("min_pixels", "max_pixels", *_PATCH_SIZES):
            if getattr(self, name) is not None or name not in _PATCH_SIZES:
                object.__setattr__(self, name, check_positive_int(name, getattr(self, name)))


_VIDEO = PatchSettings(min_pixels=128 * 28 * 28, max_pixels=28 * 28 * 768)


@dataclass(frozen=True, kw_only=True)
class Qwen2_5_VLImageSettings:  # noqa: N801 (transformers' prefix)
    """How images and videos become patches.

    The defaults are those of transformers' `Qwen2VLImageProcessor` and `Qwen2VLVideoProcessor`, not those of the
    published checkpoints, which allow images of up to 12845056 pixels. Which frames of a video are sampled is the
    caller's choice: `fps` and the like are not read.

    Args:
        image: of a still image.
        video: of each frame of a video.
    """

    image: PatchSettings = field(default_factory=PatchSettings)
    video: PatchSettings = _VIDEO

    def __post_init__(self) -> None:
        for name in ("image", "video"):
            if not isinstance(value := getattr(self, name), PatchSettings):
                raise TypeError(f"{name}: got {type(value).__name__}, expected PatchSettings")

    @classmethod
    def from_hf(cls, source: HfConfig) -> Qwen2_5_VLImageSettings:
        """Reads what a checkpoint says of its processors; where it says nothing the defaults hold.

        As in transformers, `min_pixels` and `max_pixels` win over a `size`, and videos that have no settings of their
        own have those of images.

        Args:
            source: the checkpoint's folder, of which processor_config.json, preprocessor_config.json and
                video_preprocessor_config.json are read; or the path of such a file, a mapping or a processor of
                transformers.

        Raises:
            OSError: a path that cannot be read.
            TypeError: `source` or a value is of another type.
            ValueError: a file without a JSON object; a setting that cannot be followed here (another resampling, no
                resize, a crop, padding, a bound for the whole clip, the processor of another model); and what
                `PatchSettings` raises it for.
        """
        image, video = processor_sections(source)
        return cls(image=_read(image, PatchSettings()), video=_read(video, _VIDEO))


def _read(section: Section | None, defaults: PatchSettings) -> PatchSettings:
    if section is None:
        return defaults
    given = given_settings(section, types=_PROCESSORS, resample=Image.Resampling.BICUBIC, names=_NAMES)
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


def patch_image(
    image: ImageInput | Sequence[ImageInput],
    config: Qwen2_5_VLVisionConfig,
    *,
    settings: Qwen2_5_VLImageSettings | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> PatchedImage:
    """Resize an image, or the frames of a video, to whole units and cut it into patches.

    Resized antialiased and bicubic, in uint8 where the image has 8 bits (see `llama4.tile_image` for other kinds), and
    normalised in float32. A patch covers `temporal_patch_size` frames: an image, and the last frame of a video, are
    repeated to fill it.

    Args:
        image: anything that `llama4.tile_image` takes; or a video: a list or tuple of that, an array [frames, height,
            width, channels] or a tensor [frames, channels, height, width], its frames of one size.
        config: of the encoder; its patches have 3 channels.
        settings: the checkpoint's, from `Qwen2_5_VLImageSettings.from_hf(folder)`; transformers' defaults when None.
        min_pixels, max_pixels: instead of the settings' for what `image` is, an image or a video.

    Returns:
        The patches, in float32 on the CPU.

    Raises:
        TypeError: `image` is of another type or dtype, `settings` are none, or a bound is not an int.
        ValueError: no frames or of different sizes, an aspect ratio above 200, bounds that are below 1 or crossed, a
            config with other channels or other sizes than the settings'; and what `llama4.tile_image` raises it for.
        OSError: a file that is missing or cannot be decoded.
    """
    if not isinstance(settings, Qwen2_5_VLImageSettings | None):
        raise TypeError(f"settings: got {type(settings).__name__}, expected Qwen2_5_VLImageSettings or None")
    frames = _frames(image)
    whole = settings or Qwen2_5_VLImageSettings()
    of_frames = whole.image if frames is None else whole.video
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


def _check_config(config: Qwen2_5_VLVisionConfig, settings: PatchSettings) -> None:
    if config.in_channels != 3:
        raise ValueError(f"config: got in_channels {config.in_channels}, expected 3")
    for name in _PATCH_SIZES:
        if (size := getattr(settings, name)) not in (None, getattr(config, name)):
            raise ValueError(f"settings: got {name} {size}, expected the encoder's, {getattr(config, name)}")


def _patched(frames: list[ImageInput], config: Qwen2_5_VLVisionConfig, settings: PatchSettings) -> PatchedImage:
    pixels = [to_rgb(frame) for frame in frames]
    if len({frame.shape for frame in pixels}) > 1:
        raise ValueError(f"image: got frames of {[tuple(frame.shape[1:]) for frame in pixels]}, expected one size")
    size = resized(
        *pixels[0].shape[1:],
        factor=config.patch_size * config.spatial_merge_size,
        min_pixels=settings.min_pixels,
        max_pixels=settings.max_pixels,
    )
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
