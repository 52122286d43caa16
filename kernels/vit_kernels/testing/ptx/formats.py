"""PTX types as numpy lanes, and the floating-point formats that numpy has not."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Lanes = NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "pred": np.dtype(np.bool_),
    **{f"{letter}{bits}": np.dtype(f"u{bits // 8}") for letter in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (32, 64)},
    # As bits: what is computed of them, the formats below decode.
    **dict.fromkeys(("f16", "bf16"), np.dtype(np.uint16)),
    **dict.fromkeys(("f16x2", "bf16x2", "tf32"), np.dtype(np.uint32)),
}
"""How the lanes of a type are held."""

_SMALLEST_NORMAL = np.float32(2.0**-126)


def flush(x: Lanes) -> Lanes:
    """float32 -> float32 with subnormal numbers as zeros of their sign, as `.ftz` says."""
    return np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def bf16_to_f32(bits: Lanes) -> Lanes:
    """uint16 -> float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to_bf16(x: Lanes) -> Lanes:
    """float32 or float64 -> uint16, to nearest even once; any NaN is 0x7FFF."""
    bits = _odd_float32(x) if x.dtype == np.float64 else x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def _odd_float32(x: Lanes) -> Lanes:
    """float64 -> the bits of a float32, towards zero, the last one set if anything was cut: a rounding can follow."""
    near = x.astype(np.float32)
    bits = near.view(np.uint32)
    bits = bits - (np.abs(near.astype(np.float64)) > np.abs(x)).astype(np.uint32)
    return bits | (bits.view(np.float32).astype(np.float64) != x).astype(np.uint32)


def f16_to_f32(bits: Lanes) -> Lanes:
    """uint16 -> float32, exactly."""
    return bits.view(np.float16).astype(np.float32)


def round_to_f16(x: Lanes) -> Lanes:
    """float32 or float64 -> uint16, to nearest even; any NaN is 0x7FFF."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def round_to_tf32(x: Lanes) -> Lanes:
    """float32 -> uint32 with 10 bits of mantissa, to nearest, ties away from zero; the 13 bits below are 0."""
    rounded = (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(x), np.uint32(0x7FFFE000), rounded)


def halves(bits: Lanes) -> Lanes:
    """uint32 [...] -> uint16 [..., 2], the lower half first."""
    return np.ascontiguousarray(bits).view(np.uint16).reshape(*bits.shape, 2)


def joined(pairs: Lanes) -> Lanes:
    """uint16 [..., 2] -> uint32 [...]."""
    return np.ascontiguousarray(pairs).view(np.uint32)[..., 0]


class Format(NamedTuple):
    """How a function sees a type: decoded from, and encoded to, what `DTYPES` says."""

    decode: Callable[[Lanes], Lanes]
    encode: Callable[[Lanes], Lanes]


FORMATS = {
    "bf16": Format(bf16_to_f32, round_to_bf16),
    "f16": Format(f16_to_f32, round_to_f16),
    "bf16x2": Format(lambda x: bf16_to_f32(halves(x)), lambda x: joined(round_to_bf16(x))),
    "f16x2": Format(lambda x: f16_to_f32(halves(x)), lambda x: joined(round_to_f16(x))),
}
"""The types that functions see as float32, [threads] or [threads, 2]."""
