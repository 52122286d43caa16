"""The columns of a head in two blocks, so that they are not padded to a power of two: 88 are 64 + 32, not 128.

BLOCK_D0 is the largest power of two in head_dim, BLOCK_D1 covers the rest and is 0 where there is none. A tuple of the
blocks of some rows is one value: a comment that says [M, head_dim] means [M, BLOCK_D0] and [M, BLOCK_D1], one that says
[M, columns] a single one of them. What is padded reads as 0 and is not stored.
"""

import triton
import triton.language as tl


@triton.jit
def load_columns(
    rows,
    in_sequence,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D0: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    AXIS: tl.constexpr = 0,
):
    """Block 0 or 1 of rows, pointers [M, 1], as [M, columns]; with AXIS 1 pointers [1, M], as [columns, M].

    0 where in_sequence, shaped as rows, is false. Without one, None, all rows are read: loads without a mask where the
    columns need none either.
    """
    FIRST: tl.constexpr = BLOCK * BLOCK_D0
    WIDTH: tl.constexpr = BLOCK_D1 if BLOCK else BLOCK_D0
    d = FIRST + tl.expand_dims(tl.arange(0, WIDTH), AXIS)  # [1, columns]
    if in_sequence is not None:
        x = tl.load(rows + d, mask=in_sequence & (d < HEAD_DIM), other=0.0)  # [M, columns]
    elif FIRST + WIDTH > HEAD_DIM:
        x = tl.load(rows + d, mask=d < HEAD_DIM, other=0.0)  # [M, columns]
    else:
        x = tl.load(rows + d)  # [M, columns]
    return x


@triton.jit
def load_head(rows, in_sequence, HEAD_DIM: tl.constexpr, BLOCK_D0: tl.constexpr, BLOCK_D1: tl.constexpr):
    """All columns of rows, pointers [M, 1], as [M, head_dim]; 0 where in_sequence [M, 1] is false."""
    x = (load_columns(rows, in_sequence, 0, HEAD_DIM, BLOCK_D0, BLOCK_D1),)
    if BLOCK_D1 > 0:
        x += (load_columns(rows, in_sequence, 1, HEAD_DIM, BLOCK_D0, BLOCK_D1),)
    return x  # [M, head_dim]


@triton.jit
def store_head(rows, x, in_sequence, HEAD_DIM: tl.constexpr):
    """Store x [M, head_dim] to rows, pointers [M, 1], where in_sequence [M, 1] is true."""
    for block in tl.static_range(len(x)):
        d = block * x[0].shape[1] + tl.arange(0, x[block].shape[1])[None, :]  # [1, columns]
        tl.store(rows + d, x[block].to(rows.dtype.element_ty), mask=in_sequence & (d < HEAD_DIM))


@triton.jit
def zero_head(BLOCK_M: tl.constexpr, BLOCK_D0: tl.constexpr, BLOCK_D1: tl.constexpr):
    """float32 zeros [BLOCK_M, head_dim], to add products to."""
    x = (tl.zeros((BLOCK_M, BLOCK_D0), tl.float32),)
    if BLOCK_D1 > 0:
        x += (tl.zeros((BLOCK_M, BLOCK_D1), tl.float32),)
    return x  # [BLOCK_M, head_dim]


@triton.jit
def add_product(acc, p, x, INPUT_PRECISION: tl.constexpr):
    """acc [M, head_dim] + p [M, N] @ x [N, head_dim]."""
    total = ()
    for block in tl.static_range(len(acc)):
        total += (tl.dot(p, x[block], acc[block], input_precision=INPUT_PRECISION),)
    return total  # [M, head_dim]
