"""Patches of the Qwen encoders in the graphs of the runner."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_encoder.cuda_graphs.planner import QWEN2_5_VL_BUDGETS, QWEN3_VL_BUDGETS
from vit_encoder.images import placement
from vit_encoder.qwen2_5_vl.config import Qwen2_5_VLVisionConfig
from vit_encoder.qwen2_5_vl.metadata import vision_metadata
from vit_encoder.qwen3_vl.config import Qwen3VLVisionConfig
from vit_encoder.qwen3_vl.metadata import vision_metadata as qwen3_vl_metadata


@dataclass(frozen=True)
class SequenceRoom:
    """Sequences that an encoder attends within.

    Attributes:
        of_image: how many an image is: of (frames, rows, columns of patches, config).
        patches_each: patches of a budget for each sequence that it has room for. A graph launches attention for all of
            them, and an image whose sequences are smaller takes as much of a budget as if they were not.
    """

    of_image: Callable[[int, int, int, Any], int]
    patches_each: int


@dataclass(frozen=True)
class PatchLayout:
    """What the padding must know of the tensors that an encoder takes beside the pixels.

    Those that are neither boundaries nor orders have a row for each patch or unit, and zeros for padding.

    Attributes:
        metadata: (grid_thw, config, device) -> a NamedTuple of them, in the order of the encoder's arguments.
        sequences: by the name of their boundaries, int32 [sequences + 1] in patches. Padding repeats the last boundary:
            empty sequences, and patches outside of all of them, for which attention gives zeros.
        orders: names of permutations of the units, int64 [units]. Padding stays in its place.
        budgets: patches of the graphs to capture where a user names none.
    """

    metadata: Callable[[Tensor, Any, torch.device], Any]
    sequences: Mapping[str, SequenceRoom]
    orders: tuple[str, ...]
    budgets: tuple[int, ...]

    def size(self, frames: int, rows: int, columns: int, config: Any) -> int:
        """Patches of an image, or those of a budget with room for its sequences where that is more."""
        room = (kind.patches_each * kind.of_image(frames, rows, columns, config) for kind in self.sequences.values())
        return max(frames * rows * columns, *room)


def _frames(frames: int, rows: int, columns: int, config: Any) -> int:
    return frames


def _windows(frames: int, rows: int, columns: int, config: Qwen2_5_VLVisionConfig) -> int:
    side = config.window_units * config.spatial_merge_size
    return frames * math.ceil(rows / side) * math.ceil(columns / side)


FRAMES = SequenceRoom(_frames, 64)
LAYOUTS: dict[type, PatchLayout] = {
    Qwen2_5_VLVisionConfig: PatchLayout(
        vision_metadata,
        sequences={"cu_seqlens": FRAMES, "cu_window_seqlens": SequenceRoom(_windows, 32)},
        orders=("window_index", "reverse_index"),
        budgets=QWEN2_5_VL_BUDGETS,
    ),
    Qwen3VLVisionConfig: PatchLayout(
        qwen3_vl_metadata, sequences={"cu_seqlens": FRAMES}, orders=(), budgets=QWEN3_VL_BUDGETS
    ),
}
"""By the class of a model's configuration."""


