"""What NVIDIA's PTX document says an instruction computes, a number at a time, in exact arithmetic.

Nothing here is shared with vit_kernels.testing.ptx. Operands and results are bits.
"""

import math
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple


class FloatFormat(NamedTuple):
    exponent_bits: int
    mantissa_bits: int

    @property
    def bias(self) -> int:
        return (1 << self.exponent_bits - 1) - 1

    @property
    def infinity(self) -> int:
        return (1 << self.exponent_bits) - 1 << self.mantissa_bits

    @property
    def sign(self) -> int:
        return 1 << self.exponent_bits + self.mantissa_bits


FLOATS = {"f16": FloatFormat(5, 10), "bf16": FloatFormat(8, 7), "f32": FloatFormat(8, 23), "f64": FloatFormat(11, 52)}
Number = float | Fraction


def decode(bits: int, kind: str) -> float:
    """The number, exactly: every format here fits a double."""
    if kind == "f64":
        return float(struct.unpack("<d", struct.pack("<Q", bits))[0])
    form = FLOATS[kind]
    sign = -1.0 if bits & form.sign else 1.0
    exponent, mantissa = (bits & form.infinity) >> form.mantissa_bits, bits & (1 << form.mantissa_bits) - 1
    if exponent == (1 << form.exponent_bits) - 1:
        return math.copysign(math.nan, sign) if mantissa else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - form.bias - form.mantissa_bits)
    return sign * math.ldexp(mantissa + (1 << form.mantissa_bits), exponent - form.bias - form.mantissa_bits)


def encode(x: Number, kind: str) -> int:
    """Rounded to nearest, ties to even."""
    form = FLOATS[kind]
    if isinstance(x, float) and math.isnan(x):
        return form.infinity | (1 << form.mantissa_bits - 1)
    negative = math.copysign(1, x) < 0 if isinstance(x, float) else x < 0
    sign = form.sign if negative else 0
    if isinstance(x, float) and math.isinf(x):
        return sign | form.infinity
    magnitude = abs(Fraction(x))
    if magnitude == 0:
        return sign
    exponent = max(_exponent(magnitude), 1 - form.bias)
    scaled = magnitude / Fraction(2) ** (exponent - form.mantissa_bits)
    whole = round(scaled)  # to even
    # As integers the bits count on from one exponent to the next; subnormal numbers have no hidden one.
    bits = whole + ((exponent + form.bias - 1) << form.mantissa_bits)
    return sign | min(bits, form.infinity)


def _exponent(magnitude: Fraction) -> int:
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= magnitude else exponent - 1


def flush(x: float) -> float:
    """A subnormal float32 as zero."""
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def add(a: float, b: float) -> Number:
    if not (math.isfinite(a) and math.isfinite(b)) or a == b == 0:
        return a + b
    return Fraction(a) + Fraction(b) or 0.0


def multiply(a: float, b: float) -> Number:
    if not (math.isfinite(a) and math.isfinite(b)) or 0 in (a, b):
        return a * b
    return Fraction(a) * Fraction(b)


def fused(a: float, b: float, c: float) -> Number:
    if not all(map(math.isfinite, (a, b, c))) or 0 in (a, b):
        return a * b + c if math.isfinite(c) or not math.isfinite(a * b) else c
    return Fraction(a) * Fraction(b) + Fraction(c) or 0.0


def divide(a: float, b: float) -> Number:
    if not math.isfinite(a) or not math.isfinite(b) or 0 in (a, b):
        if math.isnan(a) or math.isnan(b) or (a == b == 0) or (math.isinf(a) and math.isinf(b)):
            return math.nan
        size = math.inf if b == 0 or math.isinf(a) else 0.0
        return math.copysign(size, math.copysign(1, a) * math.copysign(1, b))
    return Fraction(a) / Fraction(b)


