"""The one place that decides which implementation of an op runs, and that registers ops with torch.

Every op has an `impl` argument that the public function fills in at trace time, so a compiled graph says itself
which implementation it calls. With None, as in a direct call of `torch.ops.vit_kernels.*`, the device decides.
"""

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vit_kernels import _forced, _transforms, _validation

# Set by vit_kernels.testing.corrected_interpreter(): the stock interpreter is silently wrong in bf16.
interpreter_is_corrected = False

# Set by vit_kernels.testing.ptx.executed_ptx(): what is launched on CPU tensors is compiled for a GPU and executed.
compiled_code_is_executed = False

_library = torch.library.Library("vit_kernels", "DEF")


def choose(op: str, x: torch.Tensor, available: tuple[str, ...] = ("eager", "triton")) -> str:
    """The implementation of `op` for `x`: the forced one, else Triton on CUDA and ROCm and eager elsewhere.

    Raises:
        ValueError: the forced implementation is not one of this op's.
    """
    implementation = _forced.choice.implementation
    if implementation is None:
        # What is no tensor, the op's own checks refuse by name.
        return "triton" if isinstance(x, torch.Tensor) and x.is_cuda else "eager"
    if implementation not in available:
        raise ValueError(f"force_impl: {op} has no {implementation!r} implementation, expected {', '.join(available)}")
    return implementation


def define(
    schema: str,
    *,
    implementations: Mapping[str, Callable[..., Any]],
    fake: Callable[..., Any] = lambda *args: None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    autocast: tuple[str, ...] = (),
) -> None:
    """Register `vit_kernels::NAME` from a schema whose last argument is `str? impl` (no default: torch drops those).

    The fake and every implementation take the schema's other arguments. The first one is a tensor whose device decides
    where the op runs. `setup_context` and `backward` are those of `torch.library.register_autograd`. Autocast casts
    the arguments named in `autocast`, and nothing within the op.

    An op that writes to arguments, `Tensor(a!)`, returns `()`, so its fake has nothing to do. Such an op refuses
    gradients, and its calls count as in-place changes to autograd and to compilers. What it reads from the memory it
    writes to is copied first: a compiler may have decided that they share it.
    """
    name = schema.partition("(")[0]

    def kernel(x: torch.Tensor, *args: Any) -> Any:
        *rest, impl = args
        impl = choose(name, x, tuple(implementations)) if impl is None else impl
        if impl not in implementations:
            raise ValueError(f"impl: {name} has no {impl!r} implementation, expected {', '.join(implementations)}")
        if written:
            x, *rest = _validation.separate(written, x, *rest)
        if impl == "eager":
            return implementations[impl](x, *rest)
        # A kernel reads memory without asking: what a direct call may give it is looked at here, cheaply.
        for argument, tensor in zip(names, (x, *rest), strict=True):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.numel():
                _validation.check_last_dim_contiguous(argument, tensor)
        with launch_context(impl, x):
            return _untraced(implementations[impl], x)(x, *rest)

    def fake_kernel(x: torch.Tensor, *args: Any) -> Any:
        return fake(x, *args[:-1])

    _library.define(schema)
    op = getattr(torch.ops.vit_kernels, name).default
    names = [argument.name for argument in op._schema.arguments][:-1]
    written = {i: a.name for i, a in enumerate(op._schema.arguments) if a.alias_info is not None}
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
        _library.impl(name, _transforms.autocast(op, key.lower(), autocast), f"Autocast{key}", with_keyset=True)
    _library.impl(name, _transforms.negative(op), "Negative", with_keyset=True)
    torch.library.register_fake(f"vit_kernels::{name}", fake_kernel, lib=_library)
    torch.library.register_vmap(f"vit_kernels::{name}", _transforms.one_by_one(op), lib=_library)
    if written:
        _library.impl(name, _transforms.in_place(op), "ADInplaceOrView", with_keyset=True)
    if backward is not None:
        _library.impl(name, _transforms.autograd(op, setup_context, backward), "Autograd", with_keyset=True)


def launch_context(impl: str, x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """The device guard of a launch on `x`.

    Raises:
        RuntimeError: `x` is on the CPU and the interpreter is off, or not corrected and `x` is bf16; or Triton is
            not installed.
    """
    if x.is_cuda:
        return torch.cuda.device(x.device)
    if impl != "triton":
        raise RuntimeError(f"implementation {impl!r}: got a tensor on {x.device}, expected a CUDA device")
    if not _triton_is_installed():
        raise RuntimeError("implementation 'triton': the package triton is not installed")
    if compiled_code_is_executed:
        return contextlib.nullcontext()
    import triton

    if not triton.knobs.runtime.interpret:
        raise RuntimeError(
            "implementation 'triton': a CPU tensor needs Triton's interpreter; set TRITON_INTERPRET=1 before "
            "vit_kernels launches its first kernel"
        )
    if x.dtype == torch.bfloat16 and not interpreter_is_corrected:
        raise RuntimeError(
            "implementation 'triton': Triton's interpreter is wrong in bfloat16; call it inside "
            "vit_kernels.testing.corrected_interpreter()"
        )
    return contextlib.nullcontext()


def _untraced(launch: Callable[..., Any], x: torch.Tensor) -> Callable[..., Any]:
    """The launch; on a CPU it is not traced: after a break in a caller's graph Dynamo would trace the interpreter."""
    return launch if x.is_cuda or "torch._dynamo" not in sys.modules else _disabled(launch)


@functools.cache
def _disabled(launch: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(launch)


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
