"""linear_gelu is the linear layer, then the erf GELU, rounded once, and what lies between is never written."""

import re
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from vit_kernels import force_impl, linear_gelu
from vit_kernels._triton import configurations
from vit_kernels.reference import linear_gelu_reference
from vit_kernels.testing import (
    NanPadded,
    assert_close_to_reference,
    corrected_interpreter,
    nan_filled_empty,
    nan_padded,
    seeded_tensor,
)
from vit_kernels.testing.strategies import dtypes, seeds, strided_tensors

from tests.kernels.test_int64_offsets import spread
from tests.support import EVERY_FORM_AND_DTYPE, FORMS, IMPLEMENTATIONS, assert_same_bits, dtypes_of, launched_on, run

BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2, "INPUT_PRECISION": "ieee"}


@pytest.mark.quick
def test_example() -> None:
    """The Triton kernel on CPU tensors."""
    x, weight = (seeded_tensor((20, 16), torch.bfloat16, seed=seed) for seed in (0, 1))  # [tokens, in], [out, in]
    bias = seeded_tensor((20,), torch.bfloat16, seed=2)
    with corrected_interpreter(), force_impl("triton"):
        out = linear_gelu(x, weight, bias)  # [tokens, out]
    expected = linear_gelu_reference(x, weight, bias)  # float64
    assert_close_to_reference(out, expected, F.gelu(F.linear(x, weight, bias)))  # PyTorch in the same precision


class Case(NamedTuple):
    x: NanPadded
    weight: NanPadded
    bias: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x.tensor, self.weight.tensor, self.bias


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    """Awkward sizes in any layout, with scores on both sides of the GELU's bend."""
    tokens, in_features, out_features = (
        draw(st.sampled_from([19, 0])),
        draw(st.integers(1, 70)),
        draw(st.integers(8, 40)),
    )
    x = draw(strided_tensors((tokens, in_features), dtype))
    weight = draw(strided_tensors((out_features, in_features), dtype))
    weight.tensor.mul_(2 * in_features**-0.5)
    return Case(x, weight, nan_padded(seeded_tensor((out_features,), dtype, draw(seeds())), [(8, 8)]).tensor)


def in_pytorch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


@pytest.mark.quick
@pytest.mark.parametrize(("form", "dtypes_of_form"), EVERY_FORM_AND_DTYPE)
@given(data=st.data())
def test_matches_the_reference(form: str, dtypes_of_form: st.SearchStrategy[torch.dtype], data: st.DataObject) -> None:
    case = data.draw(cases(data.draw(dtypes_of_form)))
    out = run(form, linear_gelu, *case.tensors)
    assert_close_to_reference(out, linear_gelu_reference(*case.tensors), in_pytorch(*case.tensors))
    assert out.dtype == case.bias.dtype
    assert out.is_contiguous()
    case.x.assert_padding_untouched()
    case.weight.assert_padding_untouched()


@given(tokens=st.integers(1, 70), in_features=st.integers(0, 50), out_features=st.integers(1, 70), seed=seeds())
def test_blocks_around_every_edge(tokens: int, in_features: int, out_features: int, seed: int) -> None:
    from vit_kernels._triton.linear_gelu import launch

    x = nan_padded(seeded_tensor((tokens, in_features), torch.float32, seed), [(1, 1), (0, 3)]).tensor
    weight = nan_padded(seeded_tensor((out_features, in_features), torch.float32, seed + 1), [(1, 1), (0, 5)]).tensor
    bias = seeded_tensor((out_features,), torch.float32, seed + 2)
    with corrected_interpreter(), nan_filled_empty():
        out = launch(x, weight, bias, configuration=BLOCKS)
    expected = linear_gelu_reference(x, weight, bias)
    # A sum of few elements can be right to the last bit in PyTorch's order: the farthest order judges.
    orders = [in_pytorch(x, weight, bias), in_pytorch(x.flip(1), weight.flip(1), bias), sequential(x, weight, bias)]
    farthest = max(orders, key=lambda other: float((other.double() - expected).abs().max()))
    assert_close_to_reference(out, expected, farthest)


