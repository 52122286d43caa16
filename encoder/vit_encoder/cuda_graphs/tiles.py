"""Tiles of Llama 4 in the graphs of the runner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vit_encoder.cuda_graphs.planner import LLAMA4_BUDGETS


class TileInputs:
    """Images of tiles, each tile for itself: padding is tiles of zeros, which no other tile sees.

    Args:
        model: a `Llama4VisionModel`, or any module with `config.num_channels` and `config.image_size` that takes
            [tiles, num_channels, image_size, image_size] to [tiles, ...].

    Raises:
        TypeError: another model.
    """

    budgets: tuple[int, ...] = LLAMA4_BUDGETS

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        if not hasattr(config, "num_channels") or not hasattr(config, "image_size"):
            raise TypeError(
                f"model: got {type(model).__name__}, expected a config with num_channels and image_size, or "
                "that of a Qwen encoder"
            )
        self.module = model
        self._shape = (config.num_channels, config.image_size, config.image_size)
        self._pixels = next(model.parameters()).new_empty(0)

    def check(self, images: Sequence[Any]) -> None:
        """Images are floating-point tensors [tiles, num_channels, image_size, image_size]."""
        for index, image in enumerate(images):
            if not isinstance(image, Tensor) or not image.is_floating_point():
                received = image.dtype if isinstance(image, Tensor) else type(image).__name__
                raise TypeError(f"images[{index}]: got {received}, expected a floating-point tensor")
            if image.shape[1:] != self._shape or len(image) == 0:
                raise ValueError(
                    f"images[{index}]: got shape {tuple(image.shape)}, expected [tiles, *{self._shape}], at least one "
                    "tile"
                )

    def check_budgets(self, budgets: Sequence[int]) -> None:
        """Every number of tiles can be one."""

    def size(self, image: Tensor) -> int:
        """Tiles."""
        return len(image)

    def allocate(self, largest: int) -> None:
        """Tiles of zeros."""
        self._pixels = self._pixels.new_zeros(largest, *self._shape)

    def static(self, budget: int) -> tuple[Tensor, ...]:
        """[budget, num_channels, image_size, image_size]."""
        return (self._pixels[:budget],)

    def fill(self, budget: int, images: Sequence[Tensor]) -> None:
        """Tiles, and zeros behind them."""
        used = sum(map(len, images))
        torch.cat([self._placed(image) for image in images], out=self._pixels[:used])
        # What an earlier batch left there may hold NaN.
        self._pixels[used:budget].zero_()

    def uncaptured(self, images: Sequence[Tensor]) -> Tensor:
        """All tiles in one call."""
        return self.module(torch.cat([self._placed(image) for image in images]))

    def split(self, features: Tensor, images: Sequence[Tensor]) -> list[Tensor]:
        """The features of each image's tiles."""
        counts = [len(image) for image in images]
        return list(features[: sum(counts)].split(counts))

    def _placed(self, image: Tensor) -> Tensor:
        return image.to(self._pixels.device, self._pixels.dtype)
