"""mma.sync: the matrix product of a warp, whose operands lie across the registers of its lanes.

With E elements in a register and lane 4 g + t (g from 0 to 7, t from 0 to 3), register i holds
of A [16, k]: row g + 8 (i % 2), columns E t + e + 4 E (i // 2);
of B [k, 8]: rows E t + e + 4 E i, column g;
of C and D [16, 8], in 32 bits: row g + 8 (i // 2), column 2 t + i % 2.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vit_kernels.testing.ptx.findings import UnknownInstruction
from vit_kernels.testing.ptx.formats import Lanes, bf16_to_f32, f16_to_f32
from vit_kernels.testing.ptx.machine import Machine, Read, Step
from vit_kernels.testing.ptx.parsing import Instruction, vector


class Element(NamedTuple):
    """A type of A and B: elements in 32 bits, how they are decoded from uint{8, 16, 32}, and the type of the sums."""

    in_word: int
    decode: Callable[[Lanes], Lanes]
    accumulator: str


def _tf32(bits: Lanes) -> Lanes:
    """The 13 lowest bits are not read."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


ELEMENTS = {
    "bf16": Element(2, bf16_to_f32, "f32"),
    "f16": Element(2, f16_to_f32, "f32"),
    "tf32": Element(1, _tf32, "f32"),
    "s8": Element(4, lambda bits: bits.view(np.int8), "s32"),
    "u8": Element(4, lambda bits: bits, "s32"),
}


def decode_words(words: Lanes, element: Element) -> Lanes:
    """uint32 [...] -> float64 [..., elements of a word]; float64 holds every product and the sums of a few exactly."""
    bits = np.ascontiguousarray(words).view(f"u{4 // element.in_word}").reshape(*words.shape, element.in_word)
    return element.decode(bits).astype(np.float64)


def matrix_a(reads: Sequence[Read], element: Element) -> Lanes:
    """The warps' A [warps, 16, k] from their registers."""
    values = decode_words(np.stack([read() for read in reads]), element)
    e = element.in_word
    # register (column half, row half), warp, g, t, e
    split = values.reshape(len(reads) // 2, 2, -1, 8, 4, e).transpose(2, 1, 3, 0, 4, 5)
    return split.reshape(-1, 16, len(reads) * 2 * e)


def matrix_b(reads: Sequence[Read], element: Element) -> Lanes:
    """The warps' B [warps, k, 8] from their registers."""
    values = decode_words(np.stack([read() for read in reads]), element)
    e = element.in_word
    split = values.reshape(len(reads), -1, 8, 4, e).transpose(1, 0, 3, 4, 2)
    return split.reshape(-1, len(reads) * 4 * e, 8)


def add_products(products: Lanes, sums: Lanes) -> Lanes:
    """What is rounded, once, to the accumulator's type; integers wrap."""
    if sums.dtype == np.int32:
        return (products.astype(np.int64) + sums).astype(np.int32)
    return (products + sums).astype(np.float32)


def multiply(machine: Machine, instruction: Instruction) -> Step:
    """mma.sync."""
    match instruction.parts:
        case ["mma", "sync", "aligned", shape, "row", "col", total, kind_a, kind_b, into] if (
            kind_a == kind_b and total == into and kind_a in ELEMENTS and total == ELEMENTS[kind_a].accumulator
        ):
            pass
        case _:
            raise UnknownInstruction(instruction)
    element = ELEMENTS[kind_a]
    target, a, b, c = (vector(operand) for operand in instruction.operands)
    k = len(a) * 2 * element.in_word
    if shape != f"m16n8k{k}" or len(b) * 4 * element.in_word != k or len(target) != 4 or len(c) != 4:
        raise UnknownInstruction(instruction, "registers that do not fit the shape")
    writes = [machine.write(name, total, instruction) for name in target]
    of_a, of_b = ([machine.read(name, "b32", instruction) for name in names] for names in (a, b))
    of_c = [machine.read(name, total, instruction) for name in c]

    def step() -> None:
        machine.require_whole(instruction)
        products = np.matmul(matrix_a(of_a, element), matrix_b(of_b, element))
        # row (half, g), column (t, low bit) -> register 2 half + low bit of lane 4 g + t
        split = products.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        for i, write in enumerate(writes):
            write(add_products(split[i], of_c[i]()))

    return step


def shape_of(text: str) -> tuple[int, int, int]:
    """(m, n, k) of "m64n128k16"."""
    m, n, k = re.fullmatch(r"m(\d+)n(\d+)k(\d+)", text).groups()  # type: ignore[union-attr]
    return int(m), int(n), int(k)


DECODERS = {"mma": multiply}
