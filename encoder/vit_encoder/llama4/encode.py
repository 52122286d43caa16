"""Several images of different tile counts through the vision encoder in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vit_encoder.image_settings import naming
from vit_encoder.images import ImageInput, check_images, placement
from vit_encoder.llama4.images import Llama4ImageSettings, TiledImage, tile_image


def encode_images(
    model: nn.Module,
    images: Sequence[ImageInput | TiledImage],
    projector: Callable[[Tensor], Tensor] | None = None,
    *,
    settings: Llama4ImageSettings | None = None,
) -> list[Tensor]:
    """Encode each image to its own features, all tiles of all images in one call of the model.

    Runs in the caller's grad mode. The pixels are cast to the dtype and moved to the device of the model's parameters.

    Args:
        model: a `Llama4VisionModel`, or any module with `config.image_size` that takes [tiles, 3, image_size,
            image_size] to [tiles, tokens, width].
        images: at least one image, each anything that `tile_image` takes or a `TiledImage` with tiles of the model's
            size.
        projector: applied to the features of all tiles, such as a `Llama4MultiModalProjector`.
        settings: of `tile_image`; the model's `image_settings`, which `from_pretrained` reads from the checkpoint, when
            None, and Llama 4's published ones where it has none.

    Returns:
        One tensor [tiles of the image * tokens, width] an image, in the order of `images`, its tiles in their order.

    Raises:
        TypeError: `images` is not a sequence, `model` is no such module, `settings` are none, a `TiledImage` does not
            hold floats, or what `tile_image` raises it for.
        ValueError: `images` is empty, the settings or a `TiledImage` have tiles of another size than the model's or, on
            the CPU, NaN or infinity in them, or what `tile_image` raises it for.
        OSError: an image file is missing or cannot be decoded.
        Those about one image name its index.
    """
    check_images(images)
    image_size, device, dtype = _of_model(model)
    settings = settings or getattr(model, "image_settings", None) or Llama4ImageSettings(image_size=image_size)
    if isinstance(settings, Llama4ImageSettings) and settings.image_size != image_size:
        raise ValueError(
            f"settings: got image_size {settings.image_size}, expected {image_size} as model.config.image_size says"
        )
    pixel_values = []
    for index, image in enumerate(images):
        with naming(f"images[{index}]"):
            tiles = image if isinstance(image, TiledImage) else tile_image(image, settings=settings)
            pixel_values.append(_checked(tiles, image_size).to(device, dtype))
    features = model(torch.cat(pixel_values))
    if projector is not None:
        features = projector(features)
    return [of_image.flatten(0, 1) for of_image in features.split([len(tiles) for tiles in pixel_values])]


def _of_model(model: nn.Module) -> tuple[int, torch.device, torch.dtype]:
    placed = placement(model) if isinstance(model, nn.Module) else None
    image_size: int | None = getattr(getattr(model, "config", None), "image_size", None)
    if placed is None or image_size is None:
        raise TypeError(
            f"model: expected a module with parameters and config.image_size, got {type(model).__name__}; Qwen2.5-VL "
            "has vit_encoder.qwen2_5_vl.encode_images"
        )
    return image_size, *placed


def _checked(image: TiledImage, image_size: int) -> Tensor:
    pixel_values = image.pixel_values
    if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
        received = pixel_values.dtype if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
        raise TypeError(f"expected pixel_values, a tensor of floats in [-1, 1], got {received}")
    if pixel_values.shape[1:] != (3, image_size, image_size) or len(pixel_values) == 0:
        raise ValueError(
            f"expected pixel_values [tiles, 3, {image_size}, {image_size}] as model.config.image_size "
            f"says, got {tuple(pixel_values.shape)}"
        )
    # On an accelerator the answer would have to be waited for.
    if pixel_values.device.type == "cpu" and not bool(pixel_values.isfinite().all()):
        raise ValueError("expected finite pixel_values, got NaN or infinity")
    return pixel_values
