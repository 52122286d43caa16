"""e4m3 numbers in numpy arrays of the raw 8-bit patterns, as Triton's interpreter stores them."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint8]


class Format(NamedTuple):
    """A sign, 4 bits of exponent, 3 of mantissa and no infinities.

    Attributes:
        bias: of the exponent.
        nan: the bit pattern that a NaN is written as.
        nans: all bit patterns that are NaN.
        finite: how many of the patterns without a sign are numbers: the first ones, in ascending order.
    """

    bias: int
    nan: int
    nans: tuple[int, ...]
    finite: int

    @property
    def values(self) -> NDArray[np.float32]:
        """The number of each of the 256 bit patterns."""
        bits = np.arange(256)
        exponent, mantissa = bits >> 3 & 15, bits & 7
        magnitude = np.ldexp(np.where(exponent == 0, mantissa, 8 + mantissa), np.maximum(exponent, 1) - self.bias - 3)
        values = np.where(bits >> 7, -magnitude, magnitude).astype(np.float32)
        values[list(self.nans)] = np.nan
        return values


E4M3FN = Format(bias=7, nan=0x7F, nans=(0x7F, 0xFF), finite=0x7F)
"""Up to 448. Source: OCP 8-bit Floating Point Specification (OFP8) 1.0, table 2."""

E4M3FNUZ = Format(bias=8, nan=0x80, nans=(0x80,), finite=0x80)
"""Up to 240, with one zero. Source: Noune et al., 8-bit Numerical Formats for Deep Neural Networks (2206.02915)."""


def widen(bits: Bits, format_: Format) -> NDArray[np.float32]:
    """The exact fp32 values of bit patterns."""
    widened: NDArray[np.float32] = format_.values[bits]
    return widened


def narrow(values: NDArray[np.float32], format_: Format) -> Bits:
    """The bit patterns nearest to fp32 values, ties to even; beyond the largest number it is that, NaN stays NaN.

    NVIDIA's cvt.rn.satfinite.e4m3x2 makes the largest number of an infinity too, and a NaN of one bit pattern.
    """
    magnitude = np.abs(values).astype(np.float64)
    _, exponent = np.frexp(magnitude)
    unit = np.ldexp(1.0, np.maximum(exponent - 1, 1 - format_.bias) - 3)
    ascending = format_.values[: format_.finite]
    rounded = np.minimum(np.rint(magnitude / unit) * unit, ascending[-1])
    bits = np.searchsorted(ascending, rounded).astype(np.uint8)
    negative = bits | np.uint8(0x80)
    if 0x80 in format_.nans:
        negative[bits == 0] = 0
    return np.where(np.isnan(values), np.uint8(format_.nan), np.where(np.signbit(values), negative, bits))
