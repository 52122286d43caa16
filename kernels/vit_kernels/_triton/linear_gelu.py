"""Triton kernel and launcher of linear_gelu."""

import torch
import triton
import triton.language as tl

from vit_kernels._triton.configurations import Configuration, default_linear

SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)


@triton.jit
def linear_gelu_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    stride_x,
    stride_weight,
    tokens,
    in_features,
    out_features,
    WHOLE_STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program makes BLOCK_M tokens by BLOCK_N features; GROUP_M blocks of tokens share a read of the weight.

    WHOLE_STEPS: in_features is a multiple of BLOCK_K.
    """
    per_group = GROUP_M * tl.cdiv(out_features, BLOCK_N)
    first_m = tl.program_id(0) // per_group * GROUP_M
    group = tl.minimum(tl.cdiv(tokens, BLOCK_M) - first_m, GROUP_M)
    within = tl.program_id(0) % per_group
    m = (first_m + within % group) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    n = within // group * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k = tl.arange(0, BLOCK_K)  # [BLOCK_K]

    # Rows past the end read the last one and are not stored, so that the loop has no mask.
    x_rows = x_ptr + tl.minimum(m, tokens - 1).to(tl.int64)[:, None] * stride_x  # [BLOCK_M, 1]
    weight_rows = weight_ptr + tl.minimum(n, out_features - 1).to(tl.int64)[None, :] * stride_weight  # [1, BLOCK_N]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BLOCK_M, BLOCK_N]
    steps = in_features // BLOCK_K
    for step in tl.range(0, steps):
        x = tl.load(x_rows + (step * BLOCK_K + k)[None, :])  # [BLOCK_M, BLOCK_K]
        weight = tl.load(weight_rows + (step * BLOCK_K + k)[:, None])  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, weight, acc, input_precision=INPUT_PRECISION)
    if not WHOLE_STEPS:
        k += steps * BLOCK_K
        x = tl.load(x_rows + k[None, :], mask=(k < in_features)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        weight = tl.load(weight_rows + k[:, None], mask=(k < in_features)[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, weight, acc, input_precision=INPUT_PRECISION)

    acc += tl.load(bias_ptr + n, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
    acc = 0.5 * acc * (1.0 + tl.erf(acc * SQRT_HALF))
    out = out_ptr + m.to(tl.int64)[:, None] * out_features + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(m < tokens)[:, None] & (n < out_features)[None, :])


def launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, configuration: Configuration | None = None
) -> torch.Tensor:
    """x [tokens, in_features], weight [out_features, in_features] -> [tokens, out_features] on the current stream."""
    tokens, in_features = x.shape
    out_features = weight.shape[0]
    out = x.new_empty(tokens, out_features)
    blocks = configuration or default_linear(x.dtype)
    programs = triton.cdiv(tokens, blocks["BLOCK_M"]) * triton.cdiv(out_features, blocks["BLOCK_N"])
    if programs:
        linear_gelu_kernel[(programs,)](
            x, weight, bias, out, x.stride(0), weight.stride(0), tokens, in_features, out_features,
            WHOLE_STEPS=in_features % blocks["BLOCK_K"] == 0, **blocks,
        )  # fmt: skip
    return out
