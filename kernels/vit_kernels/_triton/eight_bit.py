"""What the kernels on 8-bit numbers share: activations, and a row quantised by its maximum."""

import torch
import triton
import triton.language as tl

LARGEST_OF = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}
"""The largest number of each format that is stored."""

SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
SQRT_8_OVER_PI: tl.constexpr = tl.constexpr(1.5957691216057308)
SMALLEST_SCALE: tl.constexpr = tl.constexpr(2.0**-126)
HALF_WAY: tl.constexpr = tl.constexpr(1.5 * 2.0**23)
"""float32 from here on has no fractions: adding it rounds to an integer, ties to even."""


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """None, the erf GELU or its tanh form of float32."""
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 is the sigmoid of 2 z.
        y = y / (1.0 + tl.exp((y + 0.044715 * y * y * y) * -SQRT_8_OVER_PI))
    return y


@triton.jit
def quantise(y, LARGEST: tl.constexpr, TO: tl.constexpr):
    """One row of float32, 0 where it has no element -> its 8-bit numbers and its scale.

    A row with NaN or an infinity has that as its scale, and zeros.
    """
    # As integers NaN is above infinity, which is above all numbers; tl.max of floats would drop it.
    bits = tl.max(tl.abs(y).to(tl.int32, bitcast=True), 0)
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), LARGEST)
    scale = tl.where(scale < SMALLEST_SCALE, SMALLEST_SCALE, scale)
    q = tl.where(scale < float("inf"), y * (1.0 / scale), 0.0)
    IS_INT8: tl.constexpr = tl.int8 == TO
    if IS_INT8:
        q = (q + HALF_WAY) - HALF_WAY
    return q.to(TO), scale


def warps_of(block: int) -> int:
    """For a row of `block` elements: 16 elements a thread, where there are so many."""
    return min(16, max(1, block // 512))
