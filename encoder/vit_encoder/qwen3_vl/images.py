"""Images and video frames to patches, as Qwen3-VL's processors make them, on the CPU.

The behaviour is that of transformers' `Qwen2VLImageProcessor` and `Qwen3VLVideoProcessor`, Qwen3-Omni's videos that of
`Qwen2VLVideoProcessor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vit_encoder.configs import HfConfig
from vit_encoder.image_settings import Section, processor_sections
from vit_encoder.images import ImageInput
from vit_encoder.qwen3_vl.config import Qwen3VLVisionConfig
from vit_encoder.qwen_images import PatchedImage, PatchSettings, QwenImageSettings, patches, read_settings

_HALF: dict[str, Any] = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_IMAGE_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
_CLIP_PROCESSOR, _FRAME_PROCESSOR = "Qwen3VLVideoProcessor", "Qwen2VLVideoProcessor"
# What the published checkpoints of Qwen3-VL say.
_IMAGE = PatchSettings(min_pixels=256 * 256, max_pixels=4096 * 4096, **_HALF)
_VIDEO = PatchSettings(min_pixels=4096, max_pixels=25165824, of_the_clip=True, **_HALF)
# What transformers' classes have where a checkpoint's file says nothing of it; of images as `PatchSettings`.
_CLIP = PatchSettings(min_pixels=128 * 32 * 32, max_pixels=32 * 32 * 768, of_the_clip=True, **_HALF)
_FRAME = PatchSettings(min_pixels=128 * 28 * 28, max_pixels=28 * 28 * 768)


@dataclass(frozen=True, kw_only=True)
class Qwen3VLImageSettings(QwenImageSettings):
    """How images and videos become patches.

    The defaults are those of Qwen3-VL's published checkpoints. Which frames of a video are sampled is the caller's
    choice: `fps` and the like are not read.

    Args:
        image: of a still image.
        video: of all frames of a video together, or where not `of_the_clip` of each, as Qwen3-Omni has it.
    """

    image: PatchSettings = _IMAGE
    video: PatchSettings = _VIDEO

    @classmethod
    def from_hf(cls, source: HfConfig) -> Qwen3VLImageSettings:
        """Reads what a checkpoint says of its processors; the defaults hold where it has no file about them.

        As in transformers, `min_pixels` and `max_pixels` win over a `size`, what a file leaves out is as in
        transformers' class, and videos that have no settings of their own have those of images. A video's bounds are
        of the whole clip, and a `size` alone has them; but of each frame, and as for images, where the processor is
        `Qwen2VLVideoProcessor` or of an Omni.

        Args:
            source: the checkpoint's folder, of which processor_config.json, preprocessor_config.json and
                video_preprocessor_config.json are read; or the path of such a file, a mapping or a processor of
                transformers.

        Raises:
            OSError: a path that cannot be read.
            TypeError: `source` or a value is of another type.
            ValueError: a file without a JSON object; a setting that cannot be followed here (another resampling, no
                resize, a crop, padding, a bound for each frame of a clip, the processor of another model); and what
                `PatchSettings` raises it for.
        """
        image, video = processor_sections(source)
        types = (*_IMAGE_PROCESSORS, _CLIP_PROCESSOR, _FRAME_PROCESSOR)
        return cls(
            image=_IMAGE if image is None else read_settings(image, PatchSettings(), _IMAGE_PROCESSORS),
            video=_VIDEO if video is None else read_settings(video, _FRAME if _of_frames(video) else _CLIP, types),
        )


def _of_frames(video: Section) -> bool:
    """Whether transformers would take the processor whose bounds are of each frame."""
    if (kind := video.values.get("video_processor_type")) is not None:
        return bool(kind == _FRAME_PROCESSOR)
    return "Omni" in str(video.values.get("processor_class"))


def patch_image(
    image: ImageInput | Sequence[ImageInput],
    config: Qwen3VLVisionConfig,
    *,
    settings: Qwen3VLImageSettings | None = None,
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
        settings: the checkpoint's, from `Qwen3VLImageSettings.from_hf(folder)`; the published checkpoints' when None.
        min_pixels, max_pixels: instead of the settings' for what `image` is, an image or a video, whose bounds are of
            the sum of its frames' areas.

    Returns:
        The patches, in float32 on the CPU.

    Raises:
        TypeError: `image` is of another type or dtype, `settings` are none, or a bound is not an int.
        ValueError: no frames or of different sizes, fewer than a patch has where the bounds are of the clip, an aspect
            ratio above 200, bounds that are below 1 or crossed, a config with other channels or other sizes than the
            settings'; and what `llama4.tile_image` raises it for.
        OSError: a file that is missing or cannot be decoded.
    """
    if not isinstance(settings, Qwen3VLImageSettings | None):
        raise TypeError(f"settings: got {type(settings).__name__}, expected Qwen3VLImageSettings or None")
    whole = settings or Qwen3VLImageSettings()
    return patches(image, config, whole, min_pixels=min_pixels, max_pixels=max_pixels)
