"""Triton kernel and launcher of rotary_2d."""

import torch
import triton
import triton.language as tl


@triton.jit
def _rotate_heads(
    x_ptr,
    out_ptr,
    stride_token,
    tokens,
    t,
    cos,
    sin,
    head,
    STRIDE_HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rotate HEADS_PER_PROGRAM heads, from `head` on, of the tokens t; cos, sin [BLOCK_T, BLOCK_HALF]."""
    HALF: tl.constexpr = HEAD_DIM // 2
    for h in range(head, tl.minimum(head + HEADS_PER_PROGRAM, HEADS)):
        source = x_ptr + t.to(tl.int64)[:, None] * stride_token + tl.cast(h, tl.int64) * STRIDE_HEAD
        target = out_ptr + t.to(tl.int64)[:, None] * (HEADS * HEAD_DIM) + h * HEAD_DIM
        if INTERLEAVED:
            d = tl.arange(0, 2 * BLOCK_HALF)[None, :]
            mask = (t < tokens)[:, None] & (d < HEAD_DIM)
            x = tl.load(source + d, mask=mask, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(x, (x.shape[0], BLOCK_HALF, 2)))
            rotated = tl.join(a * cos - b * sin, a * sin + b * cos)
            out = tl.reshape(rotated, (x.shape[0], 2 * BLOCK_HALF))
            tl.store(target + d, out.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            d = tl.arange(0, BLOCK_HALF)[None, :]
            mask = (t < tokens)[:, None] & (d < HALF)
            a = tl.load(source + d, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(source + HALF + d, mask=mask, other=0.0).to(tl.float32)
            tl.store(target + d, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(target + HALF + d, (a * sin + b * cos).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotary_2d_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    stride_q,
    stride_k,
    tokens,
    positions,
    STRIDE_QH: tl.constexpr,
    STRIDE_KH: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
):
    """One program rotates HEADS_PER_PROGRAM heads, of q or of k, for BLOCK_T tokens with one read of the tables."""
    HALF: tl.constexpr = HEAD_DIM // 2
    Q_GROUPS: tl.constexpr = (Q_HEADS + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    group = tl.program_id(1)
    j = tl.arange(0, BLOCK_HALF)
    row = (t % positions)[:, None] * HALF + j[None, :]
    mask = (t < tokens)[:, None] & (j < HALF)[None, :]
    cos = tl.load(cos_ptr + row, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + row, mask=mask, other=0.0)
    if group < Q_GROUPS:
        head = group * HEADS_PER_PROGRAM
        _rotate_heads(
            q_ptr, q_out_ptr, stride_q, tokens, t, cos, sin, head,
            STRIDE_QH, Q_HEADS, HEAD_DIM, HEADS_PER_PROGRAM, BLOCK_HALF, INTERLEAVED,
        )  # fmt: skip
    else:
        head = (group - Q_GROUPS) * HEADS_PER_PROGRAM
        _rotate_heads(
            k_ptr, k_out_ptr, stride_k, tokens, t, cos, sin, head,
            STRIDE_KH, K_HEADS, HEAD_DIM, HEADS_PER_PROGRAM, BLOCK_HALF, INTERLEAVED,
        )  # fmt: skip


def launch(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [tokens, heads, head_dim], cos, sin [positions, head_dim // 2] -> rotated q, k on the current stream."""
    tokens, q_heads, head_dim = q.shape
    k_heads = k.shape[1]
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    block_tokens, heads_per_program = 16, 4
    if tokens:
        groups = triton.cdiv(q_heads, heads_per_program) + triton.cdiv(k_heads, heads_per_program)
        rotary_2d_kernel[(triton.cdiv(tokens, block_tokens), groups)](
            q,
            k,
            cos,
            sin,
            q_out,
            k_out,
            q.stride(0),
            k.stride(0),
            tokens,
            cos.shape[0],
            STRIDE_QH=q.stride(1),
            STRIDE_KH=k.stride(1),
            Q_HEADS=q_heads,
            K_HEADS=k_heads,
            HEAD_DIM=head_dim,
            INTERLEAVED=interleaved,
            BLOCK_T=block_tokens,
            BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
            HEADS_PER_PROGRAM=heads_per_program,
        )
    return q_out, k_out
