"""Triton kernel and launcher of add_layer_norm_quantise and add_rms_norm_quantise."""

import torch
import triton
import triton.language as tl

from vit_kernels._triton.eight_bit import LARGEST_OF, quantise, warps_of


@triton.jit
def add_layer_norm_quantise_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    hidden_ptr,
    q_ptr,
    scale_ptr,
    stride_x,
    stride_residual,
    eps,
    CHANNELS: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program adds, normalises and quantises one token; without a bias that is the RMS norm."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)  # [BLOCK]
    mask = c < CHANNELS  # [BLOCK]
    x = tl.load(x_ptr + token * stride_x + c, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    x += tl.load(residual_ptr + token * stride_residual + c, mask=mask, other=0.0).to(tl.float32)
    hidden = x.to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + token * CHANNELS + c, hidden, mask=mask)

    # The norm of what was stored, as where the norm reads it.
    y = hidden.to(tl.float32)  # [BLOCK]
    if bias_ptr is not None:
        y = tl.where(mask, y - tl.sum(y, 0) / CHANNELS, 0.0)
    weight = tl.load(weight_ptr + c, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    y = y * tl.rsqrt(tl.sum(y * y, 0) / CHANNELS + eps) * weight
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=mask, other=0.0).to(tl.float32)
    # Where there is no channel, NaN and infinity times the weight of zero is NaN.
    q, scale = quantise(tl.where(mask, y, 0.0), LARGEST, q_ptr.dtype.element_ty)
    tl.store(q_ptr + token * CHANNELS + c, q, mask=mask)
    tl.store(scale_ptr + token, scale)


def launch(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, residual [tokens, channels] -> their sum, its norm in 8 bits and the scales, on the current stream."""
    tokens, channels = x.shape
    hidden, q = x.new_empty(tokens, channels), x.new_empty(tokens, channels, dtype=dtype)
    scale = x.new_empty(tokens, dtype=torch.float32)
    if tokens:
        block = triton.next_power_of_2(max(channels, 1))
        add_layer_norm_quantise_kernel[(tokens,)](
            x, residual, weight, bias, hidden, q, scale, x.stride(0), residual.stride(0), eps,
            CHANNELS=channels, LARGEST=LARGEST_OF[dtype], BLOCK=block, num_warps=warps_of(block),
        )  # fmt: skip
    return hidden, q, scale
