"""wgmma: the matrix product of four warps, which runs on beside them until they wait for its group.

Its results are computed when it is issued. What may not happen before the wait is reported instead: a use of its
registers, or a write to the shared memory that it reads.
"""

import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vit_kernels.testing.ptx.findings import Hazard, UnknownInstruction
from vit_kernels.testing.ptx.formats import Lanes
from vit_kernels.testing.ptx.in_flight import Product
from vit_kernels.testing.ptx.machine import WARP, Machine, Read, Step, integer
from vit_kernels.testing.ptx.mma import ELEMENTS, Element, add_products, decode_words, matrix_a, shape_of
from vit_kernels.testing.ptx.parsing import Instruction, vector
from vit_kernels.testing.ptx.shared_memory import CHUNK

GROUP = 128
"""Threads of four warps."""

_SPANS = {1: 128, 2: 64, 3: 32}
"""Of a descriptor's swizzle modes: bytes of a row whose chunks are permuted. Mode 0, without one, is not known."""


def guarded(machine: Machine, instruction: Instruction, step: Step) -> Step:
    """The step of another instruction, which reports its use of registers of a wgmma in flight."""
    named = [name for operand in instruction.operands for name in re.findall(r"%\w+", operand)]
    touched = machine.watched.intersection(named)
    if not touched:
        return step

    def watched() -> int | None:
        queue = machine.products
        if not queue.busy.isdisjoint(touched):
            machine.report.add(Hazard.WGMMA_REGISTER_IN_FLIGHT, instruction)
        queue.accessed.update(touched)
        return step()

    return watched


def decode(machine: Machine, instruction: Instruction) -> Step:
    """wgmma.fence, mma_async, commit_group and wait_group."""
    match instruction.parts:
        case ["wgmma", "fence", "sync", "aligned"]:
            return _fence(machine, instruction)
        case ["wgmma", "commit_group", "sync", "aligned"]:
            return _commit(machine, instruction)
        case ["wgmma", "wait_group", "sync", "aligned"]:
            return _wait(machine, instruction, integer(instruction.operands[0]))
        case ["wgmma", "mma_async", "sync", "aligned", shape, total, kind_a, kind_b] if (
            kind_a == kind_b and kind_a in ELEMENTS and total == ELEMENTS[kind_a].accumulator
        ):
            return _multiply(machine, instruction, shape, ELEMENTS[kind_a])
    raise UnknownInstruction(instruction)


def _fence(machine: Machine, instruction: Instruction) -> Step:
    def step() -> None:
        machine.require_whole(instruction, block=True)
        machine.products.accessed.clear()

    return step


def _commit(machine: Machine, instruction: Instruction) -> Step:
    def step() -> None:
        machine.require_whole(instruction, block=True)
        machine.products.commit()

    return step


def _wait(machine: Machine, instruction: Instruction, pending: int) -> Step:
    def step() -> None:
        machine.require_whole(instruction, block=True)
        for product in machine.products.finished(pending):
            for first_warp, chunks in product.chunks:
                machine.shared.matrix_read(chunks, first_warp)

    return step


