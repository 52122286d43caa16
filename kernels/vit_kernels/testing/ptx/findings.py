"""What an execution may find wrong, and how it says so."""

import enum
from typing import NamedTuple

from vit_kernels.testing.ptx.parsing import Instruction


class Hazard(enum.StrEnum):
    """What a GPU would leave undefined, or let happen in any order."""

    GLOBAL_BOUNDS = "global access outside every tensor of the launch"
    GLOBAL_ALIGNMENT = "misaligned global access"
    GLOBAL_UNINITIALISED = "global read of memory that nothing wrote"
    GLOBAL_TWO_BLOCKS_WRITE = "two blocks write one byte"
    GLOBAL_READ_OF_ANOTHER_BLOCK = "a block reads what another block writes"
    GLOBAL_READ_WITHOUT_BARRIER = "global read of another thread's write without a barrier"
    GLOBAL_TWO_THREADS_WRITE = "two threads write different values to one byte without a barrier"
    SHARED_BOUNDS = "access outside the shared memory of the block"
    SHARED_ALIGNMENT = "misaligned shared access"
    SHARED_UNINITIALISED = "shared read of memory that nothing wrote"
    SHARED_READ_WITHOUT_BARRIER = "shared read of another warp's write without a barrier"
    SHARED_READ_WITHOUT_WARP_BARRIER = "shared read of another lane's write without bar.warp.sync"
    SHARED_WRITE_AFTER_READ = "shared write of what another warp reads without a barrier between"
    SHARED_TWO_THREADS_WRITE = "two threads write different values to shared memory without a barrier"
    COPY_READ_IN_FLIGHT = "shared read of a cp.async that was not waited for"
    COPY_WRITE_IN_FLIGHT = "shared write where a cp.async is in flight"
    COPY_AT_EXIT = "exit with a cp.async in flight"
    WGMMA_UNFENCED_WRITE = "wgmma reads a generic write without fence.proxy.async"
    WGMMA_WRITE_IN_FLIGHT = "shared write of what a wgmma in flight reads"
    WGMMA_REGISTER_IN_FLIGHT = "register of a wgmma in flight used before wgmma.wait_group"
    WGMMA_WITHOUT_FENCE = "wgmma of registers that were accessed since the last wgmma.fence"
    WGMMA_AT_EXIT = "exit with a wgmma in flight"
    DIVERGENCE = "threads that must get here together do not"


class Finding(NamedTuple):
    """A hazard, where in the source it is (file:line, and the lines that it was inlined from), and the instruction."""

    hazard: Hazard
    where: str
    instruction: str

    def __str__(self) -> str:
        return f"{self.hazard}, at {self.where or 'an unknown line'}: {self.instruction}"


class PtxError(Exception):
    """PTX that cannot be executed."""


class UnknownInstruction(PtxError):  # noqa: N818 - as UnicodeError's subclasses, it reads as what was found
    """An instruction, or a form of one, that the executor has no definition of. Raised before anything runs."""

    def __init__(self, instruction: Instruction, why: str = "") -> None:
        """The instruction, and what about it is unknown."""
        reason = f" ({why})" if why else ""
        super().__init__(f"no definition of {instruction.text!r} at {instruction.where or 'an unknown line'}{reason}")


class HazardFound(PtxError):  # noqa: N818
    """Raised by the first finding of a strict execution, and by those after which no execution can go on.

    Attributes:
        finding: which hazard, where.
    """

    def __init__(self, finding: Finding, detail: str = "") -> None:
        """A finding, and what is known of the threads or addresses."""
        super().__init__(f"{finding}{': ' if detail else ''}{detail}")
        self.finding = finding
