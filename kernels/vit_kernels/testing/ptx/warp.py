"""Instructions in which the lanes of a warp read each other's registers: shfl, redux."""

import numpy as np

from vit_kernels.testing.ptx.findings import UnknownInstruction
from vit_kernels.testing.ptx.formats import DTYPES
from vit_kernels.testing.ptx.machine import WARP, Machine, Step
from vit_kernels.testing.ptx.parsing import Instruction

_REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_ALL_LANES = ("-1", "0xffffffff", "4294967295")


def shuffle(machine: Machine, instruction: Instruction) -> Step:
    """shfl.sync: each lane reads the lane that its mode names, or itself where that is past the clamp."""
    match instruction.parts:
        case ["shfl", "sync", ("bfly" | "up" | "down" | "idx") as mode, "b32"]:
            pass
        case _:
            raise UnknownInstruction(instruction)
    target, _, in_range = instruction.operands[0].partition("|")
    if in_range or instruction.predicate or instruction.operands[4] not in _ALL_LANES:
        raise UnknownInstruction(instruction, "with a second destination, a predicate or some lanes only")
    write = machine.write(target, "b32", instruction)
    value, other, clamp = (machine.read(x, "b32", instruction) for x in instruction.operands[1:4])
    lane, first = machine.lanes % WARP, machine.lanes // WARP * WARP

    def step() -> None:
        machine.require_whole(instruction)
        most, segment = clamp() & np.uint32(31), (clamp() >> np.uint32(8)) & np.uint32(31)
        distance = (other() & np.uint32(31)).astype(np.int64)
        low = lane & segment
        limit = low | (most & ~segment & np.uint32(31))
        named = {
            "bfly": lane ^ distance,
            "up": lane - distance,
            "down": lane + distance,
            "idx": low | (distance & ~segment.astype(np.int64)),
        }[mode]
        valid = named >= limit if mode == "up" else named <= limit
        write(value()[first + np.where(valid, named, lane)])

    return step


def reduce(machine: Machine, instruction: Instruction) -> Step:
    """redux.sync: every lane gets the reduction of the warp."""
    match instruction.parts:
        case ["redux", "sync", operation, ("s32" | "u32" | "b32") as kind] if operation in _REDUCTIONS:
            pass
        case _:
            raise UnknownInstruction(instruction)
    write = machine.write(instruction.operands[0], kind, instruction)
    value, members = machine.read(instruction.operands[1], kind, instruction), instruction.operands[2]
    mask = machine.read(members, "b32", instruction)
    function, dtype = _REDUCTIONS[operation], DTYPES[kind]

    def step() -> None:
        machine.require_whole(instruction)
        if (mask()[machine.running()] != np.uint32(0xFFFFFFFF)).any():
            raise UnknownInstruction(instruction, "of some lanes only")
        write(np.repeat(function.reduce(value().reshape(-1, WARP), axis=1, dtype=dtype), WARP))

    return step


DECODERS = {"shfl": shuffle, "redux": reduce}
