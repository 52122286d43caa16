"""The encoders whose graphs have budgets, and what an image of a size takes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vit_encoder import Qwen2_5_VLVisionConfig, Qwen3VLVisionConfig
from vit_encoder.cuda_graphs import LLAMA4_BUDGETS, QWEN2_5_VL_BUDGETS, QWEN3_VL_BUDGETS
from vit_encoder.cuda_graphs.patches import LAYOUTS
from vit_encoder.llama4.images import best_canvas
from vit_encoder.qwen2_5_vl.images import resized
from vit_encoder.qwen3_vl import Qwen3VLImageSettings

from experiments.graph_budgets.mixes import Mix
from experiments.graph_budgets.padding import Image


@dataclass(frozen=True)
class Encoder:
    """One encoder.

    Attributes:
        unit: what its budgets count.
        budgets: ours.
        smallest: of the powers of two: that of vLLM for the Qwen encoders, 64 features; 1 tile for Llama 4.
        taken: (width, height) -> what an image takes, and what of that is useful.
    """

    name: str
    unit: str
    budgets: tuple[int, ...]
    smallest: int
    taken: Callable[[int, int], Image]

    def images(self, mix: Mix) -> dict[Image, float]:
        """What images of a mix take, and the probability of each."""
        found: dict[Image, float] = {}
        for size, probability in mix.sizes.items():
            taken = self.taken(*size)
            found[taken] = found.get(taken, 0) + probability
        return found


def _llama4(width: int, height: int) -> Image:
    high, wide = best_canvas(height, width)
    tiles = high * wide + (high * wide > 1)  # a global tile beside several others
    return tiles, tiles


def _qwen2_5_vl(width: int, height: int) -> Image:
    """With the bounds of transformers' image processor: at most 1280 features of 28 x 28 pixels."""
    config = Qwen2_5_VLVisionConfig.qwen2_5_vl_7b()
    rows, columns = (side // config.patch_size for side in resized(height, width))
    return LAYOUTS[type(config)].size(1, rows, columns, config), rows * columns


def _qwen3_vl(width: int, height: int) -> Image:
    """With the bounds of the published checkpoints: 65536 to 16777216 pixels."""
    config = Qwen3VLVisionConfig.qwen3_vl_8b()
    bounds = Qwen3VLImageSettings().image
    size = resized(height, width, factor=32, min_pixels=bounds.min_pixels, max_pixels=bounds.max_pixels)
    rows, columns = (side // config.patch_size for side in size)
    return LAYOUTS[type(config)].size(1, rows, columns, config), rows * columns


ENCODERS = (
    Encoder("Llama 4", "tiles", LLAMA4_BUDGETS, 1, _llama4),
    Encoder("Qwen2.5-VL", "patches", QWEN2_5_VL_BUDGETS, 256, _qwen2_5_vl),
    Encoder("Qwen3-VL", "patches", QWEN3_VL_BUDGETS, 256, _qwen3_vl),
)
