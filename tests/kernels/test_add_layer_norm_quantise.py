"""add_layer_norm_quantise is an addition, the norm of the sum, then the nearest 8-bit numbers, in one pass."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from vit_kernels import add_layer_norm_quantise, add_rms_norm_quantise, force_impl
from vit_kernels.reference import add_norm_reference
from vit_kernels.testing import (
    NanPadded,
    assert_close_to_reference,
    corrected_interpreter,
    nan_padded,
    seeded_tensor,
)
from vit_kernels.testing.strategies import dtypes, seeds, special_tensors, strided_tensors

from tests.kernels.eight_bit import FORMATS, assert_quantised, every_format
from tests.kernels.test_int64_offsets import spread
from tests.support import COMPILED_FORMS, FORMS, IMPLEMENTATIONS, launched_on, run

pytestmark = pytest.mark.costly

every_implementation = pytest.mark.parametrize("form", IMPLEMENTATIONS)
every_norm = pytest.mark.parametrize("norm", ["layer", "rms"])


def op_of(norm: str, bias: Tensor | None) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The public function, with the bias where there is one."""
    if norm == "rms":
        return add_rms_norm_quantise
    return lambda x, residual, weight, **options: add_layer_norm_quantise(x, residual, weight, bias, **options)  # type: ignore[arg-type]


