"""quantise_rows is an activation in float32, then the nearest 8-bit numbers over the largest magnitude of each row."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from vit_kernels import force_impl, quantise_rows
from vit_kernels.reference import activation_reference
from vit_kernels.testing import corrected_interpreter, seeded_tensor
from vit_kernels.testing.strategies import dtypes, seeds, special_tensors, strided_tensors

from tests.kernels.eight_bit import LARGEST, assert_quantised, every_format
from tests.kernels.test_int64_offsets import spread
from tests.support import COMPILED_FORMS, FORMS, IMPLEMENTATIONS, launched_on, run

ACTIVATIONS = (None, "gelu", "gelu_tanh", "gated_silu")
pytestmark = pytest.mark.costly

every_implementation = pytest.mark.parametrize("form", IMPLEMENTATIONS)


def allowed(x: Tensor) -> Tensor:
    """Of float32's roundings in an activation: by the largest value, or product of the gated form."""
    return x.double().abs().amax(-1, keepdim=True).square().clamp(min=1) * 2**-20 if x.shape[1] else x.new_zeros(1)


@pytest.mark.quick
@every_format
def test_example(dtype: torch.dtype) -> None:
    """The Triton kernel on CPU tensors."""
    x = seeded_tensor((20, 16), torch.bfloat16, seed=0)  # [rows, features]
    with corrected_interpreter(), force_impl("triton"):
        q, scale = quantise_rows(x, activation="gelu", dtype=dtype)  # [rows, features], [rows]
    expected = activation_reference(x, "gelu")  # float64
    assert ((q.double() * scale[:, None] - expected).abs() <= expected.abs() / 16 + scale[:, None] * 0.51).all()
    assert_quantised(q, scale, expected, allowed(x))


@pytest.mark.quick
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_format
@given(data=st.data(), x_dtype=dtypes())
def test_matches_the_reference(
    form: str, dtype: torch.dtype, activation: str | None, data: st.DataObject, x_dtype: torch.dtype
) -> None:
    rows, features = data.draw(st.sampled_from([7, 0])), data.draw(st.integers(1, 70))
    features *= 1 + (activation == "gated_silu")
    x = data.draw(strided_tensors((rows, features), x_dtype))
    x.tensor.mul_(data.draw(st.sampled_from([1.0, 6.0, 1e-3])))
    q, scale = run(form, quantise_rows, x.tensor, activation=activation, dtype=dtype)
    assert q.dtype == dtype
    error = 0.0 if activation is None else allowed(x.tensor)
    assert_quantised(q, scale, activation_reference(x.tensor, activation), error)
    x.assert_padding_untouched()


@pytest.mark.parametrize("form", [*IMPLEMENTATIONS, *COMPILED_FORMS])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_format
@given(data=st.data(), x_dtype=dtypes())
def test_nan_and_infinity_reach_the_scale(
    form: str, dtype: torch.dtype, activation: str | None, data: st.DataObject, x_dtype: torch.dtype
) -> None:
    x = data.draw(special_tensors((5, 24), x_dtype))
    x[data.draw(st.integers(0, 4))] = 0
    q, scale = run(form, quantise_rows, x, activation=activation, dtype=dtype)
    expected = activation_reference(x, activation)
    limit = torch.finfo(torch.float32)
    # Beyond float32 anything may come, and GELU's cube is there before its result.
    overflows = (expected.abs() > limit.max).any(-1) & ~expected.isinf().any(-1)
    if activation == "gated_silu":
        overflows |= (x[:, :12].double().abs() * x[:, 12:].double().abs()).nan_to_num(0, 0).amax(-1) > limit.max
    kept = ~overflows
    finite = x.double().abs().nan_to_num(0, 0).amax(-1, keepdim=True)
    error = torch.zeros_like(finite) if activation is None else (finite.square() + 1) * 2**-20
    assert_quantised(q[kept], scale[kept], expected[kept], error[kept])


@every_implementation
@every_format
def test_rows_of_zeros_and_of_tiny_numbers(form: str, dtype: torch.dtype) -> None:
    x = torch.zeros(4, 20)
    x[1, 3], x[2, 3], x[3] = 1e-45, -1e-37, 2.0**-120
    q, scale = run(form, quantise_rows, x, dtype=dtype)
    assert not q[0].float().any()
    assert (scale >= 2.0**-126).all()
    assert ((q.double() * scale.double()[:, None] - x.double()).abs() <= scale.double()[:, None] / 2).all()
    # Its scale would be below the smallest.
    assert (q[3].float() == 64).all()


@every_implementation
@every_format
@pytest.mark.parametrize(("rows", "features"), [(0, 3), (2, 0), (0, 0)])
def test_without_elements(form: str, dtype: torch.dtype, rows: int, features: int) -> None:
    for activation in ACTIVATIONS:
        width = 2 * features if activation == "gated_silu" else features
        q, scale = run(form, quantise_rows, torch.ones(rows, width), activation=activation, dtype=dtype)
        assert q.shape == (rows, features)
        assert (scale == (2.0**-126)).all() if not features else scale.shape == (rows,)


@every_implementation
@every_format
def test_halves_are_rounded_to_even(form: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, 126.5]]) * (LARGEST[dtype] / 127)
    q, scale = run(form, quantise_rows, x, dtype=dtype)
    assert scale.item() == LARGEST[dtype] / 127 / (LARGEST[dtype] / 127)
    if dtype == torch.int8:
        assert q.tolist() == [[127, 0, 2, -2, 126]]


