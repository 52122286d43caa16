"""Images and video frames to patches, as Qwen2.5-VL's processor makes them, on the CPU.

The behaviour is that of transformers' `Qwen2VLImageProcessor` and `Qwen2VLVideoProcessor`, and of `qwen-vl-utils`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vit_encoder.configs import HfConfig
from vit_encoder.image_settings import processor_sections
from vit_encoder.images import ImageInput
from vit_encoder.qwen2_5_vl.config import Qwen2_5_VLVisionConfig
from vit_encoder.qwen_images import PatchedImage, PatchSettings, QwenImageSettings, patches, read_settings, resized

__all__ = ["PatchSettings", "PatchedImage", "Qwen2_5_VLImageSettings", "patch_image", "resized"]

_PROCESSORS = (
    "Qwen2VLImageProcessor",
    "Qwen2VLImageProcessorFast",
    "Qwen2VLImageProcessorPil",
    "Qwen2_5_VLImageProcessor",
    "Qwen2VLVideoProcessor",
)
_VIDEO = PatchSettings(min_pixels=128 * 28 * 28, max_pixels=28 * 28 * 768)


@dataclass(frozen=True, kw_only=True)
class Qwen2_5_VLImageSettings(QwenImageSettings):  # noqa: N801 (transformers' prefix)
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
        return cls(
            image=read_settings(image, PatchSettings(), _PROCESSORS), video=read_settings(video, _VIDEO, _PROCESSORS)
        )


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
    whole = settings or Qwen2_5_VLImageSettings()
    return patches(image, config, whole, min_pixels=min_pixels, max_pixels=max_pixels)
