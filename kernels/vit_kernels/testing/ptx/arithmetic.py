"""Instructions that compute each thread's result from its own registers: one table, a row an opcode."""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from vit_kernels.testing.ptx.findings import UnknownInstruction
from vit_kernels.testing.ptx.formats import DTYPES, FORMATS, Lanes, flush, round_to_tf32
from vit_kernels.testing.ptx.machine import Machine, Read, Step, integer
from vit_kernels.testing.ptx.parsing import Instruction, vector

Function = Callable[..., Lanes]


class Operation(NamedTuple):
    """What an opcode computes.

    Attributes:
        result: type of the destination.
        sources: types of the sources; "imm" is a constant that the function takes as an int.
        function: lanes of the sources -> lanes of the result. It sees 16-bit floats as float32, pairs of them as
            float32 [threads, 2], and gives float32 or float64 for them, which is rounded once.
    """

    result: str
    sources: tuple[str, ...]
    function: Function


# Integers.


def _shift(direction: Function) -> Function:
    def shifted(x: Lanes, amount: Lanes) -> Lanes:
        bits = x.dtype.itemsize * 8
        most = np.minimum(amount, bits - 1).astype(x.dtype)
        result = direction(x, most)
        if direction is np.right_shift and x.dtype.kind == "i":
            return result
        return np.where(amount >= bits, x.dtype.type(0), result)

    return shifted


def _divide(a: Lanes, b: Lanes) -> Lanes:
    """Towards zero; PTX leaves a division by zero open, here it is all ones."""
    if a.dtype.kind == "u":
        return np.where(b == 0, ~a.dtype.type(0), a // np.maximum(b, 1))
    # The least integer over -1 is itself again, as its magnitude is as an unsigned number.
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    magnitudes = np.abs(a).view(unsigned) // np.maximum(np.abs(b).view(unsigned), 1)
    signed = magnitudes.view(a.dtype)
    return np.where(b == 0, a.dtype.type(-1), np.where((a < 0) != (b < 0), -signed, signed))


def _remainder(a: Lanes, b: Lanes) -> Lanes:
    return np.where(b == 0, a, a - _divide(a, b) * b)


def _wide(a: Lanes, b: Lanes) -> Lanes:
    wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(wide) * b.astype(wide)


def _high(a: Lanes, b: Lanes) -> Lanes:
    bits = 8 * a.dtype.itemsize
    if bits == 64:
        return np.array([int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)], a.dtype)
    return (_wide(a, b) >> bits).astype(a.dtype)


def _extract_bits(x: Lanes, position: Lanes, length: Lanes) -> Lanes:
    """bfe: bits [position, position + length) of x; past the top they are its sign, or zero without one."""
    bits = 8 * x.dtype.itemsize
    first, width = (position & 255).astype(np.int64), (length & 255).astype(np.int64)
    shifted = _shift(np.right_shift)(x, first)
    # Shifted up until the field's last bit is the top one, and down again with its sign.
    above = np.clip(bits - width, 0, bits - 1).astype(x.dtype)
    # A field that begins past the top is all sign.
    return np.where(width == 0, x.dtype.type(0), (shifted << above) >> above)


def _insert_bits(field: Lanes, x: Lanes, position: Lanes, length: Lanes) -> Lanes:
    """bfi: x with `length` bits from `position` on replaced by the lowest of the field."""
    first, width = (position & 255).astype(np.uint64), (length & 255).astype(np.uint64)
    ones = np.where(width >= 32, np.uint64(2**32 - 1), (np.uint64(1) << np.minimum(width, 32)) - np.uint64(1))
    mask = np.where(first >= 32, np.uint64(0), ones << np.minimum(first, 31)).astype(np.uint32)
    moved = np.where(first >= 32, np.uint64(0), field.astype(np.uint64) << np.minimum(first, 31)).astype(np.uint32)
    return (x & ~mask) | (moved & mask)


