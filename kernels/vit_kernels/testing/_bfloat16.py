"""bfloat16 arithmetic on numpy arrays of the raw 16-bit patterns, as Triton's interpreter stores them."""

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint16]


def widen(bits: Bits) -> NDArray[np.float32]:
    """The exact fp32 values of bf16 bit patterns."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: NDArray[np.float32]) -> Bits:
    """The bf16 bit patterns nearest to fp32 values, ties to even; NaN stays NaN (made quiet) and keeps its sign."""
    bits = values.view(np.uint32)
    half_ulp_or_less = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    rounded = ((bits + half_ulp_or_less) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), narrow_towards_zero(values), rounded)


def narrow_towards_zero(values: NDArray[np.float32]) -> Bits:
    """The bf16 bit patterns of fp32 values, cut off; NaN stays NaN (made quiet)."""
    cut = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), cut | np.uint16(0x0040), cut)


def multiply_add(x: Bits, y: Bits, z: Bits) -> Bits:
    """`x * y + z` rounded once.

    The product is exact in fp64. Rounding the sum to odd in fp64 and then in fp32 keeps what the last rounding needs
    (S. Boldo, G. Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd",
    IEEE Transactions on Computers 57(4), 2008).
    """
    product = widen(x).astype(np.float64) * widen(y)
    addend = widen(z).astype(np.float64)
    total = product + addend
    # Knuth's TwoSum: what the addition rounded away.
    recovered = total - product
    lost = (product - (total - recovered)) + (addend - recovered)
    total = _to_odd(total, np.sign(lost), np.uint64)
    single = total.astype(np.float32)
    return narrow(_to_odd(single, np.sign(total - single), np.uint32))


def _to_odd(values: NDArray, lost_sign: NDArray, unsigned: type) -> NDArray:
    """Move values whose last bit is 0 one step towards what rounding lost (-1 or +1; 0 and NaN: nothing)."""
    inexact_and_even = (np.abs(lost_sign) == 1) & (values.view(unsigned) & unsigned(1) == 0)
    away = np.copysign(np.array(np.inf, values.dtype), lost_sign.astype(values.dtype))
    return np.where(inexact_and_even, np.nextafter(values, away), values)
