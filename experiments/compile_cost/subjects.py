"""What is compiled: an encoder, batches of several sizes for it, and the peer on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from vit_encoder import Llama4VisionConfig, Qwen2_5_VLVisionConfig, Qwen3VLVisionConfig
from vit_encoder.llama4 import model as llama4_model
from vit_encoder.qwen2_5_vl import model as qwen2_5_vl_model
from vit_encoder.qwen3_vl import model as qwen3_vl_model
from vit_encoder.qwen_configs import QwenVisionConfig

from experiments.common.peers import (
    side_by_side,
    transformers_qwen2_5_vl,
    transformers_qwen3_vl,
    transformers_vision_model,
)
from experiments.common.weights import SEED, random_encoder

CPU = torch.device("cpu")
Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Subject:
    """One model.

    Attributes:
        encoder: the decorated module.
        regions: the classes of its parts that are nested regions, and the names of these.
        batches: arguments of the encoder; the first compiles, dimension 0 of each varies.
        peer: makes transformers' module on the same weights, or None where that is not installed.
        peer_batches: its arguments.
        peer_features: the features in its result.
    """

    encoder: Any
    regions: dict[type[nn.Module], tuple[str, ...]]
    batches: list[Batch]
    peer: Callable[[], nn.Module | None]
    peer_batches: list[Batch]
    peer_features: Callable[[Any], Tensor]


def llama4_config(layers: int, heads: int) -> Llama4VisionConfig:
    """Tiles of 112 pixels through so many layers of so many heads of 88."""
    return replace(
        Llama4VisionConfig.tiny(),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=88 * heads,
        intermediate_size=4 * 88 * heads,
    )


def pixels(config: Llama4VisionConfig, tiles: int) -> Tensor:
    """[tiles, 3, image_size, image_size], the same in every process."""
    generator = torch.Generator().manual_seed(SEED + tiles)
    return torch.randn(tiles, 3, config.image_size, config.image_size, generator=generator)


def llama4(layers: int, heads: int) -> Subject:
    """Llama 4's encoder, on 2, 1, 17 and 5 tiles."""
    model = random_encoder(llama4_config(layers, heads), dtype=torch.float32, device=CPU)
    batches: list[Batch] = [(pixels(model.config, tiles),) for tiles in (2, 1, 17, 5)]
    return Subject(
        encoder=model,
        regions={llama4_model.EncoderLayer: ("_region",)},
        batches=batches,
        peer=lambda: transformers_vision_model(model),
        peer_batches=batches,
        peer_features=lambda result: result.last_hidden_state,
    )


def qwen2_5_vl(layers: int, heads: int) -> Subject:
    """Qwen2.5-VL's encoder, every fourth layer with full attention, on batches of images and a video."""
    config = replace(
        Qwen2_5_VLVisionConfig.tiny(),
        depth=layers,
        num_heads=heads,
        hidden_size=80 * heads,
        fullatt_block_indexes=tuple(range(3, layers, 4)),
    )
    model = random_encoder(config, dtype=torch.float32, device=CPU)
    inputs = _images_and_a_video(config)
    return Subject(
        encoder=model.encoder,
        regions={qwen2_5_vl_model.EncoderLayer: ("_window_region", "_full_region")},
        batches=[(values, *model.metadata(grid_thw, CPU)) for values, grid_thw in inputs],
        peer=lambda: transformers_qwen2_5_vl(model),
        peer_batches=inputs,
        peer_features=side_by_side,
    )


def qwen3_vl(layers: int, heads: int) -> Subject:
    """Qwen3-VL's encoder, three deepstack layers as far apart as they are, on batches of images and a video."""
    config = replace(
        Qwen3VLVisionConfig.tiny(),
        depth=layers,
        num_heads=heads,
        hidden_size=72 * heads,
        deepstack_visual_indexes=tuple(sorted({layers * i // 27 for i in (8, 16, 24)})),
    )
    model = random_encoder(config, dtype=torch.float32, device=CPU)
    inputs = _images_and_a_video(config)
    return Subject(
        encoder=model.encoder,
        regions={qwen3_vl_model.EncoderLayer: ("_region",)},
        batches=[(values, *model.metadata(grid_thw, CPU)) for values, grid_thw in inputs],
        peer=lambda: transformers_qwen3_vl(model),
        peer_batches=inputs,
        peer_features=side_by_side,
    )


def _images_and_a_video(config: QwenVisionConfig) -> list[Batch]:
    """Pixels and sizes of four batches."""
    grids = [[[1, 10, 12], [1, 6, 8]], [[1, 2, 2]], [[2, 8, 8], [1, 12, 6], [1, 4, 30]], [[1, 16, 16]]]
    return [(_patches(config, torch.tensor(grid)), torch.tensor(grid)) for grid in grids]


def _patches(config: QwenVisionConfig, grid_thw: Tensor) -> Tensor:
    count = int(grid_thw.prod(dim=1).sum())
    return torch.randn(count, config.patch_dim, generator=torch.Generator().manual_seed(SEED + count))


SUBJECTS: dict[str, Callable[[int, int], Subject]] = {
    "llama4": llama4,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
}
HEAD_DIMS = {"llama4": 88, "qwen2_5_vl": 80, "qwen3_vl": 72}
