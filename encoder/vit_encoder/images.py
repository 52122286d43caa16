"""Reading an image of any kind, and resizing it, as every encoder's image preparation does: on the CPU."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from vit_encoder.image_settings import Normalisation

ImageInput: TypeAlias = Image.Image | str | os.PathLike[str] | np.ndarray | Tensor

_ACCEPTED_PIXELS = (
    "expected a numpy array [height, width] or [height, width, 1, 3 or 4 channels], or a tensor [height, width] or "
    "[1, 3 or 4 channels, height, width], of uint8, uint16 or floats in [0, 1]"
)


def check_images(images: object) -> None:
    """Raise TypeError for what is no sequence of images, ValueError for an empty one."""
    if not isinstance(images, Sequence) or isinstance(images, str | bytes):
        raise TypeError(
            f"images: expected a sequence of images, got one {type(images).__name__}; pass [image] to encode one image"
        )
    if not images:
        raise ValueError("images: expected at least one image, got an empty sequence")


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    """Where and in which dtype a module takes its pixels: as its first floating parameter; None where it has none."""
    parameter = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    return None if parameter is None else (parameter.device, parameter.dtype)


def resize(pixels: Tensor, height: int, width: int, mode: str) -> Tensor:
    """[channels, height, width] in another size, antialiased, in the dtype that it has (uint8 or floating)."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels[None], (height, width), mode=mode, align_corners=False, antialias=True)[0]


def normalise(pixels: Tensor, normalisation: Normalisation) -> Tensor:
    """[3, height, width] of levels (uint8), or of fractions of 255 levels (floating), normalised in float32."""
    step = normalisation.rescale_factor * (255 if pixels.is_floating_point() else 1)
    # One subtraction and one division of the levels, as transformers has it: the roundings are the same. Device and
    # dtype are given because those that PyTorch takes by default are the user's.
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device="cpu")[:, None, None] * (1.0 / step)
        for values in (normalisation.image_mean, normalisation.image_std)
    )
    return (pixels.to(torch.float32) - mean) / std


def to_rgb(image: ImageInput) -> Tensor:
    """Read any accepted image as [3, height, width], uint8 or float32 in [0, 1], on the CPU."""
    if isinstance(image, str | os.PathLike):
        with _open(image) as opened:
            return _rgb_from_pil(opened)
    if isinstance(image, Image.Image):
        return _rgb_from_pil(image)
    if isinstance(image, np.ndarray):
        return _rgb_from_array(image)
    if isinstance(image, Tensor):
        return _rgb_from_tensor(image, f"a {image.dtype} tensor of shape {tuple(image.shape)}")
    raise TypeError(f"image: expected a PIL image, a path, a numpy array or a tensor, got {type(image).__name__}")


