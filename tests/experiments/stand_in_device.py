"""A device that stands in for a GPU: its tensors say "cuda:0", their data lies in the CPU's memory.

What PyTorch refuses on a GPU is refused here (operands on two devices), and what makes the CPU wait for one is counted
(a copy between the two, a value read), while the arithmetic is done and its results can be compared. For a process of
its own, after `install_device_guard`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
# What takes tensors of both devices; the indices of the last one are copied.
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OnDevice(Tensor):
    """A tensor of the stand-in device; `on_cpu` is what it holds."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, data: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=DEVICE,
        )
        made.on_cpu = data
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{function} was called outside of stand_in_device")


@contextlib.contextmanager
def stand_in_device() -> Iterator[list[str]]:
    """In the block tensors can be made on "cuda" and computed with, without gradients.

    Yields:
        The operators that made the CPU wait, in order, to which each further one is added.
    """
    waits: list[str] = []
    initialise = torch.cuda._lazy_init
    # A CPU build refuses to; nothing here needs it.
    torch.cuda._lazy_init = lambda: None
    try:
        with torch.no_grad(), _Operators(waits), _Functions(waits):
            yield waits
    finally:
        torch.cuda._lazy_init = initialise


def moved(module: nn.Module) -> nn.Module:
    """A module moved to the stand-in device; its parameters are made anew, since they change their class."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return module.to(DEVICE)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


class _Functions(TorchFunctionMode):
    """What copies below the operators that `_Operators` sees: lists to tensors, and back."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.tensor and kwargs.get("device") is not None:
            return function(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if function is Tensor.tolist and isinstance(args[0], OnDevice):
            self.waits.append("tolist")
            return args[0].on_cpu.tolist()
        return function(*args, **kwargs)


class _Operators(TorchDispatchMode):
    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        held = {isinstance(tensor, OnDevice) for tensor in tensors}
        target = kwargs.get("device")
        to_device = True in held if target is None else target.type == "cuda"
        if function in COPIES or (function is torch.ops.aten.index.Tensor and isinstance(args[0], OnDevice)):
            if {*held, to_device} == {True, False} and not kwargs.get("non_blocking"):
                self.waits.append(str(function))
        # A number in a tensor may lie anywhere.
        elif len({isinstance(tensor, OnDevice) for tensor in tensors if tensor.ndim}) > 1:
            raise RuntimeError(f"{function}: expected all tensors on the same device, found cuda:0 and cpu")
        if function is torch.ops.aten._local_scalar_dense.default and True in held:
            self.waits.append(str(function))
        known = {id(tensor.on_cpu): tensor for tensor in tensors if isinstance(tensor, OnDevice)}
        out = function(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
        return tree_map(_wrapper(known), out) if to_device else out


def _on_cpu(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.on_cpu
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


def _wrapper(known: dict[int, OnDevice]) -> Callable[[Any], Any]:
    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # What an in-place operator returns is its argument.
        return known[id(value)] if id(value) in known else OnDevice(value)

    return wrapped