def _three_inputs(a: Lanes, b: Lanes, c: Lanes, table: int) -> Lanes:
    """lop3: bit i of the table is the result where the bits of a, b, c spell i."""
    out = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def _permute(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    """prmt: byte i of the result is the byte of b, a that nibble i names, or its sign all over where bit 3 is set."""
    source = np.stack([a, b], -1).view(np.uint8).reshape(-1, 8)
    nibbles = (selector[:, None] >> (4 * np.arange(4, dtype=np.uint32))) & np.uint32(15)
    chosen = np.take_along_axis(source, (nibbles & 7).astype(np.int64), 1)
    signs = (chosen.view(np.int8) >> 7).view(np.uint8)
    return np.where(nibbles & 8, signs, chosen).view(np.uint32)[:, 0]


def _funnel(left: bool) -> Function:
    """shf.{l,r}.wrap: b, a as 64 bits shifted by the amount modulo 32; the upper or lower half."""

    def shifted(a: Lanes, b: Lanes, amount: Lanes) -> Lanes:
        both, by = (b.astype(np.uint64) << np.uint64(32)) | a, (amount & np.uint32(31)).astype(np.uint64)
        return ((both << by) >> np.uint64(32) if left else both >> by).astype(np.uint32)

    return shifted


def _count_bits(x: Lanes) -> Lanes:
    return np.unpackbits(np.ascontiguousarray(x).view(np.uint8).reshape(-1, x.dtype.itemsize), axis=1).sum(1, np.uint32)


def _leading_zeros(x: Lanes) -> Lanes:
    # frexp of an integer below 2**53 is exact.
    return (32 - np.frexp(x.astype(np.float64))[1]).astype(np.uint32)


def _select(a: Lanes, b: Lanes, condition: Lanes) -> Lanes:
    return np.where(condition, a, b)


# Floats.


def _maximum(a: Lanes, b: Lanes) -> Lanes:
    """The operand that is not NaN, and +0 rather than -0."""
    return np.where((a == 0) & (b == 0), a + b, np.fmax(a, b))


def _minimum(a: Lanes, b: Lanes) -> Lanes:
    return np.where((a == 0) & (b == 0), -(-a - b), np.fmin(a, b))


def _or_nan(pick: Function) -> Function:
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), pick(a, b))