class PatchInputs:
    """Images and videos of patches, of which each frame, or window of it, is a sequence.

    Args:
        model: one whose configuration has a layout. Its `encoder` is captured; it takes the pixels and the metadata.
        layout: of what that takes.
    """

    def __init__(self, model: Any, layout: PatchLayout) -> None:
        placed = placement(model)
        assert placed is not None  # the runner has seen a parameter
        self._device, self._dtype = placed
        self._model, self._config, self._layout = model, model.config, layout
        self._memory: dict[str, Tensor] = {}
        self._patches_a_row: dict[str, int] = {}
        self._places = torch.empty(0)
        self.module: nn.Module = model.encoder
        self.budgets = layout.budgets

    def check(self, images: Sequence[Any]) -> None:
        """Images have pixel_values [patches, patch_dim] and grid_thw [1, 3], as a `PatchedImage`."""
        for index, image in enumerate(images):
            pixels, grid = getattr(image, "pixel_values", None), getattr(image, "grid_thw", None)
            if not isinstance(pixels, Tensor) or not isinstance(grid, Tensor):
                raise TypeError(f"images[{index}]: got {type(image).__name__}, expected a PatchedImage")
            if not pixels.is_floating_point():
                raise TypeError(f"images[{index}].pixel_values: got {pixels.dtype}, expected a floating-point tensor")
            if grid.shape != (1, 3) or grid.device.type != "cpu" or grid.is_floating_point():
                raise ValueError(
                    f"images[{index}].grid_thw: got {grid.dtype} {tuple(grid.shape)} on {grid.device}, expected "
                    "integers (1, 3) on cpu"
                )
            if pixels.shape != (expected := (int(grid.prod()), self._config.patch_dim)):
                raise ValueError(
                    f"images[{index}].pixel_values: got shape {tuple(pixels.shape)}, expected {expected} for grid_thw "
                    f"{grid[0].tolist()}"
                )

    def check_budgets(self, budgets: Sequence[int]) -> None:
        """Budgets are whole units."""
        unit = self._config.merge_unit
        if bad := [budget for budget in budgets if budget % unit]:
            raise ValueError(f"budgets: got {bad[0]}, expected multiples of the {unit} patches of a unit")

    def size(self, image: Any) -> int:
        """Patches, or those of a budget with room for the image's sequences where that is more."""
        frames, rows, columns = image.grid_thw[0].tolist()
        return self._layout.size(frames, rows, columns, self._config)

    def allocate(self, largest: int) -> None:
        """Zeros: no frame and no window, all patches outside of them."""
        unit, side = self._config.merge_unit, self._config.spatial_merge_size
        self._places = torch.arange(largest // unit, device=self._device)
        probe = self._metadata(torch.tensor([[1, side, side]], device="cpu"))
        self._patches_a_row = {"pixel_values": 1} | {name: unit // len(tensor) for name, tensor in probe.items()}
        pixels = torch.zeros(largest, self._config.patch_dim, device=self._device, dtype=self._dtype)
        self._memory = {"pixel_values": pixels}
        for name, tensor in probe.items():
            self._memory[name] = tensor.new_zeros(self._rows(name, largest), *tensor.shape[1:])

    def static(self, budget: int) -> tuple[Tensor, ...]:
        """The pixels [budget, patch_dim] and the metadata of so many patches."""
        return tuple(tensor[: self._rows(name, budget)] for name, tensor in self._memory.items())

    def fill(self, budget: int, images: Sequence[Any]) -> None:
        """Images, and behind them zeros, empty sequences, and units in their places."""
        used = sum(len(image.pixel_values) for image in images)
        pixels = self._memory["pixel_values"]
        torch.cat([self._placed(image) for image in images], out=pixels[:used])
        # What an earlier batch left there may hold NaN.
        pixels[used:budget].zero_()
        for name, tensor in self._metadata(self._grid(images)).items():
            static = self._memory[name][: self._rows(name, budget)]
            static[: len(tensor)].copy_(tensor)
            padding = static[len(tensor) :]
            if name in self._layout.sequences:
                padding.fill_(used)
            elif name in self._layout.orders:
                padding.copy_(self._places[len(tensor) : len(static)])
            else:
                padding.zero_()

    def uncaptured(self, images: Sequence[Any]) -> Tensor:
        """All images in one call."""
        return self._model(torch.cat([self._placed(image) for image in images]), self._grid(images))

    def split(self, features: Tensor, images: Sequence[Any]) -> list[Tensor]:
        """The features of each image's units."""
        counts = [len(image.pixel_values) // self._config.merge_unit for image in images]
        return list(features[: sum(counts)].split(counts))

    def _metadata(self, grid_thw: Tensor) -> dict[str, Tensor]:
        made: dict[str, Tensor] = self._layout.metadata(grid_thw, self._config, self._device)._asdict()
        return made

    def _rows(self, name: str, budget: int) -> int:
        if kind := self._layout.sequences.get(name):
            return math.ceil(budget / kind.patches_each) + 1
        return budget // self._patches_a_row[name]

    def _placed(self, image: Any) -> Tensor:
        return image.pixel_values.to(self._device, self._dtype)

    @staticmethod
    def _grid(images: Sequence[Any]) -> Tensor:
        return torch.cat([image.grid_thw for image in images])
