"""What an op does above its kernel: gradients, forward-mode AD, torch.func, autocast and in-place bookkeeping."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)


def refuse_gradients(op: str, **arguments: Any) -> None:
    """Raise for an op that writes to its arguments.

    Raises:
        ValueError: gradients are on and an argument requires them.
    """
    for name, argument in arguments.items():
        if isinstance(argument, Tensor) and argument.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: got a tensor that requires grad, expected none under torch.is_grad_enabled(): "
                f"{op} writes to its arguments and has no gradient"
            )


def refuse_derivatives(op: str, **arguments: Any) -> None:
    """Raise for an op that rounds to 8 bits, whose gradients and tangents would get lost without a word.

    Raises:
        ValueError: gradients are on and an argument requires them.
        NotImplementedError: an argument has a tangent.
    """
    for name, argument in arguments.items():
        if isinstance(argument, Tensor) and argument.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: got a tensor that requires grad, expected none under torch.is_grad_enabled(): "
                f"{op} rounds to 8 bits and has no gradient"
            )
    _refuse_tangents(op, tuple(arguments), tuple(arguments.values()))


def no_backward(op: str) -> Callable[..., Any]:
    """The backward of an op that has none, for direct calls of it."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{op} rounds to 8 bits and has no gradient")

    return backward


def autograd(
    op: torch._ops.OpOverload, setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> Callable[..., Any]:
    """The kernel of `op` for autograd, as torch.library.register_autograd makes one.

    That one loses tangents without a word, and does not work inside torch.func.grad.
    """
    name = op._schema.name.removeprefix("vit_kernels::")
    names = [argument.name for argument in op._schema.arguments]

    class Function(_SingleLevelFunction):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            *args, keyset = inputs
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if setup_context is not None:
                setup_context(ctx, inputs[:-1], output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
                return *backward(ctx, *grads), None

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        _refuse_tangents(name, names, args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            # torch.func has unwrapped the arguments for one of its transforms, which wants only its own derivative.
            with enable_single_level_autograd_function():
                return Function.apply(*args, keyset)  # type: ignore[attr-defined]
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return kernel


def _refuse_tangents(op: str, names: Sequence[str], args: tuple[Any, ...]) -> None:
    # Any dual number is inside of a level, those of torch.func.jvp too.
    if forward_ad._current_level < 0:
        return
    for name, x in zip(names, args, strict=True):
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{name}: got a tensor with a tangent, but {op} does not support forward-mode AD (torch.func.jvp)"
            )


def in_place(op: torch._ops.OpOverload) -> Callable[..., None]:
    """What an op that writes to arguments does on its way to a kernel: what torch's own in-place operators do there.

    A saved tensor that was changed since is found by its version.
    """
    name = op._schema.name.removeprefix("vit_kernels::")
    names = [argument.name for argument in op._schema.arguments]
    written = [i for i, argument in enumerate(op._schema.arguments) if argument.alias_info is not None]

    def track(keyset: torch._C.DispatchKeySet, *args: Any) -> None:
        _refuse_tangents(name, names, args)
        refuse_gradients(name, **dict(zip(names, args, strict=True)))
        torch.autograd.graph.increment_version([args[i] for i in written if args[i] is not None])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    return track


def negative(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The kernel of `op` for tensors whose negation is pending: negates what is only read, and refuses the rest.

    Compilers too: Inductor of torch 2.13 ignores the pending negation of an input, and the result would be wrong.
    """
    arguments = op._schema.arguments

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        for argument, x in zip(arguments, args, strict=True):
            refused = argument.alias_info is not None or isinstance(x, FakeTensor)
            if refused and isinstance(x, Tensor) and x.is_neg():
                raise ValueError(f"{argument.name}: got a tensor whose negation is pending, expected its resolve_neg()")
        return op(*(x.resolve_neg() if isinstance(x, Tensor) else x for x in args))

    return kernel


def one_by_one(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The rule of `op` for torch.func.vmap: a call for each member of the batch."""
    arguments = op._schema.arguments

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        for argument, x, dim in zip(arguments, args, in_dims, strict=True):
            if argument.alias_info is not None and x is not None and dim is None:
                raise ValueError(f"{argument.name}: got a tensor without the dimension that vmap maps, expected one")
        calls = [
            op(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if not op._schema.returns:
            return None, None
        if len(op._schema.returns) == 1:
            return torch.stack(calls), 0
        return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(op._schema.returns)

    return rule


def autocast(op: torch._ops.OpOverload, device_type: str, names: tuple[str, ...]) -> Callable[..., Any]:
    """The kernel of `op` for autocast: casts the arguments of these names, and turns autocast off for the rest."""
    cast = {i for i, argument in enumerate(op._schema.arguments) if argument.name in names}

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return op(*(_cast(x, device_type) if i in cast else x for i, x in enumerate(args)))

    return kernel


def cast_for_autocast(*tensors: Any) -> tuple[Any, ...]:
    """What torch's own matrix products do with their arguments: under autocast, cast all but float64 to its dtype."""
    first = tensors[0]
    return tuple(_cast(x, first.device.type) for x in tensors) if is_autocast(first) else tensors


def is_autocast(x: Any) -> bool:
    """Whether autocast is on for the device of `x`; not for what is no tensor."""
    return isinstance(x, Tensor) and x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


def _cast(x: Any, device_type: str) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 and x.device.type == device_type:
        return x.to(torch.get_autocast_dtype(device_type))
    return x
