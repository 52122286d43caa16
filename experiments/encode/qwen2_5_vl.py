"""What the main job measures of Qwen2.5-VL: an image cut into patches, and batches of many sizes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from vit_encoder import CompilationConfig, Qwen2_5_VLVisionConfig, Qwen2_5_VLVisionModel
from vit_encoder.qwen2_5_vl import PatchedImage, Qwen2_5_VLImageSettings, patch_image, reference_forward

from experiments.common.peers import transformers_qwen2_5_vl
from experiments.common.weights import SEED, checkpoint_qwen2_5_vl, random_encoder
from experiments.encode.subject import Subject
from experiments.encode.sweep import Sweep, sweep_batches

CONFIGS: dict[str, Callable[[], Qwen2_5_VLVisionConfig]] = {
    "7b": Qwen2_5_VLVisionConfig.qwen2_5_vl_7b,
    "3b": Qwen2_5_VLVisionConfig.qwen2_5_vl_3b,
    "32b": Qwen2_5_VLVisionConfig.qwen2_5_vl_32b,
    "72b": Qwen2_5_VLVisionConfig.qwen2_5_vl_72b,
    "tiny": Qwen2_5_VLVisionConfig.tiny,
}
# By default: a CPU takes seconds for an image.
MAX_PIXELS_ON_A_CPU = 28 * 28 * 256
GRIDS = [
    [[1, 2, 2]],
    [[1, 18, 10], [2, 8, 8], [1, 2, 40]],
    [[1, 8, 8]],
    [[1, 2, 2]] * 9,
    [[1, 2, 400]],
    [[4, 6, 14]],
]
"""Each a batch: one unit, a mixture with a video, one whole window, as many windows as frames, 1:200, a video."""


def prepare(options: argparse.Namespace, dtype: torch.dtype, device: torch.device, path: Path) -> Subject:
    """The encoder and the image that the options ask for.

    Raises:
        OSError, TypeError, ValueError: as `patch_image` and `Qwen2_5_VLVisionModel.from_pretrained` do.
    """
    folder: Path | None = options.checkpoint
    config = Qwen2_5_VLVisionConfig.from_hf(folder) if folder else CONFIGS[options.config]()
    settings = Qwen2_5_VLImageSettings.from_hf(folder) if folder else Qwen2_5_VLImageSettings()
    most = min(MAX_PIXELS_ON_A_CPU, settings.image.max_pixels) if device.type == "cpu" else settings.image.max_pixels
    max_pixels = options.max_pixels or most
    min_pixels = min(settings.image.min_pixels, max_pixels)
    patched = patch_image(path, config, settings=settings, min_pixels=min_pixels, max_pixels=max_pixels)
    if folder:
        model = checkpoint_qwen2_5_vl(folder, layers=options.layers, dtype=dtype, device=device)
    else:
        model = random_encoder(replace(config, depth=options.layers or config.depth), dtype=dtype, device=device)
    pixel_values, grid_thw = patched.pixel_values.to(device, dtype), patched.grid_thw
    peer, peer_grid = transformers_qwen2_5_vl(model), grid_thw.to(device)
    return Subject(
        model=model,
        inputs=(pixel_values, grid_thw),
        part="image",
        parts=1,
        description=_description(options, path, patched, model),
        reference=lambda: reference_forward(model, pixel_values, grid_thw, progress=True),
        peer=peer and (lambda: peer(pixel_values, grid_thw=peer_grid).pooler_output),
        swept=("grids", GRIDS),
        sweep=lambda compilation: _sweep(model.config, compilation, dtype, device),
    )


def _description(
    options: argparse.Namespace, path: Path, patched: PatchedImage, model: Qwen2_5_VLVisionModel
) -> dict[str, Any]:
    config = model.config
    _, high, wide = patched.grid_thw[0].tolist()
    with Image.open(path) as image:
        width, height = image.size
    return {
        "image": {
            "name": path.name,
            "width": width,
            "height": height,
            "grid": [high, wide],
            "encoder_tokens": high * wide,
            "features": high * wide // config.merge_unit,
        },
        "encoder": {
            "config": options.checkpoint.resolve().name if options.checkpoint else f"qwen2_5_vl-{options.config}",
            "weights": "checkpoint" if options.checkpoint else f"random, seed {SEED}",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "num_hidden_layers": config.depth,
            **asdict(config),
        },
        "size_chosen": options.max_pixels is None,
    }


def _sweep(
    config: Qwen2_5_VLVisionConfig, compilation: CompilationConfig, dtype: torch.dtype, device: torch.device
) -> Sweep:
    """With an encoder as deep as `config`, but narrow on a CPU: the depth makes the graph, the width arithmetic."""
    if device.type == "cpu":
        full = config.fullatt_block_indexes
        config = replace(Qwen2_5_VLVisionConfig.tiny(), depth=config.depth, fullatt_block_indexes=full)
    generator = torch.Generator().manual_seed(SEED)
    batches = []
    for grids in GRIDS:
        grid_thw = torch.tensor(grids)
        pixels = torch.randn(int(grid_thw.prod(dim=1).sum()), config.patch_dim, generator=generator)
        batches.append((f"the grids {grids}", (pixels.to(device, dtype), grid_thw)))
    model = random_encoder(config, dtype=dtype, device=device)
    return sweep_batches(model, batches, compilation, Sweep(config.depth, config.hidden_size))
