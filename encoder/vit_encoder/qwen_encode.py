"""Several images and videos of different sizes through a Qwen vision encoder in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vit_encoder.image_settings import naming
from vit_encoder.images import ImageInput, check_images, placement
from vit_encoder.qwen_images import PatchedImage
from vit_encoder.qwen_models import QwenVisionModel


def encode(
    model: Any,
    images: Sequence[ImageInput | Sequence[ImageInput] | PatchedImage],
    settings: Any,
    *,
    expected: type[QwenVisionModel],
    patch_image: Callable[..., PatchedImage],
) -> list[Tensor]:
    """Encode each image or video to its own features, all of them in one call of the model.

    Args and errors: as for each encoder's `encode_images`; `expected` is the class of its model, `patch_image` its own.

    Returns:
        One tensor [features, width] an image, in the order of `images`.
    """
    check_images(images)
    placed = placement(model) if isinstance(getattr(model, "config", None), expected.CONFIG) else None
    if placed is None:
        raise TypeError(f"model: expected a {expected.__name__}, got {type(model).__name__}")
    patched = []
    for index, image in enumerate(images):
        with naming(f"images[{index}]"):
            if not isinstance(image, PatchedImage):
                image = patch_image(image, model.config, settings=settings or model.image_settings)
            patched.append(image)
    grid_thw = torch.cat([image.grid_thw for image in patched])  # [images, 3]
    features = model(torch.cat([image.pixel_values.to(*placed) for image in patched]), grid_thw)
    return list(features.split((grid_thw.prod(dim=1) // model.config.merge_unit).tolist()))
