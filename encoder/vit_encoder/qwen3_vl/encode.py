"""Several images and videos of different sizes through the vision encoder in one batch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vit_encoder.images import ImageInput
from vit_encoder.qwen3_vl.images import Qwen3VLImageSettings, patch_image
from vit_encoder.qwen3_vl.model import Qwen3VLVisionModel
from vit_encoder.qwen_encode import encode
from vit_encoder.qwen_images import PatchedImage


def encode_images(
    model: Qwen3VLVisionModel,
    images: Sequence[ImageInput | Sequence[ImageInput] | PatchedImage],
    *,
    settings: Qwen3VLImageSettings | None = None,
) -> list[Tensor]:
    """Encode each image or video to its own features, all of them in one call of the model.

    Runs in the caller's grad mode. The pixels are cast to the dtype and moved to the device of the model's parameters.

    Args:
        model: the encoder.
        images: at least one image or video, each anything that `patch_image` takes or a `PatchedImage`.
        settings: of `patch_image`; the model's `image_settings`, which `from_pretrained` reads from the checkpoint,
            when None.

    Returns:
        One tensor [features, feature_width] an image, in the order of `images`; `model.split` gives the parts of it.

    Raises:
        TypeError: `images` is not a sequence, `model` is no such encoder, or what `patch_image` raises it for.
        ValueError: `images` is empty, or what `patch_image` and the model raise it for.
        OSError: an image file is missing or cannot be decoded.
        Those about one image name its index.
    """
    return encode(model, images, settings, expected=Qwen3VLVisionModel, patch_image=patch_image)
