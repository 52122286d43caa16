"""Triton kernels and launcher of varlen_attention's gradients."""

import torch
import triton
import triton.language as tl

from vit_kernels._triton.configurations import Configuration, preferred
from vit_kernels._triton.head import add_product, load_columns, load_head, store_head, zero_head
from vit_kernels._triton.sequences import bounds, find_sequence
from vit_kernels._triton.strides import head_stride, token_granule
from vit_kernels._triton.varlen_attention import LOWEST, SMALLEST_SCALE

LOG2_E = tl.constexpr(1.4426950408889634)
LARGE_LSE = {torch.float32: 16.0, torch.float16: 1024.0, torch.bfloat16: 1024.0}
"""In base 2, where rounding a log-sum-exp to float32 is felt beside the other roundings of a probability."""


@triton.jit
def _split_lse(
    q,
    k_ptr,
    stride_k,
    keys,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D0: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """The largest score of each row in base 2, and the sum of exp2 of the scores less that."""
    row_max = tl.full((BLOCK_M,), LOWEST, tl.float32)  # [BLOCK_M]
    row_sum = tl.zeros((BLOCK_M,), tl.float32)  # [BLOCK_M]
    for first_key in range(0, keys, BLOCK_N):
        n = first_key + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        in_sequence = n < keys  # [BLOCK_N]
        if INT64_OFFSETS:
            n = n.to(tl.int64)
        k_rows = k_ptr + n[:, None] * stride_k  # [BLOCK_N, 1]
        scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # [BLOCK_M, BLOCK_N]
        for block in tl.static_range(len(q)):
            k = load_columns(k_rows, in_sequence[:, None], block, HEAD_DIM, BLOCK_D0, BLOCK_D1)  # [BLOCK_N, columns]
            scores = tl.dot(q[block], tl.trans(k), scores, input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
        scores = tl.where(in_sequence[None, :], scores, float("-inf"))  # [BLOCK_M, BLOCK_N]
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)  # [BLOCK_M]
        p = tl.exp2(scores * scale_log2 - new_max[:, None])  # [BLOCK_M, BLOCK_N]
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(p, 1)  # [BLOCK_M]
        row_max = new_max
    # Without keys, or with scores of -inf alone, the sum is 0, and so are all probabilities.
    return row_max, tl.where(row_sum == 0.0, 1.0, row_sum)


@triton.jit(
    do_not_specialize=("total_tokens", "total_tokens_k", "sequences"),
    do_not_specialize_on_alignment=("times_qh", "times_kh", "times_vh"),
)
def exact_lse_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    shift_ptr,
    factor_ptr,
    cu_seqlens_ptr,
    cu_seqlens_k_ptr,
    stride_q,
    stride_k,
    total_tokens,
    total_tokens_k,
    sequences,
    scale_log2,
    times_qh,
    times_kh,
    GRANULE: tl.constexpr,
    STRIDE_QH: tl.constexpr,
    STRIDE_KH: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    BLOCK_D0: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    SEARCH: tl.constexpr,
    LARGE: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program: what the probabilities of BLOCK_M queries of one head are made of, exp2(score - shift) * factor.

    The shift is the log-sum-exp in base 2. Rounded to float32 it is off by up to 2**-24 of itself, and a probability
    by as much times it: by 3e-4 where scores are 7000, though of one that outweighs all others PyTorch's is exactly 1.
    So where it is large, the rows are computed again: the shift is their largest score and, where there are factors,
    a whole number, which leaves a factor from 0.5 to 1. Factors of None are 1. Elsewhere only lse is read.
    """
    stride_q *= GRANULE
    stride_k *= GRANULE
    scale_log2 = tl.full((), scale_log2, tl.float32)
    program = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    s = find_sequence(cu_seqlens_ptr, sequences, program, BLOCK_M, SEARCH)
    if s < 0:
        return
    first_query = (program - (tl.load(cu_seqlens_ptr + s) // BLOCK_M + s)) * BLOCK_M
    start, queries = bounds(cu_seqlens_ptr, s, sequences, total_tokens, total_tokens)
    start_k, keys = bounds(cu_seqlens_k_ptr, s, sequences, 0, total_tokens_k)
    if (first_query < 0) | (first_query >= queries):
        return

    m = first_query + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    in_sequence = m < queries  # [BLOCK_M]
    t = (start + m).to(tl.int64)  # [BLOCK_M]
    head_rows = head * total_tokens + t  # [BLOCK_M]
    shift = tl.load(lse_ptr + head_rows, mask=in_sequence, other=0.0) * LOG2_E  # [BLOCK_M]
    factor = tl.full((BLOCK_M,), 1.0, tl.float32)  # [BLOCK_M]
    if tl.max(tl.abs(shift), 0) > LARGE:
        q_rows = q_ptr + head * times_qh * STRIDE_QH + t[:, None] * stride_q  # [BLOCK_M, 1]
        k_ptr += start_k.to(tl.int64) * stride_k + head // GROUP * times_kh * STRIDE_KH
        q = load_head(q_rows, in_sequence[:, None], HEAD_DIM, BLOCK_D0, BLOCK_D1)  # [BLOCK_M, head_dim]
        row_max, row_sum = _split_lse(
            q, k_ptr, stride_k, keys, scale_log2,
            HEAD_DIM, BLOCK_M, BLOCK_TAIL, BLOCK_D0, BLOCK_D1, INT64_OFFSETS, INPUT_PRECISION,
        )  # fmt: skip
        if factor_ptr is not None:
            shift = row_max + tl.ceil(tl.log2(row_sum))  # [BLOCK_M]
            factor = tl.exp2(shift - row_max) / row_sum  # [BLOCK_M]
        else:
            shift = row_max + tl.log2(row_sum)  # [BLOCK_M]
    tl.store(shift_ptr + head_rows, shift, mask=in_sequence)
    if factor_ptr is not None:
        tl.store(factor_ptr + head_rows, factor, mask=in_sequence)


@triton.jit
def _grad_q_of_keys(
    q,
    grad,
    shift,
    delta,
    acc,
    k_ptr,
    v_ptr,
    stride_k,
    stride_v,
    first_key,
    keys,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D0: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    MASK_KEYS: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Add to q's gradient what BLOCK_N keys from first_key on contribute.

    A block of columns is read right before its products: with all of them read first, AMD takes more registers.
    """
    n = first_key + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_sequence = n < keys  # [BLOCK_N]
    if INT64_OFFSETS:
        n = n.to(tl.int64)
    k_rows = k_ptr + n[:, None] * stride_k  # [BLOCK_N, 1]
    v_rows = v_ptr + n[:, None] * stride_v  # [BLOCK_N, 1]
    kv_in_sequence = in_sequence[:, None] if MASK_KEYS else None  # [BLOCK_N, 1]

    k = ()
    scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # [BLOCK_M, BLOCK_N]
    grad_p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # [BLOCK_M, BLOCK_N]
    for block in tl.static_range(len(q)):
        k += (load_columns(k_rows, kv_in_sequence, block, HEAD_DIM, BLOCK_D0, BLOCK_D1),)  # [BLOCK_N, columns]
        v = load_columns(v_rows, kv_in_sequence, block, HEAD_DIM, BLOCK_D0, BLOCK_D1)  # [BLOCK_N, columns]
        scores = tl.dot(q[block], tl.trans(k[block]), scores, input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
        grad_p = tl.dot(grad[block], tl.trans(v), grad_p, input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]

    grad_scores = tl.exp2(scores * scale_log2 - shift[:, None]) * (grad_p - delta[:, None])  # [BLOCK_M, BLOCK_N]
    if MASK_KEYS:
        # What is infinite in a query or a gradient makes NaN of the zeros read past the end.
        grad_scores = tl.where(in_sequence[None, :], grad_scores, 0.0)  # [BLOCK_M, BLOCK_N]
    return add_product(acc, grad_scores.to(k_ptr.dtype.element_ty), k, INPUT_PRECISION)


@triton.jit(
    do_not_specialize=("total_tokens", "total_tokens_k", "sequences"),
    do_not_specialize_on_alignment=("times_qh", "times_kh", "times_vh"),
)
def grad_q_kernel(
    grad_ptr,
    grad_lse_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    shift_ptr,
    grad_q_ptr,
    delta_ptr,
    cu_seqlens_ptr,
    cu_seqlens_k_ptr,
    stride_q,
    stride_k,
    stride_v,
    total_tokens,
    total_tokens_k,
    sequences,
    scale,
    scale_log2,
    times_qh,
    times_kh,
    times_vh,
    GRANULE: tl.constexpr,
    STRIDE_QH: tl.constexpr,
    STRIDE_KH: tl.constexpr,
    STRIDE_VH: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    BLOCK_D0: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    SEARCH: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program: the gradient of BLOCK_M queries of one head, and their delta for the kernel of k and v.

    delta = sum(grad * out) - grad_lse is what the softmax's gradient subtracts from each row. grad, out and grad_q
    are contiguous, shift, as `exact_lse_kernel` gives it, and delta [heads, total_tokens].
    """
    stride_q *= GRANULE
    stride_k *= GRANULE
    stride_v *= GRANULE
    # The interpreter takes what is below the normal numbers for float64.
    scale, scale_log2 = tl.full((), scale, tl.float32), tl.full((), scale_log2, tl.float32)
    program = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    s = find_sequence(cu_seqlens_ptr, sequences, program, BLOCK_M, SEARCH)
    if s < 0:
        return
    first_query = (program - (tl.load(cu_seqlens_ptr + s) // BLOCK_M + s)) * BLOCK_M
    start, queries = bounds(cu_seqlens_ptr, s, sequences, total_tokens, total_tokens)
    start_k, keys = bounds(cu_seqlens_k_ptr, s, sequences, 0, total_tokens_k)
    if (first_query < 0) | (first_query >= queries):
        return

    m = first_query + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    in_sequence = (m < queries)[:, None]  # [BLOCK_M, 1]
    t = (start + m).to(tl.int64)  # [BLOCK_M]
    q_rows = q_ptr + head * times_qh * STRIDE_QH + t[:, None] * stride_q  # [BLOCK_M, 1]
    row = t[:, None] * (HEADS * HEAD_DIM) + head * HEAD_DIM  # [BLOCK_M, 1]
    acc = zero_head(BLOCK_M, BLOCK_D0, BLOCK_D1)  # [BLOCK_M, head_dim]
    q = ()
    grad = ()
    delta = None
    for block in tl.static_range(len(acc)):
        q += (load_columns(q_rows, in_sequence, block, HEAD_DIM, BLOCK_D0, BLOCK_D1),)  # [BLOCK_M, columns]
        grad += (load_columns(grad_ptr + row, in_sequence, block, HEAD_DIM, BLOCK_D0, BLOCK_D1),)  # [BLOCK_M, columns]
        out = load_columns(out_ptr + row, in_sequence, block, HEAD_DIM, BLOCK_D0, BLOCK_D1)  # [BLOCK_M, columns]
        of_block = tl.sum(out.to(tl.float32) * grad[block].to(tl.float32), 1)  # [BLOCK_M]
        delta = of_block if delta is None else delta + of_block  # [BLOCK_M]
    head_rows = head * total_tokens + t  # [BLOCK_M]
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + head_rows, mask=m < queries, other=0.0)  # [BLOCK_M]
    tl.store(delta_ptr + head_rows, delta, mask=m < queries)
    shift = tl.load(shift_ptr + head_rows, mask=m < queries, other=0.0)  # [BLOCK_M]

    k_ptr += start_k.to(tl.int64) * stride_k + head // GROUP * times_kh * STRIDE_KH
    v_ptr += start_k.to(tl.int64) * stride_v + head // GROUP * times_vh * STRIDE_VH
    full = keys // BLOCK_N * BLOCK_N
    for first_key in range(0, full, BLOCK_N):
        acc = _grad_q_of_keys(
            q, grad, shift, delta, acc, k_ptr, v_ptr, stride_k, stride_v, first_key, keys, scale_log2,
            HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D0, BLOCK_D1, False, INT64_OFFSETS, INPUT_PRECISION,
        )  # fmt: skip
    for first_key in range(full, keys, BLOCK_TAIL):
        acc = _grad_q_of_keys(
            q, grad, shift, delta, acc, k_ptr, v_ptr, stride_k, stride_v, first_key, keys, scale_log2,
            HEAD_DIM, BLOCK_M, BLOCK_TAIL, BLOCK_D0, BLOCK_D1, True, INT64_OFFSETS, INPUT_PRECISION,
        )  # fmt: skip
    store_head(grad_q_ptr + row, [x * scale for x in acc], in_sequence, HEAD_DIM)


@triton.jit
def _grad_kv_of_queries(
    k,
    v,
    grad_k,
    grad_v,
    q_ptr,
    grad_ptr,
    delta_ptr,
    shift_ptr,
    stride_q,
    first_query,
    queries,
    scale_log2,
    STRIDE_GRAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D0: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    MASK_QUERIES: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Add to the gradients of k and v what BLOCK_M queries from first_query on contribute.

    Blocks of columns are read in the order that costs least, the gradients' second one after the scores: every other
    that was tried takes more registers or instructions on gfx942, sm_90 or sm_100.
    """
    m = first_query + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    in_sequence = m < queries  # [BLOCK_M]
    if MASK_QUERIES:
        delta = tl.load(delta_ptr + m, mask=in_sequence, other=0.0)  # [BLOCK_M]
        shift = tl.load(shift_ptr + m, mask=in_sequence, other=0.0)  # [BLOCK_M]
    else:
        delta = tl.load(delta_ptr + m)  # [BLOCK_M]
        shift = tl.load(shift_ptr + m)  # [BLOCK_M]
    if INT64_OFFSETS:
        m = m.to(tl.int64)
    q_rows = q_ptr + m[:, None] * stride_q  # [BLOCK_M, 1]
    grad_rows = grad_ptr + m[:, None] * STRIDE_GRAD  # [BLOCK_M, 1]
    q_in_sequence = in_sequence[:, None] if MASK_QUERIES else None  # [BLOCK_M, 1]

    q = ()
    grad = ()
    scores = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)  # [BLOCK_N, BLOCK_M]
    for block in tl.static_range(len(k)):
        q += (load_columns(q_rows, q_in_sequence, block, HEAD_DIM, BLOCK_D0, BLOCK_D1),)  # [BLOCK_M, columns]
        if block == 0:
            grad += (load_columns(grad_rows, q_in_sequence, block, HEAD_DIM, BLOCK_D0, BLOCK_D1),)  # [BLOCK_M, columns]
        scores = tl.dot(k[block], tl.trans(q[block]), scores, input_precision=INPUT_PRECISION)  # [BLOCK_N, BLOCK_M]
    p = tl.exp2(scores * scale_log2 - shift[None, :])  # [BLOCK_N, BLOCK_M]
    if MASK_QUERIES:
        # A query past the end belongs to the next sequence; what is infinite in a key makes NaN of the zeros read.
        p = tl.where(in_sequence[None, :], p, 0.0)  # [BLOCK_N, BLOCK_M]

    rounded = p.to(q_ptr.dtype.element_ty)  # [BLOCK_N, BLOCK_M]
    new_grad_v = ()
    grad_p = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)  # [BLOCK_N, BLOCK_M]
    for block in tl.static_range(len(v)):
        if block > 0:
            grad += (load_columns(grad_rows, q_in_sequence, block, HEAD_DIM, BLOCK_D0, BLOCK_D1),)  # [BLOCK_M, columns]
        new_grad_v += (tl.dot(rounded, grad[block], grad_v[block], input_precision=INPUT_PRECISION),)
        grad_p = tl.dot(v[block], tl.trans(grad[block]), grad_p, input_precision=INPUT_PRECISION)  # [BLOCK_N, BLOCK_M]
    grad_scores = p * (grad_p - delta[None, :])  # [BLOCK_N, BLOCK_M]
    if MASK_QUERIES:
        grad_scores = tl.where(in_sequence[None, :], grad_scores, 0.0)  # [BLOCK_N, BLOCK_M]
    return add_product(grad_k, grad_scores.to(q_ptr.dtype.element_ty), q, INPUT_PRECISION), new_grad_v


@triton.jit(
    do_not_specialize=("total_tokens", "total_tokens_k", "sequences"),
    do_not_specialize_on_alignment=("times_qh", "times_kh", "times_vh"),
)
def grad_kv_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    delta_ptr,
    shift_ptr,
    grad_k_ptr,
    grad_v_ptr,
    cu_seqlens_ptr,
    cu_seqlens_k_ptr,
    stride_q,
    stride_k,
    stride_v,
    total_tokens,
    total_tokens_k,
    sequences,
    scale,
    scale_log2,
    times_qh,
    times_kh,
    times_vh,
    GRANULE: tl.constexpr,
    STRIDE_QH: tl.constexpr,
    STRIDE_KH: tl.constexpr,
    STRIDE_VH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    BLOCK_D0: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    SEARCH: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program: the gradients of BLOCK_N keys and values of one head, all its query heads added in order."""
    stride_q *= GRANULE
    stride_k *= GRANULE
    stride_v *= GRANULE
    scale, scale_log2 = tl.full((), scale, tl.float32), tl.full((), scale_log2, tl.float32)
    program = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    s = find_sequence(cu_seqlens_k_ptr, sequences, program, BLOCK_N, SEARCH)
    if s < 0:
        return
    first_key = (program - (tl.load(cu_seqlens_k_ptr + s) // BLOCK_N + s)) * BLOCK_N
    start_k, keys = bounds(cu_seqlens_k_ptr, s, sequences, total_tokens_k, total_tokens_k)
    start, queries = bounds(cu_seqlens_ptr, s, sequences, 0, total_tokens)
    if (first_key < 0) | (first_key >= keys):
        return

    n = first_key + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_sequence = (n < keys)[:, None]  # [BLOCK_N, 1]
    t = (start_k + n).to(tl.int64)[:, None]  # [BLOCK_N, 1]
    k_rows = k_ptr + kv_head * times_kh * STRIDE_KH + t * stride_k  # [BLOCK_N, 1]
    v_rows = v_ptr + kv_head * times_vh * STRIDE_VH + t * stride_v  # [BLOCK_N, 1]
    k = load_head(k_rows, in_sequence, HEAD_DIM, BLOCK_D0, BLOCK_D1)  # [BLOCK_N, head_dim]
    v = load_head(v_rows, in_sequence, HEAD_DIM, BLOCK_D0, BLOCK_D1)  # [BLOCK_N, head_dim]
    grad_k = zero_head(BLOCK_N, BLOCK_D0, BLOCK_D1)  # [BLOCK_N, head_dim]
    grad_v = zero_head(BLOCK_N, BLOCK_D0, BLOCK_D1)  # [BLOCK_N, head_dim]

    full = queries // BLOCK_M * BLOCK_M
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_head = q_ptr + head * times_qh * STRIDE_QH + start.to(tl.int64) * stride_q
        grad_head = grad_ptr + (start.to(tl.int64) * (GROUP * KV_HEADS) + head) * HEAD_DIM
        row = head * total_tokens + start
        for first_query in range(0, full, BLOCK_M):
            grad_k, grad_v = _grad_kv_of_queries(
                k, v, grad_k, grad_v, q_head, grad_head, delta_ptr + row, shift_ptr + row,
                stride_q, first_query, queries, scale_log2, GROUP * KV_HEADS * HEAD_DIM, HEAD_DIM,
                BLOCK_M, BLOCK_N, BLOCK_D0, BLOCK_D1, False, INT64_OFFSETS, INPUT_PRECISION,
            )  # fmt: skip
        for first_query in range(full, queries, BLOCK_TAIL):
            grad_k, grad_v = _grad_kv_of_queries(
                k, v, grad_k, grad_v, q_head, grad_head, delta_ptr + row, shift_ptr + row,
                stride_q, first_query, queries, scale_log2, GROUP * KV_HEADS * HEAD_DIM, HEAD_DIM,
                BLOCK_TAIL, BLOCK_N, BLOCK_D0, BLOCK_D1, True, INT64_OFFSETS, INPUT_PRECISION,
            )  # fmt: skip
    row = t * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM  # [BLOCK_N, 1]
    store_head(grad_k_ptr + row, [x * scale for x in grad_k], in_sequence, HEAD_DIM)
    store_head(grad_v_ptr + row, grad_v, in_sequence, HEAD_DIM)


def launch(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    scale: float,
    *,
    configurations: tuple[Configuration, Configuration] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, contiguous, on the current stream; grad and out are contiguous, lse [heads, tokens].

    No sum depends on the order in which programs run. `configurations` are those of the two kernels.
    """
    total_tokens, heads, head_dim = q.shape
    total_tokens_k, kv_heads, _ = k.shape
    sequences = cu_seqlens.shape[0] - 1
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta, shift = torch.empty_like(lse), torch.empty_like(lse)
    factor = torch.empty_like(lse) if q.dtype == torch.float32 else None
    if configurations is None:
        configurations = preferred("grad_q", head_dim, q.dtype), preferred("grad_kv", head_dim, q.dtype)
    for_q, for_kv = configurations
    granule = token_granule(q, k, v)
    (times_q, of_q), (times_k, of_k), (times_v, of_v) = head_stride(q), head_stride(k), head_stride(v)
    shared = {
        "cu_seqlens_ptr": cu_seqlens,
        "cu_seqlens_k_ptr": cu_seqlens_k,
        "total_tokens": total_tokens,
        "total_tokens_k": total_tokens_k,
        "sequences": sequences,
        "scale_log2": max(scale * LOG2_E.value, SMALLEST_SCALE),
        "stride_q": q.stride(0) // granule,
        "stride_k": k.stride(0) // granule,
        "GRANULE": granule,
        "times_qh": times_q,
        "times_kh": times_k,
        "STRIDE_QH": of_q,
        "STRIDE_KH": of_k,
        "GROUP": heads // kv_heads,
        "HEAD_DIM": head_dim,
        # As in the forward.
        "SEARCH": 128,
    }
    of_values = {"scale": scale, "stride_v": v.stride(0) // granule, "times_vh": times_v, "STRIDE_VH": of_v}
    if total_tokens:
        programs = triton.cdiv(total_tokens, for_q["BLOCK_M"]) + sequences
        exact_lse_kernel[(programs, heads)](
            q, k, lse, shift, factor, **shared,
            **{name: value for name, value in for_q.items() if name != "BLOCK_N"},
            LARGE=LARGE_LSE[q.dtype], INT64_OFFSETS=total_tokens_k * k.stride(0) >= 2**31,
        )  # fmt: skip
        if factor is not None:
            # All that follows is linear in a row's gradients. In half precision they would be rounded once more, to
            # less than what the factor mends.
            grad = grad * factor.T[..., None]
            grad_lse = None if grad_lse is None else grad_lse * factor
        grad_q_kernel[(programs, heads)](
            grad, grad_lse, q, k, v, out, shift, grads[0], delta, **shared, **of_values, **for_q,
            HEADS=heads, INT64_OFFSETS=total_tokens_k * max(k.stride(0), v.stride(0)) >= 2**31,
        )  # fmt: skip
    if total_tokens_k:
        programs = triton.cdiv(total_tokens_k, for_kv["BLOCK_N"]) + sequences
        grad_kv_kernel[(programs, kv_heads)](
            grad, q, k, v, delta, shift, *grads[1:], **shared, **of_values, **for_kv,
            KV_HEADS=kv_heads, INT64_OFFSETS=total_tokens * max(q.stride(0), grad.stride(0)) >= 2**31,
        )  # fmt: skip
    return grads
