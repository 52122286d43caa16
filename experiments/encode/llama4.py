"""What the main job measures of Llama 4: an image cut into tiles, and every number of tiles."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from vit_encoder import (
    CompilationConfig,
    Llama4ImageSettings,
    Llama4VisionConfig,
    Llama4VisionModel,
    TiledImage,
    tile_image,
)
from vit_encoder.llama4 import reference_forward

from experiments.common.peers import transformers_vision_model
from experiments.common.weights import SEED, checkpoint_encoder, random_encoder
from experiments.encode.subject import Subject
from experiments.encode.sweep import Sweep, sweep_batches

CONFIGS: dict[str, Callable[[], Llama4VisionConfig]] = {
    "scout": Llama4VisionConfig.scout,
    "tiny": Llama4VisionConfig.tiny,
}
TILE_COUNTS = [1, 17, 2, 5, 33]
# By default: a CPU takes seconds for each.
MAX_TILES_ON_A_CPU = 1


def prepare(options: argparse.Namespace, dtype: torch.dtype, device: torch.device, path: Path) -> Subject:
    """The encoder and the image that the options ask for.

    Raises:
        OSError, TypeError, ValueError: as `tile_image` and `Llama4VisionModel.from_pretrained` do.
    """
    config = Llama4VisionConfig.from_hf(options.checkpoint) if options.checkpoint else CONFIGS[options.config]()
    settings = Llama4ImageSettings(image_size=config.image_size)
    if options.checkpoint:
        settings = Llama4ImageSettings.from_hf(options.checkpoint, image_size=config.image_size)
    max_tiles = options.max_tiles or (MAX_TILES_ON_A_CPU if device.type == "cpu" else settings.max_tiles)
    tiled = tile_image(path, settings=settings, max_tiles=max_tiles)
    model = _encoder(options, config, dtype, device)
    pixel_values = tiled.pixel_values.to(device, dtype)
    tile_counts = options.tile_counts or TILE_COUNTS
    peer = transformers_vision_model(model)
    description = {
        "image": _describe_image(path, tiled, model.config, max_tiles),
        "encoder": {
            "config": options.checkpoint.resolve().name if options.checkpoint else options.config,
            "weights": "checkpoint" if options.checkpoint else f"random, seed {SEED}",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            **asdict(model.config),
        },
        "max_tiles_chosen": options.max_tiles is None,
    }
    return Subject(
        model=model,
        inputs=(pixel_values,),
        part="tile",
        parts=len(pixel_values),
        description=description,
        reference=lambda: reference_forward(model, pixel_values, progress=True),
        peer=peer and (lambda: peer(pixel_values=pixel_values).last_hidden_state),
        swept=("tile_counts", tile_counts),
        sweep=lambda compilation: sweep_tile_counts(
            sweep_config(model.config, device), tile_counts, compilation, dtype=dtype, device=device
        ),
    )


def _encoder(
    options: argparse.Namespace, config: Llama4VisionConfig, dtype: torch.dtype, device: torch.device
) -> Llama4VisionModel:
    if options.checkpoint:
        return checkpoint_encoder(options.checkpoint, layers=options.layers, dtype=dtype, device=device)
    print("drawing random weights ...", file=sys.stderr, flush=True)
    config = replace(config, num_hidden_layers=options.layers or config.num_hidden_layers)
    return random_encoder(config, dtype=dtype, device=device)


def _describe_image(path: Path, tiled: TiledImage, config: Llama4VisionConfig, max_tiles: int) -> dict[str, Any]:
    with Image.open(path) as image:
        width, height = image.size
    tiles = len(tiled.pixel_values)
    return {
        "name": path.name,
        "width": width,
        "height": height,
        "max_tiles": max_tiles,
        "canvas": list(tiled.aspect_ratio),
        "tiles": tiles,
        "encoder_tokens": tiles * config.tokens_per_tile,
        "features": tiles * config.output_tokens_per_tile,
    }


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
