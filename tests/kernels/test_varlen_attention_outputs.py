"""What varlen_attention returns on request: the log-sum-exp, and an output that the caller gave."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vit_kernels import force_impl, varlen_attention
from vit_kernels.reference import varlen_attention_lse_reference
from vit_kernels.testing import assert_close_to_reference, corrected_interpreter, nan_padded, seeded_tensor
from vit_kernels.testing.strategies import dtypes, head_dims, seeds

from tests.kernels.test_varlen_attention import (
    Case,
    assert_right,
    attend,
    boundaries,
    cases,
    opcheck_inputs,
    self_attention,
)
from tests.support import (
    COMPILED_FORMS,
    EVERY_FORM_AND_DTYPE,
    FORMS,
    IMPLEMENTATIONS,
    assert_same_bits,
    dtypes_of,
    launched_on,
    run,
)


def pytorch_lse(case: Case, scale: float | None, dtype: torch.dtype) -> Tensor:
    """The log-sum-exps of scores in `dtype`, sequence by sequence."""
    heads, head_dim = case.q.shape[1:]
    lse = torch.full((heads, len(case.q)), -torch.inf, dtype=dtype)
    for rows, rows_k in zip(case.rows(), case.rows_k(), strict=True):
        q = case.q[rows].transpose(0, 1).to(dtype)
        k = case.k[rows_k].repeat_interleave(heads // case.k.shape[1], 1).permute(1, 2, 0).to(dtype)
        lse[:, rows] = (q @ k * (head_dim**-0.5 if scale is None else scale)).logsumexp(-1)
    return lse


@pytest.mark.parametrize(("form", "dtypes_of_form"), EVERY_FORM_AND_DTYPE)
@settings(max_examples=8)
@given(data=st.data(), scale=st.none() | st.floats(0.01, 0.5))
def test_the_log_sum_exp_matches_the_reference(
    form: str, dtypes_of_form: st.SearchStrategy[torch.dtype], data: st.DataObject, scale: float | None
) -> None:
    case = data.draw(cases(data.draw(dtypes_of_form), max_total=40))
    out, lse = run(form, varlen_attention, *case[:4], cu_seqlens_k=case.cu_seqlens_k, scale=scale, return_lse=True)
    assert_same_bits(out, attend(form, case, scale))
    boundaries_k = case.cu_seqlens_k
    expected = varlen_attention_lse_reference(case.q, case.k, case.cu_seqlens, cu_seqlens_k=boundaries_k, scale=scale)
    # Of float64, PyTorch's own error is that of the reference.
    precision = torch.promote_types(case.q.dtype, torch.float32)
    baseline = pytorch_lse(case, scale, precision)
    if precision == torch.float64:
        torch.testing.assert_close(lse, expected)
    else:
        assert_close_to_reference(lse, expected, baseline)
    assert lse.is_contiguous()


@st.composite
def outputs(draw: st.DrawFn, case: Case) -> Callable[[], Tensor]:
    """Memory for the output of a case: contiguous, with gaps between rows and heads, or heads first."""
    tokens, heads, head_dim = case.q.shape
    kind = draw(st.sampled_from(["contiguous", "gaps", "heads first"]))
    if kind == "contiguous":
        return lambda: torch.full((tokens, heads, head_dim), torch.nan, dtype=case.q.dtype)
    if kind == "gaps":
        margins = [(1, 1), (0, draw(st.integers(0, 2))), (0, draw(st.sampled_from([0, 8, 3])))]
        return lambda: nan_padded(torch.full((tokens, heads, head_dim), torch.nan, dtype=case.q.dtype), margins).tensor
    return lambda: torch.full((heads, tokens, head_dim), torch.nan, dtype=case.q.dtype).transpose(0, 1)


def run_without_poison(form: str, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`run` of a compiled form, without NaN in what it allocates."""
    torch.compiler.reset()
    with corrected_interpreter(), force_impl(form.split()[-1]):
        return torch.compile(op, backend="aot_eager", fullgraph=True, dynamic=False)(*args, **kwargs)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=8)
