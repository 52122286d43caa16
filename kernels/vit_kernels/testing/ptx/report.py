"""What an execution found and counted."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from vit_kernels.testing.ptx.counts import SectorCounts, WavefrontCounts
from vit_kernels.testing.ptx.findings import Finding, Hazard, HazardFound
from vit_kernels.testing.ptx.parsing import Instruction


@dataclass(frozen=True)
class Launch:
    """A kernel that was launched.

    Attributes:
        name: of the kernel.
        grid: its blocks.
        reached: how many of its instructions a thread got to.
        instructions: how many it has.
    """

    name: str
    grid: tuple[int, int, int]
    reached: int
    instructions: int


@dataclass
class Report:
    """Filled by the launches inside `executed_ptx`. Lines are those of the kernel's source, with their callers.

    Attributes:
        strict: the first finding raises.
        findings: and how often each was found.
        duplicates: (line, opcode) -> stores of one value to one byte by two threads without a barrier between.
        opcodes: instructions executed, each counted once a warp.
        lines: the same by line.
        sectors: (line, opcode) -> what its global accesses touch.
        wavefronts: (line, opcode) -> what its shared accesses take.
        launches: in order.
    """

    strict: bool = True
    findings: Counter[Finding] = field(default_factory=Counter)
    duplicates: Counter[tuple[str, str]] = field(default_factory=Counter)
    opcodes: Counter[str] = field(default_factory=Counter)
    lines: Counter[str] = field(default_factory=Counter)
    sectors: dict[tuple[str, str], SectorCounts] = field(default_factory=lambda: defaultdict(SectorCounts))
    wavefronts: dict[tuple[str, str], WavefrontCounts] = field(default_factory=lambda: defaultdict(WavefrontCounts))
    launches: list[Launch] = field(default_factory=list)

    def add(self, hazard: Hazard, instruction: Instruction, detail: str = "", *, fatal: bool = False) -> None:
        """Note a finding.

        Raises:
            HazardFound: the execution is strict, or cannot go on after a fatal one.
        """
        finding = Finding(hazard, instruction.where, instruction.text)
        self.findings[finding] += 1
        if self.strict or fatal:
            raise HazardFound(finding, detail)
