"""The cos and sin tables of Llama 4's 2D rotary embedding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vit_encoder.llama4.config import Llama4VisionConfig
from vit_encoder.rotary import Rotation, axial_frequencies


def rotary_tables(config: Llama4VisionConfig, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Tables cos, sin [tokens_per_tile, head_dim // 2], float32.

    The first half of the columns turns by (x + 1) * rope_theta**(-4i / head_dim), the second by (y + 1) times the
    same frequencies, x and y a patch's column and row. The class token, last, is not rotated.
    Source: transformers, `modeling_llama4.py`, `Llama4VisionRotaryEmbedding`.
    """
    frequencies = axial_frequencies(config.head_dim, config.rope_theta, device)
    patch = torch.arange(config.patches_per_tile, device=device)
    x = (patch % config.grid + 1)[:, None] * frequencies
    y = (patch // config.grid + 1)[:, None] * frequencies
    angles = nn.functional.pad(torch.cat([x, y], dim=-1), (0, 0, 0, 1))
    return angles.cos(), angles.sin()


class RotaryTables(nn.Module):
    """Holds the tables in float32 on the model's device, whatever dtype the model is cast to.

    Built from the configuration again at every move, since a cast would round them and `to_empty` would leave
    garbage. They are no part of the state_dict.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Llama4VisionConfig) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        self._build(torch.device("cpu") if device.type == "meta" else device)

    def _build(self, device: torch.device) -> None:
        cos, sin = rotary_tables(self.config, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self) -> Rotation:
        """Both tables; FSDP casts buffers without `_apply`."""
        if self.cos.dtype != torch.float32:
            self._build(self.cos.device)
        return Rotation(self.cos, self.sin)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTables:
        super()._apply(fn, recurse)
        self._build(self.cos.device)
        return self
