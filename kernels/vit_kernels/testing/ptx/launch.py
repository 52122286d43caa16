"""Launches of Triton kernels, compiled for a target and executed here."""

import contextlib
import struct
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from vit_kernels import _dispatch
from vit_kernels.testing.ptx.global_memory import UNWRITTEN, GlobalMemory
from vit_kernels.testing.ptx.program import program
from vit_kernels.testing.ptx.report import Report

TARGETS = ("sm_80", "sm_90")

_FLOATS = {"f32": "<f", "f64": "<d"}
_ALLOCATORS = (
    (torch, ("empty", "empty_like", "empty_strided")),
    (torch.Tensor, ("new_empty", "new_empty_strided")),
)


@contextlib.contextmanager
def executed_ptx(target: str, *, strict: bool = True, edit: Callable[[str], str] | None = None) -> Iterator[Report]:
    """Compile what Triton launches on CPU tensors for a GPU, and execute the PTX here.

    Exactly what the JIT would specialise on that GPU is compiled. `force_impl("triton")` accepts CPU tensors
    meanwhile. Of an autotuned kernel the first configuration is launched. What `torch.empty` and its kind return holds
    a pattern by which a read of what nothing wrote is seen.

    Triton's state is replaced for the process: launch from one thread, and enter once.

    Args:
        target: "sm_80" or "sm_90".
        strict: the first finding raises; otherwise findings are counted in the report, but for those after which
            no execution can go on.
        edit: changes the PTX of every kernel before it runs.

    Yields:
        The report, which every launch adds to.

    Raises:
        ValueError: another target (sm_100 has matrix instructions and barriers that are not modelled).
        RuntimeError: kernels of this process are interpreted (TRITON_INTERPRET=1).
        UnknownInstruction: raised by a launch, before it runs: an instruction has no definition here.
        HazardFound: raised by a launch: the finding, with the line of the kernel's source.
    """
    if target not in TARGETS:
        raise ValueError(f"target: got {target!r}, expected one of {', '.join(TARGETS)}")
    _require_compiler()
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from vit_kernels.inspection.compiling import _StubDriver
    from vit_kernels.inspection.targets import TARGETS as DESCRIBED

    report = Report(strict=strict)
    compile_only = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            ptx = kernel.asm["ptx"]
            _execute(self, kernel, edit(ptx) if edit else ptx, args, kwargs, grid, report)
        return kernel

    def run_first_configuration(self: Autotuner, *args: Any, **kwargs: Any) -> Any:
        return self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())

    with (
        mock.patch.object(driver, "_active", _StubDriver(DESCRIBED[target])),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(Autotuner, "run", run_first_configuration),
        mock.patch.object(_dispatch, "compiled_code_is_executed", True),
        _marked_empty(),
    ):
        yield report


def _require_compiler() -> None:
    import triton
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    # triton.language's own kernels tell what TRITON_INTERPRET was when triton was imported.
    if triton.knobs.runtime.interpret or not isinstance(tl.sum, JITFunction):
        raise RuntimeError(
            "executed_ptx(): kernels of this process are interpreted; run it in a process where TRITON_INTERPRET is "
            "not set (it is read when triton is imported)"
        )


def _execute(
    function: Any, kernel: Any, ptx: str, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any, report: Report
) -> None:
    bound = {parameter.name: parameter.default for parameter in function.params if parameter.has_default}
    bound |= dict(zip(function.arg_names, args, strict=False))
    bound |= {name: value for name, value in kwargs.items() if name in function.arg_names}
    size = tuple(int(n) for n in (grid(bound) if callable(grid) else grid))
    x, y, z = (*size, 1, 1)[:3]
    decoded = program(ptx, kernel.metadata.num_warps * 32, kernel.metadata.shared)
    values = [bound[name] for name, kind in kernel.src.signature.items() if kind != "constexpr"]
    kinds = [kind for _, kind in decoded.module.parameters]
    bits = [_bits(value, kind) for value, kind in zip(values, kinds, strict=False)]
    # The parameters at the end are scratch memory, which none of these kernels asks for.
    bits += [0] * (len(kinds) - len(bits))
    tensors = [getattr(value, "base", value) for value in values if hasattr(value, "data_ptr")]
    decoded.launch((x, y, z), bits, GlobalMemory(tensors, decoded.narrowest_global), report)


def _bits(value: Any, kind: str) -> int:
    """An argument as the parameter of this PTX type."""
    if hasattr(value, "data_ptr"):
        return int(value.data_ptr())
    if not isinstance(value, int | float):
        raise TypeError(f"an argument: got {type(value).__name__}, expected a tensor or a number")
    if kind in _FLOATS:
        return int.from_bytes(struct.pack(_FLOATS[kind], value), "little")
    return int(value)


@contextlib.contextmanager
def _marked_empty() -> Iterator[None]:
    """Fill new memory with `UNWRITTEN`."""

    def marked(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            result = allocate(*args, **kwargs)
            if type(result) is torch.Tensor and result.device.type == "cpu" and result.element_size() > 1:
                words = torch.tensor([], dtype=torch.int16).set_(result.untyped_storage())
                words.fill_(UNWRITTEN)
            return result

        return empty

    with contextlib.ExitStack() as stack:
        for owner, names in _ALLOCATORS:
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, marked(getattr(owner, name))))
        yield