def _multiply(machine: Machine, instruction: Instruction, shape: str, element: Element) -> Step:
    m, n, k = shape_of(shape)
    target, a, b, add, *rest = instruction.operands
    sign_a, sign_b, *transposed = (integer(operand) for operand in rest)
    a_in_registers, total = a.startswith("{"), element.accumulator
    wanted = 0 if element.in_word != 2 else 1 if a_in_registers else 2
    accumulators = vector(target)
    if m != 64 or k * 4 // element.in_word != 32 or len(transposed) != wanted or len(accumulators) * 2 != n:
        raise UnknownInstruction(instruction, "operands that do not fit the shape")
    transposed_b = bool(transposed[-1:] == [1])
    transposed_a = bool(transposed[:1] == [1]) and not a_in_registers
    registers_a = [machine.read(name, "b32", instruction) for name in vector(a)] if a_in_registers else []
    descriptor_a = None if a_in_registers else machine.read(a, "b64", instruction)
    descriptor_b, keep = machine.read(b, "b64", instruction), machine.read(add, "pred", instruction)
    reads = [machine.read(name, total, instruction) for name in accumulators]
    writes = [machine.write(name, total, instruction) for name in accumulators]
    named = frozenset(accumulators) | frozenset(vector(a) if a_in_registers else ())
    matrix = _SharedMatrix(machine, instruction, element, k)

    def product(first: int, chunks: list[tuple[int, Lanes]], in_registers: Lanes | None) -> Lanes:
        """[64, n] of the group whose first thread is given; the chunks that it reads are added to those given."""
        if descriptor_a is None:
            of_a = in_registers[first // 32 : first // 32 + 4].reshape(m, k)  # type: ignore[index]
        else:
            of_a = matrix.load(descriptor_a, first, m, transposed_a, chunks)
        of_b = matrix.load(descriptor_b, first, n, transposed_b, chunks)
        return of_a @ of_b.T * (sign_a * sign_b)

    def step() -> None:
        machine.require_whole(instruction, block=True)
        queue = machine.products
        if not queue.accessed.isdisjoint(named):
            machine.report.add(Hazard.WGMMA_WITHOUT_FENCE, instruction)
        chunks: list[tuple[int, Lanes]] = []
        in_registers = matrix_a(registers_a, element) if a_in_registers else None
        products = np.stack([product(first, chunks, in_registers) for first in range(0, machine.threads, GROUP)])
        # [group, row (warp, half, g), column (j, t, bit)] -> [register (j, half, bit), thread (group, warp, g, t)]
        split = products.reshape(-1, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, -1)
        kept = keep()
        for i, (read, write) in enumerate(zip(reads, writes, strict=True)):
            write(add_products(split[i], np.where(kept, read(), read().dtype.type(0))))
        queue.issue(Product(instruction, named, chunks))

    return step


class _SharedMatrix(NamedTuple):
    """An operand of k columns in shared memory, that a 64-bit descriptor names."""

    machine: Machine
    instruction: Instruction
    element: Element
    k: int

    def load(self, descriptor: Read, first: int, rows: int, transposed: bool, read: list[tuple[int, Lanes]]) -> Lanes:
        """float64 [rows, k] of the group that begins at thread `first`; the chunks are added to those read."""
        values = descriptor()[first : first + GROUP]
        if (values != values[0]).any():
            self.machine.report.add(Hazard.DIVERGENCE, self.instruction, "a descriptor differs in a group", fatal=True)
        addresses = chunk_addresses(int(values[0]), rows, self.k * 4 // self.element.in_word, transposed)
        if addresses is None:
            raise UnknownInstruction(self.instruction, "a descriptor without a swizzle")
        shared, report = self.machine.shared, self.machine.report
        chunks = shared.rows(addresses.ravel(), CHUNK, self.instruction, report)
        self._check(chunks)
        np.add.at(shared.of(shared.matrix_reads, CHUNK), chunks, 1)
        read.append((first // WARP, chunks))
        words = shared.data.reshape(-1, CHUNK)[chunks].view(np.uint32).reshape(*addresses.shape, 4)
        elements = decode_words(words, self.element).reshape(len(addresses), -1)
        return elements.T if transposed else elements

    def _check(self, chunks: Lanes) -> None:
        shared, report, instruction = self.machine.shared, self.machine.report, self.instruction
        if shared.in_flight and shared.of(shared.arriving, CHUNK)[chunks].any():
            report.add(Hazard.COPY_READ_IN_FLIGHT, instruction)
        written = shared.of(shared.last_write, CHUNK)[chunks]
        if written.min() == 0:
            report.add(Hazard.SHARED_UNINITIALISED, instruction)
        if shared.of(shared.unfenced, CHUNK)[chunks].any():
            report.add(Hazard.WGMMA_UNFENCED_WRITE, instruction)
        if shared.since_barrier(written).any():
            report.add(Hazard.SHARED_READ_WITHOUT_BARRIER, instruction)


def chunk_addresses(descriptor: int, rows: int, row_bytes: int, transposed: bool) -> NDArray[np.int64] | None:
    """Shared addresses of the 16-byte chunks of a matrix [rows, k]; None without a swizzle.

    [rows, chunks of k] of a K-major matrix, whose k lie together; transposed [k, chunks of rows], whose rows do.
    `row_bytes` are those of k elements; transposed, elements take two bytes each.

    A swizzled row spans 32, 64 or 128 bytes, and 8 of them are an atom. K-major: the stride of the descriptor leads
    from one atom's 8 rows to the next 8, the leading offset from one span of k to the next. Transposed: the stride
    leads from 8 k to the next 8, the leading offset from one span of rows to the next. Chunks are then permuted: bits
    4 to 6 of an address are xored with its bits 7 to 9, as many as the span has.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    span = _SPANS.get(descriptor >> 62 & 3)
    if span is None:
        return None
    outer, inner_bytes = (row_bytes // 2, rows * 2) if transposed else (rows, row_bytes)
    outside = np.arange(outer, dtype=np.int64)[:, None]
    inside = np.arange(0, inner_bytes, CHUNK, dtype=np.int64)
    linear = start + outside % 8 * span + outside // 8 * stride + inside % span + inside // span * leading
    return linear ^ ((linear >> 7 & span // CHUNK - 1) << 4)


DECODERS = {"wgmma": decode}
