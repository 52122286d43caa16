"""Instructions that move data between registers and memory: ld, st, cp.async, ldmatrix, stmatrix."""

import numpy as np

from vit_kernels.testing.ptx.counts import sectors_of, wavefronts_of
from vit_kernels.testing.ptx.findings import UnknownInstruction
from vit_kernels.testing.ptx.formats import DTYPES, Lanes
from vit_kernels.testing.ptx.in_flight import Copy
from vit_kernels.testing.ptx.machine import Machine, Read, Step, integer
from vit_kernels.testing.ptx.parsing import Instruction, vector

_VECTORS = {"v2": 2, "v4": 4, "v8": 8}
_HINTS = {
    "ca", "cg", "cs", "cv", "wb", "wt", "nc", "volatile", "weak", "relaxed", "gpu", "cta", "sys",
    *(f"{level}::{hint}" for level in ("L1", "L2")
      for hint in ("evict_first", "evict_last", "evict_normal", "evict_unchanged", "no_allocate")),
}  # fmt: skip
"""They say nothing of the value."""


def _form(instruction: Instruction) -> tuple[bool, str, int]:
    """(shared memory, type, how many) of an ld or st."""
    space, *modifiers, kind = instruction.parts[1:]
    count = 1
    for modifier in modifiers:
        if modifier in _VECTORS:
            count = _VECTORS[modifier]
        elif modifier not in _HINTS:
            raise UnknownInstruction(instruction, modifier)
    if space not in ("global", "shared", "shared::cta") or kind not in DTYPES or kind == "pred":
        raise UnknownInstruction(instruction)
    return space != "global", kind, count


def access_bytes(instruction: Instruction) -> tuple[bool, int] | None:
    """(shared memory, bytes of a lane's access), of the instructions here that access either memory."""
    match instruction.parts:
        case ["ld", "param", *_]:
            return None
        case ["ld" | "st", *_]:
            shared, kind, count = _form(instruction)
            return shared, DTYPES[kind].itemsize * count
        case ["ldmatrix" | "stmatrix", *_]:
            return True, 16
        case ["cp", "async", "ca" | "cg", *_]:
            return True, integer(instruction.operands[2])
    return None


def load(machine: Machine, instruction: Instruction) -> Step:
    """ld.param, ld.global, ld.shared."""
    if instruction.parts[1] == "param":
        return _load_parameter(machine, instruction)
    shared, kind, count = _form(instruction)
    item = DTYPES[kind].itemsize
    size, guard = item * count, machine.guard(instruction)
    writes = [machine.write(name, kind, instruction, guard) for name in vector(instruction.operands[0])]
    address = machine.address(instruction.operands[1], "u32" if shared else "u64", instruction)
    if len(writes) != count:
        raise UnknownInstruction(instruction, f"{len(writes)} registers")

    def step() -> None:
        running = machine.running(guard)
        if not running.any():
            return
        threads = machine.lanes[running]
        loaded = (_read_shared if shared else _read_global)(machine, address()[running], size, threads, instruction)
        lanes = np.zeros((machine.threads, size), np.uint8)
        lanes[running] = loaded
        pieces = lanes.view(DTYPES[kind])
        for i, write in enumerate(writes):
            write(pieces[:, i].copy())

    return step


def _load_parameter(machine: Machine, instruction: Instruction) -> Step:
    kind, name = instruction.parts[-1], instruction.operands[1].strip("[] ")
    if kind not in DTYPES or name not in dict(machine.module.parameters):
        raise UnknownInstruction(instruction)
    write = machine.write(instruction.operands[0], kind, instruction, machine.guard(instruction))
    dtype = DTYPES[kind]
    unsigned = np.dtype(f"u{dtype.itemsize}")

    def step() -> None:
        bits = machine.parameters[name] % (1 << 8 * dtype.itemsize)
        write(np.full(machine.threads, bits, unsigned).view(dtype))

    return step


