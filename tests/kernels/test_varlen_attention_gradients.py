"""The gradients of varlen_attention against fp64, and what they promise: determinism, nothing beyond a sequence."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vit_kernels import force_impl, varlen_attention
from vit_kernels.testing import assert_close_to_reference, corrected_interpreter, nan_filled_empty, seeded_tensor
from vit_kernels.testing.strategies import COMMON_HEAD_DIMS, dtypes, seeds

from tests.kernels.test_varlen_attention import (
    BOUNDARY_LENGTHS,
    OPCHECK_CASES,
    Case,
    boundaries,
    cases,
    grouped_heads,
    opcheck_inputs,
    self_attention,
)
from tests.support import COMPILED_FORMS, IMPLEMENTATIONS, assert_same_bits, dtypes_of, run


def expected_gradients(case: Case, grad: Tensor, dtype: torch.dtype, scale: float | None = None) -> list[Tensor]:
    """Of q, k, v, by autograd through SDPA."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in case[:3]]
    q, k, v = (x.transpose(0, 1) for x in inputs)
    outs, grads = [], []
    for rows, rows_k in zip(case.rows(), case.rows_k(), strict=True):
        if rows.start < rows.stop and rows_k.start < rows_k.stop:
            sequence = (q[None, :, rows], k[None, :, rows_k], v[None, :, rows_k])
            out = F.scaled_dot_product_attention(*sequence, scale=scale, enable_gqa=True)
            outs.append(out[0].transpose(0, 1))
            grads.append(grad[rows].to(dtype))
    return list(torch.autograd.grad(outs, inputs, grads))


def pytorch_gradients(case: Case, grad: Tensor, expected: list[Tensor], scale: float | None = None) -> list[Tensor]:
    """Of q, k, v, in their dtype.

    Of four orders of channels and keys, which mean the same, each element is taken from the one farthest off: the
    rounding of a single order may by luck cancel.
    """
    worst = [x.to(case.q.dtype, copy=True) for x in expected]
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        channels = torch.randperm(case.q.shape[2], generator=generator)
        keys = torch.cat([r.start + torch.randperm(r.stop - r.start, generator=generator) for r in case.rows_k()])
        keys = torch.cat([keys, torch.arange(len(keys), len(case.k))])
        shuffled = case._replace(q=case.q[..., channels], k=case.k[keys][..., channels], v=case.v[keys])
        grad_q, grad_k, grad_v = expected_gradients(shuffled, grad, case.q.dtype, scale)
        grads = grad_q[..., channels.argsort()], grad_k[keys.argsort()][..., channels.argsort()], grad_v[keys.argsort()]
        for i, (x, wanted) in enumerate(zip(grads, expected, strict=True)):
            farther = (x.double() - wanted).abs() > (worst[i].double() - wanted).abs()
            worst[i] = torch.where(farther, x, worst[i])
    return worst


def attend_and_differentiate(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, scale: float | None
) -> tuple[Tensor, ...]:
    q, k, v = inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = varlen_attention(q, k, v, cu_seqlens, cu_seqlens_k=cu_seqlens_k, scale=scale)
    return torch.autograd.grad(out, inputs, grad)


def gradients(form: str, case: Case, grad: Tensor, scale: float | None = None) -> tuple[Tensor, ...]:
    """Of q, k, v; a compiled form compiles the forward pass, and with it the backward."""
    if not form.startswith("compiled"):
        both = case.cu_seqlens, case.cu_seqlens_k
        computed: tuple[Tensor, ...] = run(form, attend_and_differentiate, *case[:3], grad, *both, scale)
        return computed
    q, k, v = inputs = [x.detach().requires_grad_() for x in case[:3]]
    with corrected_interpreter(), force_impl(form.split()[-1]), nan_filled_empty():
        torch.compiler.reset()
        attention = torch.compile(varlen_attention, backend="aot_eager", fullgraph=True, dynamic=False)
        out = attention(q, k, v, case.cu_seqlens, cu_seqlens_k=case.cu_seqlens_k, scale=scale)
        return torch.autograd.grad(out, inputs, grad)


def assert_gradients_match(form: str, data: st.DataObject, scale: float | None) -> None:
    # float64 has gradcheck.
    case = data.draw(cases(data.draw(dtypes()), max_total=50))
    grad = seeded_tensor(case.q.shape, case.q.dtype, data.draw(seeds()))
    actual = gradients(form, case, grad, scale)
    expected = expected_gradients(case, grad, torch.float64, scale)
    for x, wanted, pytorch in zip(actual, expected, pytorch_gradients(case, grad, expected, scale), strict=True):
        assert_close_to_reference(x, wanted, pytorch)
        assert x.is_contiguous()
    for storage in case.padded:
        storage.assert_padding_untouched()
    for x, cu in ((actual[0], case.cu_seqlens), *((x, case.cu_seqlens_k) for x in actual[1:])):
        end = int((case.cu_seqlens if cu is None else cu)[-1])
        assert not x[end:].any(), "tokens of no sequence"


