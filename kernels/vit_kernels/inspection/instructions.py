"""What both readers of machine code give: instructions, their counts, the loop that matters among them."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import networkx as nx


class Instruction(NamedTuple):
    """One instruction of SASS or of AMD assembly.

    Attributes:
        opcode: with its modifiers, such as "LDG.E.128" or "buffer_load_dwordx4".
        operands: the rest of the line.
        labels: those that stand before it.
        targets: labels to which control may go.
        falls_through: whether control may go on to the next instruction.
    """

    opcode: str
    operands: str
    labels: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    falls_through: bool = True


class Kind(NamedTuple):
    """What an instruction is: a name of a field of `InstructionCounts`, and the bytes a lane that it moves."""

    name: str
    lane_bytes: int = 0


@dataclass(frozen=True)
class Resources:
    """What one thread (lane) of a kernel takes; as in `KernelReport`."""

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


@dataclass(frozen=True)
class InstructionCounts:
    """Static counts: each instruction of the text once, however often it runs.

    Attributes:
        opcodes: of every instruction, with modifiers.
        matrix: opcodes of matrix instructions (HMMA, HGMMA, UTC*MMA, v_mfma and their like), with their shapes.
        global_loads: bytes a lane -> count of loads from global memory into registers.
        global_stores: bytes a lane -> count of stores from registers to global memory.
        async_copies: bytes a lane -> count of copies from global to shared memory (cp.async; loads to LDS).
        bulk_copies: TMA loads, stores and reductions.
        local_loads: bytes a lane -> count of loads from local (scratch) memory, such as reloads of spills.
        local_stores: bytes a lane -> count of stores to it.
    """

    opcodes: Counter[str] = field(default_factory=Counter)
    matrix: Counter[str] = field(default_factory=Counter)
    global_loads: Counter[int] = field(default_factory=Counter)
    global_stores: Counter[int] = field(default_factory=Counter)
    async_copies: Counter[int] = field(default_factory=Counter)
    bulk_copies: int = 0
    local_loads: Counter[int] = field(default_factory=Counter)
    local_stores: Counter[int] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Number of instructions."""
        return self.opcodes.total()

    def matrix_flops(self, num_warps: int) -> int:
        """FLOPs of all warps of a block in the matrix instructions, each of the text once; see `matrix_flops`."""
        return sum(matrix_flops(opcode, num_warps) * times for opcode, times in self.matrix.items())


def count(instructions: Iterable[Instruction], kind_of: Callable[[Instruction], Kind | None]) -> InstructionCounts:
    """Count instructions by the kinds of their instruction set."""
    instructions = list(instructions)
    kinds = [(instruction, kind_of(instruction)) for instruction in instructions]

    def widths(name: str) -> Counter[int]:
        return Counter(kind.lane_bytes for _, kind in kinds if kind and kind.name == name)

    return InstructionCounts(
        opcodes=Counter(instruction.opcode for instruction in instructions),
        matrix=Counter(instruction.opcode for instruction, kind in kinds if kind and kind.name == "matrix"),
        global_loads=widths("global_loads"),
        global_stores=widths("global_stores"),
        async_copies=widths("async_copies"),
        bulk_copies=sum(kind is not None and kind.name == "bulk_copies" for _, kind in kinds),
        local_loads=widths("local_loads"),
        local_stores=widths("local_stores"),
    )


def longest_loop(instructions: Sequence[Instruction]) -> list[Instruction] | None:
    """The innermost loop with most instructions; None when there is no loop."""
    longest: set[int] = max(_innermost(natural_loops(instructions)), key=len, default=set())
    return [instructions[i] for i in sorted(longest)] or None


