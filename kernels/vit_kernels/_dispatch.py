"""The one place that decides which body of an op runs, and that registers ops with torch.

Every op has an `impl` argument that the public function fills in at trace time, so a compiled graph says itself
which body it calls. With None, as in a direct call of `torch.ops.vit_kernels.*`, the device decides.
"""

import contextlib
import functools
import importlib.util
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

IMPLEMENTATIONS = ("eager", "triton", "flash_attn")

# Set by vit_kernels.testing.corrected_interpreter(): the stock interpreter is silently wrong in bf16.
interpreter_is_corrected = False

_library = torch.library.Library("vit_kernels", "DEF")


class _Forced(threading.local):
    """Dynamo guards on an instance attribute of a threading.local; it cannot trace ContextVar.get."""

    def __init__(self) -> None:
        self.implementation: str | None = None


_forced = _Forced()


@contextlib.contextmanager
def force_impl(implementation: str) -> Iterator[None]:
    """Make every op of this thread run one implementation.

    Read when an op is called or traced, and guarded by compiled code: changing it recompiles.
    `"eager"` is the PyTorch body, `"triton"` the kernel (on CPU tensors through Triton's interpreter, which
    TRITON_INTERPRET=1 must have turned on), `"flash_attn"` the flash-attn package (varlen_attention only).

    Raises:
        ValueError: an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: got {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    previous, _forced.implementation = _forced.implementation, implementation
    try:
        yield
    finally:
        _forced.implementation = previous


def choose(op: str, x: torch.Tensor, available: tuple[str, ...] = ("eager", "triton")) -> str:
    """The implementation of `op` for `x`: the forced one, else Triton on CUDA and ROCm and eager elsewhere.

    Raises:
        ValueError: the forced implementation is not one of this op's.
    """
    implementation = _forced.implementation
    if implementation is None:
        # What is no tensor, the op's own checks refuse by name.
        return "triton" if isinstance(x, torch.Tensor) and x.is_cuda else "eager"
    if implementation not in available:
        raise ValueError(f"force_impl: {op} has no {implementation!r} implementation, expected {', '.join(available)}")
    return implementation


def define(
    schema: str,
    *,
    bodies: Mapping[str, Callable[..., Any]],
    fake: Callable[..., Any] = lambda *args: None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Register `vit_kernels::NAME` from a schema whose last argument is `str? impl` (no default: torch drops those).

    The fake impl and every body take the schema's other arguments. The first one is a tensor whose device decides
    where the op runs. `setup_context` and `backward` are those of `torch.library.register_autograd`.

    An op that writes to arguments, `Tensor(a!)`, returns `()`, so its fake impl has nothing to do. Such an op refuses
    gradients, and its calls count as in-place changes to autograd and to compilers.
    """
    name = schema.partition("(")[0]

    def kernel(x: torch.Tensor, *args: Any) -> Any:
        *rest, impl = args
        impl = choose(name, x, tuple(bodies)) if impl is None else impl
        if impl not in bodies:
            raise ValueError(f"impl: {name} has no {impl!r} implementation, expected {', '.join(bodies)}")
        if impl == "eager":
            return bodies[impl](x, *rest)
        with launch_context(impl, x):
            return bodies[impl](x, *rest)

    def fake_kernel(x: torch.Tensor, *args: Any) -> Any:
        return fake(x, *args[:-1])

    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"vit_kernels::{name}", fake_kernel, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"vit_kernels::{name}", backward, setup_context=setup_context, lib=_library)
    if "!" in schema:
        _library.impl(name, _in_place(name), "ADInplaceOrView", with_keyset=True)


def _in_place(name: str) -> Callable[..., Any]:
    """What an op that writes to arguments does on its way to a kernel: what torch's own in-place operators do there.

    A saved tensor that was changed since is found by its version.
    """
    op = getattr(torch.ops.vit_kernels, name).default
    names = [argument.name for argument in op._schema.arguments]
    written = [i for i, argument in enumerate(op._schema.arguments) if argument.alias_info is not None]

    def track(keyset: torch._C.DispatchKeySet, *args: Any) -> None:
        refuse_gradients(name, **dict(zip(names, args, strict=True)))
        torch.autograd.graph.increment_version([args[i] for i in written if args[i] is not None])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    return track


def refuse_gradients(op: str, **arguments: Any) -> None:
    """Raise for an op that writes to its arguments.

    Raises:
        ValueError: gradients are on and an argument requires them.
    """
    for name, argument in arguments.items():
        if isinstance(argument, torch.Tensor) and argument.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: got a tensor that requires grad, expected none under torch.is_grad_enabled(): "
                f"{op} writes to its arguments and has no gradient"
            )


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


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
