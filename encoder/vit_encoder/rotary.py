"""The angles of 2D rotary embeddings, as every encoder has them."""

from __future__ import annotations

import torch
from torch import Tensor


def axial_frequencies(head_dim: int, theta: float, device: torch.device | str | None = None) -> Tensor:
    """theta**(-4i / head_dim) for i < head_dim // 4, float32 [head_dim // 4]: angles of one of the two axes."""
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, device=device, dtype=torch.float32) / half
    return 1.0 / theta**exponents


class Rotation:
    """The tables cos and sin [positions, head_dim // 2], float32, as one argument of a layer.

    No tuple and no dataclass: FSDP with mixed precision casts every floating tensor that it finds in those, and a
    table in bfloat16 turns by up to 2**-9 too far.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Rotation:
        """The tables on another device; accelerate asks this of the arguments of a layer that it placed there."""
        return Rotation(self.cos.to(device, non_blocking=non_blocking), self.sin.to(device, non_blocking=non_blocking))
