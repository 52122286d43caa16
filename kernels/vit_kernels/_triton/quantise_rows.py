"""Triton kernel and launcher of quantise_rows."""

import torch
import triton
import triton.language as tl

from vit_kernels._triton.eight_bit import LARGEST_OF, activate, quantise, warps_of


@triton.jit
def quantise_rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    stride_x,
    FEATURES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program makes one row."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)  # [BLOCK]
    mask = c < FEATURES  # [BLOCK]
    y = tl.load(x_ptr + row * stride_x + c, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    if ACTIVATION == "gated_silu":
        up = tl.load(x_ptr + row * stride_x + FEATURES + c, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
        y = y / (1.0 + tl.exp(-y)) * up
    else:
        y = activate(y, ACTIVATION)
    q, scale = quantise(y, LARGEST, q_ptr.dtype.element_ty)
    tl.store(q_ptr + row * FEATURES + c, q, mask=mask)
    tl.store(scale_ptr + row, scale)


def launch(x: torch.Tensor, activation: str | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, features], where gated of both halves -> 8-bit rows and their scales, on the current stream."""
    rows = x.shape[0]
    features = x.shape[1] // 2 if activation == "gated_silu" else x.shape[1]
    q, scale = x.new_empty(rows, features, dtype=dtype), x.new_empty(rows, dtype=torch.float32)
    if rows:
        block = triton.next_power_of_2(max(features, 1))
        quantise_rows_kernel[(rows,)](
            x, q, scale, x.stride(0),
            FEATURES=features, ACTIVATION=activation, LARGEST=LARGEST_OF[dtype], BLOCK=block, num_warps=warps_of(block),
        )  # fmt: skip
    return q, scale
