"""Every opcode of the table against its scalar definition, on edge values and random ones."""

import itertools
import math
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from vit_kernels.testing.ptx import UnknownInstruction
from vit_kernels.testing.ptx.arithmetic import OPERATIONS, Operation

from tests.kernels import ptx_definitions as scalar
from tests.kernels.ptx_programs import from_numpy, run

LANES = 128
WIDTHS = {"pred": 1, "f32": 32, "f64": 64, "tf32": 32, "f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32}

Expected = Callable[..., int]


def width_of(kind: str) -> int:
    return WIDTHS.get(kind) or int(kind[1:])


def edges(kind: str) -> list[int]:
    """Bits that are worth a look, in any type of this width."""
    width = width_of(kind)
    if kind == "pred":
        return [0, 1]
    if kind in ("f16x2", "bf16x2"):
        return [low << 16 | high for low, high in itertools.product(edges(kind[:-2])[::3], repeat=2)]
    top = 1 << width - 1
    found = {0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 33, top - 1, top, top + 1, 2 * top - 1, 2 * top - 2, top // 3}
    if kind in scalar.FLOATS:
        form = scalar.FLOATS[kind]
        one = form.bias << form.mantissa_bits
        sizes = {one, one + 1, one - 1, one + (1 << form.mantissa_bits - 1), form.infinity, form.infinity - 1}
        sizes |= {form.infinity | 1 << form.mantissa_bits - 1, 1 << form.mantissa_bits, (1 << form.mantissa_bits) - 1}
        found |= sizes | {size | top for size in sizes}
    if kind == "f32":
        found |= {scalar.encode(float(x), kind) for x in (-300.5, 2.5, -2.5, 3.5, 2**31, -(2**31), 2**24 + 2, 0.1, 126)}
        found |= {0x3F808000, 0x3F818000, 0x3F801000, 0x3F803000, 0x477FF000}  # ties of bf16, tf32 and f16
    return sorted(bits for bits in found if bits < 2 * top)


def columns(kinds: tuple[str, ...], seed: int) -> list[list[int]]:
    """LANES operands of each kind: pairs of edges first, then random bits, and random numbers of moderate size."""
    generator = random.Random(seed)
    out = []
    for position, kind in enumerate(kinds):
        choices = edges(kind)
        row = [generator.choice(choices) for _ in range(LANES // 2)] if position else (choices * LANES)[: LANES // 2]
        row += [generator.getrandbits(width_of(kind)) for _ in range(LANES // 4)]
        for _ in range(LANES // 4):
            number = generator.gauss(0, 30)
            if kind in scalar.FLOATS:
                row.append(scalar.encode(number, kind))
            elif kind in ("f16x2", "bf16x2"):
                row.append(scalar.encode(number, kind[:-2]) << 16 | scalar.encode(generator.gauss(0, 1), kind[:-2]))
            else:
                row.append(int(number) % (1 << width_of(kind)))
        out.append(row)
    return out


def register(kind: str, number: int) -> str:
    return {1: "%p", 16: "%h", 32: "%r", 64: "%rd"}[max(16, width_of(kind)) if kind != "pred" else 1] + str(number)


def execute(opcode: str, operation: Operation, operands: list[list[int]], immediate: int) -> list[int]:
    """The bits of the results, as a program that loads the operands and stores the result."""
    body, names, tensors = [], [], []
    for i, (kind, row) in enumerate(zip(operation.sources, [*operands, *[[]] * 4], strict=False)):
        if kind == "imm":
            names.append(hex(immediate))
            continue
        stored = max(width_of(kind), 32) if kind == "pred" else width_of(kind)
        tensors.append(from_numpy(np.array(row, f"u{stored // 8}")))
        body += [f"mul.wide.u32 %rd1, %r0, {stored // 8};", f"add.s64 %rd1, %rd1, %rd{50 + i};"]
        into = f"%r{10 + i}" if kind == "pred" else register(kind, 10 + i)
        body.append(f"ld.global.b{stored} {into}, [%rd1];" if stored > 8 else f"ld.global.u8 {into}, [%rd1];")
        if kind == "pred":
            body.append(f"setp.ne.b32 %p{1 + i}, {into}, 0;")
        names.append(f"%p{1 + i}" if kind == "pred" else into)
    result = operation.result
    target = "%p7" if result == "pred" else register(result, 20)
    stored = 32 if result == "pred" else max(16, width_of(result))
    tensors.append(torch.zeros(LANES, dtype={16: torch.int16, 32: torch.int32, 64: torch.int64}[stored]))
    body.append(f"{opcode} {target}, {', '.join(names)};")
    if result == "pred":
        body.append("selp.b32 %r20, 1, 0, %p7;")
        target = "%r20"
    body += [f"mul.wide.u32 %rd1, %r0, {stored // 8};", f"add.s64 %rd1, %rd1, %rd{50 + len(tensors) - 1};"]
    body.append(f"st.global.b{stored} [%rd1], {target};")
    run("\n".join(body), *tensors, warps=LANES // 32)
    return [int(x) % (1 << stored) for x in tensors[-1]]


def halves(bits: int) -> tuple[int, int]:
    return bits & 0xFFFF, bits >> 16


def expected_of(opcode: str) -> Expected:
    """The scalar definition: bits of the operands -> bits of the result."""
    name, *modifiers, kind = opcode.split(".")
    if name == "setp":
        return lambda *operands: compare(modifiers, kind, *operands)
    if name == "cvt":
        return lambda *operands: convert(modifiers, kind, *operands)
    if name in ("mov", "cvta"):
        return lambda a: a
    if name == "selp":
        return lambda a, b, condition: a if condition else b
    if kind in ("f16x2", "bf16x2"):
        half = expected_of(".".join([name, *modifiers, kind[:-2]]))
        return lambda *pairs: half(*(halves(x)[0] for x in pairs)) | half(*(halves(x)[1] for x in pairs)) << 16
    if kind in scalar.FLOATS:
        return lambda *operands: of_floats(name, modifiers, kind, *operands)
    return lambda *operands: of_integers(name, modifiers, kind, *operands)


def of_floats(name: str, modifiers: list[str], kind: str, *operands: int) -> int:
    numbers = [scalar.decode(bits, kind) for bits in operands]
    if "ftz" in modifiers:
        numbers = [scalar.flush(x) for x in numbers]
    key = f"{name}.NaN" if "NaN" in modifiers else name
    function = scalar.APPROXIMATE.get(name) or scalar.FLOAT_FUNCTIONS[key]
    bits = scalar.encode(function(*numbers), kind)
    return scalar.encode(scalar.flush(scalar.decode(bits, kind)), kind) if "ftz" in modifiers else bits


def of_integers(name: str, modifiers: list[str], kind: str, *operands: int) -> int:
    width = 1 if kind == "pred" else width_of(kind)
    numbers = [bits if kind in ("pred", "b16", "b32", "b64") else scalar.integer(bits, kind) for bits in operands]
    match name, modifiers:
        case ("shl", _):
            value = scalar.shift_left(operands[0], operands[1], width)
        case ("shr", _):
            value = scalar.shift_right(numbers[0], operands[1])
        case ("bfe", _):
            value = scalar.extract_bits(operands[0], operands[1], operands[2], kind)
        case ("bfi", _):
            value = scalar.insert_bits(*operands)
        case ("lop3", _):
            value = scalar.three_inputs(*operands)
        case ("prmt", _):
            value = scalar.permute(*operands)
        case ("shf", [direction, "wrap"]):
            value = scalar.funnel(operands[0], operands[1], operands[2], left=direction == "l")
        case ("mul", ["hi"]):
            value = scalar.high(numbers[0], numbers[1], width)
        case ("mad", ["hi"]):
            value = scalar.high(numbers[0], numbers[1], width) + numbers[2]
        case ("mad", ["wide"]):
            value, width = (
                scalar.integer(operands[0], kind) * scalar.integer(operands[1], kind) + operands[2],
                2 * width,
            )
        case _:
            value = scalar.INTEGER_FUNCTIONS[".".join([name, *modifiers])](*numbers)
            width = 2 * width if modifiers == ["wide"] else 32 if name in ("popc", "clz") else width
    return value % (1 << width)


def compare(modifiers: list[str], kind: str, *operands: int) -> int:
    name, *rest = modifiers
    if kind == "f32":
        a, b = (scalar.decode(bits, kind) for bits in operands[:2])
        if "ftz" in rest:
            a, b = scalar.flush(a), scalar.flush(b)
    else:
        a, b = (scalar.integer(bits, kind.replace("b", "u")) for bits in operands[:2])
    result = int(scalar.compare(name, a, b))
    combine = {"and": result & operands[-1], "or": result | operands[-1], "xor": result ^ operands[-1]}
    return combine[rest[0]] if rest and rest[0] in combine else result


def convert(modifiers: list[str], source: str, *operands: int) -> int:
    *how, target = modifiers
    if target in ("f16x2", "bf16x2"):
        upper, lower = (scalar.encode(scalar.decode(bits, source), target[:-2]) for bits in operands)
        return upper << 16 | lower
    (bits,) = operands
    if target == "tf32":
        return scalar.to_tf32(bits)
    if source not in scalar.FLOATS:
        value = scalar.integer(bits, source)
        return scalar.encode(float_of(value), target) if target in scalar.FLOATS else value % (1 << width_of(target))
    number = scalar.decode(bits, source)
    if "ftz" in how and source == "f32":
        number = scalar.flush(number)
    if target not in scalar.FLOATS:
        return scalar.to_integer(number, how[0], target) % (1 << width_of(target))
    if how and how[0] in scalar.ROUNDINGS and math.isfinite(number):
        number = math.copysign(float(scalar.ROUNDINGS[how[0]](number)), number)
    result = scalar.encode(number, target)
    return (
        scalar.encode(scalar.flush(scalar.decode(result, target)), target)
        if "ftz" in how and target == "f32"
        else result
    )


def float_of(value: int) -> scalar.Number:
    return scalar.Fraction(value) if value else 0.0


def same(actual: int, expected: int, kind: str, tolerance: float) -> bool:
    if kind in ("f16x2", "bf16x2"):
        return all(same(x, y, kind[:-2], tolerance) for x, y in zip(halves(actual), halves(expected), strict=True))
    if kind not in scalar.FLOATS:
        return actual == expected
    a, b = scalar.decode(actual, kind), scalar.decode(expected, kind)
    return (
        actual == expected
        or (math.isnan(a) and math.isnan(b))
        or (bool(tolerance) and math.isclose(a, b, rel_tol=tolerance))
    )


def defined(opcode: str, operands: tuple[int, ...]) -> bool:
    """PTX leaves integer division by zero open, and tf32 of what is not a finite number."""
    name, *modifiers, kind = opcode.split(".")
    if name in ("div", "rem") and kind not in scalar.FLOATS:
        return operands[1] != 0
    if "tf32" in modifiers:
        return math.isfinite(scalar.decode(operands[0], "f32"))
    return True


def by_mnemonic() -> Iterator[tuple[str, list[str]]]:
    ordered = sorted(OPERATIONS, key=lambda opcode: opcode.split(".")[0])
    return ((name, list(group)) for name, group in itertools.groupby(ordered, key=lambda opcode: opcode.split(".")[0]))


@pytest.mark.parametrize(("name", "opcodes"), [pytest.param(*pair, id=pair[0]) for pair in by_mnemonic()])
def test_every_opcode_is_its_definition(name: str, opcodes: list[str]) -> None:
    tolerance = 2.0**-22 if name in scalar.APPROXIMATE else 0.0
    for seed, opcode in enumerate(opcodes):
        operation = OPERATIONS[opcode]
        kinds = tuple(kind for kind in operation.sources if kind != "imm")
        operands, immediate = columns(kinds, seed), 0b11100110
        actual = execute(opcode, operation, operands, immediate)
        definition = expected_of(opcode)
        extra = (immediate,) if "imm" in operation.sources else ()
        for lane, given in enumerate(zip(*operands, strict=True)):
            if defined(opcode, given):
                expected = definition(*given, *extra)
                assert same(actual[lane] % (1 << width_of(operation.result)), expected, operation.result, tolerance), (
                    f"{opcode} of {', '.join(map(hex, given))}: got {actual[lane]:#x}, expected {expected:#x}"
                )


@pytest.mark.parametrize("instruction", ["add.sat.s32 %r4, %r0, %r0;", "frobnicate.b32 %r4, %r0;", "add.s32 %r4, %r0;"])
def test_an_opcode_without_a_row_is_refused_before_anything_runs(instruction: str) -> None:
    x = torch.zeros(32, dtype=torch.int32)
    with pytest.raises(UnknownInstruction, match=instruction.split()[0]):
        run(f"st.global.b32 [%rd40], %r2;\nret;\n{instruction}", x)
    assert not x.any()
