"""Triton kernel and launcher of scaled_linear."""

import torch
import triton
import triton.language as tl

from vit_kernels._triton.configurations import Configuration, current_target, scaled_linear_candidates
from vit_kernels._triton.eight_bit import LARGEST_OF, activate


@triton.jit
def scaled_linear_kernel(
    x_ptr,
    weight_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_scale_ptr,
    out_ptr,
    stride_x,
    stride_weight,
    tokens,
    in_features,
    out_features,
    ACTIVATION: tl.constexpr,
    LARGEST: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One program makes BLOCK_M tokens by BLOCK_N features; GROUP_M blocks of tokens share a read of the weight.

    LARGEST: of the 8-bit numbers stored where out_scale_ptr is given. WHOLE_STEPS: in_features is a multiple of
    BLOCK_K.
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
    IS_INT8: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if IS_INT8 else tl.float32
    # On sm_90 the matrix instruction's own sums have fewer bits than float32: those of a block are moved there.
    IMPRECISE: tl.constexpr = None if IS_INT8 else BLOCK_K
    acc = tl.zeros([BLOCK_M, BLOCK_N], SUM)  # [BLOCK_M, BLOCK_N]
    steps = in_features // BLOCK_K
    for step in tl.range(0, steps):
        x = tl.load(x_rows + (step * BLOCK_K + k)[None, :])  # [BLOCK_M, BLOCK_K]
        weight = tl.load(weight_rows + (step * BLOCK_K + k)[:, None])  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, weight, acc, out_dtype=SUM, max_num_imprecise_acc=IMPRECISE)
    if not WHOLE_STEPS:
        k += steps * BLOCK_K
        x = tl.load(x_rows + k[None, :], mask=(k < in_features)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        weight = tl.load(weight_rows + k[:, None], mask=(k < in_features)[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x, weight, acc, out_dtype=SUM, max_num_imprecise_acc=IMPRECISE)

    y = acc.to(tl.float32) * tl.load(x_scale_ptr + m, mask=m < tokens, other=0.0)[:, None]
    y *= tl.load(weight_scale_ptr + n, mask=n < out_features, other=0.0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
    y = activate(y, ACTIVATION)
    if out_scale_ptr is not None:
        y = y / tl.load(out_scale_ptr + m, mask=m < tokens, other=1.0)[:, None]
        # e4m3 has no infinity, and a cast of one would be the largest number on some GPUs.
        y = tl.where(tl.abs(y) < float("inf"), tl.clamp(y, -LARGEST, LARGEST), float("nan"))
    out = out_ptr + m.to(tl.int64)[:, None] * out_features + n[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=(m < tokens)[:, None] & (n < out_features)[None, :])


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    *,
    configuration: Configuration | None = None,
) -> torch.Tensor:
    """x [tokens, in_features], weight [out_features, in_features] -> [tokens, out_features] on the current stream.

    Raises:
        TypeError: the current device does not multiply numbers of this format.
    """
    tokens, in_features = x.shape
    out_features = weight.shape[0]
    out = x.new_empty(tokens, out_features, dtype=out_dtype)
    blocks = configuration or _default(x.dtype)
    programs = triton.cdiv(tokens, blocks["BLOCK_M"]) * triton.cdiv(out_features, blocks["BLOCK_N"])
    if programs:
        scaled_linear_kernel[(programs,)](
            x, weight, x_scale, weight_scale, bias, out_scale, out,
            x.stride(0), weight.stride(0), tokens, in_features, out_features,
            ACTIVATION=activation, LARGEST=LARGEST_OF.get(out_dtype),
            WHOLE_STEPS=in_features % blocks["BLOCK_K"] == 0, **blocks,
        )  # fmt: skip
    return out


def _default(dtype: torch.dtype) -> Configuration:
    target = "interpreter" if triton.knobs.runtime.interpret else current_target()
    kept = scaled_linear_candidates(dtype, target)
    if not kept:
        raise TypeError(
            f"x: got {dtype} on {target}, which has no products of it; e4m3 is fnuz on gfx942 and OCP's else"
        )
    return kept[0]