def store(machine: Machine, instruction: Instruction) -> Step:
    """st.global, st.shared."""
    shared, kind, count = _form(instruction)
    size, guard = DTYPES[kind].itemsize * count, machine.guard(instruction)
    reads = [machine.read(name, kind, instruction) for name in vector(instruction.operands[1])]
    address = machine.address(instruction.operands[0], "u32" if shared else "u64", instruction)
    if len(reads) != count:
        raise UnknownInstruction(instruction, f"{len(reads)} registers")

    def step() -> None:
        running = machine.running(guard)
        if not running.any():
            return
        threads, to = machine.lanes[running], address()[running]
        values = np.stack([read()[running] for read in reads], -1).view(np.uint8)
        if shared:
            _write_shared(machine, to, values, threads, instruction)
        else:
            machine.memory.store(to, values, threads, instruction, machine.report)
            _count_sectors(machine, to, size, threads, instruction)

    return step


def copy(machine: Machine, instruction: Instruction) -> Step:
    """cp.async and its groups: the bytes arrive when wait_group says so, not before."""
    match instruction.parts:
        case ["cp", "async", "commit_group"]:
            return _commit(machine, instruction)
        case ["cp", "async", "wait_group"]:
            return _wait(machine, instruction, integer(instruction.operands[0]))
        case ["cp", "async", "wait_all"]:
            return _wait(machine, instruction, 0)
        case ["cp", "async", "ca" | "cg", "shared" | "shared::cta", "global", *hints] if _HINTS.issuperset(hints):
            return _copy(machine, instruction)
    raise UnknownInstruction(instruction)


def _copy(machine: Machine, instruction: Instruction) -> Step:
    guard = machine.guard(instruction)
    to = machine.address(instruction.operands[0], "u32", instruction)
    origin = machine.address(instruction.operands[1], "u64", instruction)
    size = integer(instruction.operands[2])
    # What is not read of the source is zero.
    amount = machine.read(instruction.operands[3] if len(instruction.operands) > 3 else str(size), "u32", instruction)

    def step() -> None:
        running = machine.running(guard)
        if not running.any():
            return
        threads, target, source = machine.lanes[running], to()[running], origin()[running]
        wanted = amount()[running]
        values = np.zeros((len(threads), size), np.uint8)
        whole = wanted == size
        if ((wanted != 0) & ~whole).any():
            raise UnknownInstruction(instruction, "a source size other than 0 and the whole")
        if whole.any():
            values[whole] = _read_global(machine, source[whole], size, threads[whole], instruction)
        shared = machine.shared
        rows = shared.rows(target, size, instruction, machine.report)
        shared.check_write(rows, size, threads, instruction, machine.report)
        shared.of(shared.arriving, size)[rows] = True
        shared.in_flight += 1
        machine.copies.open.append(Copy(instruction, rows, size, threads, values))
        _count_wavefronts(machine, target, size, threads, instruction)

    return step


def _commit(machine: Machine, instruction: Instruction) -> Step:
    def step() -> None:
        machine.require_whole(instruction, block=True)
        machine.copies.commit()

    return step


def _wait(machine: Machine, instruction: Instruction, pending: int) -> Step:
    everything = instruction.parts[2] == "wait_all"

    def step() -> None:
        machine.require_whole(instruction, block=True)
        if everything:
            machine.copies.commit()
        shared = machine.shared
        for copied in machine.copies.arrived(pending):
            shared.of(shared.arriving, copied.size)[copied.rows] = False
            shared.in_flight -= 1
            shared.write(copied.rows, copied.size, copied.threads, copied.values, copied.instruction, machine.report)

    return step


def load_matrix(machine: Machine, instruction: Instruction) -> Step:
    """ldmatrix: 8 x 8 matrices of 16 bits, whose rows lie where 8 lanes say."""
    count, transposed, address, registers = _matrices(machine, instruction, address_at=1)
    writes = [machine.write(name, "b32", instruction) for name in registers]
    lanes = machine.lanes.reshape(-1, 32)[:, : 8 * count]

    def step() -> None:
        machine.require_whole(instruction)
        warps = machine.running().reshape(-1, 32)[:, 0]
        threads = lanes[warps].ravel()
        rows = _read_shared(machine, address()[threads], 16, threads, instruction)
        matrices = rows.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        words = np.zeros((machine.warps, count, 32), np.uint32)
        words[warps] = matrices.view(np.uint32).reshape(-1, count, 32)
        for i, write in enumerate(writes):
            write(words[:, i].ravel())

    return step


