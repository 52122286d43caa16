"""vLLM's linear layers under the names that our encoders call."""

from __future__ import annotations

from torch import Tensor, nn


class Linear(nn.Module):
    """A linear layer of vLLM, which may return its bias too; looked up at each call, since LoRA replaces it.

    Args:
        owner: the module that has it.
        name: what it is called there.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.owner = owner
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., in_features] -> [..., out_features], of this worker's share."""
        out = getattr(self.owner, self.name)(x)
        return out if isinstance(out, Tensor) else out[0]
