"""Triton's interpreter, made right for bf16 and for accesses out of bounds."""

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING
from unittest import mock

from vit_kernels import _dispatch
from vit_kernels.testing.counts import OperationCounts

if TYPE_CHECKING:
    from vit_kernels.testing._launches import Session

_session: "Session | None" = None


@contextlib.contextmanager
def corrected_interpreter() -> Iterator[OperationCounts]:
    """Make Triton's interpreter right while the context is active, and count what kernels do.

    - bf16 arithmetic (dot, binary and unary operations, comparisons, casts, fma, reductions, scans) works on values,
      each result rounded to nearest even; the stock interpreter computes on the raw 16-bit patterns. Products of
      `tl.dot` are summed in fp32, 16 at a time: an element depends on its row and column alone, as on a GPU. So is a
      `tl.sum` of bf16, where a compiled kernel may round every partial sum: cast to fp32 first. Not covered: atomics
      on bf16, `tl.dot_scaled`.
    - Casts to e4m3, OCP's and the fnuz form, round to nearest even and saturate as NVIDIA's do, NaN stays NaN both ways
      and in `tl.dot`, whose sums are exact to fp32: not those of sm_90 with fewer bits. Not covered: other arithmetic
      on fp8, and e5m2.
    - `tl.minimum` and `tl.maximum` return the operand that is not NaN, as on a GPU.
    - Every active lane of every load, store and atomic must lie on an element of a tensor argument of the launch:
      the gaps of a strided view are outside. A lane that lands in another argument by mistake is not found: poison
      with NaN as well (`nan_filled_empty`, `nan_padded`).
    - Launches are a few times faster than stock.

    Contexts nest: the inner one counts its own kernels, and they are added to the outer counts when it ends. All
    patches are undone when the outermost one ends. Triton's interpreter is one global state: only the thread that
    entered may enter again or launch.

    Yields:
        The counts of the kernels run so far in this context.

    Raises:
        RuntimeError: Triton is not installed, or is not in interpreter mode; or another thread is in the context.
        OutOfBounds: raised by a launch, with what was accessed, how many lanes, how far outside which argument, and
            the program id.
    """
    global _session
    require_interpreter()
    if _session is not None:
        _session.require_same_thread()
        with _counting(_session) as counts:
            yield counts
        return
    from vit_kernels.testing._launches import Session

    session = Session()
    with _hooks_installed(session), _counting(session) as counts:
        _session, was_corrected = session, _dispatch.interpreter_is_corrected
        _dispatch.interpreter_is_corrected = True
        try:
            yield counts
        finally:
            _session, _dispatch.interpreter_is_corrected = None, was_corrected


def require_interpreter() -> None:
    """Raise RuntimeError unless kernels of this process run in Triton's interpreter."""
    try:
        import triton
        import triton.language as tl
    except ImportError as error:
        raise RuntimeError("corrected_interpreter(): the package triton is not installed") from error
    from triton.runtime.interpreter import InterpretedFunction

    # triton.language's own kernels tell what TRITON_INTERPRET was when triton was imported.
    if not (triton.knobs.runtime.interpret and isinstance(tl.sum, InterpretedFunction)):
        raise RuntimeError(
            "corrected_interpreter(): Triton is not in interpreter mode. TRITON_INTERPRET=1 is read when a kernel is "
            "imported, so set it before the process starts, or with os.environ['TRITON_INTERPRET'] = '1' at the top "
            "of conftest.py, before triton, vit_kernels or any module with kernels is imported"
        )


@contextlib.contextmanager
def _counting(session: "Session") -> Iterator[OperationCounts]:
    counts = OperationCounts()
    session.counts.append(counts)
    try:
        yield counts
    finally:
        session.counts.pop()
        if session.counts:
            session.counts[-1].add(counts)


@contextlib.contextmanager
def _hooks_installed(session: "Session") -> Iterator[None]:
    from vit_kernels.testing._arithmetic import arithmetic_hooks
    from vit_kernels.testing._launches import launch_hooks

    with contextlib.ExitStack() as stack:
        # In this order: the counting hooks wrap the corrected methods.
        for hooks in (arithmetic_hooks, functools.partial(launch_hooks, session)):
            for owner, name, hook in list(hooks()):
                stack.enter_context(mock.patch.object(owner, name, hook, create=True))
        yield
