"""Bounds checks, counters and quicker launches for Triton's interpreter (written for triton 3.6 to 3.9)."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from vit_kernels.testing import _bounds as bounds
from vit_kernels.testing.counts import OperationCounts

Method = Callable[..., Any]
Hook = tuple[object, str, Method]


@dataclass
class Session:
    """State shared by the hooks, from entering the outermost corrected_interpreter() to leaving it.

    Attributes:
        counts: one for each nested context; kernels add to the innermost.
        regions: the tensor arguments of the launch that runs now.
        language_patches: Triton's record of what it patched in triton.language for that launch, and for which
            module globals.
    """

    thread: int = field(default_factory=threading.get_ident)
    counts: list[OperationCounts] = field(default_factory=list)
    regions: list[bounds.Region] = field(default_factory=list)
    language_patches: Any = None
    patched_globals: set[int] = field(default_factory=set)

    def require_same_thread(self) -> None:
        """Raise RuntimeError in any thread but the one that entered the context."""
        if threading.get_ident() != self.thread:
            raise RuntimeError(
                "corrected_interpreter() is active in another thread; Triton's interpreter is one global state, so "
                "enter it and launch kernels from one thread at a time"
            )


def launch_hooks(session: Session) -> Iterator[Hook]:
    """(class or module, attribute, replacement) of every hooked method."""
    for hook in (_dot(session), _load(session), _store(session), _atomic_rmw(session), _atomic_cas(session)):
        yield InterpreterBuilder, hook.__name__, hook
    for name in ("create_exp", "create_exp2"):
        yield InterpreterBuilder, name, _exponential(session, getattr(InterpreterBuilder, name))
    yield GridExecutor, "_init_args_hst", _init_args_hst(session)
    yield GridExecutor, "__call__", _call(session)
    yield interpreter, "_patch_lang", _patch_lang(session)


def _dot(session: Session) -> Method:
    unhooked = InterpreterBuilder.create_dot

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *args: Any) -> TensorHandle:
        session.counts[-1].dot_flops += 2 * a.data.size * b.data.shape[-1]
        return unhooked(self, a, b, *args)

    return create_dot


def _exponential(session: Session, unhooked: Method) -> Method:
    def exponential(self: InterpreterBuilder, x: TensorHandle) -> TensorHandle:
        session.counts[-1].exp2 += x.data.size
        return unhooked(self, x)

    return exponential


def _checked_bytes(session: Session, kind: str, pointers: TensorHandle, active: np.ndarray) -> int:
    """Check the active lanes of an access; returns their bytes."""
    lanes = int(np.count_nonzero(active))
    if lanes == 0:
        return 0
    addresses = pointers.data.ravel() if lanes == active.size else pointers.data[active]
    element_bytes = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    bounds.check(kind, addresses, element_bytes, session.regions, interpreter.interpreter_builder.grid_idx)
    return lanes * element_bytes


def _mask_array(mask: Any) -> np.ndarray:
    # Descriptors of triton before 3.9 hand over the bare array.
    return mask.data if isinstance(mask, TensorHandle) else np.asarray(mask)


def _load(session: Session) -> Method:
    unhooked = InterpreterBuilder.create_masked_load

    def create_masked_load(self: InterpreterBuilder, ptrs: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        session.counts[-1].bytes_loaded += _checked_bytes(session, "load", ptrs, _mask_array(mask))
        return unhooked(self, ptrs, mask, *args, **kwargs)

    return create_masked_load


def _store(session: Session) -> Method:
    unhooked = InterpreterBuilder.create_masked_store

    def create_masked_store(self: InterpreterBuilder, ptrs: Any, value: Any, mask: Any, *args: Any, **kw: Any) -> Any:
        session.counts[-1].bytes_stored += _checked_bytes(session, "store", ptrs, _mask_array(mask))
        return unhooked(self, ptrs, value, mask, *args, **kw)

    return create_masked_store


def _atomic_rmw(session: Session) -> Method:
    unhooked = InterpreterBuilder.create_atomic_rmw

    def create_atomic_rmw(self: InterpreterBuilder, op: Any, ptr: Any, value: Any, mask: Any, *args: Any) -> Any:
        _checked_bytes(session, "atomic", ptr, _mask_array(mask))
        return unhooked(self, op, ptr, value, mask, *args)

    return create_atomic_rmw


def _atomic_cas(session: Session) -> Method:
    unhooked = InterpreterBuilder.create_atomic_cas

    def create_atomic_cas(self: InterpreterBuilder, ptr: Any, *args: Any) -> Any:
        _checked_bytes(session, "atomic", ptr, np.ones(ptr.data.shape, dtype=np.bool_))
        return unhooked(self, ptr, *args)

    return create_atomic_cas


def _regions(name: str, argument: Any) -> Iterator[bounds.Region]:
    if isinstance(argument, tuple):
        for index, item in enumerate(argument):
            yield from _regions(f"{name}[{index}]", item)
    elif isinstance(argument, TensorDescriptor):
        yield from _regions(name, argument.base)
    elif hasattr(argument, "data_ptr"):
        yield bounds.region_of(name, interpreter._unwrap_tensor(argument))


def _init_args_hst(session: Session) -> Method:
    unhooked = GridExecutor._init_args_hst

    def init_args_hst(self: GridExecutor, args_dev: Any, kwargs: Any) -> Any:
        # The kernel works on these host copies (the tensors themselves when they are on the CPU).
        args, kwargs = unhooked(self, args_dev, kwargs)
        for name, argument in (*zip(self.arg_names, args, strict=False), *kwargs.items()):
            session.regions += _regions(name, argument)
        return args, kwargs

    return init_args_hst


def _call(session: Session) -> Method:
    unhooked = GridExecutor.__call__

    def call(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        session.require_same_thread()
        try:
            # A GPU raises nothing on overflow or an invalid operation, whatever the warning filters.
            with np.errstate(all="ignore"):
                unhooked(self, *args, **kwargs)
        except InterpreterError as error:
            finding = _cause(error)
            if isinstance(finding, bounds.OutOfBounds):
                raise finding from None
            raise
        finally:
            session.regions, session.language_patches, session.patched_globals = [], None, set()

    return call


def _cause(error: BaseException) -> BaseException:
    """The exception that the interpreter wrapped, once for every nested device function."""
    while isinstance(error, InterpreterError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _patch_lang(session: Session) -> Method:
    """Patch triton.language once a launch, not once a call of a device function (most of an interpreted run)."""
    unhooked = interpreter._patch_lang

    def patch_lang(fn: Any) -> Any:
        if id(fn.__globals__) not in session.patched_globals:
            patches = unhooked(fn)
            session.patched_globals.add(id(fn.__globals__))
            # triton 3.6 makes a number of an array of one element, which numpy 2.4 refuses.
            patches.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
            if session.language_patches is None:
                session.language_patches = patches
            else:
                # The launch restores its own record at its end; the stock one forgets those of device functions.
                session.language_patches._changes += patches._changes
        return session.language_patches

    return patch_lang
