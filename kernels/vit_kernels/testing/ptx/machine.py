"""A block while it runs: its registers, which of its threads run, and how operands are read and written."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vit_kernels.testing.ptx.findings import Hazard, UnknownInstruction
from vit_kernels.testing.ptx.formats import DTYPES, Lanes
from vit_kernels.testing.ptx.in_flight import CopyQueue, ProductQueue, watched_registers
from vit_kernels.testing.ptx.parsing import Instruction, Module
from vit_kernels.testing.ptx.report import Report
from vit_kernels.testing.ptx.shared_memory import SHARED_BASE, SharedMemory

if TYPE_CHECKING:
    from vit_kernels.testing.ptx.global_memory import GlobalMemory

WARP = 32

Mask = NDArray[np.bool_]
Read = Callable[[], Lanes]
Write = Callable[[Lanes], None]
Step = Callable[[], int | None]
"""Runs an instruction; returns the index of the next one where that is not the one that follows."""

_IMMEDIATE = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$")
_FLOAT = re.compile(r"0(?:[fF]([0-9a-fA-F]{8})|[dD]([0-9a-fA-F]{16}))$")
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]$")


class Machine:
    """One block. What runs its instructions is decoded once and runs for every block of every launch.

    Lanes are arrays [threads]. An array that a register holds is never changed, only replaced.

    Attributes:
        threads: of a block.
        registers: of every name, by `slots`.
        parameters: name -> the bits of the kernel's argument.
        active: the threads that run, None for all of them. The others are parked at another instruction or returned.
        parked: index of an instruction -> the threads that wait there.
        returned: the threads that are done.
        shared, memory: of the block, and of the launch.
        copies, products: what is in flight.
        block: number of the block in its grid.
    """

    def __init__(self, module: Module, threads: int, shared_bytes: int, granule: int) -> None:
        """A machine for blocks of `threads` threads, whose narrowest shared access takes `granule` bytes."""
        self.module, self.threads, self.warps = module, threads, threads // WARP
        self.lanes = np.arange(threads)
        self.warp_of = self.lanes // WARP
        self.everyone = np.ones(threads, np.bool_)
        self.slots = {name: i for i, name in enumerate(module.registers)}
        # Of no use to anyone: NaN in every float type.
        undefined = {
            width: _constant(threads, np.dtype(DTYPES[width]), (1 << 64) - 1)
            for width in set(module.registers.values())
        }
        self._undefined = [undefined[width] for width in module.registers.values()]
        self.registers: list[Lanes] = list(self._undefined)
        self.special: dict[str, Lanes] = {}
        self.shared = SharedMemory(shared_bytes, threads, granule)
        self.memory: GlobalMemory
        self.report: Report
        self.parameters: dict[str, int] = {}
        self.copies = CopyQueue()
        self.watched = watched_registers(module.instructions)
        self.products = ProductQueue(self.watched)
        self.wavefronts_seen: dict[Any, tuple[int, int]] = {}

    def start(
        self,
        block: tuple[int, int, int],
        grid: tuple[int, int, int],
        parameters: dict[str, int],
        memory: "GlobalMemory",
        report: Report,
    ) -> None:
        """Begin a block."""
        self.registers[:] = self._undefined
        self.parameters, self.memory, self.report = parameters, memory, report
        self.block = block[0] + grid[0] * (block[1] + grid[1] * block[2])
        special: dict[str, Any] = {"%tid.x": self.lanes, "%laneid": self.lanes % WARP, "%warpid": self.warp_of}
        special |= {"%tid.y": 0, "%tid.z": 0, "%ntid.x": self.threads, "%ntid.y": 1, "%ntid.z": 1}
        special |= {f"%ctaid.{axis}": at for axis, at in zip("xyz", block, strict=True)}
        special |= {f"%nctaid.{axis}": size for axis, size in zip("xyz", grid, strict=True)}
        self.special = {name: np.full(self.threads, value, np.uint32) for name, value in special.items()}
        self.shared.start()
        self.copies, self.products = CopyQueue(), ProductQueue(self.watched)
        self.active: Mask | None = None
        self.parked: dict[int, Mask] = {}
        self.returned = np.zeros(self.threads, np.bool_)

    # What runs.

    def running(self, guard: Read | None = None) -> Mask:
        """The threads that run an instruction with this guard."""
        if guard is None:
            return self.everyone if self.active is None else self.active
        return guard() if self.active is None else guard() & self.active

    def running_warps(self) -> int:
        """How many warps have a thread that runs."""
        return self.warps if self.active is None else int(self.active.reshape(-1, WARP).any(1).sum())

    def park(self, index: int, threads: Mask) -> None:
        """Have threads wait at an instruction."""
        self.parked[index] = threads | self.parked.get(index, False)

    def leave(self, threads: Mask) -> bool:
        """Take threads out of the running ones; whether any stay."""
        self.active = self.running() & ~threads
        return bool(self.active.any())

    def switch(self, index: int | None) -> int | None:
        """The running threads get to an instruction (None: they are gone); go on where some are furthest behind.

        So those that went different ways meet again where their ways do.
        """
        if index is not None:
            self.park(index, self.running())
        if not self.parked:
            return None
        first = min(self.parked)
        running = self.parked.pop(first)
        self.active = None if running.all() else running
        return first

    def require_whole(self, instruction: Instruction, *, block: bool = False) -> None:
        """Report DIVERGENCE unless the threads of every running warp, or of the block, get here together."""
        if self.active is not None:
            warps = self.active.reshape(-1, WARP)
            if block or (warps.any(1) != warps.all(1)).any():
                self.report.add(Hazard.DIVERGENCE, instruction, fatal=True)

    # Operands.

    def guard(self, instruction: Instruction) -> Read | None:
        """The predicate of an instruction."""
        if not instruction.predicate:
            return None
        predicate = self.read(instruction.predicate, "pred", instruction)
        return (lambda: ~predicate()) if instruction.negated else predicate

    def read(self, operand: str, kind: str, instruction: Instruction) -> Read:
        """What gives an operand's lanes as a type: a register, its lower bits, a special register or a constant."""
        dtype = DTYPES[kind]
        if operand in self.slots:
            return self._read_register(operand, dtype, instruction)
        if operand.startswith("%"):
            if operand not in _SPECIAL or dtype.itemsize != 4:
                raise UnknownInstruction(instruction, f"register {operand}")
            return lambda: self.special[operand].view(dtype)
        constant = _constant(self.threads, dtype, self._bits(operand, instruction))
        return lambda: constant

    def _read_register(self, name: str, dtype: np.dtype[Any], instruction: Instruction) -> Read:
        slot, registers, held = self.slots[name], self.registers, DTYPES[self.module.registers[name]]
        if held == dtype:
            return lambda: registers[slot]
        if np.bool_ in (held, dtype) or held.itemsize < dtype.itemsize:
            raise UnknownInstruction(instruction, f"{name} is a {self.module.registers[name]}")
        if held.itemsize == dtype.itemsize:
            return lambda: registers[slot].view(dtype)
        narrow = np.dtype(f"u{dtype.itemsize}")
        return lambda: registers[slot].astype(narrow).view(dtype)

    def _bits(self, operand: str, instruction: Instruction) -> int:
        if operand == "global_smem":
            return SHARED_BASE
        if number := _FLOAT.match(operand):
            return int(number[1] or number[2], 16)
        if _IMMEDIATE.match(operand):
            return integer(operand)
        raise UnknownInstruction(instruction, f"operand {operand!r}")

    def write(self, operand: str, kind: str, instruction: Instruction, guard: Read | None = None) -> Write:
        """What puts lanes of a type into a register, of the threads that run with this guard."""
        if operand == "_":
            return lambda value: None
        if operand not in self.slots:
            raise UnknownInstruction(instruction, f"destination {operand!r}")
        slot, registers = self.slots[operand], self.registers
        held, given = DTYPES[self.module.registers[operand]], DTYPES[kind]
        if (np.bool_ in (held, given) and held != given) or held.itemsize < given.itemsize:
            raise UnknownInstruction(instruction, f"{operand} is a {self.module.registers[operand]}")
        # A wider register takes the sign where there is one.
        wide = np.dtype(f"{given.kind}{held.itemsize}") if held.itemsize > given.itemsize else None

        def put(value: Lanes) -> None:
            if wide is not None:
                value = value.astype(wide)
            if value.dtype != held:
                value = value.view(held)
            if guard is None and self.active is None:
                registers[slot] = value
            else:
                registers[slot] = np.where(self.running(guard), value, registers[slot])

        return put

    def address(self, operand: str, kind: str, instruction: Instruction) -> Read:
        """What gives the lanes of "[register + offset]"."""
        found = _ADDRESS.match(operand)
        if not found:
            raise UnknownInstruction(instruction, f"address {operand!r}")
        base, dtype = self.read(found[1], kind, instruction), DTYPES[kind]
        offset = integer(found[2] or "0")
        if not offset:
            return base
        added = dtype.type(offset % (1 << 8 * dtype.itemsize))
        return lambda: base() + added


_SPECIAL = (
    "%laneid", "%warpid", *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz")
)  # fmt: skip


def integer(operand: str) -> int:
    """The number that is written as decimal or hexadecimal."""
    return int(operand.rstrip("U"), 0)


def _constant(threads: int, dtype: np.dtype[Any], bits: int) -> Lanes:
    if dtype == np.bool_:
        lanes = np.full(threads, bits != 0)
    else:
        lanes = np.full(threads, bits % (1 << 8 * dtype.itemsize), f"u{dtype.itemsize}").view(dtype)
    lanes.flags.writeable = False
    return lanes