def allowed(hidden: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Of float32's roundings in a norm, the error of a mean that is large beside the deviation among them."""
    centred = hidden.double() if bias is None else hidden.double() - hidden.double().mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    size = hidden.double().abs().amax(-1, keepdim=True)
    offset = 0.0 if bias is None else bias.double().abs().max()
    return ((size / deviation + 1) ** 2 * weight.double().abs().max() + offset) * 2**-20


@pytest.mark.quick
@every_format
def test_example(dtype: torch.dtype) -> None:
    """The Triton kernel on CPU tensors."""
    x, residual = (seeded_tensor((20, 16), torch.bfloat16, seed=seed) for seed in (0, 1))  # [tokens, channels]
    weight, bias = (seeded_tensor((16,), torch.bfloat16, seed=seed) for seed in (2, 3))
    with corrected_interpreter(), force_impl("triton"):
        hidden, q, scale = add_layer_norm_quantise(x, residual, weight, bias, dtype=dtype)
    expected, normed = add_norm_reference(x, residual, weight, bias, 1e-5)  # float64
    assert_close_to_reference(hidden, expected, x + residual)
    assert_quantised(q, scale, normed, allowed(hidden, weight, bias, 1e-5))


class Case(NamedTuple):
    x: NanPadded
    residual: NanPadded
    weight: Tensor
    bias: Tensor | None
    eps: float

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x.tensor, self.residual.tensor, self.weight


@st.composite
def cases(draw: st.DrawFn, norm: str) -> Case:
    """Awkward widths in any layout, some of large mean."""
    tokens, channels, dtype = draw(st.sampled_from([7, 0])), draw(st.integers(2, 72)), draw(dtypes())
    x, residual = (draw(strided_tensors((tokens, channels), dtype)) for _ in range(2))
    x.tensor.add_(draw(st.sampled_from([0, 8])))
    of_parameters = draw(st.sampled_from([dtype, torch.float32]))
    weight, bias = (
        nan_padded(seeded_tensor((channels,), of_parameters, draw(seeds())), [(8, 8)]).tensor for _ in range(2)
    )
    return Case(x, residual, weight, bias if norm == "layer" else None, draw(st.sampled_from([1e-5, 0.5])))


@pytest.mark.quick
@pytest.mark.parametrize("form", FORMS)
@every_norm
@every_format
@given(data=st.data())
def test_matches_the_reference(form: str, dtype: torch.dtype, norm: str, data: st.DataObject) -> None:
    case = data.draw(cases(norm))
    hidden, q, scale = run(form, op_of(norm, case.bias), *case.tensors, eps=case.eps, dtype=dtype)
    expected, normed = add_norm_reference(*case.tensors, case.bias, case.eps)
    assert torch.equal(hidden, case.x.tensor + case.residual.tensor)
    assert_close_to_reference(hidden, expected, hidden)
    assert hidden.is_contiguous()
    assert q.dtype == dtype
    assert_quantised(q, scale, normed, allowed(hidden, case.weight, case.bias, case.eps))
    case.x.assert_padding_untouched()
    case.residual.assert_padding_untouched()


@pytest.mark.parametrize("form", [*IMPLEMENTATIONS, *COMPILED_FORMS])
@every_norm
@every_format
@given(data=st.data(), x_dtype=dtypes())
def test_nan_and_infinity_reach_the_scale(
    form: str, dtype: torch.dtype, norm: str, data: st.DataObject, x_dtype: torch.dtype
) -> None:
    x, residual = (data.draw(special_tensors((5, 24), x_dtype)) for _ in range(2))
    weight, bias = (data.draw(special_tensors((24,), x_dtype)) for _ in range(2))
    row = data.draw(st.integers(0, 4))
    x[row] = residual[row] = 0
    given_bias = bias if norm == "layer" else None
    hidden, q, scale = run(form, op_of(norm, given_bias), x, residual, weight, dtype=dtype)
    _, normed = add_norm_reference(x, residual, weight, given_bias, 1e-5 if norm == "layer" else 1e-6)
    torch.testing.assert_close(hidden, x + residual, rtol=0, atol=0, equal_nan=True)
    # Squares, or products with the weight, beyond float32.
    squares = hidden.double().square().sum(-1).nan_to_num(0, 0)
    largest = 24 * weight.double().abs().nan_to_num(0, 0).max() + bias.double().abs().nan_to_num(0, 0).max()
    overflows = (squares > torch.finfo(torch.float32).max) | (largest > torch.finfo(torch.float32).max)
    overflows |= (hidden.double().abs().nan_to_num(0, 0).amax(-1) > 1e15) & hidden.isfinite().all(-1)
    not_finite = ~normed.isfinite().all(-1)
    assert (((~scale.isfinite()) == not_finite) | overflows).all()
    assert (scale.isnan() == normed.isnan().any(-1))[~overflows].all()
    assert not q[~scale.isfinite()].float().any()


@every_implementation
@every_norm
@every_format
def test_a_token_of_zeros_is_the_bias(form: str, norm: str, dtype: torch.dtype) -> None:
    zeros, weight = torch.zeros(3, 24), torch.ones(24)
    bias = seeded_tensor((24,), torch.float32, 0) if norm == "layer" else None
    hidden, q, scale = run(form, op_of(norm, bias), zeros, zeros, weight, dtype=dtype)
    assert not hidden.any()
    assert_quantised(q, scale, (zeros if bias is None else zeros + bias).double(), 0.0)


@every_implementation
@every_norm
@pytest.mark.parametrize(("tokens", "channels"), [(0, 3), (2, 0), (0, 0)])
def test_without_elements(form: str, norm: str, tokens: int, channels: int) -> None:
    x, weight = torch.ones(tokens, channels), torch.ones(channels)
    hidden, q, scale = run(form, op_of(norm, weight), x, x, weight)
    assert hidden.shape == q.shape == (tokens, channels)
    assert scale.shape == (tokens,)
    assert scale.isfinite().all()


@every_implementation
def test_tokens_are_independent(form: str) -> None:
    x, residual, weight = (seeded_tensor(shape, torch.float32, i) for i, shape in enumerate([(9, 40), (9, 40), (40,)]))
    clean = run(form, add_rms_norm_quantise, x, residual, weight)
    residual[4, 7] = torch.nan
    kept = torch.arange(9) != 4
    for one, wanted in zip(run(form, add_rms_norm_quantise, x, residual, weight), clean, strict=True):
        assert torch.equal(one[kept], wanted[kept])


def test_reads_no_copy_and_writes_each_output_once() -> None:
    x, residual = torch.ones(21, 3, 24)[:, 1], torch.ones(21, 2, 24)[:, 0]
    weight, bias = torch.ones(24), torch.zeros(24)
    pointers = launched_on(add_layer_norm_quantise, x, residual, weight, bias)
    assert {t.data_ptr() for t in (x, residual, weight, bias)} <= pointers
    assert len(pointers) == 7, "and three outputs"
    with corrected_interpreter() as counts, force_impl("triton"):
        add_layer_norm_quantise(x, residual, weight, bias)
    assert counts.bytes_loaded == (2 * x.numel() + 21 * 2 * 24) * 4
    assert counts.bytes_stored == 21 * (24 * 4 + 24 + 4)


def test_rows_past_2_to_the_31_elements() -> None:
    x, weight = seeded_tensor((4, 8), torch.float16, 0), seeded_tensor((8,), torch.float16, 1)
    expected = run("triton", add_layer_norm_quantise, x, x, weight, weight)
    with corrected_interpreter(), force_impl("triton"):
        for inputs in ((spread(x), x), (x, spread(x))):
            for actual, wanted in zip(add_layer_norm_quantise(*inputs, weight, weight), expected, strict=True):
                assert torch.equal(actual, wanted)


@every_norm
def test_it_is_that_norm_of_pytorch(norm: str) -> None:
    x, weight, bias = (seeded_tensor(shape, torch.float32, i) for i, shape in enumerate([(9, 40), (40,), (40,)]))
    wanted = (
        F.layer_norm(2 * x, (40,), weight, bias, 1e-5) if norm == "layer" else F.rms_norm(2 * x, (40,), weight, 1e-6)
    )
    for form in IMPLEMENTATIONS:
        _, q, scale = run(form, op_of(norm, bias), x, x, weight)
        assert ((q * scale[:, None] - wanted).abs() <= scale[:, None] * 0.501).all()


@every_norm
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl: str, norm: str) -> None:
    x, residual = seeded_tensor((5, 3, 24), torch.float32, 0)[:, 1], seeded_tensor((5, 24), torch.float32, 1)
    bias = torch.rand(24) if norm == "layer" else None
    op = torch.ops.vit_kernels.add_layer_norm_quantise.default
    with corrected_interpreter():
        for dtype in FORMATS[:2]:
            torch.library.opcheck(op, (x, residual, torch.rand(24), bias, 1e-5, dtype, impl))


