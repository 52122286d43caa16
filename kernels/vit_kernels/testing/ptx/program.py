"""A kernel, decoded once, and the loop that runs its blocks."""

import functools
from collections.abc import Callable

import numpy as np

from vit_kernels.testing.ptx import arithmetic, control, loads, mma, warp, wgmma
from vit_kernels.testing.ptx.findings import Hazard, PtxError
from vit_kernels.testing.ptx.global_memory import WIDEST, GlobalMemory
from vit_kernels.testing.ptx.machine import WARP, Machine, Step
from vit_kernels.testing.ptx.parsing import Instruction, parse
from vit_kernels.testing.ptx.report import Launch, Report

_DECODERS: dict[str, Callable[[Machine, Instruction], Step]] = {
    **control.DECODERS,
    **loads.DECODERS,
    **warp.DECODERS,
    **mma.DECODERS,
    **wgmma.DECODERS,
}
"""By the first component of the opcode; all others are in the table of arithmetic."""

MOST_STEPS = 5_000_000
"""Of one block, before it is taken for one that does not end."""

Grid = tuple[int, int, int]


class Program:
    """A kernel that runs on a CPU, a block at a time.

    Attributes:
        module: what was parsed.
        narrowest_global: the fewest bytes that one of its global accesses takes.
    """

    def __init__(self, ptx: str, threads: int, shared_bytes: int) -> None:
        """The kernel of a PTX text, in blocks of `threads` threads, with `shared_bytes` bytes at `global_smem`.

        Raises:
            UnknownInstruction: it has an instruction that cannot be executed, whether or not a thread gets to it.
            ValueError: the threads are not whole warps.
        """
        if threads % WARP or not threads:
            raise ValueError(f"threads: got {threads}, expected a multiple of {WARP}")
        self.module = parse(ptx)
        accesses = [found for found in map(loads.access_bytes, self.module.instructions) if found]
        narrowest = {shared: min((n for s, n in accesses if s == shared), default=WIDEST) for shared in (False, True)}
        copies = [n for s, n in accesses if s and n < WIDEST]
        self.narrowest_global = min([narrowest[False], *copies])
        self._machine = Machine(self.module, threads, shared_bytes, min(narrowest[True], WIDEST))
        self._steps = [self._decode(instruction) for instruction in self.module.instructions]

    def _decode(self, instruction: Instruction) -> Step:
        decode = _DECODERS.get(instruction.parts[0], arithmetic.decode)
        step = decode(self._machine, instruction)
        return step if decode is wgmma.decode else wgmma.guarded(self._machine, instruction, step)

    def launch(self, grid: Grid, arguments: list[int], memory: GlobalMemory, report: Report) -> None:
        """Run every block of a grid, one after the other; arguments are the bits of the parameters.

        Raises:
            HazardFound: what the report says.
            PtxError: a block does not end.
        """
        names = [name for name, _ in self.module.parameters]
        parameters = dict(zip(names, arguments, strict=True))
        executed = np.zeros(len(self._steps), np.int64)
        launch = Launch(self.module.name, grid, len(self._steps))
        report.launches.append(launch)
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    self._machine.start((x, y, z), grid, parameters, memory, report)
                    memory.start(self._machine.block)
                    executed += self._run()
        launch.reached = int((executed > 0).sum())
        for instruction, times in zip(self.module.instructions, executed.tolist(), strict=True):
            if times:
                launch.opcodes[instruction.opcode] += times
                launch.lines[instruction.where] += times

    def _run(self) -> list[int]:
        """Run the block that was started; how often warps executed each instruction."""
        machine, steps, executed = self._machine, self._steps, [0] * len(self._steps)
        at: int | None = 0
        left = MOST_STEPS
        # A GPU raises nothing on overflow or an invalid operation.
        with np.errstate(all="ignore"):
            while True:
                if machine.parked or at is None:
                    at = machine.switch(at)
                    if at is None:
                        break
                if at >= len(steps) or not left:
                    raise PtxError(f"{self.module.name}: a block {'ran past its end' if left else 'does not end'}")
                left -= 1
                executed[at] += machine.running_warps()
                follows = steps[at]()
                at = at + 1 if follows is None else None if follows == control.GONE else follows
        self._report_in_flight()
        return executed

    def _report_in_flight(self) -> None:
        machine = self._machine
        for queue, hazard in ((machine.copies, Hazard.COPY_AT_EXIT), (machine.products, Hazard.WGMMA_AT_EXIT)):
            for group in (*queue.groups, queue.open):
                for issued in group:
                    machine.report.add(hazard, issued.instruction)


@functools.lru_cache(maxsize=128)
def program(ptx: str, threads: int, shared_bytes: int) -> Program:
    """The decoded kernel of a text, kept."""
    return Program(ptx, threads, shared_bytes)
