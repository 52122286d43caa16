"""Triton kernel and launcher of varlen_attention."""

import torch
import triton
import triton.language as tl

from vit_kernels._triton.configurations import Configuration, preferred
from vit_kernels._triton.sequences import bounds, find_sequence
from vit_kernels._triton.strides import head_stride, token_stride

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
SMALLEST_SCALE = 2.0**-149
"""float32's: 0 times an infinite score would be NaN."""


@triton.jit
def _attend(
    q_0,
    q_1,
    k_ptr,
    v_ptr,
    stride_k,
    stride_v,
    first_key,
    keys,
    scale_log2,
    row_max,
    row_sum,
    acc_0,
    acc_1,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D0: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    MASK_KEYS: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One step of the online softmax over the BLOCK_N keys from first_key on."""
    n = first_key + tl.arange(0, BLOCK_N)
    d_0 = tl.arange(0, BLOCK_D0)
    in_sequence = n < keys
    if INT64_OFFSETS:
        n = n.to(tl.int64)
    k_rows = k_ptr + n[None, :] * stride_k
    v_rows = v_ptr + n[:, None] * stride_v

    if MASK_KEYS:
        k_0 = tl.load(k_rows + d_0[:, None], mask=in_sequence[None, :], other=0.0)
    else:
        k_0 = tl.load(k_rows + d_0[:, None])
    scores = tl.dot(q_0, k_0, input_precision=INPUT_PRECISION)
    if BLOCK_D1 > 0:
        d_1 = BLOCK_D0 + tl.arange(0, BLOCK_D1)
        in_head = d_1 < HEAD_DIM
        if MASK_KEYS:
            k_1 = tl.load(k_rows + d_1[:, None], mask=in_head[:, None] & in_sequence[None, :], other=0.0)
        else:
            k_1 = tl.load(k_rows + d_1[:, None], mask=in_head[:, None], other=0.0)
        scores = tl.dot(q_1, k_1, scores, input_precision=INPUT_PRECISION)
    if MASK_KEYS:
        scores = tl.where(in_sequence[None, :], scores, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    decay = tl.exp2(row_max - new_max)
    p = tl.exp2(scores * scale_log2 - new_max[:, None])
    row_sum = row_sum * decay + tl.sum(p, 1)
    p = p.to(v_ptr.dtype.element_ty)

    # A key past the end belongs to the next sequence: 0 * NaN would leak, so its v is read as 0.
    if MASK_KEYS:
        v_0 = tl.load(v_rows + d_0[None, :], mask=in_sequence[:, None], other=0.0)
    else:
        v_0 = tl.load(v_rows + d_0[None, :])
    acc_0 = tl.dot(p, v_0, acc_0 * decay[:, None], input_precision=INPUT_PRECISION)
    if BLOCK_D1 > 0:
        if MASK_KEYS:
            v_1 = tl.load(v_rows + d_1[None, :], mask=in_head[None, :] & in_sequence[:, None], other=0.0)
        else:
            v_1 = tl.load(v_rows + d_1[None, :], mask=in_head[None, :], other=0.0)
        acc_1 = tl.dot(p, v_1, acc_1 * decay[:, None], input_precision=INPUT_PRECISION)
    return new_max, row_sum, acc_0, acc_1


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

    The pointers stand at the sequence and the head. head_dim is two blocks, BLOCK_D0 full columns and BLOCK_D1 masked
    ones, instead of one block padded to a power of two. Keys go BLOCK_N at a time without a mask, the rest BLOCK_TAIL
    at a time with one.
    """
    m = first_query + tl.arange(0, BLOCK_M)
    in_sequence = (m < queries)[:, None]
    d_0 = tl.arange(0, BLOCK_D0)[None, :]
    q_rows = q_ptr + m.to(tl.int64)[:, None] * stride_q
    q_0 = tl.load(q_rows + d_0, mask=in_sequence, other=0.0)
    q_1 = q_0
    acc_0 = tl.zeros((BLOCK_M, BLOCK_D0), tl.float32)
    acc_1 = acc_0
    if BLOCK_D1 > 0:
        d_1 = BLOCK_D0 + tl.arange(0, BLOCK_D1)[None, :]
        q_1 = tl.load(q_rows + d_1, mask=in_sequence & (d_1 < HEAD_DIM), other=0.0)
        acc_1 = tl.zeros((BLOCK_M, BLOCK_D1), tl.float32)
    # Not -inf: while every score of a row is, its maximum less itself would be NaN.
    row_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)

    full = keys // BLOCK_N * BLOCK_N
    for first_key in range(0, full, BLOCK_N):
        row_max, row_sum, acc_0, acc_1 = _attend(
            q_0, q_1, k_ptr, v_ptr, stride_k, stride_v, first_key, keys, scale_log2, row_max, row_sum, acc_0, acc_1,
            HEAD_DIM, BLOCK_N, BLOCK_D0, BLOCK_D1, False, INT64_OFFSETS, INPUT_PRECISION,
        )  # fmt: skip
    for first_key in range(full, keys, BLOCK_TAIL):
        row_max, row_sum, acc_0, acc_1 = _attend(
            q_0, q_1, k_ptr, v_ptr, stride_k, stride_v, first_key, keys, scale_log2, row_max, row_sum, acc_0, acc_1,
            HEAD_DIM, BLOCK_TAIL, BLOCK_D0, BLOCK_D1, True, INT64_OFFSETS, INPUT_PRECISION,
        )  # fmt: skip

    # Without keys, or with scores of -inf alone, the sum is 0: such rows are zeros, not 0 / 0.
    normaliser = tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    out_rows = out_ptr + m.to(tl.int64)[:, None] * stride_out
    tl.store(out_rows + d_0, (acc_0 / normaliser).to(out_ptr.dtype.element_ty), mask=in_sequence)
    if BLOCK_D1 > 0:
        out_1 = (acc_1 / normaliser).to(out_ptr.dtype.element_ty)
        tl.store(out_rows + d_1, out_1, mask=in_sequence & (d_1 < HEAD_DIM))
    if lse_ptr is not None:
        # A score of +inf leaves a sum of NaN, and the log-sum-exp is the score.
        lse_log2 = tl.where(row_max == float("inf"), row_max, row_max + tl.log2(row_sum))
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
    that many rows instead of BLOCK_M. Strides of heads and of out are products, see `strides.py`.
    """
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
            q.stride(0),
            k.stride(0),
            v.stride(0),
            total_tokens,
            k.shape[0],
            sequences,
            max(scale * LOG2_E, SMALLEST_SCALE),
            *(times for times, _ in strides),
            **{name: constant for name, (_, constant) in zip(names, strides, strict=True)},
            GROUP=heads // k.shape[1],
            HEAD_DIM=head_dim,
            SEARCH=128,
            INT64_OFFSETS=k.shape[0] * max(k.stride(0), v.stride(0)) >= 2**31,
            **configuration,
        )
    return out
