"""Attention masks read as what they mostly are: packed sequences, and padding between and behind them."""

from __future__ import annotations

import itertools
import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """What `varlen_attention` takes in the place of a mask.

    Attributes:
        cu_seqlens, cu_seqlens_k: int32 [sequences + 1], on the mask's device.
        queries: [queries], the rows of q sequence after sequence; None where they lie so.
        places: the inverse of `queries`: where the result of each row of q stands; None where that is.
        keys: [keys], the rows of k and v sequence after sequence; None where they lie so.
    """

    cu_seqlens: Tensor
    cu_seqlens_k: Tensor
    queries: Tensor | None = None
    places: Tensor | None = None
    keys: Tensor | None = None


# Rows of queries that see the same keys, and those of the keys.
_Group = tuple[Tensor, Tensor]

# The layers of an encoder share one mask: (the mask, its version and the other arguments, what was read).
_last: tuple[weakref.ref[Tensor], tuple[int, ...], Sequences] | None = None


@torch.compiler.disable(reason="a mask's contents decide the sequences")
def sequences_of_mask(mask: Tensor, batch: int, tokens: int, tokens_k: int) -> Sequences:
    """The sequences that a mask leaves to each other: queries that see the same keys, and these.

    Its contents are read on the host, which waits for the device; but once, where the next call brings the same tensor.

    Args:
        mask: boolean (True: attend) or additive (0: attend, at most the dtype's minimum: do not), [batch or 1, heads
            or 1, tokens or 1, tokens_k or 1].
        batch, tokens, tokens_k: sizes of the queries and keys, which are packed row of the batch after row.

    Returns:
        A query that sees no key has a sequence without keys. Keys that no query sees are left out, or are sequences
        without queries.

    Raises:
        TypeError: another dtype.
        ValueError: another shape; heads that differ; a bias, or one that wants gradients; queries of a row of the
            batch that see so different keys that those of all sequences would be more than two times the row's.
    """
    global _last
    key = (batch, tokens, tokens_k, 0 if mask.is_inference() else mask._version)
    # Another thread may put another mask there.
    last = _last
    if last is not None and last[0]() is mask and last[1] == key:
        return last[2]
    rows = _groups(_visible(mask, batch, tokens, tokens_k))
    groups = [
        (queries + row * tokens, keys + row * tokens_k)
        for row in range(batch)
        for queries, keys in rows[row if len(rows) > 1 else 0]
    ]
    read = _packed(groups, batch * tokens_k, mask.device)
    # Changes of an inference tensor cannot be seen.
    if not mask.is_inference():
        _last = weakref.ref(mask), key, read
    return read


def _visible(mask: Tensor, batch: int, tokens: int, tokens_k: int) -> Tensor:
    """The keys that each query sees, bool [batch or 1, tokens, tokens_k]."""
    sizes = (batch, mask.shape[1] if mask.dim() == 4 else 1, tokens, tokens_k)
    if mask.dim() != 4 or any(size not in (1, whole) for size, whole in zip(mask.shape, sizes, strict=True)):
        raise ValueError(
            f"attention_mask: got shape {tuple(mask.shape)}, expected [{batch} or 1, heads or 1, {tokens} or 1, "
            f"{tokens_k} or 1]"
        )
    if mask.requires_grad:
        raise ValueError("attention_mask: got one that requires gradients, expected one that is no learned bias")
    if mask.shape[1] > 1 and not torch.equal(mask, mask[:, :1].expand_as(mask)):
        raise ValueError("attention_mask: got a mask that differs between heads, expected the same for all")
    mask = mask[:, 0]
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            raise TypeError(f"attention_mask: got {mask.dtype}, expected torch.bool or a floating dtype")
        visible, hidden = mask == 0, mask <= torch.finfo(mask.dtype).min
        if not bool((visible | hidden).all()):
            raise ValueError("attention_mask: got a bias, expected 0 where to attend and the dtype's minimum elsewhere")
        mask = visible
    return mask.expand(-1, tokens, tokens_k)


def _groups(visible: Tensor) -> list[list[_Group]]:
    """For each row of the batch its queries by the keys that they see, in the order of their first queries."""
    starts = torch.ones(visible.shape[:2], dtype=torch.bool, device=visible.device)
    starts[:, 1:] = (visible[:, 1:] != visible[:, :-1]).any(-1)
    # Of each run of queries that see the same keys only the first goes to the host.
    keys_of_runs = iter(visible[starts].cpu())
    rows = []
    for row in starts.cpu():
        groups: dict[bytes, tuple[list[Tensor], Tensor]] = {}
        for first, end in itertools.pairwise([*row.nonzero().flatten().tolist(), len(row)]):
            seen = next(keys_of_runs)
            runs, _ = groups.setdefault(seen.numpy().tobytes(), ([], seen.nonzero().flatten()))
            runs.append(torch.arange(first, end))
        rows.append([(torch.cat(runs), keys) for runs, keys in groups.values()])
        if sum(len(keys) for _, keys in rows[-1]) > 2 * visible.shape[-1]:
            raise ValueError(
                f"attention_mask: got {len(groups)} groups of queries that see different keys, most of them shared, "
                "expected the queries of few sequences, each of which see the same keys"
            )
    return rows


def _packed(groups: list[_Group], total_k: int, device: torch.device) -> Sequences:
    queries, keys = (torch.cat(rows) for rows in zip(*groups, strict=True))
    lengths = [(len(rows), len(rows_k)) for rows, rows_k in groups]
    runs = all(not len(rows_k) or rows_k[-1] - rows_k[0] < len(rows_k) for _, rows_k in groups)
    keys_lie_so = runs and bool((keys.diff() > 0).all())
    if keys_lie_so:
        lengths = _with_gaps(groups, total_k)
    cu_seqlens, cu_seqlens_k = (
        torch.tensor([0, *itertools.accumulate(column)], dtype=torch.int32, device=device)
        for column in zip(*lengths, strict=True)
    )
    index_k = None if keys_lie_so else keys.to(device)
    if bool((queries.diff() > 0).all()):
        return Sequences(cu_seqlens, cu_seqlens_k, None, None, index_k)
    return Sequences(cu_seqlens, cu_seqlens_k, queries.to(device), queries.argsort().to(device), index_k)


def _with_gaps(groups: list[_Group], total_k: int) -> list[tuple[int, int]]:
    """The lengths of sequences whose keys are ascending runs, and of the keys between them, which have no queries."""
    lengths, end = [], 0
    for queries, keys in groups:
        if len(keys):
            lengths.append((0, int(keys[0]) - end))
            end = int(keys[-1]) + 1
        lengths.append((len(queries), len(keys)))
    return [pair for pair in [*lengths, (0, total_k - end)] if any(pair)]
