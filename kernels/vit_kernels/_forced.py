"""Which implementation is forced, here and now: for one thread, and for one task of it."""

import contextlib
import types
from collections.abc import Iterator
from contextvars import ContextVar

import torch

IMPLEMENTATIONS = ("eager", "triton", "flash_attn")

_entered: ContextVar[tuple[tuple[object, str | None], ...]] = ContextVar("vit_kernels.force_impl", default=())
"""Every `force_impl` that this context is inside of, with a key of its own: they may be left in any order."""


class _Choice(types.ModuleType):
    """A module, as `torch.backends.cudnn` is one, because Dynamo reads attributes of modules without tracing how.

    It guards on what it read, and reads it again before each call of compiled code. ContextVar.get it cannot trace.
    """

    @property
    def implementation(self) -> str | None:
        entered = _entered.get()
        return entered[-1][1] if entered else None

    @implementation.setter
    def implementation(self, implementation: str | None) -> None:
        """For compiled code: change the innermost choice, and leave what is as it should be alone."""
        if implementation != self.implementation:
            *others, (key, _) = _entered.get() or ((None, None),)
            _entered.set((*others, (key, implementation)))


choice = _Choice("vit_kernels._forced.choice")


@contextlib.contextmanager
def force_impl(implementation: str) -> Iterator[None]:
    """Make every op of this thread, or asyncio task, run one implementation.

    Read when an op is called or traced, and guarded by compiled code: changing it recompiles. The choice is a context
    variable: a task has its own, which starts as that of the code that created it.
    `"eager"` is PyTorch, `"triton"` the kernel (on CPU tensors through Triton's interpreter, which
    TRITON_INTERPRET=1 must have turned on), `"flash_attn"` the flash-attn package (varlen_attention only).

    Raises:
        ValueError: an unknown implementation.
        RuntimeError: left in another thread or task than it was entered in.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: got {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    if torch.compiler.is_compiling():
        # Dynamo traces assignments to an attribute.
        previous, choice.implementation = choice.implementation, implementation
        try:
            yield
        finally:
            choice.implementation = previous
        return
    key = object()
    _entered.set((*_entered.get(), (key, implementation)))
    try:
        yield
    finally:
        _leave(key)


def _leave(key: object) -> None:
    entered = _entered.get()
    remaining = tuple(entry for entry in entered if entry[0] is not key)
    if len(remaining) == len(entered):
        raise RuntimeError("force_impl: left in another thread or task than it was entered in")
    _entered.set(remaining)
