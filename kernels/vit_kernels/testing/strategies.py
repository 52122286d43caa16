"""Hypothesis strategies for the inputs of vision-encoder kernels.

Needs the package hypothesis (`pip install 'vit-kernels[test]'`). Draw shapes, layouts and a seed, never the values:

    @given(case=strided_tensors((5, 3, 88), torch.bfloat16))
    def test_rotation(case: NanPadded) -> None:
        ...
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from vit_kernels.testing.poison import NanPadded, nan_padded
from vit_kernels.testing.seeded import seeded_tensor

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(
        "vit_kernels.testing.strategies needs the package hypothesis: pip install 'vit-kernels[test]'"
    ) from error

# Where tiles of 16 and 64 begin to need a mask or one more step.
BLOCK_NEIGHBOURS = (0, 1, 15, 16, 17, 63, 64, 65)
COMMON_HEAD_DIMS = (64, 72, 80, 88, 96, 128)


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """float32, float16 or bfloat16."""
    return st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def seeds() -> st.SearchStrategy[int]:
    """Seeds for `seeded_tensor`."""
    return st.integers(0, 2**32 - 1)


def head_dims() -> st.SearchStrategy[int]:
    """Multiples of 8 in 16..256; half of the draws are 64, 72, 80, 88, 96 or 128."""
    return st.integers(2, 32).map(lambda eighths: 8 * eighths) | st.sampled_from(COMMON_HEAD_DIMS)


@st.composite
def sequence_lengths(draw: st.DrawFn, *, max_sequences: int = 5, max_total: int = 160) -> list[int]:
    """Lengths >= 0, often next to a block size, of at most `max_total` tokens together; the list may be empty."""
    length = st.sampled_from(BLOCK_NEIGHBOURS) | st.integers(0, 80)
    lengths = draw(st.lists(length, max_size=max_sequences))
    totals = itertools.accumulate(lengths)
    return [length for length, total in zip(lengths, totals, strict=True) if total <= max_total]


class PackedSequences(NamedTuple):
    """Sequences laid end to end, as varlen_attention takes them.

    Attributes:
        cu_seqlens: [sequences + 1] int32 on the CPU, from 0.
        total_tokens: at least cu_seqlens[-1]; the tokens from there on belong to no sequence.
    """

    cu_seqlens: torch.Tensor
    total_tokens: int


@st.composite
def packed_sequences(
    draw: st.DrawFn, *, max_sequences: int = 5, max_total: int = 160, max_tail: int = 20
) -> PackedSequences:
    """cu_seqlens with empty, one-token and block-sized sequences, and a tail of up to `max_tail` further tokens."""
    lengths = draw(sequence_lengths(max_sequences=max_sequences, max_total=max_total))
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return PackedSequences(cu_seqlens, sum(lengths) + draw(st.just(0) | st.integers(0, max_tail)))


@st.composite
def strided_tensors(draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype) -> NanPadded:
    """A tensor of standard normal values with a contiguous last dimension and otherwise any layout.

    The leading dimensions lie in any order in memory, with gaps of NaN before, after and between.
    """
    order = draw(st.permutations(range(len(shape) - 1)))
    gap = st.just(0) | st.integers(0, 9)
    padding = [(draw(gap), draw(gap)) for _ in shape]
    dense = seeded_tensor([shape[dim] for dim in order] + [shape[-1]], dtype, draw(seeds()))
    padded = nan_padded(dense, padding)
    inverse = [order.index(dim) for dim in range(len(order))]
    return dataclasses.replace(padded, tensor=padded.tensor.permute(*inverse, -1))


def special_values(dtype: torch.dtype) -> tuple[float, ...]:
    """Zeros, infinities, NaN, a subnormal number and the largest ones."""
    limits = torch.finfo(dtype)
    return 0.0, -0.0, float("inf"), -float("inf"), float("nan"), limits.smallest_normal / 4, limits.max, -limits.max


@st.composite
def special_tensors(
    draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype, values: Sequence[float] | None = None
) -> torch.Tensor:
    """Standard normal values, up to six of them replaced by `special_values`, or by those given."""
    x = seeded_tensor(shape, dtype, draw(seeds()))
    kinds = st.sampled_from(special_values(dtype) if values is None else values)
    for _ in range(draw(st.integers(0, 6)) if x.numel() else 0):
        x[tuple(draw(st.integers(0, size - 1)) for size in shape)] = draw(kinds)
    return x


class PackedQKV(NamedTuple):
    """q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]: views of the rows of one projection."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    packed: NanPadded


@st.composite
def packed_qkv(
    draw: st.DrawFn, *, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, kv_heads: int | None = None
) -> PackedQKV:
    """Views of a packed projection [tokens, (heads + 2 * kv_heads) * head_dim] of standard normal values.

    Rows may have NaN between them, and NaN rows lie before and after. `kv_heads` defaults to `heads`.
    """
    head_counts = [heads, kv_heads or heads, kv_heads or heads]
    dense = seeded_tensor((tokens, sum(head_counts) * head_dim), dtype, draw(seeds()))
    packed = nan_padded(dense, [(1, 1), (0, draw(st.sampled_from([0, 8, 16, 3])))])
    q, k, v = packed.tensor.unflatten(-1, (-1, head_dim)).split(head_counts, dim=1)
    return PackedQKV(q, k, v, packed)
