"""The rows of the kernel report: a kernel for one dtype, head_dim and target in one configuration, and its figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """The compiler's figures of a kernel.

    Attributes:
        matrix: opcodes of the matrix instructions of the main loop, or of a kernel without one.
        products: matrix products that each product of the source is made of.
        loads, async_copies, bulk_copies: of the same part; bytes a lane -> how many, or only how many.
        stores: of the whole kernel.
        loop_instructions_per_64: of the main loop, for 64 keys or queries.
        matrix_flops_over_dots: more than 1 where warps repeat each other's work.
    """

    num_warps: int
    num_stages: int
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    ctas_per_sm: int
    matrix: list[str]
    products: int
    loads: dict[str, int]
    async_copies: dict[str, int]
    bulk_copies: int
    stores: dict[str, int]
    instructions: int
    loop_instructions: int | None
    loop_instructions_per_64: float | None
    matrix_flops_over_dots: float | None


@dataclass(frozen=True, kw_only=True)
class Figures(Compiled):
    """The compiler's figures, and the work of the kernel: None and empty where the interpreter cannot run it.

    Attributes:
        roofline_us: lower and upper microseconds of the whole problem, by GPU.
    """

    flops_issued_over_useful: float | None = None
    bytes_requested_over_compulsory: float | None = None
    roofline_us: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row; `figures` is None where the kernel does not compile, and `error` then says why.

    Attributes:
        package: the kernel's distribution and its version.
        configuration: empty where the launcher chooses.
        default: whether it is launched so where nothing is tuned.
    """

    kernel: str
    package: str
    dtype: str
    head_dim: int
    target: str
    configuration: dict[str, Any]
    default: bool
    error: str | None = None
    figures: Figures | None = None

    @property
    def key(self) -> str:
        """The name of the row."""
        return key_of(self.kernel, self.dtype, self.head_dim, self.target, self.configuration)

    def described(self) -> dict[str, Any]:
        """Return the row as the report has it, its figures beside what names it."""
        named = {name: value for name, value in vars(self).items() if name != "figures"}
        return named | (vars(self.figures) if self.figures else {})


def row_of(described: Mapping[str, Any]) -> Row:
    """Return the row that a report describes.

    Raises:
        KeyError: something is missing.
    """
    figures = None if described["error"] else Figures(**{each.name: described[each.name] for each in fields(Figures)})
    named = {each.name: described[each.name] for each in fields(Row) if each.name != "figures"}
    return Row(**named, figures=figures)


def key_of(kernel: str, dtype: str, head_dim: int, target: str, configuration: Mapping[str, Any]) -> str:
    """Return the name of a row of the report."""
    values = " ".join(f"{name}={value}" for name, value in sorted(configuration.items()))
    return f"{kernel}, {dtype}, head_dim {head_dim}, {target}, {values or 'its own'}"