@contextmanager
def _decoding(source: str) -> Iterator[None]:
    """Turn whatever PIL's decoders raise on damaged data, which may be anything, into one OSError."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"image: {source} looks like a decompression bomb: {error}") from error
    except Exception as error:
        raise OSError(f"image: expected a complete image, got {source}, which PIL cannot read: {error}") from error


def _open(path: str | os.PathLike[str]) -> Image.Image:
    if not os.path.exists(path):
        raise FileNotFoundError(f"image: expected the path of an image file, got {path!r}, which does not exist")
    # A pipe or a device would block the read or never end it.
    if not os.path.isfile(path):
        raise OSError(f"image: expected the path of an image file, got {path!r}, which is not a regular file")
    with _decoding(f"the file {os.fspath(path)!r}"):
        return Image.open(path)


def _rgb_from_pil(image: Image.Image) -> Tensor:
    path = getattr(image, "filename", "")
    source = f"the file {path!r}" if path else f"a PIL image of mode {image.mode}"
    _check_decodable(image, source)
    # PIL decodes 16-bit greyscale to mode I, scaled to 0..65535, in this format only; elsewhere to I;16.
    limit = 65535 if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM") else 255
    with _decoding(source):
        upright = ImageOps.exif_transpose(image)
        if upright.mode[0] not in "IF":
            return torch.from_numpy(np.array(_over_white(upright))).permute(2, 0, 1)
        grey = np.array(upright)
    return _rgb_from_array(_grey_fractions(grey, limit, upright.info.get("transparency"), source))


def _check_decodable(image: Image.Image, source: str) -> None:
    """Refuse an image before its pixels are decoded."""
    if 0 in image.size:
        raise ValueError(f"image: expected at least one pixel, got {source} of size {image.size}")
    if Image.MAX_IMAGE_PIXELS is not None and math.prod(image.size) > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"image: expected at most {Image.MAX_IMAGE_PIXELS} pixels (PIL.Image.MAX_IMAGE_PIXELS, its limit against "
            f"decompression bombs), got {source} of size {image.size}"
        )
    if image.format == "EPS":
        raise ValueError(f"image: expected pixels, got {source}, a PostScript program that may never end")


def _over_white(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        straight = image.convert("LA") if image.mode == "La" else image
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), straight.convert("RGBA"))
    return image.convert("RGB")


def _grey_fractions(grey: np.ndarray, limit: int, transparent: int | None, source: str) -> np.ndarray:
    """Greyscale beyond 8 bits or signed, as the narrowest of uint8, uint16 and float32 in [0, 1] that holds it."""
    low, high = grey.min(), grey.max()
    if not (low >= 0 and high <= limit):
        raise ValueError(f"image: expected values from 0 to {limit}, got {source} with values from {low} to {high}")
    if transparent is not None:
        grey[grey == transparent] = limit
    if grey.dtype.kind == "f":
        return grey / np.float32(limit)
    return grey.astype(np.uint16 if limit == 65535 else np.uint8)


def _rgb_from_array(array: np.ndarray) -> Tensor:
    received = f"a {array.dtype} array of shape {array.shape}"
    if array.dtype.kind != "f" and array.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise TypeError(f"image: {_ACCEPTED_PIXELS}, got {received}")
    dtype = np.float32 if array.dtype.kind == "f" else array.dtype.newbyteorder("=")
    # A copy in native byte order with positive strides: torch takes no other, and warns of a read-only array.
    with np.errstate(over="ignore"):
        pixels = torch.from_numpy(np.array(array, dtype=dtype, order="C"))
    return _rgb_from_tensor(pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels, received)


def _rgb_from_tensor(pixels: Tensor, received: str) -> Tensor:
    """`pixels` is [height, width] or [channels, height, width]; `received` says what the caller passed."""
    dense = pixels.layout is torch.strided and not pixels.is_meta
    if not (dense and (pixels.is_floating_point() or pixels.dtype in (torch.uint8, torch.uint16))):
        raise TypeError(f"image: {_ACCEPTED_PIXELS}, got {received}")
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[0] not in (1, 3, 4)) or 0 in pixels.shape:
        raise ValueError(f"image: {_ACCEPTED_PIXELS}, got {received}")
    pixels = pixels.cpu() if pixels.ndim == 3 else pixels.cpu()[None]
    if pixels.is_floating_point():
        pixels = pixels.to(torch.float32)
        _check_fractions(pixels, received)
    elif pixels.dtype == torch.uint16:
        pixels = pixels.to(torch.float32) / 65535
    return _blend_over_white(pixels) if pixels.shape[0] == 4 else pixels.expand(3, -1, -1)


def _check_fractions(pixels: Tensor, received: str) -> None:
    low, high = (bound.item() for bound in pixels.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"image: expected floats in [0, 1], got {received} with values from {low} to {high}")


def _blend_over_white(rgba: Tensor) -> Tensor:
    whole = 1 if rgba.is_floating_point() else 255
    colour, alpha = rgba[:3].to(torch.float32) / whole, rgba[3:].to(torch.float32) / whole
    blended = colour * alpha + (1 - alpha)
    return blended if rgba.is_floating_point() else (blended * 255).round().to(torch.uint8)
