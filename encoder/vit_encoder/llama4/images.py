"""Image to tiles: canvas choice, resize, tiling and normalisation of Llama 4, outside the graph and on the CPU.

The behaviour is that of transformers' `Llama4ImageProcessor` (resize_to_max_canvas=False) and of Meta's llama-models
(`models/llama4/preprocess.py`), which normalises in fp32 where transformers does so in bf16.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

ImageInput: TypeAlias = Image.Image | str | os.PathLike[str] | np.ndarray | Tensor

_ACCEPTED_PIXELS = (
    "expected a numpy array [height, width] or [height, width, 1, 3 or 4 channels], or a tensor [height, width] or "
    "[1, 3 or 4 channels, height, width], of uint8, uint16 or floats in [0, 1]"
)


# Every canvas is tried, so a bound keeps a slip of the hand from taking all memory.
_MOST_TILES = 1024


@dataclass(frozen=True, eq=False)
class TiledImage:
    """An image cut into tiles, as the vision encoder takes it.

    Attributes:
        pixel_values: float32 [tiles, 3, image_size, image_size], normalised to [-1, 1]: the canvas row by row, then,
            when it has more than one tile, the whole image squeezed into one global tile.
        aspect_ratio: the canvas in tiles, (high, wide).
    """

    pixel_values: Tensor
    aspect_ratio: tuple[int, int]


def tile_image(image: ImageInput, *, image_size: int = 336, max_tiles: int = 16) -> TiledImage:
    """Fit an image onto the best canvas of at most `max_tiles` tiles and cut it up.

    The image is resized with its aspect ratio kept (antialiased bilinear; enlarged to at most `image_size` a side),
    padded with black at the right and the bottom, and normalised in fp32 with mean = std = 0.5.

    8-bit images are resized in uint8, as transformers does, and give the same pixels. What becomes of other kinds:
    - Transparency (RGBA, LA, PA, premultiplied RGBa and La, a transparent palette entry or colour, four channels) is
      composited over white, as in transformers.
    - Greyscale is repeated over the three channels; any other PIL mode goes through PIL's conversion to RGB.
    - 16-bit images (I;16, a 16-bit PGM file, uint16 arrays) are scaled by 1/65535 and resized in float32.
      transformers clips PIL's at 255, which turns nearly all of the image white.
    - The PIL modes I and F hold 0..255, PIL's own convention, and F is resized in float32; other values are refused,
      where transformers clips them.
    - Float arrays and tensors hold [0, 1] and are resized in float32, as transformers does with do_rescale=False.
    - The EXIF orientation of files and PIL images is applied, as transformers does for files.
    - Of an animation, the current frame is taken.

    Args:
        image: a PIL image; the path of an image file; a numpy array [height, width] or [height, width, channels]; or a
            tensor [height, width] or [channels, height, width] on any device. Arrays and tensors hold 1, 3 or 4
            channels of uint8, uint16 or floats in [0, 1].
        image_size: side of a tile in pixels.
        max_tiles: most tiles in the canvas, the global tile not counted.

    Returns:
        The tiles, on the CPU.

    Raises:
        TypeError: `image` is of another type or dtype, or `image_size` or `max_tiles` is not an int.
        ValueError: the wrong rank or number of channels, no pixels, values out of range or not finite, more pixels
            than PIL's limit against decompression bombs, `image_size` or `max_tiles` below 1, `max_tiles` above 1024.
        OSError: a file that is missing, is not a regular file, or cannot be decoded (truncated, not an image).
    """
    pixels = _to_rgb(image)
    height, width = pixels.shape[-2:]
    high, wide = best_canvas(height, width, image_size=image_size, max_tiles=max_tiles)
    canvas_height, canvas_width = high * image_size, wide * image_size
    fitted = _resize(pixels, *_fitted_size(height, width, canvas_height, canvas_width, image_size))
    canvas = F.pad(fitted, (0, canvas_width - fitted.shape[-1], 0, canvas_height - fitted.shape[-2]))
    tiles = rearrange(canvas, "c (high h) (wide w) -> (high wide) c h w", high=high, wide=wide)
    if len(tiles) > 1:
        tiles = torch.cat([tiles, _resize(pixels, image_size, image_size)[None]])
    return TiledImage(_normalise(tiles), (high, wide))


def best_canvas(height: int, width: int, *, image_size: int = 336, max_tiles: int = 16) -> tuple[int, int]:
    """Choose the canvas for an image: the smallest upscale of at least 1, else the largest below 1, ties by area.

    Args:
        height: the image's height in pixels.
        width: the image's width in pixels.
        image_size: side of a tile in pixels.
        max_tiles: most tiles in a canvas.

    Returns:
        (high, wide), in tiles.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is below 1, or max_tiles above 1024.
    """
    sizes = {"height": height, "width": width, "image_size": image_size, "max_tiles": max_tiles}
    for name, value in sizes.items():
        _check_positive_int(name, value)
    if max_tiles > _MOST_TILES:
        raise ValueError(f"max_tiles: expected at most {_MOST_TILES}, got {max_tiles}")
    canvases = _canvases(max_tiles)
    # float32, as in transformers: sides above 2**24 pixels round, and with them the comparisons.
    scales = ((canvases * image_size).astype(np.float32) / np.array([height, width], dtype=np.float32)).min(axis=1)
    upscales = scales[scales >= 1]
    scale = upscales.min() if upscales.size else scales.max()
    # No tie is left: if a height a and a width b bind at the same scale, then a x b itself is a canvas with that scale,
    # and every other such canvas is larger.
    fitting = canvases[scales == scale]
    high, wide = fitting[fitting.prod(axis=1).argmin()].tolist()
    return high, wide


def _check_positive_int(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {value}")


@lru_cache
def _canvases(max_tiles: int) -> np.ndarray:
    return np.array([(high, wide) for high in range(1, max_tiles + 1) for wide in range(1, max_tiles // high + 1)])


def _fitted_size(height: int, width: int, canvas_height: int, canvas_width: int, image_size: int) -> tuple[int, int]:
    """Size of the image on its canvas: enlarged to `image_size` at most, else shrunk to fit, aspect ratio kept."""
    room_height, scale_height = _side_scale(height, canvas_height, image_size)
    room_width, scale_width = _side_scale(width, canvas_width, image_size)
    if scale_width < scale_height:
        return max(_scaled(height, scale_width), 1), room_width
    return room_height, max(_scaled(width, scale_height), 1)


def _side_scale(length: int, canvas_length: int, image_size: int) -> tuple[int, np.floating]:
    """The room for one side, and its scale in the precision that transformers computes it in.

    There a side bound by the canvas is a tensor (float32), any other a Python number (float64), and the rounding
    decides whether the other side comes out one pixel shorter.
    """
    wanted = max(length, image_size)
    if canvas_length < wanted:
        return canvas_length, np.float32(canvas_length) / np.float32(length)
    return wanted, np.float64(wanted) / np.float64(length)


def _scaled(length: int, scale: np.floating) -> int:
    return math.floor(type(scale)(length) * scale)


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels[None], (height, width), mode="bilinear", align_corners=False, antialias=True)[0]


def _normalise(pixels: Tensor) -> Tensor:
    fractions = pixels if pixels.is_floating_point() else pixels.to(torch.float32) / 255
    return (fractions - 0.5) / 0.5


def _to_rgb(image: ImageInput) -> Tensor:
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
