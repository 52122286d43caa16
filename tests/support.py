"""What the tests of the three ops share: the forms an op runs in, and what they judge it by."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from triton.runtime.interpreter import GridExecutor
from vit_kernels import force_impl
from vit_kernels.testing import corrected_interpreter, nan_filled_empty
from vit_kernels.testing.ptx import executed_ptx
from vit_kernels.testing.strategies import dtypes

IMPLEMENTATIONS = ("eager", "triton")
COMPILED_FORMS = ("compiled eager", "compiled triton")
FORMS = (*IMPLEMENTATIONS, *COMPILED_FORMS)
EXECUTED_FORMS = ("executed sm_80", "executed sm_90")
"""The kernel's compiled code, in a process that compiles kernels: the tests in kernels/executed."""


def run(form: str, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an op in one of FORMS or EXECUTED_FORMS, with NaN in what it allocates.

    A compiled form is traced anew, as one graph of these very sizes.
    """
    if form in EXECUTED_FORMS:
        with executed_ptx(form.split()[-1]), force_impl("triton"):
            return op(*args, **kwargs)
    with corrected_interpreter(), force_impl(form.split()[-1]), nan_filled_empty():
        if form.startswith("compiled"):
            torch.compiler.reset()
            op = torch.compile(op, backend="aot_eager", fullgraph=True, dynamic=False)
        return op(*args, **kwargs)


def dtypes_of(form: str) -> st.SearchStrategy[torch.dtype]:
    """The dtypes that an op takes in this form."""
    return dtypes() if "triton" in form else dtypes() | st.just(torch.float64)


KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EVERY_FORM_AND_DTYPE = [
    *(
        pytest.param(form, st.just(dtype), id=f"{form}-{str(dtype).removeprefix('torch.')}")
        for form in IMPLEMENTATIONS
        for dtype in (*KERNEL_DTYPES, torch.float64)
        if (form, dtype) != ("triton", torch.float64)
    ),
    *(pytest.param(form, dtypes_of(form), id=form) for form in FORMS if form not in IMPLEMENTATIONS),
]
"""(form, strategy of dtypes): each dtype has its own examples, but where compiling makes them slow."""


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a floating tensor, as integers."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Same dtype, shape and bit patterns, NaN and the sign of zero included."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(bits(actual), bits(expected), rtol=0, atol=0)


def launched_on(op: Callable[..., Any], *args: Any, **kwargs: Any) -> set[int]:
    """Addresses of the tensors that the kernels of an op were launched on."""
    with corrected_interpreter(), force_impl("triton"):
        launch = GridExecutor.__call__
        with mock.patch.object(GridExecutor, "__call__", autospec=True, side_effect=launch) as launches:
            op(*args, **kwargs)
    arguments = (argument for call in launches.call_args_list for argument in call.args)
    return {argument.data_ptr() for argument in arguments if isinstance(argument, torch.Tensor)}


def checkpoint_layers(model: Any, *, use_reentrant: bool) -> None:
    """Have a model of transformers checkpoint its layers in training; later versions renamed it."""
    later = getattr(model, "activation_checkpointing_enable", None)
    (later or model.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})


def saved_bytes(forward: Callable[..., Any], *args: Any) -> int:
    """Bytes of the storages that are kept for backward, each counted once."""
    kept = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward(*args)
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}.values())
