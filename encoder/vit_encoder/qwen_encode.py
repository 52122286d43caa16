"""Several images and videos of different sizes through the vision encoder in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vit_encoder.image_settings import naming
from vit_encoder.images import ImageInput, check_images, placement
from vit_encoder.qwen2_5_vl.config import Qwen2_5_VLVisionConfig
from vit_encoder.qwen2_5_vl.images import PatchedImage, Qwen2_5_VLImageSettings, patch_image
from vit_encoder.qwen2_5_vl.model import Qwen2_5_VLVisionModel


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
    check_images(images)
    config = getattr(model, "config", None)
    placed = placement(model) if isinstance(config, Qwen2_5_VLVisionConfig) else None
    if placed is None:
        raise TypeError(f"model: expected a Qwen2_5_VLVisionModel, got {type(model).__name__}")
    patched = []
    for index, image in enumerate(images):
        with naming(f"images[{index}]"):
            if not isinstance(image, PatchedImage):
                image = patch_image(image, model.config, settings=settings or model.image_settings)
            patched.append(image)
    grid_thw = torch.cat([image.grid_thw for image in patched])  # [images, 3]
    features = model(torch.cat([image.pixel_values.to(*placed) for image in patched]), grid_thw)
    return list(features.split((grid_thw.prod(dim=1) // model.config.merge_unit).tolist()))
