"""Branches, exits, barriers and fences."""

import numpy as np

from vit_kernels.testing.ptx.findings import UnknownInstruction
from vit_kernels.testing.ptx.machine import WARP, Machine, Step
from vit_kernels.testing.ptx.parsing import Instruction

GONE = -1
"""Returned by the step of an exit after which no thread of those that ran is left."""


def branch(machine: Machine, instruction: Instruction) -> Step:
    """bra: the threads that take it go on there, or wait there while others do not."""
    if instruction.parts not in (["bra"], ["bra", "uni"]) or instruction.operands[0] not in machine.module.labels:
        raise UnknownInstruction(instruction)
    target, guard = machine.module.labels[instruction.operands[0]], machine.guard(instruction)
    if guard is None:
        return lambda: target

    def step() -> int | None:
        running = machine.running()
        taken = guard() & running
        if not taken.any():
            return None
        if (taken == running).all():
            return target
        machine.park(target, taken)
        machine.leave(taken)
        return None

    return step


def leave(machine: Machine, instruction: Instruction) -> Step:
    """ret, exit: threads are done."""
    guard = machine.guard(instruction)

    def step() -> int | None:
        done = machine.running(guard)
        machine.returned = machine.returned | done
        return None if machine.leave(done) else GONE

    return step


def barrier(machine: Machine, instruction: Instruction) -> Step:
    """bar.sync, bar.warp.sync: they order memory among the threads that meet."""
    if instruction.predicate:
        raise UnknownInstruction(instruction, "with a predicate")
    match instruction.parts:
        case ["bar" | "barrier", "sync"] | ["bar" | "barrier", "cta", "sync"] | ["barrier", "sync", "aligned"]:
            if instruction.operands != ("0",):
                raise UnknownInstruction(instruction, "of some threads, or a barrier other than 0")
            return _meet(machine, instruction)
        case ["bar", "warp", "sync"]:
            return _meet_in_warps(machine, instruction)
    raise UnknownInstruction(instruction)


def _meet(machine: Machine, instruction: Instruction) -> Step:
    def step() -> None:
        machine.require_whole(instruction, block=True)
        machine.shared.barrier()
        machine.memory.barrier()

    return step


def _meet_in_warps(machine: Machine, instruction: Instruction) -> Step:
    def step() -> None:
        machine.require_whole(instruction)
        warps = np.flatnonzero(machine.running().reshape(-1, WARP)[:, 0])
        machine.shared.barrier_of_warps(warps)
        machine.memory.barrier_of_warps(warps)

    return step


def fence(machine: Machine, instruction: Instruction) -> Step:
    """fence.proxy.async: matrix instructions see what the generic instructions wrote before."""
    if instruction.parts not in (["fence", "proxy", "async", "shared::cta"], ["fence", "proxy", "async"]):
        raise UnknownInstruction(instruction)

    def step() -> None:
        machine.require_whole(instruction, block=True)
        machine.shared.unfenced.fill(False)

    return step


DECODERS = {
    "bra": branch,
    "ret": leave,
    "exit": leave,
    "bar": barrier,
    "barrier": barrier,
    "fence": fence,
}