@pytest.mark.usefixtures("fresh_dynamo")
@every_norm
@every_implementation
def test_inductor_makes_one_graph_for_any_number_of_tokens(form: str, norm: str) -> None:
    counter = CompileCounterWithBackend("inductor")
    weight, bias = (seeded_tensor((24,), torch.bfloat16, seed) for seed in (1, 2))
    compiled = torch.compile(op_of(norm, bias), backend=counter, fullgraph=True)
    for tokens in (1, 65, 2, 0, 33):
        x = seeded_tensor((tokens, 24), torch.bfloat16, tokens)
        mark_unbacked(x, 0)
        with corrected_interpreter(), force_impl(form):
            hidden, q, scale = compiled(x, x, weight)
        eps, of_norm = (1e-5, bias) if norm == "layer" else (1e-6, None)
        _, normed = add_norm_reference(x, x, weight, of_norm, eps)
        assert torch.equal(hidden, x + x)
        assert_quantised(q, scale, normed, allowed(hidden, weight, of_norm, eps))
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@every_implementation
def test_derivatives_are_refused_by_name(form: str) -> None:
    x, weight = torch.ones(4, 8), torch.ones(8, requires_grad=True)
    with corrected_interpreter(), force_impl(form):
        with pytest.raises(
            ValueError, match=r"^weight: got a tensor that requires grad, .*add_rms_norm_quantise round"
        ):
            add_rms_norm_quantise(x, x, weight)
        with torch.no_grad():
            assert not add_rms_norm_quantise(x, x, weight)[2].requires_grad
        op = torch.ops.vit_kernels.add_layer_norm_quantise.default
        direct = op(x, x, weight, None, 1e-6, torch.int8, form)
        with pytest.raises(NotImplementedError, match="add_layer_norm_quantise rounds to 8 bits and has no gradient"):
            direct[2].sum().backward()
        with (
            forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match=r"^residual: got a tensor with a tangent"),
        ):
            add_rms_norm_quantise(x, forward_ad.make_dual(x, x), weight.detach())


