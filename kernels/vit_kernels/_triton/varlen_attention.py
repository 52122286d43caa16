"""Triton kernel and launcher of varlen_attention."""

import torch
import triton
import triton.language as tl

from vit_kernels._triton.configurations import Configuration, preferred
from vit_kernels._triton.head import load_columns, load_head, store_head, zero_head
from vit_kernels._triton.sequences import bounds, find_sequence
from vit_kernels._triton.strides import head_stride, token_granule, token_stride

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
SMALLEST_SCALE = 2.0**-149
"""float32's: 0 times an infinite score would be NaN."""


@triton.jit
def _attend(
    q,
    k_ptr,
    v_ptr,
    stride_k,
    stride_v,
    first_key,
    keys,
    scale_log2,
    row_max,
    row_sum,
    acc,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D0: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    MASK_KEYS: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One step of the online softmax over the BLOCK_N keys from first_key on.

    A block of columns is read right before its product: with all of them read first, AMD takes more registers.
    """
    n = first_key + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    in_sequence = n < keys  # [BLOCK_N]
    if INT64_OFFSETS:
        n = n.to(tl.int64)
    k_rows = k_ptr + n[None, :] * stride_k  # [1, BLOCK_N]
    v_rows = v_ptr + n[:, None] * stride_v  # [BLOCK_N, 1]
    # A key past the end belongs to the next sequence: 0 * NaN would leak, so its v is read as 0.
    k_in_sequence = in_sequence[None, :] if MASK_KEYS else None  # [1, BLOCK_N]
    v_in_sequence = in_sequence[:, None] if MASK_KEYS else None  # [BLOCK_N, 1]

    scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # [BLOCK_M, BLOCK_N]
    for block in tl.static_range(len(q)):
        k = load_columns(k_rows, k_in_sequence, block, HEAD_DIM, BLOCK_D0, BLOCK_D1, AXIS=1)  # [columns, BLOCK_N]
        scores = tl.dot(q[block], k, scores, input_precision=INPUT_PRECISION)  # [BLOCK_M, BLOCK_N]
    if MASK_KEYS:
        scores = tl.where(in_sequence[None, :], scores, float("-inf"))  # [BLOCK_M, BLOCK_N]

    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)  # [BLOCK_M]
    decay = tl.exp2(row_max - new_max)  # [BLOCK_M]
    p = tl.exp2(scores * scale_log2 - new_max[:, None])  # [BLOCK_M, BLOCK_N]
    row_sum = row_sum * decay + tl.sum(p, 1)  # [BLOCK_M]
    p = p.to(v_ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_N]

    new_acc = ()
    for block in tl.static_range(len(acc)):
        v = load_columns(v_rows, v_in_sequence, block, HEAD_DIM, BLOCK_D0, BLOCK_D1)  # [BLOCK_N, columns]
        new_acc += (tl.dot(p, v, acc[block] * decay[:, None], input_precision=INPUT_PRECISION),)  # [BLOCK_M, columns]
    return new_max, row_sum, new_acc


@triton.jit
def _attend_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    stride_q,
    stride_k,
    stride_v,
    first_query,
    queries,
    keys,
    scale_log2,
    stride_out,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    BLOCK_D0: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Outputs, and log-sum-exps where lse_ptr is given, of BLOCK_M queries from first_query on.

    The pointers stand at the sequence and the head. Keys go BLOCK_N at a time without a mask, the rest BLOCK_TAIL at a
    time with one.
    """
    m = first_query + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    in_sequence = (m < queries)[:, None]  # [BLOCK_M, 1]
    q_rows = q_ptr + m.to(tl.int64)[:, None] * stride_q  # [BLOCK_M, 1]
    q = load_head(q_rows, in_sequence, HEAD_DIM, BLOCK_D0, BLOCK_D1)  # [BLOCK_M, head_dim]
    acc = zero_head(BLOCK_M, BLOCK_D0, BLOCK_D1)  # [BLOCK_M, head_dim]
    # Not -inf: while every score of a row is, its maximum less itself would be NaN.
    row_max = tl.full((BLOCK_M,), LOWEST, tl.float32)  # [BLOCK_M]
    row_sum = tl.zeros((BLOCK_M,), tl.float32)  # [BLOCK_M]

    full = keys // BLOCK_N * BLOCK_N
    for first_key in range(0, full, BLOCK_N):
        row_max, row_sum, acc = _attend(
            q, k_ptr, v_ptr, stride_k, stride_v, first_key, keys, scale_log2, row_max, row_sum, acc,
            HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D0, BLOCK_D1, False, INT64_OFFSETS, INPUT_PRECISION,
        )  # fmt: skip
    for first_key in range(full, keys, BLOCK_TAIL):
        row_max, row_sum, acc = _attend(
            q, k_ptr, v_ptr, stride_k, stride_v, first_key, keys, scale_log2, row_max, row_sum, acc,
            HEAD_DIM, BLOCK_M, BLOCK_TAIL, BLOCK_D0, BLOCK_D1, True, INT64_OFFSETS, INPUT_PRECISION,
        )  # fmt: skip

    # Without keys, or with scores of -inf alone, the sum is 0: such rows are zeros, not 0 / 0.
    normaliser = tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]  # [BLOCK_M, 1]
    out_rows = out_ptr + m.to(tl.int64)[:, None] * stride_out  # [BLOCK_M, 1]
    store_head(out_rows, [x / normaliser for x in acc], in_sequence, HEAD_DIM)
    if lse_ptr is not None:
        # A score of +inf leaves a sum of NaN, and the log-sum-exp is the score.
        lse_log2 = tl.where(row_max == float("inf"), row_max, row_max + tl.log2(row_sum))  # [BLOCK_M]
        tl.store(lse_ptr + m, lse_log2 * LN_2, mask=m < queries)


