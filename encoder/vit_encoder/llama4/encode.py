"""Several images of different tile counts through the vision encoder in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from vit_encoder.llama4.config import Llama4VisionConfig
from vit_encoder.llama4.images import ImageInput, TiledImage, tile_image


def encode_images(
    model: nn.Module,
    images: Sequence[ImageInput | TiledImage],
    projector: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """Encode each image to its own features, all tiles of all images in one call of the model.

    Runs in the caller's grad mode. The pixels are cast to the dtype and moved to the device of the model's parameters.

    Args:
        model: a `Llama4VisionModel`, or any module with `config.image_size` that takes [tiles, 3, image_size,
            image_size] to [tiles, tokens, width].
        images: at least one image, each anything that `tile_image` takes (with at most 16 tiles and a global one) or
            a `TiledImage` with tiles of the model's size.
        projector: applied to the features of all tiles, such as a `Llama4MultiModalProjector`.

    Returns:
        One tensor [tiles of the image * tokens, width] an image, in the order of `images`, its tiles in their order.

    Raises:
        TypeError: `images` is not a sequence, `model` is no such module, a `TiledImage` does not hold floats, or what
            `tile_image` raises it for.
        ValueError: `images` is empty, a `TiledImage` has tiles of another size than the model's or, on the CPU, NaN or
            infinity in them, or what `tile_image` raises it for.
        OSError: an image file is missing or cannot be decoded.
        Those about one image name its index.
    """
    if not isinstance(images, Sequence) or isinstance(images, str | bytes):
        raise TypeError(
            f"images: expected a sequence of images, got one {type(images).__name__}; pass [image] to encode one image"
        )
    if not images:
        raise ValueError("images: expected at least one image, got an empty sequence")
    parameter = _first_parameter(model)
    image_size = cast(Llama4VisionConfig, model.config).image_size
    pixel_values = [_pixel_values(index, image, image_size) for index, image in enumerate(images)]
    features = model(torch.cat([tiles.to(parameter.device, parameter.dtype) for tiles in pixel_values]))
    if projector is not None:
        features = projector(features)
    return [of_image.flatten(0, 1) for of_image in features.split([len(tiles) for tiles in pixel_values])]


def _first_parameter(model: nn.Module) -> nn.Parameter:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if parameter is None or not hasattr(getattr(model, "config", None), "image_size"):
        raise TypeError(f"model: expected a module with parameters and config.image_size, got {type(model).__name__}")
    return parameter


def _pixel_values(index: int, image: ImageInput | TiledImage, image_size: int) -> Tensor:
    if not isinstance(image, TiledImage):
        try:
            return tile_image(image, image_size=image_size).pixel_values
        except (TypeError, ValueError, OSError) as error:
            raise type(error)(f"images[{index}]: {error}") from error
    pixel_values = image.pixel_values
    if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
        received = pixel_values.dtype if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
        raise TypeError(f"images[{index}]: expected pixel_values, a tensor of floats in [-1, 1], got {received}")
    if pixel_values.shape[1:] != (3, image_size, image_size) or len(pixel_values) == 0:
        raise ValueError(
            f"images[{index}]: expected pixel_values [tiles, 3, {image_size}, {image_size}] as model.config.image_size "
            f"says, got {tuple(pixel_values.shape)}"
        )
    # On an accelerator the answer would have to be waited for.
    if pixel_values.device.type == "cpu" and not bool(pixel_values.isfinite().all()):
        raise ValueError(f"images[{index}]: expected finite pixel_values, got NaN or infinity")
    return pixel_values
