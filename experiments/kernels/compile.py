"""Compile and interpret the kernels of the report in processes of their own, several at once.

A process either compiles or interprets: Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from unittest import mock

from tqdm import tqdm

from experiments.kernels.registry import OURS, PEERS, Kernel, Problem
from experiments.kernels.row import Compiled, key_of

if TYPE_CHECKING:
    from vit_kernels.testing.counts import OperationCounts

Result = TypeVar("Result")
KERNELS = {kernel.name: kernel for kernel in (*OURS, *PEERS)}
# They change what the compiler makes of a kernel, and nothing of what the kernel does.
_OPTIONS = ("num_warps", "num_stages", "INPUT_PRECISION", "waves_per_eu", "matrix_instr_nonkdim", "kpack", "maxnreg")


@dataclass(frozen=True)
class Case:
    """One row of the report: a kernel for a dtype and head_dim, with one configuration, for one target.

    The configuration is empty where the launcher chooses.
    """

    kernel: str
    dtype: str
    head_dim: int
    target: str
    configuration: tuple[tuple[str, Any], ...]
    default: bool

    @property
    def key(self) -> str:
        """The name of its row."""
        return key_of(self.kernel, self.dtype, self.head_dim, self.target, dict(self.configuration))

    def blocks(self) -> tuple[Any, ...]:
        """What is equal for cases that do the same work when interpreted."""
        kept = tuple(item for item in self.configuration if item[0] not in _OPTIONS)
        return self.kernel, self.dtype, self.head_dim, kept


def cases_of(
    kernel: Kernel, dtypes: Sequence[str], head_dims: Sequence[int], targets: Sequence[str], *, defaults_only: bool
) -> list[Case]:
    """Return the case of every row of a kernel, or only of those with the default configurations."""
    return [
        Case(kernel.name, dtype, head_dim, target, tuple(sorted((configuration or {}).items())), default=i == 0)
        for dtype in dtypes
        for head_dim in head_dims
        for target in targets
        for i, configuration in enumerate(kernel.candidates(head_dim, dtype, target))
        if i == 0 or not defaults_only
    ]


def run_all(
    function: Callable[[Case], Result], cases: Sequence[Case], *, interpret: bool, jobs: int, title: str
) -> dict[Case, Result]:
    """Call a function with every case in `jobs` processes that interpret, or compile, Triton's kernels.

    Raises:
        RuntimeError: a process died, such as by an assertion in a compiler; the message names its case.
    """
    results: dict[Case, Result] = {}
    context = multiprocessing.get_context("spawn")
    with (
        # The processes start as the cases are submitted, and import the main module, perhaps Triton, before all else.
        mock.patch.dict(os.environ, TRITON_INTERPRET="1" if interpret else "0", OMP_NUM_THREADS="1"),
        ProcessPoolExecutor(min(jobs, len(cases)) or 1, context) as pool,
        tqdm(total=len(cases), desc=title, unit="case", mininterval=1) as progress,
    ):
        pending = {pool.submit(function, case): case for case in cases}
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                case = pending.pop(future)
                try:
                    results[case] = future.result()
                except BrokenProcessPool as error:
                    raise RuntimeError(
                        f"{title}: a process died, by an assertion in a compiler or for want of memory, with {case} or "
                        "a case beside it in work; --jobs 1 with --kernel, --head-dim and --target finds it"
                    ) from error
                progress.update()
    return results


@contextlib.contextmanager
def _launcher(kernel: Kernel) -> Iterator[Callable[..., Any]]:
    """Return the launcher, with all but one of the kernels that it launches silenced."""
    module, launch = kernel.load()
    with (
        mock.patch.multiple(module, **{name: mock.MagicMock() for name in kernel.silenced})
        if (kernel.silenced)
        else mock.MagicMock()
    ):
        yield launch


def compile_case(case: Case) -> Compiled | str:
    """Compile a case, and return the compiler's figures or why it does not compile."""
    from triton import CompilationError
    from vit_kernels.inspection import compile_launch

    kernel = KERNELS[case.kernel]
    args, kwargs = kernel.arguments(Problem(case.head_dim, case.dtype), dict(case.configuration) or None)
    with _launcher(kernel) as launch:
        try:
            (report,) = compile_launch(case.target, launch, *args, **kwargs)
        except (CompilationError, RuntimeError) as error:
            cause = _root_cause(error)
            return f"{type(cause).__name__}: {str(cause).strip()}"
    return compiled_of(report, kernel)


def _root_cause(error: BaseException) -> BaseException:
    """Return the error that others wrap: Triton wraps it once for every function that the kernel was in."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def compiled_of(report: Any, kernel: Kernel) -> Compiled:
    """Return the report's figures of a `KernelReport`."""
    loop = report.main_loop
    where = loop or report.instructions
    dots = report.dot_loops[0] if loop and loop.matrix and report.dot_loops else None
    return Compiled(
        num_warps=report.num_warps,
        num_stages=report.num_stages,
        registers=report.registers,
        spill_store_bytes=report.spill_store_bytes,
        spill_load_bytes=report.spill_load_bytes,
        stack_bytes=report.stack_bytes,
        shared_bytes=report.shared_bytes,
        tensor_memory_columns=report.tensor_memory_columns,
        ctas_per_sm=report.ctas_per_sm,
        matrix=sorted(where.matrix),
        products=3 if "tf32x3" in report.asm["ttir"] else 1,
        loads=_widths(where.global_loads),
        async_copies=_widths(where.async_copies),
        bulk_copies=where.bulk_copies,
        stores=_widths(report.instructions.global_stores),
        instructions=report.instructions.total,
        loop_instructions=loop.total if loop else None,
        loop_instructions_per_64=loop.total * 64 / report.constants[kernel.rows] if loop and kernel.rows else None,
        matrix_flops_over_dots=round(loop.matrix_flops(report.num_warps) / dots, 4) if dots else None,
    )


def _widths(counts: Any) -> dict[str, int]:
    return {str(width): times for width, times in sorted(counts.items())}


def interpret_case(case: Case) -> OperationCounts | None:
    """Count what a case does by the interpreter; None where the interpreter cannot run a peer's kernel."""
    from triton.runtime.errors import InterpreterError
    from vit_kernels.testing import corrected_interpreter

    kernel = KERNELS[case.kernel]
    problem = kernel.interpreted_problem(case.head_dim, case.dtype)
    args, kwargs = kernel.arguments(problem, dict(case.configuration) or None)
    with _launcher(kernel) as launch, corrected_interpreter() as counts:
        try:
            launch(*args, **kwargs)
        except InterpreterError:
            if kernel in PEERS:
                return None
            raise
    return counts