@triton.jit(
    do_not_specialize=("total_tokens", "total_tokens_k", "sequences"),
    do_not_specialize_on_alignment=("times_qh", "times_kh", "times_vh", "times_out", "times_outh"),
)
def varlen_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    cu_seqlens_k_ptr,
    stride_q,
    stride_k,
    stride_v,
    total_tokens,
    total_tokens_k,
    sequences,
    scale_log2,
    times_qh,
    times_kh,
    times_vh,
    times_out,
    times_outh,
    GRANULE: tl.constexpr,
    STRIDE_QH: tl.constexpr,
    STRIDE_KH: tl.constexpr,
    STRIDE_VH: tl.constexpr,
    STRIDE_OUT: tl.constexpr,
    STRIDE_OUTH: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_LAST: tl.constexpr,
    BLOCK_N_LAST: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    BLOCK_D0: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    SEARCH: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program: BLOCK_M queries of one head, found from cu_seqlens on the device.

    A last block of at most BLOCK_LAST queries, such as the lone class token of 577 = 9 * 64 + 1, is computed with
    that many rows instead of BLOCK_M. Strides of heads and of out are products, those of q, k and v are given divided
    by GRANULE, see `strides.py`.
    """
    stride_q *= GRANULE
    stride_k *= GRANULE
    stride_v *= GRANULE
    # The interpreter takes what is below the normal numbers for float64.
    scale_log2 = tl.full((), scale_log2, tl.float32)
    program = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    s = find_sequence(cu_seqlens_ptr, sequences, program, BLOCK_M, SEARCH)
    if s < 0:
        return
    first_program = tl.load(cu_seqlens_ptr + s) // BLOCK_M + s
    start, queries = bounds(cu_seqlens_ptr, s, sequences, total_tokens, total_tokens)
    start_k, keys = bounds(cu_seqlens_k_ptr, s, sequences, 0, total_tokens_k)
    first_query = (program - first_program) * BLOCK_M
    if (first_query < 0) | (first_query >= queries):
        return

    q_ptr += start.to(tl.int64) * stride_q + head * times_qh * STRIDE_QH
    k_ptr += start_k.to(tl.int64) * stride_k + head // GROUP * times_kh * STRIDE_KH
    v_ptr += start_k.to(tl.int64) * stride_v + head // GROUP * times_vh * STRIDE_VH
    out_ptr += start.to(tl.int64) * times_out * STRIDE_OUT + head * times_outh * STRIDE_OUTH
    if lse_ptr is not None:
        lse_ptr += head * total_tokens + start
    if BLOCK_LAST < BLOCK_M and queries - first_query <= BLOCK_LAST:
        _attend_queries(
            q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stride_q, stride_k, stride_v, first_query, queries, keys, scale_log2,
            times_out * STRIDE_OUT, HEAD_DIM, BLOCK_LAST, BLOCK_N_LAST, BLOCK_TAIL, BLOCK_D0, BLOCK_D1,
            INT64_OFFSETS, INPUT_PRECISION,
        )  # fmt: skip
    else:
        _attend_queries(
            q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stride_q, stride_k, stride_v, first_query, queries, keys, scale_log2,
            times_out * STRIDE_OUT, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_TAIL, BLOCK_D0, BLOCK_D1,
            INT64_OFFSETS, INPUT_PRECISION,
        )  # fmt: skip


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    scale: float,
    *,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    configuration: Configuration | None = None,
) -> torch.Tensor:
    """q [total_tokens, heads, head_dim], k, v [total_tokens_k, kv_heads, head_dim] -> as q, on the current stream.

    Written to `out` where it is given; the log-sum-exps to `lse`, float32 [heads, total_tokens], where that is.
    """
    total_tokens, heads, head_dim = q.shape
    sequences = cu_seqlens.shape[0] - 1
    if out is None:
        out = q.new_empty(q.shape)
    if configuration is None:
        configuration = preferred("varlen_attention", head_dim, q.dtype)
    if total_tokens:
        programs = triton.cdiv(total_tokens, configuration["BLOCK_M"]) + sequences
        granule = token_granule(q, k, v)
        strides = (head_stride(q), head_stride(k), head_stride(v), token_stride(out), head_stride(out))
        names = ("STRIDE_QH", "STRIDE_KH", "STRIDE_VH", "STRIDE_OUT", "STRIDE_OUTH")
        varlen_attention_kernel[(programs, heads)](
            q,
            k,
            v,
            out,
            lse,
            cu_seqlens,
            cu_seqlens_k,
            q.stride(0) // granule,
            k.stride(0) // granule,
            v.stride(0) // granule,
            total_tokens,
            k.shape[0],
            sequences,
            max(scale * LOG2_E, SMALLEST_SCALE),
            *(times for times, _ in strides),
            **{name: constant for name, (_, constant) in zip(names, strides, strict=True)},
            GRANULE=granule,
            GROUP=heads // k.shape[1],
            HEAD_DIM=head_dim,
            # One step of the search for batches of up to 127 sequences.
            SEARCH=128,
            INT64_OFFSETS=k.shape[0] * max(k.stride(0), v.stride(0)) >= 2**31,
            **configuration,
        )
    return out
