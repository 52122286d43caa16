"""Which sequence of a packed batch a program works on, found on the device."""

import triton
import triton.language as tl


@triton.jit
def find_sequence(cu_seqlens_ptr, sequences, program, BLOCK_M: tl.constexpr, SEARCH: tl.constexpr):
    """The last sequence whose first program, cu_seqlens[s] // BLOCK_M + s, is not after `program`.

    Sequence s needs at most as many programs as lie before the first one of s + 1. The rows beyond the last
    sequence count as one more sequence.
    """
    found = 0
    for first in range(0, sequences + 1, SEARCH):
        s = first + tl.arange(0, SEARCH)  # [SEARCH]
        start = tl.load(cu_seqlens_ptr + s, mask=s <= sequences, other=0)  # [SEARCH]
        found += tl.sum(((s <= sequences) & (start // BLOCK_M + s <= program)).to(tl.int32))
    return found - 1


@triton.jit
def bounds(cu_seqlens_ptr, s, sequences, end_if_beyond, tokens):
    """Start and length of sequence s, inside the tokens whatever cu_seqlens holds."""
    start = tl.load(cu_seqlens_ptr + s)
    end = tl.load(cu_seqlens_ptr + s + 1, mask=s < sequences, other=0)
    end = tl.where(s < sequences, end, end_if_beyond)
    start = tl.minimum(tl.maximum(start, 0), tokens)
    end = tl.minimum(tl.maximum(end, start), tokens)
    return start, end - start