def matrix_loops(
    instructions: Sequence[Instruction], kind_of: Callable[[Instruction], Kind | None]
) -> list[list[Instruction]]:
    """The loops with matrix instructions that hold no other such loop, those with most matrix work first."""
    matrix = {i for i, x in enumerate(instructions) if (kind := kind_of(x)) and kind.name == "matrix"}
    loops = _innermost([loop for loop in natural_loops(instructions) if loop & matrix])

    def work(loop: set[int]) -> tuple[int, int]:
        return sum(matrix_flops(instructions[i].opcode, num_warps=4) for i in loop & matrix), len(loop)

    return [[instructions[i] for i in sorted(loop)] for loop in sorted(loops, key=work, reverse=True)]


def _innermost(loops: Sequence[set[int]]) -> list[set[int]]:
    return [loop for loop in loops if not any(other < loop for other in loops)]


def matrix_flops(opcode: str, num_warps: int) -> int:
    """FLOPs that a block of `num_warps` warps makes when all of it passes one matrix instruction.

    The shape m x n x k is in the name: HMMA.16816 is 16 x 8 x 16, v_mfma_f32_16x16x4_4b_f32 four of 16 x 16 x 4. Each
    warp (wavefront) multiplies a tile of its own, but for Hopper's HGMMA, shared by four warps, and Blackwell's
    UTC*MMA, which one thread issues for the block (`nvidia.parse` adds the shape to its name).

    Raises:
        ValueError: the name says no shape.
    """
    if named := re.search(r"(\d+)x(\d+)x(\d+)(?:_(\d+)b)?", opcode):
        m, n, k, blocks = (int(size or 1) for size in named.groups())
    elif named := re.search(r"MMA\.(?:SP\.)?168(\d+)", opcode):
        m, n, k, blocks = 16, 8, int(named.group(1)), 1
    else:
        raise ValueError(f"opcode: got {opcode!r}, expected a matrix instruction with its shape in the name")
    issuers = 1 if opcode.startswith("UTC") else num_warps / 4 if "GMMA" in opcode else num_warps
    return int(2 * m * n * k * blocks * issuers)


def natural_loops(instructions: Sequence[Instruction]) -> list[set[int]]:
    """Indices of the instructions of each natural loop.

    A loop is an edge to an instruction that dominates its origin, with all that reaches the origin without passing
    that instruction (Aho, Lam, Sethi, Ullman, Compilers, 9.6). "Back to the nearest label above" would take
    out-of-line waits on barriers for loops, and miss that they belong to one.
    """
    graph = _control_flow(instructions)
    dominates = _dominance(graph)
    bodies: dict[int, set[int]] = {}
    for origin, header in graph.edges:
        if dominates(header, origin):
            without_header = graph.subgraph(graph.nodes - {header})
            inside = {origin} | nx.ancestors(without_header, origin) if origin != header else set()
            bodies.setdefault(header, {header}).update(inside)
    return list(bodies.values())


def _control_flow(instructions: Sequence[Instruction]) -> "nx.DiGraph[int]":
    index_of = {label: i for i, instruction in enumerate(instructions) for label in instruction.labels}
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(instructions)))
    graph.add_edges_from((i, j) for i, j in pairwise(range(len(instructions))) if instructions[i].falls_through)
    for i, instruction in enumerate(instructions):
        graph.add_edges_from((i, index_of[target]) for target in instruction.targets if target in index_of)
    reachable = nx.descendants(graph, 0) | {0}
    return graph.subgraph(reachable).copy()


def _dominance(graph: "nx.DiGraph[int]") -> Callable[[int, int], bool]:
    """Whether the first node dominates the second: whether it is an ancestor in the tree of dominators, or the same."""
    # The root is given as its own dominator, or as None, or not at all, as the version of networkx has it.
    parents = {node: above for node, above in nx.immediate_dominators(graph, 0).items() if above not in (node, None)}
    tree: nx.DiGraph[int] = nx.DiGraph((above, node) for node, above in parents.items())
    tree.add_node(0)
    entered, left = {}, {}
    for time, (_, node, event) in enumerate(nx.dfs_labeled_edges(tree, 0)):
        if event == "forward":
            entered[node] = time
        elif event == "reverse":
            left[node] = time
    return lambda above, node: entered[above] <= entered[node] and left[node] <= left[above]