@every_norm
@every_implementation
def test_autocast_vmap_and_negation(form: str, norm: str) -> None:
    x, weight, bias = (seeded_tensor(shape, torch.float32, i) for i, shape in enumerate([(6, 24), (24,), (24,)]))
    op = op_of(norm, bias)
    expected = run(form, op, x, x, weight)

    def assert_same(actual: Any) -> None:
        for one, wanted in zip(actual, expected, strict=True):
            assert torch.equal(one.reshape(wanted.shape), wanted)

    with torch.autocast("cpu", torch.bfloat16):
        assert_same(run(form, op, x, x, weight))
    assert_same(run(form, op, torch._neg_view(-x), x, weight))
    with corrected_interpreter(), force_impl(form):
        assert_same(torch.func.vmap(lambda x: op(x, x, weight))(x.view(2, 3, 24)))


X, WEIGHT = torch.zeros(4, 8), torch.zeros(8)
MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not a tensor": ({"x": [1.0]}, TypeError, "x: got list, expected a tensor [tokens, channels]"),
    "rank 3": ({"x": X[None]}, ValueError, "x: got shape (1, 4, 8), expected [tokens, channels]"),
    "integers": ({"x": X.int()}, TypeError, "x: got torch.int32, expected one of (torch.float32"),
    "double": ({"x": X.double()}, TypeError, "x: got torch.float64, expected one of (torch.float32"),
    "transposed": ({"residual": torch.zeros(8, 4).mT}, ValueError, "residual: got strides (1, 4), expected a contig"),
    "other dtype": ({"residual": X.half()}, TypeError, "residual: got torch.float16, expected torch.float32 as x has"),
    "fewer tokens": (
        {"residual": X[:3]},
        ValueError,
        "residual: expected as many tokens as x has, got residual 3, x 4",
    ),
    "fewer channels": ({"residual": X[:, :7]}, ValueError, "residual: got 7 channels, expected 8 as x has"),
    "no weight": ({"weight": None}, TypeError, "weight: got NoneType, expected a tensor [channels]"),
    "short weight": ({"weight": WEIGHT[:7]}, ValueError, "weight: got 7 channels, expected 8 as x has"),
    "half weight": ({"weight": WEIGHT.half()}, TypeError, "weight: got torch.float16, expected torch.float32 as x has"),
    "weight elsewhere": ({"weight": WEIGHT.to("meta")}, ValueError, "weight: got device meta, expected cpu as x has"),
    "no bias": ({"bias": None}, TypeError, "bias: got NoneType, expected a tensor [channels]"),
    "strided bias": ({"bias": torch.zeros(16)[::2]}, ValueError, "bias: got strides (2,), expected a contiguous last"),
    "eps": ({"eps": 0.0}, ValueError, "eps: got 0.0, expected a positive finite number"),
    "eps of text": ({"eps": "1e-5"}, TypeError, "eps: got str, expected a number"),
    "dtype": ({"dtype": torch.bfloat16}, TypeError, "dtype: got torch.bfloat16, expected one of (torch.int8,"),
}


@every_implementation
@pytest.mark.parametrize(("wrong", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_the_error_names_the_argument(wrong: dict[str, Any], error: type[Exception], message: str, form: str) -> None:
    right: dict[str, Any] = {"x": X, "residual": X, "weight": WEIGHT, "bias": WEIGHT}
    with corrected_interpreter(), force_impl(form):
        add_layer_norm_quantise(**right)
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            add_layer_norm_quantise(**right | wrong)
