"""What an execution found and counted."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TypeVar

from vit_kernels.testing.ptx.counts import SectorCounts, WavefrontCounts
from vit_kernels.testing.ptx.findings import Finding, Hazard, HazardFound
from vit_kernels.testing.ptx.parsing import Instruction

C = TypeVar("C", SectorCounts, WavefrontCounts)
Place = tuple[str, str]
"""A line of the kernel's source, with the lines that it was inlined from, and an opcode."""


@dataclass
class Launch:
    """A kernel that was launched, and what its warps did.

    Attributes:
        name: of the kernel.
        grid: its blocks.
        instructions: how many it has.
        reached: how many of them a thread got to.
        opcodes: instructions executed, each counted once a warp.
        lines: the same by line of the source.
        sectors: what global accesses touch.
        wavefronts: what shared accesses take.
        duplicates: stores of one value to one byte by two threads without a barrier between.
    """

    name: str
    grid: tuple[int, int, int]
    instructions: int
    reached: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)
    lines: Counter[str] = field(default_factory=Counter)
    sectors: dict[Place, SectorCounts] = field(default_factory=lambda: defaultdict(SectorCounts))
    wavefronts: dict[Place, WavefrontCounts] = field(default_factory=lambda: defaultdict(WavefrontCounts))
    duplicates: Counter[Place] = field(default_factory=Counter)


@dataclass
class Report:
    """Filled by the launches inside `executed_ptx`; counts are those of all of them.

    Attributes:
        strict: the first finding raises.
        findings: and how often each was found.
        launches: in order; each has its own counts.
    """

    strict: bool = True
    findings: Counter[Finding] = field(default_factory=Counter)
    launches: list[Launch] = field(default_factory=list)

    @property
    def opcodes(self) -> Counter[str]:
        """Instructions executed, each counted once a warp."""
        return sum((launch.opcodes for launch in self.launches), Counter())

    @property
    def lines(self) -> Counter[str]:
        """The same by line of the source."""
        return sum((launch.lines for launch in self.launches), Counter())

    @property
    def duplicates(self) -> Counter[Place]:
        """Stores of one value to one byte by two threads without a barrier between."""
        return sum((launch.duplicates for launch in self.launches), Counter())

    @property
    def sectors(self) -> dict[Place, SectorCounts]:
        """What global accesses touch."""
        return _merged(SectorCounts, [launch.sectors for launch in self.launches])

    @property
    def wavefronts(self) -> dict[Place, WavefrontCounts]:
        """What shared accesses take."""
        return _merged(WavefrontCounts, [launch.wavefronts for launch in self.launches])

    def add(self, hazard: Hazard, instruction: Instruction, detail: str = "", *, fatal: bool = False) -> None:
        """Note a finding.

        Raises:
            HazardFound: the execution is strict, or cannot go on after a fatal one.
        """
        finding = Finding(hazard, instruction.where, instruction.text)
        self.findings[finding] += 1
        if self.strict or fatal:
            raise HazardFound(finding, detail)


def _merged(kind: type[C], tables: list[dict[Place, C]]) -> dict[Place, C]:
    places = dict.fromkeys(place for table in tables for place in table)
    return {place: kind.total(table[place] for table in tables if place in table) for place in places}
