"""The rows of each sequence of a packed batch, on the host."""

import itertools

import torch
from torch import Tensor

from vit_kernels import _validation


def rows(q: Tensor, k: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None) -> list[tuple[slice, slice]]:
    """Rows of q and of k of every sequence that has both.

    Raises:
        ValueError: boundaries that make no sense.
    """
    bounds = _validation.check_cu_seqlens_contents("cu_seqlens", cu_seqlens, q.shape[0])
    bounds_k = bounds
    if cu_seqlens_k is not None:
        bounds_k = _validation.check_cu_seqlens_contents("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    rows_q = [slice(*pair) for pair in itertools.pairwise(bounds)]
    rows_k = [slice(*pair) for pair in itertools.pairwise(bounds_k)]
    return [(r, r_k) for r, r_k in zip(rows_q, rows_k, strict=True) if r.start < r.stop and r_k.start < r_k.stop]


def scale_of_scores(scale: float, dtype: torch.dtype) -> float:
    """The scale, where float32 would round it to 0 the smallest number that it has: 0 times an infinity is NaN."""
    return scale if dtype == torch.float64 else max(scale, 2.0**-149)