def store_matrix(machine: Machine, instruction: Instruction) -> Step:
    """stmatrix, the inverse of ldmatrix."""
    count, transposed, address, registers = _matrices(machine, instruction, address_at=0)
    reads = [machine.read(name, "b32", instruction) for name in registers]
    lanes = machine.lanes.reshape(-1, 32)[:, : 8 * count]

    def step() -> None:
        machine.require_whole(instruction)
        warps = machine.running().reshape(-1, 32)[:, 0]
        threads = lanes[warps].ravel()
        words = np.stack([read().reshape(-1, 32)[warps] for read in reads], 1)
        matrices = words.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        values = matrices.reshape(-1, 8).view(np.uint8)
        _write_shared(machine, address()[threads], values, threads, instruction)

    return step


def _matrices(machine: Machine, instruction: Instruction, address_at: int) -> tuple[int, bool, Read, list[str]]:
    match instruction.parts:
        case [_, "sync", "aligned", "m8n8", ("x1" | "x2" | "x4") as count, *trans, "shared" | "shared::cta", "b16"]:
            pass
        case _:
            raise UnknownInstruction(instruction)
    if trans not in ([], ["trans"]) or instruction.predicate:
        raise UnknownInstruction(instruction)
    registers = vector(instruction.operands[1 - address_at])
    if len(registers) != int(count[1]):
        raise UnknownInstruction(instruction, f"{len(registers)} registers")
    address = machine.address(instruction.operands[address_at], "u32", instruction)
    return int(count[1]), bool(trans), address, registers


def _read_global(machine: Machine, addresses: Lanes, size: int, threads: Lanes, instruction: Instruction) -> Lanes:
    values = machine.memory.load(addresses, size, threads, instruction, machine.report)
    _count_sectors(machine, addresses, size, threads, instruction)
    return values


def _read_shared(machine: Machine, addresses: Lanes, size: int, threads: Lanes, instruction: Instruction) -> Lanes:
    rows = machine.shared.rows(addresses, size, instruction, machine.report)
    _count_wavefronts(machine, addresses, size, threads, instruction)
    return machine.shared.read(rows, size, threads, instruction, machine.report)


def _write_shared(machine: Machine, addresses: Lanes, values: Lanes, threads: Lanes, instruction: Instruction) -> None:
    size = values.shape[1]
    rows = machine.shared.rows(addresses, size, instruction, machine.report)
    machine.shared.check_write(rows, size, threads, instruction, machine.report, values)
    machine.shared.write(rows, size, threads, values, instruction, machine.report)
    _count_wavefronts(machine, addresses, size, threads, instruction)


def _count_sectors(machine: Machine, addresses: Lanes, size: int, threads: Lanes, instruction: Instruction) -> None:
    counted = sectors_of(addresses.astype(np.int64), threads // 32, size)
    machine.report.launches[-1].sectors[instruction.where, instruction.opcode].add(*counted)


def _count_wavefronts(machine: Machine, addresses: Lanes, size: int, threads: Lanes, instruction: Instruction) -> None:
    # The same addresses come again with every block and every round of a loop.
    key = size, addresses.tobytes(), threads.tobytes()
    counted = machine.wavefronts_seen.get(key)
    if counted is None:
        counted = machine.wavefronts_seen[key] = wavefronts_of(addresses.astype(np.int64), threads, size)
    machine.report.launches[-1].wavefronts[instruction.where, instruction.opcode].add(*counted)


DECODERS = {"ld": load, "st": store, "cp": copy, "ldmatrix": load_matrix, "stmatrix": store_matrix}
