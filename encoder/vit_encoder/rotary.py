"""The frequencies of 2D rotary embeddings, as every encoder has them."""

from __future__ import annotations

import torch
from torch import Tensor


def axial_frequencies(head_dim: int, theta: float, device: torch.device | str | None = None) -> Tensor:
    """theta**(-4i / head_dim) for i < head_dim // 4, float32 [head_dim // 4]: angles of one of the two axes."""
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, device=device, dtype=torch.float32) / half
    return 1.0 / theta**exponents