@pytest.mark.quick
@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data(), scale=st.none() | st.floats(0.01, 0.5))
def test_matches_fp64(form: str, data: st.DataObject, scale: float | None) -> None:
    assert_gradients_match(form, data, scale)


@pytest.mark.parametrize("form", COMPILED_FORMS)
@settings(max_examples=6)
@given(data=st.data(), scale=st.none() | st.floats(0.01, 0.5))
def test_matches_fp64_inside_a_compiled_graph(form: str, data: st.DataObject, scale: float | None) -> None:
    assert_gradients_match(form, data, scale)


@settings(max_examples=10)
@given(
    length=st.sampled_from(BOUNDARY_LENGTHS),
    length_k=st.sampled_from(BOUNDARY_LENGTHS),
    head_dim=st.sampled_from(COMMON_HEAD_DIMS),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=seeds(),
)
def test_lengths_around_the_blocks(length: int, length_k: int, head_dim: int, dtype: torch.dtype, seed: int) -> None:
    # Followed by a sequence of NaN, which a missing mask would read; of one key, the gradient of q is zero in fp64
    # and rounding noise in any other precision.
    length_k += length_k == 1
    q, k, v, grad = (
        torch.cat([seeded_tensor((n, 1, head_dim), dtype, seed + i), torch.full((70, 1, head_dim), torch.nan)]).to(
            dtype
        )
        for i, n in enumerate((length, length_k, length_k, length))
    )
    both = Case(q, k, v, boundaries([length, 70]), boundaries([length_k, 70]), ())
    alone = Case(q[:length], k[:length_k], v[:length_k], boundaries([length]), boundaries([length_k]), ())
    actual = gradients("triton", alone, grad[:length])
    expected = expected_gradients(alone, grad[:length], torch.float64)
    for x, wanted, pytorch in zip(actual, expected, pytorch_gradients(alone, grad[:length], expected), strict=True):
        assert_close_to_reference(x, wanted, pytorch)
    for x, wanted in zip(gradients("triton", both, grad), actual, strict=True):
        assert_same_bits(x[: len(wanted)], wanted)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@settings(max_examples=6)
@given(heads=grouped_heads, dtype=st.sampled_from([torch.float16, torch.bfloat16]), seed=seeds())
def test_the_log_sum_exp_has_a_gradient(form: str, heads: tuple[int, int], dtype: torch.dtype, seed: int) -> None:
    case = self_attention([20, 17], *heads, 24, dtype, seed)
    grad_lse = seeded_tensor((heads[0], 37), torch.float32, seed + 9)

    def through_pytorch(precision: torch.dtype) -> tuple[Tensor, ...]:
        q, k = (x.detach().to(precision).requires_grad_() for x in case[:2])
        repeated = k.repeat_interleave(heads[0] // heads[1], 1)
        scores = [(q[r].transpose(0, 1) @ repeated[r].permute(1, 2, 0)) * 24**-0.5 for r in case.rows()]
        lse = torch.cat([x.to(torch.promote_types(precision, torch.float32)).logsumexp(-1) for x in scores], dim=1)
        return torch.autograd.grad(lse, (q, k), grad_lse.to(lse.dtype))

    with corrected_interpreter(), force_impl(form), nan_filled_empty():
        q, k, v = (x.detach().requires_grad_() for x in case[:3])
        out, lse = varlen_attention(q, k, v, case.cu_seqlens, return_lse=True)
        actual = torch.autograd.grad(lse, (q, k, v), grad_lse, retain_graph=True)
        both = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), grad_lse), retain_graph=True)
        only_out = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert not actual[2].any()
    for x, wanted, pytorch in zip(actual[:2], through_pytorch(torch.float64), through_pytorch(dtype), strict=True):
        assert_close_to_reference(x, wanted, pytorch)
    for together, of_lse, of_out in zip(both, actual, only_out, strict=True):
        torch.testing.assert_close(together, of_lse + of_out, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@settings(max_examples=10)
@given(data=st.data())
def test_a_batch_gives_each_sequence_the_gradients_it_has_alone(form: str, data: st.DataObject) -> None:
    case = data.draw(cases(data.draw(dtypes_of(form)), max_total=50))
    grad = seeded_tensor(case.q.shape, case.q.dtype, data.draw(seeds()))
    together = gradients(form, case, grad)
    assert all(map(torch.equal, together, gradients(form, case, grad)))
    for rows, rows_k in zip(case.rows(), case.rows_k(), strict=True):
        alone = Case(
            case.q[rows],
            case.k[rows_k],
            case.v[rows_k],
            boundaries([rows.stop - rows.start]),
            boundaries([rows_k.stop - rows_k.start]),
            (),
        )
        for x, wanted, r in zip(gradients(form, alone, grad[rows]), together, (rows, rows_k, rows_k), strict=True):
            assert_same_bits(x, wanted[r])


@given(
    lengths=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=3),
    heads=grouped_heads,
    tails=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    cross=st.booleans(),
    return_lse=st.booleans(),
    seed=seeds(),
)
def test_gradcheck(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    tails: tuple[int, int],
    cross: bool,
    return_lse: bool,
    seed: int,
) -> None:
    cu_seqlens, cu_seqlens_k = (boundaries(column) for column in zip(*lengths, strict=True))
    tokens, tokens_k = (int(cu[-1]) + tail for cu, tail in zip((cu_seqlens, cu_seqlens_k), tails, strict=True))
    shapes = [(tokens, heads[0], 16), *[(tokens_k if cross else tokens, heads[1], 16)] * 2]
    inputs = [seeded_tensor(shape, torch.float64, seed + i).requires_grad_() for i, shape in enumerate(shapes)]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        boundaries_k = cu_seqlens_k if cross else None
        if not return_lse:
            return varlen_attention(q, k, v, cu_seqlens, cu_seqlens_k=boundaries_k)
        out, lse = varlen_attention(q, k, v, cu_seqlens, cu_seqlens_k=boundaries_k, return_lse=True)
        # A query without keys has the constant -inf.
        return out, torch.where(lse.isfinite(), lse, 0)

    assert torch.autograd.gradcheck(attention, inputs, fast_mode=True)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_gradients_of_expanded_memory(form: str) -> None:
    case = self_attention([17], 1, 1, 16, torch.float32, 0)
    grad = torch.ones(()).expand(case.q.shape)
    for x, wanted in zip(gradients(form, case, grad), gradients(form, case, grad.contiguous()), strict=True):
        assert_same_bits(x, wanted)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("needs", [0, 1, 2], ids=["q", "k", "v"])
