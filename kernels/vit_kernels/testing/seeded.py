"""Random tensors that a seed determines."""

from collections.abc import Sequence

import torch


def seeded_tensor(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A contiguous CPU tensor of standard normal values, the same for the same seed.

    No global generator is read or changed, so that a failing example replays and shrinks. The values are drawn in
    fp32 and rounded: one seed gives nearly the same values in every dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)
