"""Several images and videos of different sizes through the vision encoder in one batch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vit_encoder.images import ImageInput
from vit_encoder.qwen2_5_vl.images import PatchedImage, Qwen2_5_VLImageSettings, patch_image
from vit_encoder.qwen2_5_vl.model import Qwen2_5_VLVisionModel
from vit_encoder.qwen_encode import encode


def encode_images(
    model: Qwen2_5_VLVisionModel,
    images: Sequence[ImageInput | Sequence[ImageInput] | PatchedImage],
    *,
    settings: Qwen2_5_VLImageSettings | None = None,
) -> list[Tensor]:
    """Encode each image or video to its own features, all of them in one call of the model.

    Runs in the caller's grad mode. The pixels are cast to the dtype and moved to the device of the model's parameters.

    Args:
        model: the encoder.
        images: at least one image or video, each anything that `patch_image` takes or a `PatchedImage`.
        settings: of `patch_image`; the model's `image_settings`, which `from_pretrained` reads from the checkpoint,
            when None.

    Returns:
        One tensor [features, out_hidden_size] an image, in the order of `images`.

    Raises:
        TypeError: `images` is not a sequence, `model` is no such encoder, or what `patch_image` raises it for.
        ValueError: `images` is empty, or what `patch_image` and the model raise it for.
        OSError: an image file is missing or cannot be decoded.
        Those about one image name its index.
    """
    return encode(model, images, settings, expected=Qwen2_5_VLVisionModel, patch_image=patch_image)