def test_any_input_alone_may_need_gradients(form: str, needs: int) -> None:
    case = self_attention([17, 3], 2, 1, 24, torch.float32, 0)
    grad = seeded_tensor(case.q.shape, torch.float32, 3)
    q, k, v = inputs = [x.detach().requires_grad_(i == needs) for i, x in enumerate(case[:3])]
    with corrected_interpreter(), force_impl(form):
        (actual,) = torch.autograd.grad(varlen_attention(q, k, v, case.cu_seqlens), inputs[needs], grad)
    assert_same_bits(actual, gradients(form, case, grad)[needs])


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_the_op_called_raw_differentiates_alike(form: str) -> None:
    case = self_attention([17, 3], 2, 1, 24, torch.float32, 0)
    grad = seeded_tensor(case.q.shape, torch.float32, 3)
    inputs = [x.detach().requires_grad_() for x in case[:3]]
    with corrected_interpreter():
        out = torch.ops.vit_kernels.varlen_attention.default(*inputs, case.cu_seqlens, None, 24**-0.5, form)
        actual = torch.autograd.grad(out, inputs, grad)
    for x, wanted in zip(actual, gradients(form, case, grad), strict=True):
        assert_same_bits(x, wanted)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_there_is_no_second_derivative_and_the_error_says_so(form: str) -> None:
    q, k, v, cu_seqlens = self_attention([3], 1, 1, 16, torch.float32, 0)[:4]
    with corrected_interpreter(), force_impl(form):
        out = varlen_attention(q.requires_grad_(), k, v, cu_seqlens)
        (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="varlen_attention: got a second derivative"):
            grad.sum().backward()


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tokens", "tokens_k"), [(0, 5), (5, 0), (0, 0)])
def test_without_queries_or_keys_the_gradients_are_zero(form: str, tokens: int, tokens_k: int) -> None:
    shapes = ((tokens, 1, 24), (tokens_k, 1, 24), (tokens_k, 1, 24))
    q, k, v = inputs = [torch.ones(shape) for shape in shapes]
    case = Case(q, k, v, boundaries([tokens]), boundaries([tokens_k]), ())
    for x, of in zip(gradients(form, case, torch.ones(shapes[0])), inputs, strict=True):
        assert_same_bits(x, torch.zeros_like(of))


@pytest.mark.parametrize(("cross", "group", "requires_grad"), OPCHECK_CASES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck_with_the_log_sum_exp(impl: str, cross: bool, group: int, requires_grad: bool) -> None:
    inputs, *cu_seqlens = opcheck_inputs(cross, group)
    inputs = [x.detach().requires_grad_(requires_grad) for x in inputs]
    op = torch.ops.vit_kernels.varlen_attention_with_lse.default
    with corrected_interpreter():
        torch.library.opcheck(op, (*inputs, *cu_seqlens, 0.25, impl))


@pytest.mark.parametrize(("cross", "group"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck_of_the_backward(impl: str, cross: bool, group: int) -> None:
    (q, k, v), *cu_seqlens = opcheck_inputs(cross, group)
    q = q.contiguous()
    grad_lse = torch.ones(q.shape[1], q.shape[0]) if cross else None
    arguments = (q + 1, grad_lse, q, k, v, q + 2, torch.ones(q.shape[1], q.shape[0]), *cu_seqlens, 0.25, impl)
    with corrected_interpreter():
        torch.library.opcheck(torch.ops.vit_kernels.varlen_attention_backward.default, arguments)