@given(data=st.data(), return_lse=st.booleans())
def test_the_caller_may_give_the_output(form: str, data: st.DataObject, return_lse: bool) -> None:
    case = data.draw(cases(data.draw(dtypes_of(form)), max_total=40))
    out = data.draw(outputs(case))()
    expected = attend(form, case)
    # Dynamo cannot trace the allocation of the log-sum-exp while that is made to give NaN.
    call = run_without_poison if return_lse and form in COMPILED_FORMS else run
    with torch.no_grad():
        result = call(form, varlen_attention, *case[:4], cu_seqlens_k=case.cu_seqlens_k, return_lse=return_lse, out=out)
    returned = result[0] if return_lse else result
    assert returned is out or form.startswith("compiled")
    assert_same_bits(out, expected)
    assert_same_bits(returned, expected)
    if return_lse:
        both = run(form, varlen_attention, *case[:4], cu_seqlens_k=case.cu_seqlens_k, return_lse=True)
        assert_same_bits(result[1], both[1])


@given(head_dim=head_dims(), dtype=dtypes(), seed=seeds())
def test_the_kernel_writes_to_the_given_memory(head_dim: int, dtype: torch.dtype, seed: int) -> None:
    case = self_attention([17], 1, 1, head_dim, dtype, seed)
    out = torch.empty_like(case.q)
    assert out.data_ptr() in launched_on(varlen_attention, *case[:4], out=out)
    assert_right(out, case)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_memory_beyond_the_given_rows_is_left_alone(form: str) -> None:
    case = self_attention([5, 12], 2, 1, 24, torch.float32, 0)
    padded = nan_padded(torch.zeros(case.q.shape), [(2, 3), (1, 0), (0, 8)])
    with torch.no_grad(), corrected_interpreter(), force_impl(form):
        varlen_attention(*case[:4], out=padded.tensor)
    padded.assert_padding_untouched()
    assert_right(padded.tensor.contiguous(), case)


Q = torch.zeros(5, 2, 16)
PACKED = torch.zeros(5, 4, 16)
OUT_ERRORS = {
    "dtype": (torch.empty(5, 2, 16, dtype=torch.float16), TypeError, "out: got torch.float16, expected torch.float32"),
    "rank": (torch.empty(5, 32), ValueError, "out: got shape"),
    "heads": (torch.empty(5, 1, 16), ValueError, "out: got shape"),
    "tokens": (torch.empty(6, 2, 16), ValueError, "out: expected as many tokens as q has, got out 6, q 5"),
    "channels": (torch.empty(5, 2, 32)[..., ::2], ValueError, "out: got strides"),
    "device": (torch.empty(5, 2, 16, device="meta"), ValueError, "out: got device meta, expected cpu"),
    "no tensor": ([0.0], TypeError, "out: got list"),
    "expanded": (torch.empty(1, 2, 16).expand(5, 2, 16), ValueError, "out: got strides .* do not overlap"),
    "memory of q": (PACKED[:, :2], ValueError, "out: shares memory with q"),
    "rows of q": (torch.as_strided(PACKED, (5, 2, 16), (16, 16, 1), 80), ValueError, "out: "),
}


@pytest.mark.parametrize("name", OUT_ERRORS)
def test_outputs_that_do_not_fit_are_refused(name: str) -> None:
    out: Any
    out, error, message = OUT_ERRORS[name]
    with pytest.raises(error, match=message):
        varlen_attention(PACKED[:, :2], Q, Q, boundaries([5]), out=out)


def test_an_output_is_refused_where_gradients_are_needed() -> None:
    q = Q.clone().requires_grad_()
    with pytest.raises(ValueError, match="q: got a tensor that requires grad"):
        varlen_attention(q, Q, Q, boundaries([5]), out=torch.empty(5, 2, 16))
    with torch.no_grad():
        varlen_attention(q, Q, Q, boundaries([5]), out=torch.empty(5, 2, 16))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize(("cross", "group"), [(False, 1), (True, 2)])
def test_opcheck(impl: str, with_lse: bool, cross: bool, group: int) -> None:
    inputs, *cu_seqlens = opcheck_inputs(cross, group)
    out = seeded_tensor((9, 2, 24), torch.float32, 1)
    lse = torch.zeros(2, 9) if with_lse else None
    arguments = (*inputs, *cu_seqlens, 0.25, out, lse, impl)
    with corrected_interpreter():
        torch.library.opcheck(torch.ops.vit_kernels.varlen_attention_out.default, arguments)
