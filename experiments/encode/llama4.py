"""The proof that one graph serves every number of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from vit_encoder import CompilationConfig, Llama4VisionConfig

from experiments.common.weights import SEED, random_encoder
from experiments.encode.sweep import Sweep, sweep_batches


def sweep_config(config: Llama4VisionConfig, device: torch.device) -> Llama4VisionConfig:
    """The encoder to sweep with: `config` on a GPU, as deep but narrow on a CPU, where 58 tiles take too long.

    The depth makes the graph; the width only makes the arithmetic.
    """
    if device.type == "cuda":
        return config
    return replace(Llama4VisionConfig.tiny(), num_hidden_layers=config.num_hidden_layers)


def sweep_tile_counts(
    config: Llama4VisionConfig,
    tile_counts: Sequence[int],
    compilation_config: CompilationConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Sweep:
    """Call a compiled encoder with each number of tiles in turn, and compare it with itself eager."""
    generator = torch.Generator(device).manual_seed(SEED)
    size = (config.num_channels, config.image_size, config.image_size)
    batches = [
        (f"{tiles} tile(s)", (torch.randn(tiles, *size, dtype=dtype, device=device, generator=generator),))
        for tiles in tile_counts
    ]
    model = random_encoder(config, dtype=dtype, device=device)
    return sweep_batches(model, batches, compilation_config, Sweep(config.num_hidden_layers, config.hidden_size))
