"""Compile what a launcher launches, for a target that need not be there."""

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from vit_kernels.inspection import amd, nvidia
from vit_kernels.inspection.dots import dot_loops
from vit_kernels.inspection.instructions import InstructionCounts, count, longest_loop, matrix_loops
from vit_kernels.inspection.targets import TARGETS, Target


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """What a compiler made of a kernel. Nothing here was run or timed.

    Attributes:
        name: of the kernel function.
        target: a key of `TARGETS`.
        constants: argument -> value, of the arguments that were compiled in: constexpr, and those the JIT specialises
            on (None, 1).
        num_warps: warps (wavefronts) of a block.
        num_stages: software pipeline stages asked for.
        registers: of a thread (NVIDIA), or VGPRs and AGPRs of a lane (AMD).
        spill_store_bytes: NVIDIA: what ptxas says, bytes a thread; AMD: bytes a lane of all stores to scratch.
        spill_load_bytes: likewise of loads.
        stack_bytes: stack frame (NVIDIA) or private segment (AMD) of a thread.
        shared_bytes: shared memory of a block.
        tensor_memory_columns: of sm_100's 512; 0 elsewhere.
        ctas_per_sm: blocks resident at once on a multiprocessor; 0 when one needs more than there is.
        instructions: counts over the whole kernel.
        main_loop: counts over the innermost loop with most matrix instructions (without any: the longest innermost
            loop); None when the kernel has no loop.
        matrix_loops: counts over each innermost loop with matrix instructions, those with most matrix work first.
        dot_loops: FLOPs of one trip through each innermost loop with `tl.dot` in the source, most first.
        asm: "ttir", "ttgir", "llir", and "ptx" and "sass", or "amdgcn".
    """

    name: str
    target: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    ctas_per_sm: int
    instructions: InstructionCounts
    main_loop: InstructionCounts | None
    matrix_loops: tuple[InstructionCounts, ...]
    dot_loops: tuple[int, ...]
    asm: dict[str, str] = dataclasses.field(repr=False)


class _StubDriver:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, target: Target) -> None:
        self.target = GPUTarget(target.backend, target.arch, target.warp_size)
        # JIT functions keep what they compiled by device, so each target is one.
        self.device = 1000 + list(TARGETS).index(target.name)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launch(target: str, launch: Callable[..., Any], *args: Any, **kwargs: Any) -> list[KernelReport]:
    """Call a launcher and compile, not launch, the kernels that it launches as `kernel[grid](...)`.

    Exactly what the JIT would specialise on a GPU is compiled: constexprs, dtypes, arguments divisible by 16, aligned
    pointers; every configuration of an autotuned kernel. No GPU, driver or CUDA build of PyTorch is needed: give
    tensors on the meta device (`torch.empty(..., device="meta")`). They have shapes, strides, dtypes and an address
    of 0 plus their offset, so they count as 16-byte aligned, and what the launcher allocates from them is meta too.

    Triton's state is replaced for the process while this runs: call it from one thread. Compiled kernels are kept in
    Triton's cache (TRITON_CACHE_DIR).

    Args:
        target: a key of `TARGETS`.
        launch: takes args and kwargs, launches at least one kernel.

    Returns:
        A report for each different compiled kernel, in the order of the launches.

    Raises:
        ValueError: `target` is unknown, or `launch` launched nothing.
        RuntimeError: kernels of this process are interpreted (TRITON_INTERPRET=1).
        triton.CompilationError: a kernel does not compile.
    """
    if target not in TARGETS:
        raise ValueError(f"target: got {target!r}, expected one of {', '.join(TARGETS)}")
    _require_compiler()
    compiled: dict[int, Any] = {}
    jit_run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = jit_run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[id(kernel)] = kernel
        return kernel

    def compile_every_configuration(self: Autotuner, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        return self.warmup(*args, **kwargs)

    with (
        mock.patch.object(driver, "_active", _StubDriver(TARGETS[target])),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(Autotuner, "run", compile_every_configuration),
    ):
        launch(*args, **kwargs)
    if not compiled:
        raise ValueError("launch: it launched no kernel with these arguments, expected at least one")
    return [_report(TARGETS[target], kernel) for kernel in compiled.values()]


def _require_compiler() -> None:
    """Raise RuntimeError where kernels are interpreted."""
    import triton
    import triton.language as tl

    if triton.knobs.runtime.interpret or not isinstance(tl.sum, JITFunction):
        raise RuntimeError(
            "compile_launch: kernels of this process are interpreted; run it in a process where TRITON_INTERPRET is "
            "not set (it is read when triton is imported)"
        )


def _report(target: Target, kernel: Any) -> KernelReport:
    reader = amd if target.backend == "hip" else nvidia
    asm = reader.texts(kernel)
    instructions = reader.parse(asm)
    loops = matrix_loops(instructions, reader.kind_of)
    loop = loops[0] if loops else longest_loop(instructions)
    resources = reader.resources(kernel, asm)
    tensor_memory_columns = getattr(kernel.metadata, "tmem_size", None) or 0
    return KernelReport(
        name=kernel.metadata.name,
        target=target.name,
        constants=_constants(kernel.src),
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        **dataclasses.asdict(resources),
        shared_bytes=kernel.metadata.shared,
        tensor_memory_columns=tensor_memory_columns,
        ctas_per_sm=target.blocks_per_multiprocessor(
            registers=resources.registers,
            shared_bytes=kernel.metadata.shared,
            num_warps=kernel.metadata.num_warps,
            tensor_memory_columns=tensor_memory_columns,
        ),
        instructions=count(instructions, reader.kind_of),
        main_loop=count(loop, reader.kind_of) if loop else None,
        matrix_loops=tuple(count(body, reader.kind_of) for body in loops),
        dot_loops=dot_loops(asm["ttir"]),
        asm=asm,
    )


def _constants(source: Any) -> dict[str, Any]:
    """Names of arguments, or of their parts as in "shape.1", with the values that were compiled in."""
    names = source.fn.arg_names
    return {".".join([names[first], *map(str, rest)]): value for (first, *rest), value in source.constants.items()}
