"""What a block issued and has not waited for yet: groups of cp.async, groups of wgmma."""

import re
from typing import NamedTuple

from vit_kernels.testing.ptx.formats import Lanes
from vit_kernels.testing.ptx.parsing import Instruction

_REGISTER = re.compile(r"%\w+")


class Copy(NamedTuple):
    """A cp.async: values uint8 [copies, size] for rows of shared memory, by threads."""

    instruction: Instruction
    rows: Lanes
    size: int
    threads: Lanes
    values: Lanes


class Product(NamedTuple):
    """A wgmma: the registers that it reads and writes, and (first warp of four, chunks of shared memory they read)."""

    instruction: Instruction
    registers: frozenset[str]
    chunks: list[tuple[int, Lanes]]


class CopyQueue:
    """The copies of a block.

    Groups are kept for the block as a whole, whose threads must come to a commit or a wait together.
    """

    def __init__(self) -> None:
        """Nothing is in flight."""
        self.groups: list[list[Copy]] = []
        self.open: list[Copy] = []

    def commit(self) -> None:
        """The open copies are a group."""
        self.groups.append(self.open)
        self.open = []

    def arrived(self, pending: int) -> list[Copy]:
        """Take out the copies of all groups but the last `pending` ones."""
        done, self.groups = self.groups[: max(0, len(self.groups) - pending)], self.groups[-pending:] if pending else []
        return [copy for group in done for copy in group]


class ProductQueue:
    """The wgmma of a block, and which of their registers were accessed since the last fence.

    Attributes:
        watched: every register that a wgmma of the kernel names.
        accessed: those accessed since the last wgmma.fence; all of them before the first one.
        busy: those of the wgmma in flight.
    """

    def __init__(self, watched: frozenset[str]) -> None:
        """Nothing is in flight."""
        self.watched = watched
        self.groups: list[list[Product]] = []
        self.open: list[Product] = []
        self.accessed, self.busy = set(watched), set[str]()

    def issue(self, product: Product) -> None:
        """Add one to the open ones."""
        self.open.append(product)
        self.busy |= product.registers

    def commit(self) -> None:
        """The open products are a group."""
        self.groups.append(self.open)
        self.open = []

    def finished(self, pending: int) -> list[Product]:
        """Take out the products of all groups but the last `pending` ones."""
        done, self.groups = self.groups[: max(0, len(self.groups) - pending)], self.groups[-pending:] if pending else []
        self.busy = {name for group in (*self.groups, self.open) for product in group for name in product.registers}
        return [product for group in done for product in group]


def watched_registers(instructions: tuple[Instruction, ...]) -> frozenset[str]:
    """The registers of sums, and of A, that the wgmma of a kernel name."""
    named = (operand for i in instructions if i.opcode.startswith("wgmma.mma_async") for operand in i.operands[:2])
    return frozenset(name for operand in named for name in _REGISTER.findall(operand))
