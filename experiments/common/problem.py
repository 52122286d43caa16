"""The problem that most experiments measure, 16 tiles of Llama 4's vision encoder, and the windows of Qwen2.5-VL."""

from __future__ import annotations

from vit_encoder import Llama4VisionConfig

_LLAMA4 = Llama4VisionConfig.scout()

TILES = 16
POSITIONS, GRID = _LLAMA4.tokens_per_tile, _LLAMA4.grid
"""Tokens of a tile, the class token included, and the patches along its side: 577 and 24."""

HEADS, HEAD_DIM, WIDTH = _LLAMA4.num_attention_heads, _LLAMA4.head_dim, _LLAMA4.hidden_size
"""16 heads of 88 make the width of 1408."""

WINDOW = 64
"""Tokens of a window of Qwen2.5-VL, which has as many heads, of 80."""


def sequences(head_dim: int, tiles: int = TILES) -> tuple[int, int]:
    """Return how many sequences attention is measured on, and their length: tiles, or windows for heads of 80."""
    return (9 * tiles, WINDOW) if head_dim == 80 else (tiles, POSITIONS)
