"""Argument checks shared by the public functions. Each names the argument, what came and what was expected."""

import itertools
import numbers
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch

DEVICE_CHECKS = os.environ.get("VIT_KERNELS_DEBUG", "0") not in ("", "0")
"""VIT_KERNELS_DEBUG=1 also checks the contents of cu_seqlens on accelerators, at the price of a sync a call."""

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EAGER_DTYPES = (*KERNEL_DTYPES, torch.float64)


def check_tensor(name: str, x: torch.Tensor, rank: int, shape: str) -> None:
    """`x` is a tensor of `rank` dimensions; `shape` describes them in words."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor {shape}")
    if x.is_nested or x.layout is not torch.strided:
        raise TypeError(
            f"{name}: got {'a nested tensor' if x.is_nested else x.layout}, expected a dense tensor {shape}"
        )
    if x.dim() != rank:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {shape}")


def check_dtype(name: str, x: torch.Tensor, impl: str) -> None:
    """`x` has a dtype that the implementation takes: float64 is for the eager one only."""
    allowed = EAGER_DTYPES if impl == "eager" else KERNEL_DTYPES
    if x.dtype not in allowed:
        raise TypeError(f"{name}: got {x.dtype} for implementation {impl!r}, expected one of {allowed}")


def check_last_dim_contiguous(name: str, x: torch.Tensor) -> None:
    """The kernels read the last dimension as one run; a single element, or none, is one whatever the stride."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name}: got strides {x.stride()}, expected a contiguous last dimension")


def check_operand(name: str, x: torch.Tensor, rank: int, shape: str, impl: str) -> None:
    """`x` is a tensor that the implementation can read: of `rank`, of a dtype it takes, its last dimension one run."""
    check_tensor(name, x, rank, shape)
    check_dtype(name, x, impl)
    check_last_dim_contiguous(name, x)


