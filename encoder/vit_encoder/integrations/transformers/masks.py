"""Attention masks read as what they mostly are: packed sequences, and padding behind them."""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

Boundaries = tuple[Tensor, Tensor]

# The layers of an encoder share one mask: (the mask, its version and the other arguments, what was read).
_last: tuple[weakref.ref[Tensor], tuple[int, ...], Boundaries] | None = None


@torch.compiler.disable(reason="a mask's contents decide the sequences")
def sequences_of_mask(mask: Tensor, batch: int, tokens: int, tokens_k: int) -> Boundaries:
    """The sequences that a mask leaves to each other.

    Args:
        mask: boolean (True: attend) or additive (0: attend, at most the dtype's minimum: do not), [batch or 1, heads
            or 1, tokens, tokens_k].
        batch, tokens, tokens_k: sizes of the queries and keys, which are packed row of the batch after row.

    Returns:
        cu_seqlens and cu_seqlens_k, int32 [sequences + 1], on the mask's device. Keys that no query sees are sequences
        without queries.

    Raises:
        ValueError: another shape; heads that differ; a bias; keys of a query that are no run, that overlap those of
            the queries before, or none at all.
    """
    global _last
    key = (batch, tokens, tokens_k, 0 if mask.is_inference() else mask._version)
    if _last is not None and _last[0]() is mask and _last[1] == key:
        return _last[2]
    first, end = _runs(_visible(mask, tokens, tokens_k))
    cu_seqlens, cu_seqlens_k = [0], [0]
    for row in range(batch):
        runs = zip(first[row % len(first)], end[row % len(first)], strict=True)
        lengths = [(*keys, len(list(queries))) for keys, queries in itertools.groupby(runs)]
        for queries, until in _row(lengths, tokens_k):
            cu_seqlens.append(cu_seqlens[-1] + queries)
            cu_seqlens_k.append(row * tokens_k + until)
    read = _boundaries(cu_seqlens, mask.device), _boundaries(cu_seqlens_k, mask.device)
    # Changes of an inference tensor cannot be seen.
    if not mask.is_inference():
        _last = weakref.ref(mask), key, read
    return read


def _boundaries(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _row(runs: list[tuple[int, int, int]], tokens_k: int) -> list[tuple[int, int]]:
    """(queries, last key) of each sequence of one row of the batch, from its runs (first key, last key, queries)."""
    sequences, seen = [], 0
    for first, end, queries in runs:
        if first < seen:
            raise ValueError("attention_mask: got keys that several sequences of queries see, expected disjoint ones")
        if first > seen:
            sequences.append((0, first))
        sequences.append((queries, end))
        seen = end
    return sequences if seen == tokens_k else [*sequences, (0, tokens_k)]


def _visible(mask: Tensor, tokens: int, tokens_k: int) -> Tensor:
    """The keys that each query sees, bool [batch or 1, tokens, tokens_k] on the host."""
    if mask.dim() != 4 or mask.shape[2:] != (tokens, tokens_k):
        raise ValueError(
            f"attention_mask: got shape {tuple(mask.shape)}, expected [batch, heads, {tokens}, {tokens_k}]"
        )
    if mask.shape[1] > 1 and not torch.equal(mask, mask[:, :1].expand_as(mask)):
        raise ValueError("attention_mask: got a mask that differs between heads, expected the same for all")
    mask = mask[:, 0]
    if mask.dtype == torch.bool:
        return mask.cpu()
    visible, hidden = mask == 0, mask <= torch.finfo(mask.dtype).min
    if not bool((visible | hidden).all()):
        raise ValueError("attention_mask: got a bias, expected 0 where to attend and the dtype's minimum elsewhere")
    return visible.cpu()


def _runs(visible: Tensor) -> tuple[list[list[int]], list[list[int]]]:
    """The first key that each query sees, and the one behind the last."""
    first, count = visible.byte().argmax(-1), visible.sum(-1)
    end = first + count
    key = torch.arange(visible.shape[-1])
    if not torch.equal(visible, (key >= first[..., None]) & (key < end[..., None])) or not bool(count.all()):
        raise ValueError("attention_mask: got a query whose keys are no run, expected one run of keys for each query")
    return first.tolist(), end.tolist()
