"""Image to tiles: canvas choice, resize, tiling and normalisation of Llama 4, outside the graph and on the CPU.

The behaviour is that of transformers' `Llama4ImageProcessor` (resize_to_max_canvas=False) and of Meta's llama-models
(`models/llama4/preprocess.py`), which normalises in fp32 where transformers does so in bf16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vit_encoder.images import ImageInput, check_positive_int, resize, to_rgb

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
    pixels = to_rgb(image)
    height, width = pixels.shape[-2:]
    high, wide = best_canvas(height, width, image_size=image_size, max_tiles=max_tiles)
    canvas_height, canvas_width = high * image_size, wide * image_size
    fitted = resize(pixels, *_fitted_size(height, width, canvas_height, canvas_width, image_size), "bilinear")
    canvas = F.pad(fitted, (0, canvas_width - fitted.shape[-1], 0, canvas_height - fitted.shape[-2]))
    tiles = rearrange(canvas, "c (high h) (wide w) -> (high wide) c h w", high=high, wide=wide)
    if len(tiles) > 1:
        tiles = torch.cat([tiles, resize(pixels, image_size, image_size, "bilinear")[None]])
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
        check_positive_int(name, value)
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


def _normalise(pixels: Tensor) -> Tensor:
    fractions = pixels if pixels.is_floating_point() else pixels.to(torch.float32) / 255
    return (fractions - 0.5) / 0.5