def check_like(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """`x` shares dtype and device with `other`."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: got {x.dtype}, expected {other.dtype} as {other_name} has")
    check_same_device(name, x, other_name, other)


def check_same_device(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """`x` is on the device of `other`."""
    if x.device != other.device:
        raise ValueError(f"{name}: got device {x.device}, expected {other.device} as {other_name} has")


def check_separate_memory(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """What is written to `x` changes neither `other` nor another element of `x`.

    A compiler decides anew which tensors share memory, and torch.func's have none: `separate` looks when the op runs.
    """
    if torch.compiler.is_compiling() or any(map(torch._C._functorch.is_functorch_wrapped_tensor, (x, other))):
        return
    if x.untyped_storage()._cdata == other.untyped_storage()._cdata:
        first, last = _extent(x)
        other_first, other_last = _extent(other)
        if first <= other_last and other_first <= last:
            raise ValueError(f"{name}: shares memory with {other_name}, expected a tensor of its own")
    _check_no_overlap_within(name, x)


def _check_no_overlap_within(name: str, x: torch.Tensor) -> None:
    room = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride < room:
            raise ValueError(f"{name}: got strides {x.stride()}, expected elements that do not overlap")
        room = stride * size


def _extent(x: torch.Tensor) -> tuple[int | torch.SymInt, int | torch.SymInt]:
    """The first and last element of its storage that a tensor reaches."""
    first = x.storage_offset()
    steps = [(size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return first, first + sum(steps) if x.numel() else first - 1


def separate(written: Mapping[int, str], *args: Any) -> list[Any]:
    """The arguments of an op that writes to those at the places `written`, copies for those that lie in their memory.

    Raises:
        ValueError: a written tensor overlaps with itself, or with another one.
    """
    result = list(args)
    for i, name in written.items():
        if args[i] is None:
            continue
        _check_no_overlap_within(name, args[i])
        first, end = _addresses(args[i])
        for j, other in enumerate(args):
            if j == i or not isinstance(other, torch.Tensor) or other.data_ptr() >= end:
                continue
            _, other_end = _addresses(other)
            if first < other_end:
                if j in written:
                    raise ValueError(f"{name}: shares memory with {written[j]}, expected a tensor of its own")
                result[j] = other.clone(memory_format=torch.contiguous_format)
    return result


def _addresses(x: torch.Tensor) -> tuple[int, int]:
    """The first byte that a tensor reaches, and the one after its last; one on the meta device reaches none."""
    first = x.data_ptr()
    if not (first and x.numel()):
        return first, first
    steps = [(size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return first, first + (sum(steps) + 1) * x.itemsize


def check_sizes(condition: bool | torch.SymBool, expected: str, **sizes: int | torch.SymInt) -> None:
    """Sizes that may be symbolic satisfy `condition`.

    Stated without a message where they are symbolic: a closure in the graph would keep Inductor from caching it.
    """
    if torch.compiler.is_compiling() or isinstance(condition, torch.SymBool):
        torch._check_value(condition)
    elif not condition:
        raise ValueError(f"{expected}, got {', '.join(f'{name} {size}' for name, size in sizes.items())}")


def integer(name: str, value: Any) -> int:
    """`value`, of Python or numpy, as an integer of Python; a symbolic one stays one."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt | numbers.Integral):
        # Dynamo has no repr of what is an array to it, as numbers of numpy are.
        got = repr(value) if isinstance(value, bool | float | str) else type(value).__name__
        raise TypeError(f"{name}: got {got}, expected an integer")
    return value if isinstance(value, torch.SymInt) else int(value)  # type: ignore[return-value]


def positive_integer(name: str, value: Any) -> int:
    """`value` as `integer` takes it, above zero."""
    number = integer(name, value)
    if number < 1:
        raise ValueError(f"{name}: got {number}, expected a positive integer")
    return number


def positive_number(name: str, value: Any, at_most: float = sys.float_info.max) -> float:
    """`value`, of Python or numpy, as a finite float of Python above zero; a symbolic one stays one."""
    if isinstance(value, bool) or not isinstance(value, torch.SymInt | torch.SymFloat | numbers.Real):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    symbolic = isinstance(value, torch.SymInt | torch.SymFloat)
    number: float = value if symbolic else float(value)  # type: ignore[assignment]
    if not 0 < number <= at_most:
        raise ValueError(f"{name}: got {value}, expected a positive finite number, at most {at_most:.4g}")
    return number


def boolean(name: str, value: Any) -> bool:
    """`value`, of Python or numpy, as a bool of Python."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a bool")
    return bool(value)


def check_cu_seqlens_contents(name: str, cu_seqlens: torch.Tensor, tokens: int) -> list[int]:
    """The boundaries as a list, on the host: they start at 0, never decrease and end within `tokens`."""
    boundaries: list[int] = cu_seqlens.tolist()
    if boundaries[0] != 0:
        raise ValueError(f"{name}: starts at {boundaries[0]}, expected 0")
    for i, (start, end) in enumerate(itertools.pairwise(boundaries)):
        if end < start:
            raise ValueError(f"{name}: decreases from {start} to {end} at index {i + 1}, expected sorted boundaries")
    if boundaries[-1] > tokens:
        raise ValueError(f"{name}: ends at {boundaries[-1]}, expected at most the {tokens} tokens given")
    return boundaries


def check_cu_seqlens_where_possible(
    cu_seqlens: torch.Tensor, cu_seqlens_k: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor
) -> None:
    """Check the contents of the boundaries on CPUs, and everywhere under VIT_KERNELS_DEBUG."""
    if q.device.type == "cpu" or DEVICE_CHECKS:
        check_cu_seqlens_contents("cu_seqlens", cu_seqlens, q.shape[0])
        if cu_seqlens_k is not None:
            check_cu_seqlens_contents("cu_seqlens_k", cu_seqlens_k, k.shape[0])
