"""Triton kernel and launchers of rotary_2d, its backward and rotary_2d_qkv_."""

import torch
import triton
import triton.language as tl

from vit_kernels._triton.strides import head_stride, token_granule


@triton.jit
def _rotate_heads(
    x_ptr,
    out_ptr,
    stride_token,
    stride_out_token,
    times_head,
    times_out_head,
    tokens,
    t,
    cos,
    sin,
    STRIDE_HEAD: tl.constexpr,
    STRIDE_OUT_HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Rotate all heads of the tokens t; cos, sin [BLOCK_T, 1, BLOCK_HALF]."""
    HALF: tl.constexpr = HEAD_DIM // 2
    t = t.to(tl.int64)[:, None, None]  # [BLOCK_T, 1, 1]
    for first_head in tl.static_range(0, HEADS, BLOCK_H):
        h = first_head + tl.arange(0, BLOCK_H)[None, :, None]  # [1, BLOCK_H, 1]
        mask = (t < tokens) & (h < HEADS)  # [BLOCK_T, BLOCK_H, 1]
        source = x_ptr + t * stride_token + h.to(tl.int64) * times_head * STRIDE_HEAD  # [BLOCK_T, BLOCK_H, 1]
        target = out_ptr + t * stride_out_token + h.to(tl.int64) * times_out_head * STRIDE_OUT_HEAD  # as source
        if INTERLEAVED:
            d = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]  # [1, 1, 2 * BLOCK_HALF]
            mask &= d < HEAD_DIM
            x = tl.load(source + d, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_H, 2 * BLOCK_HALF]
            a, b = tl.split(tl.reshape(x, (x.shape[0], BLOCK_H, BLOCK_HALF, 2)))  # [BLOCK_T, BLOCK_H, BLOCK_HALF]
            rotated = tl.join(a * cos - b * sin, a * sin + b * cos)  # [BLOCK_T, BLOCK_H, BLOCK_HALF, 2]
            out = tl.reshape(rotated, (x.shape[0], BLOCK_H, 2 * BLOCK_HALF))  # as x
            tl.store(target + d, out.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            # Half a head of 88 is 88 bytes, 8 at a time: a lane that held 16 would read every other 8 of a row.
            d = tl.max_contiguous(tl.arange(0, BLOCK_HALF), HALF & -HALF)[None, None, :]  # [1, 1, BLOCK_HALF]
            mask &= d < HALF
            a = tl.load(source + d, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_H, BLOCK_HALF]
            b = tl.load(source + HALF + d, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_H, BLOCK_HALF]
            tl.store(target + d, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(target + HALF + d, (a * sin + b * cos).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=("tokens", "positions"),
    do_not_specialize_on_alignment=("times_qh", "times_kh", "times_q_out_h", "times_k_out_h"),
)
def rotary_2d_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    stride_q,
    stride_k,
    stride_q_out,
    stride_k_out,
    tokens,
    positions,
    times_qh,
    times_kh,
    times_q_out_h,
    times_k_out_h,
    GRANULE: tl.constexpr,
    STRIDE_QH: tl.constexpr,
    STRIDE_KH: tl.constexpr,
    STRIDE_Q_OUT_H: tl.constexpr,
    STRIDE_K_OUT_H: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_QH: tl.constexpr,
    BLOCK_KH: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """One program rotates all heads of BLOCK_T tokens with one read of the tables; the outputs may be the inputs.

    Strides of heads are products, those of tokens are given divided by GRANULE, see `strides.py`.
    """
    stride_q *= GRANULE
    stride_k *= GRANULE
    stride_q_out *= GRANULE
    stride_k_out *= GRANULE
    HALF: tl.constexpr = HEAD_DIM // 2
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    j = tl.arange(0, BLOCK_HALF)[None, None, :]  # [1, 1, BLOCK_HALF]
    row = (t % positions)[:, None, None] * HALF + j  # [BLOCK_T, 1, BLOCK_HALF]
    mask = (t < tokens)[:, None, None] & (j < HALF)  # [BLOCK_T, 1, BLOCK_HALF]
    cos = tl.load(cos_ptr + row, mask=mask, other=0.0)  # [BLOCK_T, 1, BLOCK_HALF]
    sin = tl.load(sin_ptr + row, mask=mask, other=0.0)  # [BLOCK_T, 1, BLOCK_HALF]
    if INVERSE:
        sin = -sin
    _rotate_heads(
        q_ptr, q_out_ptr, stride_q, stride_q_out, times_qh, times_q_out_h, tokens, t, cos, sin,
        STRIDE_QH, STRIDE_Q_OUT_H, Q_HEADS, HEAD_DIM, INTERLEAVED, BLOCK_QH, BLOCK_HALF,
    )  # fmt: skip
    _rotate_heads(
        k_ptr, k_out_ptr, stride_k, stride_k_out, times_kh, times_k_out_h, tokens, t, cos, sin,
        STRIDE_KH, STRIDE_K_OUT_H, K_HEADS, HEAD_DIM, INTERLEAVED, BLOCK_KH, BLOCK_HALF,
    )  # fmt: skip


def launch(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, inverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k [tokens, heads, head_dim], cos, sin [positions, head_dim // 2] -> q, k turned, or turned back."""
    out = q.new_empty(q.shape), k.new_empty(k.shape)
    _launch(q, k, *out, cos, sin, interleaved, inverse)
    return out


def launch_in_place(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> None:
    """Turn q and k, as in `launch`, where they lie."""
    _launch(q, k, q, k, cos, sin, interleaved, inverse=False)


def _launch(
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    inverse: bool,
) -> None:
    tokens, q_heads, head_dim = q.shape
    k_heads = k.shape[1]
    block_half = triton.next_power_of_2(head_dim // 2)
    block_q_heads, block_k_heads = (min(16, triton.next_power_of_2(max(heads, 1))) for heads in (q_heads, k_heads))
    # One token of 16 heads of 88 is 16 bytes a lane and load for four warps, and the tables stay in registers.
    block_tokens = min(16, triton.cdiv(2048, max(block_q_heads, block_k_heads) * 2 * block_half))
    granule = token_granule(q, k, q_out, k_out)
    strides = head_stride(q), head_stride(k), head_stride(q_out), head_stride(k_out)
    names = ("STRIDE_QH", "STRIDE_KH", "STRIDE_Q_OUT_H", "STRIDE_K_OUT_H")
    if q.numel() + k.numel():
        rotary_2d_kernel[(triton.cdiv(tokens, block_tokens),)](
            q,
            k,
            cos,
            sin,
            q_out,
            k_out,
            q.stride(0) // granule,
            k.stride(0) // granule,
            q_out.stride(0) // granule,
            k_out.stride(0) // granule,
            tokens,
            cos.shape[0],
            *(times for times, _ in strides),
            **{name: constant for name, (_, constant) in zip(names, strides, strict=True)},
            GRANULE=granule,
            Q_HEADS=q_heads,
            K_HEADS=k_heads,
            HEAD_DIM=head_dim,
            INTERLEAVED=interleaved,
            INVERSE=inverse,
            BLOCK_T=block_tokens,
            BLOCK_QH=block_q_heads,
            BLOCK_KH=block_k_heads,
            BLOCK_HALF=block_half,
        )
