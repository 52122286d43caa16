"""The encoder that an experiment runs: with random weights, or with a checkpoint's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from vit_encoder import Llama4VisionConfig, Llama4VisionModel
from vit_encoder.llama4 import initialise_

SEED = 0


@torch.no_grad()
def random_encoder(config: Llama4VisionConfig, *, dtype: torch.dtype, device: torch.device) -> Llama4VisionModel:
    """An encoder with the scaled random weights of `initialise_`, queries and keys at half their gain.

    At the full gain attention is so sharp that 34 layers amplify every rounding several hundred times, and two right
    implementations differ by most of the features in bfloat16. At half of it they do not amplify at all, and
    an encoder without rotary embedding is still wrong by a third of the features.
    """
    with torch.device("meta"):
        model = Llama4VisionModel(config)
    model = model.to(dtype).to_empty(device=device).eval()
    initialise_(model, SEED)
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.weight"):
            parameter[: 2 * config.hidden_size] /= 2
    return model


def checkpoint_encoder(
    folder: Path, *, layers: int | None, dtype: torch.dtype, device: torch.device
) -> Llama4VisionModel:
    """The encoder of a checkpoint folder, cut off after `layers` layers.

    Raises:
        ValueError: the checkpoint has fewer layers; and what `Llama4VisionModel.from_pretrained` raises.
    """
    model = Llama4VisionModel.from_pretrained(folder, dtype=dtype, device=device)
    if layers is None:
        return model
    if layers > len(model.layers):
        raise ValueError(f"layers: got {layers}, expected at most the {len(model.layers)} of the checkpoint")
    model.layers = nn.ModuleList(model.layers[:layers])
    model.config = replace(model.config, num_hidden_layers=layers)
    return model