def minimum(a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    return min((a, b), key=lambda x: (x, math.copysign(1, x)))


def maximum(a: float, b: float) -> float:
    return -minimum(-a, -b)


def square_root(x: float) -> float:
    return math.nan if x < 0 else math.sqrt(x)


def _or_nan(function: Callable[[float, float], float]) -> Callable[[float, float], float]:
    return lambda a, b: math.nan if math.isnan(a) or math.isnan(b) else function(a, b)


FLOAT_FUNCTIONS: dict[str, Callable[..., Number]] = {
    "add": add,
    "sub": lambda a, b: add(a, -b),
    "mul": multiply,
    "fma": fused,
    "div": divide,
    "rcp": lambda x: divide(1.0, x),
    "sqrt": square_root,
    "min": minimum,
    "max": maximum,
    "min.NaN": _or_nan(minimum),
    "max.NaN": _or_nan(maximum),
    "neg": lambda x: -x,
    "abs": abs,
    "copysign": lambda sign, x: math.copysign(x, sign),
}


def _power(x: float) -> float:
    return math.inf if x >= 1024 else math.exp2(x) if hasattr(math, "exp2") else 2.0**x


def _logarithm(x: float) -> float:
    return math.nan if x < 0 or math.isnan(x) else -math.inf if x == 0 else math.log2(x)


def _inverse_root(x: float) -> float:
    if x == 0:
        return math.copysign(math.inf, x)
    return math.nan if x < 0 or math.isnan(x) else 0.0 if math.isinf(x) else 1 / math.sqrt(x)


APPROXIMATE: dict[str, Callable[[float], float]] = {
    "ex2": _power,
    "lg2": _logarithm,
    "rsqrt": _inverse_root,
    "tanh": math.tanh,
}
"""To a relative error that the document allows the hardware; here they are nearer."""


def signed(bits: int, width: int) -> int:
    return bits - (1 << width) if bits >> width - 1 & 1 else bits


def integer(bits: int, kind: str) -> int:
    width = int(kind[1:])
    return signed(bits, width) if kind[0] == "s" else bits


def _towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER_FUNCTIONS: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "mul.wide": lambda a, b: a * b,
    "mad.lo": lambda a, b, c: a * b + c,
    "mad.wide": lambda a, b, c: a * b + c,
    "div": _towards_zero,
    "rem": lambda a, b: a - _towards_zero(a, b) * b,
    "min": min,
    "max": max,
    "neg": lambda a: -a,
    "abs": abs,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "popc": lambda a: a.bit_count(),
    "clz": lambda a: 32 - a.bit_length(),
}


def high(a: int, b: int, width: int) -> int:
    return a * b >> width


def shift_left(a: int, by: int, width: int) -> int:
    return 0 if by >= width else a << by


def shift_right(a: int, by: int) -> int:
    return a >> by


def extract_bits(a: int, position: int, length: int, kind: str) -> int:
    """bfe, as its pseudo-code goes bit by bit."""
    position, length, top = position & 255, length & 255, int(kind[1:]) - 1
    sign = 0 if kind[0] == "u" or length == 0 else a >> min(position + length - 1, top) & 1
    bits = 0
    for i in range(top + 1):
        bits |= (a >> position + i & 1 if i < length and position + i <= top else sign) << i
    return bits


def insert_bits(a: int, b: int, position: int, length: int) -> int:
    """bfi, as its pseudo-code goes bit by bit."""
    position, length, out = position & 255, length & 255, b
    for i in range(length):
        if position + i <= 31:
            out = out & ~(1 << position + i) | (a >> i & 1) << position + i
    return out


def three_inputs(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))


def permute(a: int, b: int, selector: int) -> int:
    both, out = b << 32 | a, 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = both >> 8 * (nibble & 7) & 255
        out |= (byte if nibble < 8 else 255 * (byte >> 7)) << 8 * i
    return out


def funnel(a: int, b: int, by: int, left: bool) -> int:
    both, by = b << 32 | a, by & 31
    return (both << by >> 32 if left else both >> by) & 0xFFFFFFFF


ROUNDINGS: dict[str, Callable[[float], int]] = {
    "rni": round,
    "rzi": math.trunc,
    "rmi": math.floor,
    "rpi": math.ceil,
}


def to_integer(x: float, rounding: str, kind: str) -> int:
    """Saturated; NaN is 0."""
    width = int(kind[1:])
    low, above = (-(1 << width - 1), 1 << width - 1) if kind[0] == "s" else (0, 1 << width)
    if math.isnan(x):
        return 0
    if math.isinf(x):
        return low if x < 0 else above - 1
    return min(max(ROUNDINGS[rounding](x), low), above - 1)


def to_tf32(bits: int) -> int:
    """To 10 bits of mantissa, ties away from zero: the magnitude plus half of the last bit that stays."""
    return bits + 0x1000 & 0xFFFFE000


COMPARISONS: dict[str, Callable[[Number, Number], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lo": lambda a, b: a < b,
    "ls": lambda a, b: a <= b,
    "hi": lambda a, b: a > b,
    "hs": lambda a, b: a >= b,
}


def compare(name: str, a: Number, b: Number) -> bool:
    """setp of floats, or of integers, which are never NaN."""
    unordered = math.isnan(a) or math.isnan(b)
    if name in ("num", "nan"):
        return unordered == (name == "nan")
    if name in COMPARISONS:
        return not unordered and COMPARISONS[name](a, b)
    return unordered or COMPARISONS[name.removesuffix("u")](a, b)
