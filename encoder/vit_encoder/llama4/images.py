"""Image to tiles: canvas choice, resize, tiling and normalisation of Llama 4, outside the graph and on the CPU.

The behaviour is that of transformers' `Llama4ImageProcessor` and of Meta's llama-models
(`models/llama4/preprocess.py`), which normalises in fp32 where transformers does so in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from vit_encoder.configs import HfConfig, side
from vit_encoder.image_settings import (
    Normalisation,
    changed,
    check_positive_int,
    given_settings,
    naming,
    processor_sections,
)
from vit_encoder.images import ImageInput, normalise, resize, to_rgb

# Every canvas is tried, so a bound keeps a slip of the hand from taking all memory.
_MOST_TILES = 1024
_PROCESSORS = ("Llama4ImageProcessor", "Llama4ImageProcessorFast")
_NAMES = {
    "image_size": "size",
    "max_tiles": "max_patches",
    **{name: name for name in ("resize_to_max_canvas", "image_mean", "image_std", "rescale_factor")},
}


@dataclass(frozen=True, kw_only=True)
class Llama4ImageSettings(Normalisation):
    """How an image becomes tiles; the defaults are those of transformers' `Llama4ImageProcessor`, and Llama 4's.

    Args:
        image_size: side of a tile in pixels, the encoder's.
        max_tiles: most tiles in the canvas, the global tile not counted (`max_patches` in transformers).
        resize_to_max_canvas: enlarge the image as far as a canvas allows, instead of to `image_size` at most.
        image_mean, image_std, rescale_factor: as in `Normalisation`.

    Raises:
        TypeError: a value of another type.
        ValueError: a number below 1, `max_tiles` above 1024, or one that is not finite or divides by zero.
    """

    image_size: int = 336
    max_tiles: int = 16
    resize_to_max_canvas: bool = False
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_size", "max_tiles"):
            object.__setattr__(self, name, check_positive_int(name, getattr(self, name)))
        if self.max_tiles > _MOST_TILES:
            raise ValueError(f"max_tiles: expected at most {_MOST_TILES}, got {self.max_tiles}")
        if not isinstance(self.resize_to_max_canvas, bool):
            raise TypeError(f"resize_to_max_canvas: expected a bool, got {self.resize_to_max_canvas!r}")

    @classmethod
    def from_hf(cls, source: HfConfig, *, image_size: int = 336) -> Llama4ImageSettings:
        """Reads what a checkpoint says of its image processor; a folder with no such file has the defaults.

        Args:
            source: the checkpoint's folder, of which processor_config.json or preprocessor_config.json is read; or the
                path of such a file, a mapping or a processor of transformers.
            image_size: where the source does not say it.

        Raises:
            OSError: a path that cannot be read.
            TypeError: `source` or a value is of another type.
            ValueError: a file without a JSON object; a setting that cannot be followed here (another resampling, no
                resize, a crop, padding, the processor of another model); and what the constructor raises it for.
        """
        section, _ = processor_sections(source)
        if section is None:
            return cls(image_size=image_size)
        given = given_settings(section, types=_PROCESSORS, resample=Image.Resampling.BILINEAR, names=_NAMES)
        with naming(section.source):
            given["image_size"] = _square(given.get("image_size", image_size))
            return cls(**given)


def _square(size: object) -> object:
    """The side of a `size` as processors have it."""
    if not isinstance(size, Mapping):
        return side("size", size)
    if set(size) != {"height", "width"}:
        raise ValueError(f"size: got {dict(size)}, expected height and width")
    return side("size", [size["height"], size["width"]])


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


def tile_image(
    image: ImageInput,
    *,
    settings: Llama4ImageSettings | None = None,
    image_size: int | None = None,
    max_tiles: int | None = None,
) -> TiledImage:
    """Fit an image onto the best canvas of at most `max_tiles` tiles and cut it up.

    The image is resized with its aspect ratio kept (antialiased bilinear; enlarged to at most `image_size` a side
    unless the settings say otherwise), padded with black at the right and the bottom, and normalised in fp32.

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
        settings: the checkpoint's, from `Llama4ImageSettings.from_hf(folder)`; Llama 4's published ones when None.
        image_size, max_tiles: instead of the settings'.

    Returns:
        The tiles, in float32 on the CPU.

    Raises:
        TypeError: `image` is of another type or dtype, `settings` are none, or as `Llama4ImageSettings` says.
        ValueError: the wrong rank or number of channels, no pixels, values out of range or not finite, more pixels
            than PIL's limit against decompression bombs, or as `Llama4ImageSettings` says.
        OSError: a file that is missing, is not a regular file, or cannot be decoded (truncated, not an image).
    """
    if not isinstance(settings, Llama4ImageSettings | None):
        raise TypeError(f"settings: got {type(settings).__name__}, expected Llama4ImageSettings or None")
    changes = {"image_size": image_size, "max_tiles": max_tiles}
    settings = changed(settings or Llama4ImageSettings(), changes)
    pixels, size = to_rgb(image), settings.image_size
    height, width = pixels.shape[-2:]
    high, wide = _canvas(height, width, settings)
    canvas_height, canvas_width = high * size, wide * size
    enlarged_to = None if settings.resize_to_max_canvas else size
    fitted = resize(pixels, *_fitted_size(height, width, canvas_height, canvas_width, enlarged_to), "bilinear")
    canvas = F.pad(fitted, (0, canvas_width - fitted.shape[-1], 0, canvas_height - fitted.shape[-2]))
    tiles = rearrange(canvas, "c (high h) (wide w) -> (high wide) c h w", high=high, wide=wide)
    if len(tiles) > 1:
        tiles = torch.cat([tiles, resize(pixels, size, size, "bilinear")[None]])
    return TiledImage(normalise(tiles, settings), (high, wide))


def best_canvas(
    height: int, width: int, *, image_size: int = 336, max_tiles: int = 16, resize_to_max_canvas: bool = False
) -> tuple[int, int]:
    """Choose the canvas for an image: the smallest upscale of at least 1, else the largest below 1, ties by area.

    Args:
        height: the image's height in pixels.
        width: the image's width in pixels.
        image_size: side of a tile in pixels.
        max_tiles: most tiles in a canvas.
        resize_to_max_canvas: choose the largest upscale instead.

    Returns:
        (high, wide), in tiles.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is below 1, or max_tiles above 1024.
    """
    for name, value in {"height": height, "width": width}.items():
        check_positive_int(name, value)
    settings = Llama4ImageSettings(
        image_size=image_size, max_tiles=max_tiles, resize_to_max_canvas=resize_to_max_canvas
    )
    return _canvas(height, width, settings)


def _canvas(height: int, width: int, settings: Llama4ImageSettings) -> tuple[int, int]:
    canvases, size = _canvases(settings.max_tiles), settings.image_size
    # float32, as in transformers: sides above 2**24 pixels round, and with them the comparisons.
    scales = ((canvases * size).astype(np.float32) / np.array([height, width], dtype=np.float32)).min(axis=1)
    upscales = scales[scales >= 1]
    enlarge_most = settings.resize_to_max_canvas or not upscales.size
    scale = scales.max() if enlarge_most else upscales.min()
    # No tie is left: if a height a and a width b bind at the same scale, then a x b itself is a canvas with that scale,
    # and every other such canvas is larger.
    fitting = canvases[scales == scale]
    high, wide = fitting[fitting.prod(axis=1).argmin()].tolist()
    return high, wide


@lru_cache
def _canvases(max_tiles: int) -> np.ndarray:
    return np.array([(high, wide) for high in range(1, max_tiles + 1) for wide in range(1, max_tiles // high + 1)])


def _fitted_size(
    height: int, width: int, canvas_height: int, canvas_width: int, enlarged_to: int | None
) -> tuple[int, int]:
    """Size of the image on its canvas: enlarged to `enlarged_to` at most, else shrunk to fit, aspect ratio kept."""
    room_height, scale_height = _side_scale(height, canvas_height, enlarged_to)
    room_width, scale_width = _side_scale(width, canvas_width, enlarged_to)
    if scale_width < scale_height:
        return min(max(_scaled(height, scale_width), 1), room_height), room_width
    return room_height, min(max(_scaled(width, scale_height), 1), room_width)


def _side_scale(length: int, canvas_length: int, enlarged_to: int | None) -> tuple[int, np.floating]:
    """The room for one side, and its scale in the precision that transformers computes it in.

    There a side bound by the canvas is a tensor (float32), any other a Python number (float64), and the rounding
    decides whether the other side comes out one pixel shorter.
    """
    wanted = canvas_length if enlarged_to is None else max(length, enlarged_to)
    if canvas_length < wanted or enlarged_to is None:
        return canvas_length, np.float32(canvas_length) / np.float32(length)
    return wanted, np.float64(wanted) / np.float64(length)


def _scaled(length: int, scale: np.floating) -> int:
    return math.floor(type(scale)(length) * scale)