def sequential(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One product after the other, each rounded."""
    u = torch.zeros(len(x), len(weight))
    for a, b in zip(x.T, weight.T, strict=True):
        u = u + a[:, None] * b
    return F.gelu(u + bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_kept_configuration_gives_the_same(target: str, dtype: torch.dtype) -> None:
    from vit_kernels._triton.linear_gelu import launch

    x, weight, bias = (seeded_tensor(shape, dtype, i) for i, shape in enumerate([(130, 72), (140, 72), (140,)]))
    expected = linear_gelu_reference(x, weight, bias)
    for configuration in configurations.linear_candidates(dtype, target):
        with corrected_interpreter(), nan_filled_empty():
            blocks = configuration | {"INPUT_PRECISION": "ieee"}
            assert_close_to_reference(
                launch(x, weight, bias, configuration=blocks), expected, in_pytorch(x, weight, bias)
            )


def test_it_is_the_erf_form() -> None:
    x = torch.linspace(-3, 3, 64)[:, None]
    one, zero = torch.ones(1, 1), torch.zeros(1)
    for form in IMPLEMENTATIONS:
        out = run(form, linear_gelu, x, one, zero)
        assert (out - F.gelu(x)).abs().max() < 1e-6
        assert (out - F.gelu(x, approximate="tanh")).abs().max() > 1e-4


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data())
def test_tokens_and_features_are_independent(form: str, data: st.DataObject) -> None:
    case = data.draw(cases(data.draw(dtypes_of(form))).filter(lambda case: case.x.tensor.numel()))
    clean = run(form, linear_gelu, *case.tensors)
    token = data.draw(st.integers(0, len(clean) - 1))
    feature = data.draw(st.integers(0, clean.shape[1] - 1))
    case.x.tensor[token] = torch.nan
    case.weight.tensor[feature] = torch.nan
    out = run(form, linear_gelu, *case.tensors)
    assert out[token].isnan().all()
    assert out[:, feature].isnan().all()
    kept = torch.ones_like(out, dtype=torch.bool)
    kept[token], kept[:, feature] = False, False
    if form == "triton":
        assert_same_bits(out[kept], clean[kept])
    else:
        assert out[kept].isfinite().all()


@given(tokens=st.integers(1, 40), dtype=dtypes())
def test_reads_no_copy_and_writes_the_output_once(tokens: int, dtype: torch.dtype) -> None:
    x, weight = torch.ones(tokens, 3, 24, dtype=dtype)[:, 1], torch.ones(70, 24, dtype=dtype)
    bias = torch.zeros(70, dtype=dtype)
    pointers = launched_on(linear_gelu, x, weight, bias)
    assert {t.data_ptr() for t in (x, weight, bias)} <= pointers
    assert len(pointers) == 4, "and the output"
    with corrected_interpreter() as counts, force_impl("triton"):
        linear_gelu(x, weight, bias)
    assert counts.bytes_stored == tokens * 70 * x.itemsize


@pytest.mark.quick
@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_gradients_are_autograds(form: str, data: st.DataObject) -> None:
    dtype = data.draw(dtypes())
    case = data.draw(cases(dtype).filter(lambda case: case.x.tensor.numel()))
    inputs: list[Any] = [x.detach().requires_grad_() for x in case.tensors]
    grad = data.draw(strided_tensors(in_pytorch(*inputs).shape, dtype)).tensor

    def op(*inputs: Tensor) -> Tensor:
        out: Tensor = torch.ops.vit_kernels.linear_gelu.default(*inputs, form.split()[-1])
        return out

    with corrected_interpreter(), nan_filled_empty():
        actual = torch.autograd.grad(run(form, op, *inputs), inputs, grad)
    pytorch = torch.autograd.grad(in_pytorch(*inputs), inputs, grad)
    exact: list[Any] = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(in_pytorch(*exact), exact, grad.double())
    for x, wanted, theirs in zip(actual, expected, pytorch, strict=True):
        assert_close_to_reference(x, wanted, theirs)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_input_gets_no_gradient(frozen: int) -> None:
    inputs = [
        seeded_tensor(shape, torch.float32, i).requires_grad_(i != frozen)
        for i, shape in enumerate([(3, 8), (5, 8), (5,)])
    ]
    with corrected_interpreter(), force_impl("triton"):
        linear_gelu(*inputs).square().sum().backward()
    assert [x.grad is not None for x in inputs] == [i != frozen for i in range(3)]


def test_gradcheck() -> None:
    inputs = [seeded_tensor(shape, torch.float64, i).requires_grad_() for i, shape in enumerate([(3, 4), (5, 4), (5,)])]
    op = torch.ops.vit_kernels.linear_gelu.default
    assert torch.autograd.gradcheck(lambda *inputs: op(*inputs, "eager"), inputs)
    assert torch.autograd.gradgradcheck(lambda *inputs: op(*inputs, "eager"), inputs)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl: str, requires_grad: bool) -> None:
    x = seeded_tensor((5, 3, 24), torch.float32, 0)[:, 1].detach()
    inputs = [t.requires_grad_(requires_grad) for t in (x, torch.rand(9, 24), torch.rand(9))]
    with corrected_interpreter():
        torch.library.opcheck(torch.ops.vit_kernels.linear_gelu.default, (*inputs, impl))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_inductor_makes_one_graph_for_any_number_of_tokens(form: str) -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(linear_gelu, backend=counter, fullgraph=True)
    weight, bias = seeded_tensor((40, 24), torch.bfloat16, 1), seeded_tensor((40,), torch.bfloat16, 2)
    for tokens in (1, 65, 2, 0, 33):
        x = seeded_tensor((tokens, 24), torch.bfloat16, tokens)
        mark_unbacked(x, 0)
        with corrected_interpreter(), force_impl(form):
            out = compiled(x, weight, bias)
        assert_close_to_reference(out, linear_gelu_reference(x, weight, bias), in_pytorch(x, weight, bias))
    assert counter.frame_count == 1


def test_rows_past_2_to_the_31_elements() -> None:
    x, weight, bias = (seeded_tensor(shape, torch.float16, i) for i, shape in enumerate([(4, 8), (4, 8), (4,)]))
    expected = run("triton", linear_gelu, x, weight, bias)
    with corrected_interpreter(), force_impl("triton"):
        assert torch.equal(linear_gelu(spread(x), weight, bias), expected)
        assert torch.equal(linear_gelu(x, spread(weight), bias), expected)


X, WEIGHT, BIAS = torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(6)

MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not a tensor": ({"x": [1.0]}, TypeError, "x: got list, expected a tensor [tokens, in_features]"),
    "rank 3": ({"x": X[None]}, ValueError, "x: got shape (1, 4, 8), expected [tokens, in_features]"),
    "integers": ({"x": X.int()}, TypeError, "x: got torch.int32 for implementation"),
    "transposed": ({"x": torch.zeros(8, 4).mT}, ValueError, "x: got strides (1, 4), expected a contiguous last"),
    "no weight": ({"weight": None}, TypeError, "weight: got NoneType, expected a tensor [out_features, in_features]"),
    "narrow weight": ({"weight": WEIGHT[:, :7]}, ValueError, "weight: got 7 input features, expected 8 as x has"),
    "double weight": ({"weight": WEIGHT.double()}, TypeError, "weight: got torch.float64, expected torch.float32 as x"),
    "strided weight": ({"weight": torch.zeros(8, 6).mT}, ValueError, "weight: got strides (1, 6), expected a contig"),
    "no bias": ({"bias": None}, TypeError, "bias: got NoneType, expected a tensor [out_features]"),
    "short bias": ({"bias": BIAS[:5]}, ValueError, "bias: got 5 features, expected 6 as weight has"),
    "strided bias": ({"bias": torch.zeros(12)[::2]}, ValueError, "bias: got strides (2,), expected a contiguous last"),
    "bias elsewhere": ({"bias": BIAS.to("meta")}, ValueError, "bias: got device meta, expected cpu as x has"),
}


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize(("wrong", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_the_error_names_the_argument(wrong: dict[str, Any], error: type[Exception], message: str, form: str) -> None:
    right: dict[str, Any] = {"x": X, "weight": WEIGHT, "bias": BIAS}
    with force_impl(form):
        linear_gelu(**right)
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            linear_gelu(**right | wrong)