def _fused(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """The product of float32 is exact in float64. Once in 2**29 the sum there is rounded into a tie of float32."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _in_double(function: Function) -> Function:
    return lambda *sources: function(*(x.astype(np.float64) for x in sources))


def _in_single(function: Function) -> Function:
    return lambda *sources: function(*(x.astype(np.float64) for x in sources)).astype(np.float32)


# Conversions.


def _to_integer(kind: str, rounding: Function) -> Function:
    """Float to integer: saturated, NaN to 0."""
    limits, dtype = np.iinfo(DTYPES[kind]), DTYPES[kind]

    def converted(x: Lanes) -> Lanes:
        whole = rounding(np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf))
        inside = np.where((whole >= float(limits.min)) & (whole < float(limits.max)), whole, 0).astype(dtype)
        return np.where(
            whole >= float(limits.max),
            dtype.type(limits.max),
            np.where(whole < limits.min, dtype.type(limits.min), inside),
        )

    return converted


def _to(kind: str) -> Function:
    return lambda x: x.astype(DTYPES[kind])


def _pair(upper: Lanes, lower: Lanes) -> Lanes:
    return np.stack([lower, upper], -1)


def _same(x: Lanes) -> Lanes:
    return x


# The table.

_INTEGERS = "{s16,u16,s32,u32,s64,u64}"
_ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}

# opcode, type of the result, types of the sources ("t" is the opcode's last component), function.
_ROWS: tuple[tuple[str, str, str, Function], ...] = (
    (f"add.{_INTEGERS}", "t", "t t", np.add),
    (f"sub.{_INTEGERS}", "t", "t t", np.subtract),
    (f"mul.lo.{_INTEGERS}", "t", "t t", np.multiply),
    (f"mul.hi.{_INTEGERS}", "t", "t t", _high),
    ("mul.wide.s16", "s32", "t t", _wide),
    ("mul.wide.u16", "u32", "t t", _wide),
    ("mul.wide.s32", "s64", "t t", _wide),
    ("mul.wide.u32", "u64", "t t", _wide),
    (f"mad.lo.{_INTEGERS}", "t", "t t t", lambda a, b, c: a * b + c),
    (f"mad.hi.{_INTEGERS}", "t", "t t t", lambda a, b, c: _high(a, b) + c),
    ("mad.wide.s16", "s32", "t t s32", lambda a, b, c: _wide(a, b) + c),
    ("mad.wide.u16", "u32", "t t u32", lambda a, b, c: _wide(a, b) + c),
    ("mad.wide.s32", "s64", "t t s64", lambda a, b, c: _wide(a, b) + c),
    ("mad.wide.u32", "u64", "t t u64", lambda a, b, c: _wide(a, b) + c),
    (f"div.{_INTEGERS}", "t", "t t", _divide),
    (f"rem.{_INTEGERS}", "t", "t t", _remainder),
    (f"min.{_INTEGERS}", "t", "t t", np.minimum),
    (f"max.{_INTEGERS}", "t", "t t", np.maximum),
    ("neg.{s16,s32,s64}", "t", "t", np.negative),
    ("abs.{s16,s32,s64}", "t", "t", np.abs),
    ("and.{b16,b32,b64,pred}", "t", "t t", np.bitwise_and),
    ("or.{b16,b32,b64,pred}", "t", "t t", np.bitwise_or),
    ("xor.{b16,b32,b64,pred}", "t", "t t", np.bitwise_xor),
    ("not.{b16,b32,b64,pred}", "t", "t", np.invert),
    ("shl.{b16,b32,b64}", "t", "t u32", _shift(np.left_shift)),
    ("shr.{b16,b32,b64,s16,u16,s32,u32,s64,u64}", "t", "t u32", _shift(np.right_shift)),
    ("bfe.{s32,u32,s64,u64}", "t", "t u32 u32", _extract_bits),
    ("bfi.b32", "t", "t t u32 u32", _insert_bits),
    ("lop3.b32", "t", "t t t imm", _three_inputs),
    ("prmt.b32", "t", "t t t", _permute),
    ("shf.l.wrap.b32", "t", "t t u32", _funnel(left=True)),
    ("shf.r.wrap.b32", "t", "t t u32", _funnel(left=False)),
    ("popc.b32", "u32", "t", _count_bits),
    ("clz.b32", "u32", "t", _leading_zeros),
    ("selp.{b16,b32,b64,s32,u32,s64,u64,f32,f64}", "t", "t t pred", _select),
    ("mov.{b16,u16,s16,b32,u32,s32,f32,b64,u64,s64,f64,pred}", "t", "t", _same),
    ("cvta{,.to}.global.u64", "t", "t", _same),
    ("add{,.rn}{,.ftz}.f32", "t", "t t", np.add),
    ("sub{,.rn}{,.ftz}.f32", "t", "t t", np.subtract),
    ("mul{,.rn}{,.ftz}.f32", "t", "t t", np.multiply),
    ("fma.rn{,.ftz}.f32", "t", "t t t", _fused),
    ("div{.rn,.full,.approx}{,.ftz}.f32", "t", "t t", np.divide),
    ("min{,.ftz}.f32", "t", "t t", _minimum),
    ("max{,.ftz}.f32", "t", "t t", _maximum),
    ("min{,.ftz}.NaN.f32", "t", "t t", _or_nan(_minimum)),
    ("max{,.ftz}.NaN.f32", "t", "t t", _or_nan(_maximum)),
    ("neg{,.ftz}.f32", "t", "t", np.negative),
    ("abs{,.ftz}.f32", "t", "t", np.abs),
    ("copysign.f32", "t", "t t", lambda sign, x: np.copysign(x, sign)),
    ("ex2.approx{,.ftz}.f32", "t", "t", _in_single(np.exp2)),
    ("lg2.approx{,.ftz}.f32", "t", "t", _in_single(np.log2)),
    ("rcp{.rn,.approx}{,.ftz}.f32", "t", "t", np.reciprocal),
    ("sqrt{.rn,.approx}{,.ftz}.f32", "t", "t", np.sqrt),
    ("rsqrt.approx{,.ftz}.f32", "t", "t", _in_single(lambda x: 1 / np.sqrt(x))),
    ("tanh.approx.f32", "t", "t", _in_single(np.tanh)),
    ("add{,.rn}.{f16,bf16,f16x2,bf16x2}", "t", "t t", _in_double(np.add)),
    ("sub{,.rn}.{f16,bf16,f16x2,bf16x2}", "t", "t t", _in_double(np.subtract)),
    ("mul{,.rn}.{f16,bf16,f16x2,bf16x2}", "t", "t t", _in_double(np.multiply)),
    ("fma.rn.{f16,bf16,f16x2,bf16x2}", "t", "t t t", _in_double(lambda a, b, c: a * b + c)),
    ("min.{f16,bf16,f16x2,bf16x2}", "t", "t t", _minimum),
    ("max.{f16,bf16,f16x2,bf16x2}", "t", "t t", _maximum),
    ("neg.{f16,bf16,f16x2,bf16x2}", "t", "t", np.negative),
    ("abs.{f16,bf16,f16x2,bf16x2}", "t", "t", np.abs),
    ("cvt.rn{,.ftz}.{f16,bf16}.f32", "result", "t", _same),
    ("cvt.rn.{f16x2,bf16x2}.f32", "result", "t t", _pair),
    ("cvt{,.ftz}.f32.{f16,bf16}", "f32", "t", _same),
    ("cvt.rna.tf32.f32", "b32", "t", round_to_tf32),
    ("cvt.f64.f32", "f64", "t", _to("f64")),
    ("cvt.rn{,.ftz}.f32.f64", "f32", "t", _to("f32")),
    (f"cvt.rn.f32.{_INTEGERS}", "f32", "t", _to("f32")),
    (f"cvt.rn.{{f16,bf16}}.{_INTEGERS}", "result", "t", _to("f64")),
    *(
        (f"cvt.{rounding}{{,.ftz}}.{kind}.f32", kind, "t", _to_integer(kind, function))
        for rounding, function in _ROUNDINGS.items()
        for kind in ("s16", "u16", "s32", "u32", "s64", "u64")
    ),
    *((f"cvt.{rounding}{{,.ftz}}.f32.f32", "f32", "t", function) for rounding, function in _ROUNDINGS.items()),
    *(
        (f"cvt.{kind}.{{s8,u8,s16,u16,s32,u32,s64,u64}}", kind, "t", _to(kind))
        for kind in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")
    ),
)


def _expand(pattern: str) -> Iterator[str]:
    """All strings of a pattern with alternatives in braces."""
    pieces = re.split(r"\{([^}]*)\}", pattern)
    choices = [piece.split(",") if i % 2 else [piece] for i, piece in enumerate(pieces)]
    return ("".join(choice) for choice in itertools.product(*choices))


def _flushing(function: Function) -> Function:
    def flushed(*sources: Lanes) -> Lanes:
        result = function(*(flush(x) if x.dtype == np.float32 else x for x in sources))
        return flush(result) if result.dtype == np.float32 else result

    return flushed


def _operations() -> Iterator[tuple[str, Operation]]:
    for pattern, result, sources, function in _ROWS:
        for opcode in _expand(pattern):
            *_, destination, last = opcode.split(".")
            named = {"t": last, "result": destination}
            yield (
                opcode,
                Operation(
                    named.get(result, result),
                    tuple(named.get(kind, kind) for kind in sources.split()),
                    _flushing(function) if ".ftz." in opcode else function,
                ),
            )
    yield from _comparisons()


def _comparisons() -> Iterator[tuple[str, Operation]]:
    """setp: where a NaN is compared, false, or true in the forms that end in u."""
    for kind in ("b16", "b32", "b64", "s16", "u16", "s32", "u32", "s64", "u64"):
        for name, function in _COMPARISONS.items():
            yield from _with_a_predicate(name, "", kind, function)
    for kind in ("u16", "u32", "u64"):
        for name, same in _UNSIGNED_NAMES.items():
            yield from _with_a_predicate(name, "", kind, _COMPARISONS[same])
    for ftz in ("", ".ftz"):
        for name, function in _COMPARISONS.items():
            compare = _flushing(function) if ftz else function
            yield from _with_a_predicate(name, ftz, "f32", _ordered(compare))
            yield from _with_a_predicate(f"{name}u", ftz, "f32", _unordered(compare))
        yield from _with_a_predicate("num", ftz, "f32", lambda a, b: ~(np.isnan(a) | np.isnan(b)))
        yield from _with_a_predicate("nan", ftz, "f32", lambda a, b: np.isnan(a) | np.isnan(b))


def _ordered(function: Function) -> Function:
    return lambda a, b: function(a, b) & ~(np.isnan(a) | np.isnan(b))


def _unordered(function: Function) -> Function:
    return lambda a, b: function(a, b) | np.isnan(a) | np.isnan(b)


def _with_a_predicate(name: str, ftz: str, kind: str, function: Function) -> Iterator[tuple[str, Operation]]:
    """A comparison, and its forms that combine it with a predicate."""
    yield f"setp.{name}{ftz}.{kind}", Operation("pred", (kind, kind), function)
    for word, combine in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):

        def combined(a: Lanes, b: Lanes, c: Lanes, combine: Function = combine) -> Lanes:
            return combine(function(a, b), c)

        yield f"setp.{name}.{word}{ftz}.{kind}", Operation("pred", (kind, kind, "pred"), combined)


OPERATIONS = dict(_operations())
"""Opcode -> what it computes."""


def decode(machine: Machine, instruction: Instruction) -> Step:
    """The step of an instruction of the table.

    Raises:
        UnknownInstruction: it is not in the table, or its operands are not those of its row.
    """
    if instruction.parts[0] == "mov" and any(operand.startswith("{") for operand in instruction.operands):
        return _decode_vector(machine, instruction)
    operation = OPERATIONS.get(instruction.opcode)
    if operation is None or len(instruction.operands) != 1 + len(operation.sources):
        raise UnknownInstruction(instruction)
    reads = [
        _source(machine, operand, kind, instruction)
        for operand, kind in zip(instruction.operands[1:], operation.sources, strict=True)
    ]
    write = machine.write(instruction.operands[0], operation.result, instruction, machine.guard(instruction))
    function = operation.function
    if operation.result in FORMATS:
        encode, decoded = FORMATS[operation.result].encode, function
        return lambda: write(encode(decoded(*(read() for read in reads))))
    # Without a list: most of what a block executes are these.
    match reads:
        case [a]:
            return lambda: write(function(a()))
        case [a, b]:
            return lambda: write(function(a(), b()))
        case [a, b, c]:
            return lambda: write(function(a(), b(), c()))
    return lambda: write(function(*(read() for read in reads)))


def _source(machine: Machine, operand: str, kind: str, instruction: Instruction) -> Callable[[], Any]:
    if kind == "imm":
        constant = integer(operand)
        return lambda: constant
    read: Read = machine.read(operand, kind, instruction)
    if kind in FORMATS:
        decode_format = FORMATS[kind].decode
        return lambda: decode_format(read())
    return read


def _decode_vector(machine: Machine, instruction: Instruction) -> Step:
    """mov between a register and the registers of its parts, the lowest first."""
    whole_kind = instruction.parts[-1]
    target, source = (vector(operand) for operand in instruction.operands)
    count = max(len(target), len(source))
    if whole_kind not in ("b16", "b32", "b64") or min(len(target), len(source)) != 1:
        raise UnknownInstruction(instruction)
    part_kind = f"b{int(whole_kind[1:]) // count}"
    guard = machine.guard(instruction)
    if len(source) == 1:
        whole = machine.read(source[0], whole_kind, instruction)
        writes = [machine.write(name, part_kind, instruction, guard) for name in target]

        def split() -> None:
            parts = np.ascontiguousarray(whole()).view(DTYPES[part_kind]).reshape(-1, count)
            for i, write in enumerate(writes):
                write(parts[:, i].copy())

        return split
    reads = [machine.read(name, part_kind, instruction) for name in source]
    write_whole = machine.write(target[0], whole_kind, instruction, guard)
    return lambda: write_whole(np.stack([read() for read in reads], -1).view(DTYPES[whole_kind])[:, 0])