@every_implementation
def test_rows_are_independent(form: str) -> None:
    x = seeded_tensor((9, 40), torch.float32, 0)
    clean, clean_scale = run(form, quantise_rows, x, activation="gelu")
    x[4, 7] = torch.nan
    q, scale = run(form, quantise_rows, x, activation="gelu")
    kept = torch.arange(9) != 4
    assert torch.equal(q[kept], clean[kept])
    assert torch.equal(scale[kept], clean_scale[kept])
    assert scale[4].isnan()


def test_reads_no_copy_and_writes_the_output_once() -> None:
    x = torch.ones(21, 3, 24)[:, 1]
    pointers = launched_on(quantise_rows, x)
    assert x.data_ptr() in pointers
    assert len(pointers) == 3, "and both outputs"
    with corrected_interpreter() as counts, force_impl("triton"):
        quantise_rows(x, activation="gated_silu")
    assert counts.bytes_loaded == x.numel() * 4
    assert counts.bytes_stored == 21 * 12 + 21 * 4


def test_rows_past_2_to_the_31_elements() -> None:
    x = seeded_tensor((4, 8), torch.float16, 0)
    expected = run("triton", quantise_rows, x)
    with corrected_interpreter(), force_impl("triton"):
        for actual, wanted in zip(quantise_rows(spread(x)), expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("activation", [None, "gated_silu"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl: str, activation: str | None) -> None:
    x = seeded_tensor((5, 3, 24), torch.float32, 0)[:, 1]
    with corrected_interpreter():
        for dtype in (torch.int8, torch.float8_e4m3fn):
            op = torch.ops.vit_kernels.quantise_rows.default
            torch.library.opcheck(op, (x, activation, dtype, impl))


@pytest.mark.usefixtures("fresh_dynamo")
@every_implementation
def test_inductor_makes_one_graph_for_any_number_of_rows(form: str) -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(quantise_rows, backend=counter, fullgraph=True)
    for rows in (1, 65, 2, 0, 33):
        x = seeded_tensor((rows, 24), torch.bfloat16, rows)
        mark_unbacked(x, 0)
        with corrected_interpreter(), force_impl(form):
            q, scale = compiled(x, activation="gated_silu")
        assert_quantised(q, scale, activation_reference(x, "gated_silu"), allowed(x))
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@every_implementation
def test_derivatives_are_refused_by_name(form: str) -> None:
    x = torch.ones(4, 8, requires_grad=True)
    with corrected_interpreter(), force_impl(form):
        with pytest.raises(ValueError, match=r"^x: got a tensor that requires grad, .*quantise_rows rounds to 8 bits"):
            quantise_rows(x)
        with torch.no_grad():
            assert not quantise_rows(x)[1].requires_grad
        direct = torch.ops.vit_kernels.quantise_rows.default(x, None, torch.int8, form)
        with pytest.raises(NotImplementedError, match="quantise_rows rounds to 8 bits and has no gradient"):
            direct[1].sum().backward()
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"^x: got a tensor with a tangent"):
            quantise_rows(forward_ad.make_dual(x.detach(), x.detach()))


@every_implementation
def test_autocast_vmap_and_negation(form: str) -> None:
    x = seeded_tensor((6, 24), torch.float32, 0)
    expected = run(form, quantise_rows, x, activation="gelu")

    def assert_same(actual: Any) -> None:
        for one, wanted in zip(actual, expected, strict=True):
            assert torch.equal(one.reshape(wanted.shape), wanted)

    with torch.autocast("cpu", torch.bfloat16):
        assert_same(run(form, quantise_rows, x, activation="gelu"))
    assert_same(run(form, quantise_rows, torch._neg_view(-x), activation="gelu"))
    with corrected_interpreter(), force_impl(form):
        assert_same(torch.func.vmap(lambda x: quantise_rows(x, activation="gelu"))(x.view(2, 3, 24)))


X = torch.zeros(4, 7)
MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not a tensor": ({"x": [1.0]}, TypeError, "x: got list, expected a tensor [rows, features]"),
    "rank 3": ({"x": X[None]}, ValueError, "x: got shape (1, 4, 7), expected [rows, features]"),
    "integers": ({"x": X.int()}, TypeError, "x: got torch.int32, expected one of (torch.float32"),
    "double": ({"x": X.double()}, TypeError, "x: got torch.float64, expected one of (torch.float32"),
    "transposed": ({"x": torch.zeros(7, 4).mT}, ValueError, "x: got strides (1, 4), expected a contiguous last"),
    "an odd gate": ({"activation": "gated_silu"}, ValueError, "x: got 7 features, expected an even number beside"),
    "activation": ({"activation": "relu"}, ValueError, "activation: got 'relu', expected None or one of ('gelu', 'ge"),
    "dtype": ({"dtype": torch.uint8}, TypeError, "dtype: got torch.uint8, expected one of (torch.int8,"),
}


@every_implementation
@pytest.mark.parametrize(("wrong", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_the_error_names_the_argument(wrong: dict[str, Any], error: type[Exception], message: str, form: str) -> None:
    with corrected_interpreter(), force_impl(form):
        quantise_rows(X)
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            quantise_rows(**{"x": X} | wrong)


def test_the_stock_interpreter_is_refused() -> None:
    with force_impl("triton"):
        with pytest.raises(RuntimeError, match=r"interpreter is wrong in torch.float8_e4m3fn; call it inside"):
            quantise_rows(X, dtype=torch.float8_e4m3fn)
        with pytest.raises(RuntimeError, match=r"interpreter is wrong in bfloat16; call it inside"):
            quantise_rows(X.bfloat16())


@given(seed=seeds())
def test_a_row_of_any_width_takes_one_block(seed: int) -> None:
    x = seeded_tensor((2, 1500), torch.float32, seed)
    q, scale = run("triton", quantise_rows, x)
    assert_quantised(q, scale, x.double(), 0.0)
