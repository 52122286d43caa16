"""Random weights that make a comparison of two encoders see every mistake."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_GAIN = 0.75
_QUERY_KEY_GAIN = 4.0


@torch.no_grad()
def initialise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill the parameters of an encoder or projector in place, reproducibly, and return it.

    Linear weights are normal with standard deviation 0.75 / sqrt(fan_in), 0.02 at Llama 4's width as transformers
    has it, those of queries and keys 4 times that: at the usual scale attention is so flat that an encoder without
    any rotary embedding differs by little more than bf16 noise. Biases, norms and embeddings are random too, so that
    none of them can be forgotten.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)

    def normal(parameter: Tensor, mean: float, deviation: float) -> None:
        parameter.normal_(mean, deviation, generator=generator)

    for name, parameter in model.named_parameters():
        if name.endswith("embedding"):
            normal(parameter, 0.0, parameter.shape[-1] ** -0.5)
        elif parameter.dim() == 2:
            normal(parameter, 0.0, _GAIN * parameter.shape[1] ** -0.5)
        else:
            normal(parameter, 1.0 if name.endswith("weight") else 0.0, 0.1)
        if name.endswith("qkv.weight"):
            parameter[: 2 * parameter.shape[0] // 3] *= _QUERY_KEY_GAIN
    return model
