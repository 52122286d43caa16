"""scaled_linear is an exact product of 8-bit numbers, its scales, bias and activation, rounded once."""

import os
import re
import subprocess
import sys
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from vit_kernels import force_impl, scaled_linear
from vit_kernels import scaled_linear as op
from vit_kernels._triton import configurations
from vit_kernels._triton.configurations import scaled_linear_candidates
from vit_kernels.reference import scaled_linear_reference
from vit_kernels.testing import (
    NanPadded,
    assert_close_to_reference,
    corrected_interpreter,
    nan_filled_empty,
    nan_padded,
    seeded_tensor,
)
from vit_kernels.testing.strategies import dtypes, seeds, special_tensors

from tests.kernels.eight_bit import E4M3, FORMATS, LARGEST, assert_nearest, every_format, numbers, scales
from tests.kernels.test_int64_offsets import spread
from tests.support import COMPILED_FORMS, FORMS, IMPLEMENTATIONS, launched_on, run

pytestmark = pytest.mark.costly

ACTIVATIONS = (None, "gelu", "gelu_tanh")
BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2}
every_implementation = pytest.mark.parametrize("form", IMPLEMENTATIONS)


@pytest.mark.quick
@every_format
def test_example(dtype: torch.dtype) -> None:
    """The Triton kernel on CPU tensors."""
    x, weight = numbers((20, 16), dtype, seed=0), numbers((24, 16), dtype, seed=1)  # [tokens, in], [out, in]
    x_scale, weight_scale = scales(20, 0.01, seed=2), scales(24, 0.01, seed=3)  # a row each
    with corrected_interpreter(), force_impl("triton"):
        out = scaled_linear(x, weight, x_scale, weight_scale, activation="gelu")  # [tokens, out], bfloat16
    expected = scaled_linear_reference(x, weight, x_scale, weight_scale, activation="gelu")  # float64
    assert_close_to_reference(out, expected, expected.bfloat16())


class Case(NamedTuple):
    x: NanPadded
    weight: NanPadded
    x_scale: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    activation: str | None

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        return self.x.tensor, self.weight.tensor, self.x_scale, self.weight_scale, self.bias


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    """Awkward sizes in any layout, with sums on both sides of the GELU's bend."""
    tokens, in_features, out_features = (
        draw(st.sampled_from([19, 0])),
        draw(st.integers(1, 70)),
        draw(st.integers(8, 40)),
    )
    gap = st.tuples(st.integers(0, 3), st.integers(0, 9))
    x, weight = (
        nan_padded(numbers((rows, in_features), dtype, draw(seeds())), [draw(gap), draw(gap)])
        for rows in (tokens, out_features)
    )
    x_scale = scales(tokens, 3 / LARGEST[dtype], draw(seeds()))
    weight_scale = scales(out_features, 2 * in_features**-0.5 / LARGEST[dtype], draw(seeds()))
    bias = seeded_tensor((out_features,), draw(dtypes()), draw(seeds()))
    parts = [nan_padded(t, [(8, 8)]).tensor for t in (x_scale, weight_scale, bias)]
    activation = draw(st.sampled_from(ACTIVATIONS))
    return Case(x, weight, parts[0], parts[1], draw(st.sampled_from([None, parts[2]])), activation)


def assert_rounded_once(out: Tensor, case: Case) -> None:
    """Within the roundings of float32, of what is added up, and one to the dtype of the output.

    Sums of int8 are exact; those of e4m3 have a rounding for each feature.
    """
    expected = scaled_linear_reference(*case.arguments, activation=case.activation)
    x, weight, x_scale, weight_scale, bias = case.arguments
    terms = [t.float().abs() if t.dtype != torch.int8 else t.float() for t in (x, weight)]
    magnitude = scaled_linear_reference(terms[0], terms[1], x_scale, weight_scale).abs()
    magnitude += 0.0 if bias is None else bias.double().abs()
    roundings = 10 + (0 if x.dtype == torch.int8 else x.shape[1])
    limits = torch.finfo(out.dtype)
    last = limits.eps / 2 * expected.abs().clamp(min=limits.smallest_normal)
    assert ((out.double() - expected).abs() <= last + roundings * 2**-24 * magnitude).all()


@pytest.mark.quick
@every_format
@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_matches_the_reference(form: str, dtype: torch.dtype, data: st.DataObject) -> None:
    case, out_dtype = data.draw(cases(dtype)), data.draw(dtypes())
    out = run(form, scaled_linear, *case.arguments, activation=case.activation, out_dtype=out_dtype)
    assert_rounded_once(out, case)
    assert out.dtype == out_dtype
    assert out.is_contiguous()
    case.x.assert_padding_untouched()
    case.weight.assert_padding_untouched()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", E4M3, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_stores_e4m3_over_a_given_scale(form: str, dtype: torch.dtype, data: st.DataObject) -> None:
    case = data.draw(cases(dtype))
    # Some rows saturate.
    out_scale = scales(len(case.x_scale), data.draw(st.sampled_from([1e-3, 1e-2, 1.0])), data.draw(seeds()))
    out = run(form, scaled_linear, *case.arguments, activation=case.activation, out_scale=out_scale)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_nearest(out, scaled_linear_reference(*case.arguments, activation=case.activation, out_scale=out_scale))


@every_format
@given(tokens=st.integers(1, 70), in_features=st.integers(0, 50), out_features=st.integers(1, 70), seed=seeds())
def test_blocks_around_every_edge(
    dtype: torch.dtype, tokens: int, in_features: int, out_features: int, seed: int
) -> None:
    from vit_kernels._triton.scaled_linear import launch

    x, weight = (
        nan_padded(numbers((rows, in_features), dtype, seed + i), [(1, 1), (0, 3 + i)]).tensor
        for i, rows in enumerate((tokens, out_features))
    )
    parts = scales(tokens, 0.01, seed), scales(out_features, 0.01, seed + 1)
    with corrected_interpreter(), nan_filled_empty():
        out = launch(x, weight, *parts, None, None, None, torch.float32, configuration=BLOCKS)
    expected = scaled_linear_reference(x, weight, *parts)
    magnitude = scaled_linear_reference(x.float().abs(), weight.float().abs(), *parts)
    # Each term's share of the roundings of its sum and of the scales.
    assert ((out.double() - expected).abs() <= (in_features + 4) * 2**-24 * magnitude).all()


@every_format
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942", "gfx950"])
def test_every_kept_configuration_gives_the_same(target: str, dtype: torch.dtype) -> None:
    from vit_kernels._triton.scaled_linear import launch

    x, weight = numbers((130, 72), dtype, 0), numbers((140, 72), dtype, 1)
    parts = scales(130, 0.01, 2), scales(140, 0.01, 3)
    expected = scaled_linear_reference(x, weight, *parts)
    for configuration in scaled_linear_candidates(dtype, target):
        with corrected_interpreter(), nan_filled_empty():
            out = launch(x, weight, *parts, None, None, None, torch.float32, configuration=configuration)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


def test_products_that_a_target_does_not_have_are_refused() -> None:
    kept = {
        target: {str(dtype)[6:] for dtype in FORMATS if scaled_linear_candidates(dtype, target)}
        for target in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_103", "gfx942", "gfx950")
    }
    assert kept == {
        "sm_80": {"int8"},
        "sm_86": {"int8"},
        "sm_90": {"int8", "float8_e4m3fn"},
        "sm_100": {"int8", "float8_e4m3fn"},
        "sm_103": {"int8", "float8_e4m3fn"},
        "gfx942": {"int8", "float8_e4m3fnuz"},
        "gfx950": {"int8", "float8_e4m3fn"},
    }
    x = numbers((4, 16), torch.float8_e4m3fn, 0)
    with (
        corrected_interpreter(),
        force_impl("triton"),
        mock.patch("vit_kernels._triton.scaled_linear.scaled_linear_candidates", return_value=[]),
        pytest.raises(TypeError, match=r"^x: got torch.float8_e4m3fn on interpreter, which has no products of it"),
    ):
        scaled_linear(x, x, torch.ones(4), torch.ones(4))


@every_implementation
def test_sums_of_int8_are_exact(form: str) -> None:
    x = torch.full((3, 131071), -128, dtype=torch.int8)
    x[1], x[2, ::2] = 127, 127
    large = BLOCKS | {"BLOCK_K": 8192}
    with mock.patch("vit_kernels._triton.scaled_linear.scaled_linear_candidates", return_value=[large]):
        out = run(form, scaled_linear, x, x[:1], torch.ones(3), torch.ones(1), out_dtype=torch.float32)
    expected = x.long() @ x[:1].long().T
    assert torch.equal(out, expected.float())
    assert int(expected.max()) == 131071 * 128**2 < 2**31
    with pytest.raises(ValueError, match=r"^x: got 131072 features of int8, expected at most 131071"):
        run(form, scaled_linear, *[torch.zeros(1, 131072, dtype=torch.int8)] * 2, torch.ones(1), torch.ones(1))


@every_implementation
def test_both_forms_of_the_gelu(form: str) -> None:
    x = torch.arange(-64, 64).to(torch.int8)[:, None]
    one, scale = torch.ones(1, 1, dtype=torch.int8), torch.full((128,), 1 / 16)
    for activation, approximate in (("gelu", "none"), ("gelu_tanh", "tanh")):
        out = run(form, scaled_linear, x, one, scale, torch.ones(1), activation=activation, out_dtype=torch.float32)
        expected = torch.nn.functional.gelu(x.double() / 16, approximate=approximate)
        assert (out - expected).abs().max() < 1e-6


@pytest.mark.parametrize("form", [*IMPLEMENTATIONS, *COMPILED_FORMS])
@every_format
@given(data=st.data(), out_dtype=dtypes())
def test_special_values(form: str, dtype: torch.dtype, data: st.DataObject, out_dtype: torch.dtype) -> None:
    """NaN and infinities of the scales, the bias and e4m3 come where they do in fp64."""
    x, weight = numbers((5, 24), dtype, data.draw(seeds())), numbers((9, 24), dtype, data.draw(seeds()))
    if dtype != torch.int8 and data.draw(st.booleans()):
        x[data.draw(st.integers(0, 4)), 3] = torch.nan
        weight[data.draw(st.integers(0, 8)), 5] = torch.nan
    x[data.draw(st.integers(0, 4))] = 0
    x_scale, weight_scale, bias = (data.draw(special_tensors((n,), torch.float32)) for n in (5, 9, 9))
    arguments, activation = (x, weight, x_scale, weight_scale, bias), data.draw(st.sampled_from(ACTIVATIONS))
    expected = scaled_linear_reference(*arguments, activation=activation)
    finite = [t.double().abs().nan_to_num(0, 0) for t in arguments]
    largest = (finite[0] @ finite[1].T) * finite[2][:, None]
    sums = largest * finite[3] + finite[4]
    # Beyond float32 anything may come, and below its normal numbers too.
    limit = torch.finfo(torch.float32)
    excused = (largest > limit.max / 4) | (sums > limit.max / 4) | ((largest > 0) & (largest < limit.smallest_normal))
    excused |= (sums > 0) & (sums < limit.smallest_normal)
    # The cube in the tanh form; the cdf of fp64 is zero later than that of float32.
    u = scaled_linear_reference(*arguments)
    excused |= (u < -5) & (activation is not None) & (u > -torch.inf)
    out = run(form, scaled_linear, *arguments, activation=activation, out_dtype=out_dtype)
    wanted = expected.to(out_dtype)
    same = (out.isnan() & wanted.isnan()) | (out == wanted) | (wanted.isfinite() & out.isfinite())
    largest_out = torch.finfo(out_dtype).max
    same |= (expected.abs() > largest_out * (1 - 1e-6)) & (expected.abs() < largest_out * (1 + 2**-6))
    assert (same | excused).all()
    if dtype != torch.int8:
        out_scale = data.draw(special_tensors((5,), torch.float32))
        q = run(form, scaled_linear, *arguments, activation=activation, out_scale=out_scale)
        over = scaled_linear_reference(*arguments, activation=activation, out_scale=out_scale)
        excused |= (out_scale.abs() < limit.smallest_normal)[:, None] | (over.abs() > limit.max)
        assert ((q.float().isnan() == ~over.isfinite()) | excused).all()


@every_implementation
@every_format
@pytest.mark.parametrize(("tokens", "in_features", "out_features"), [(0, 3, 2), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
def test_without_elements(form: str, dtype: torch.dtype, tokens: int, in_features: int, out_features: int) -> None:
    x, weight = torch.ones(tokens, in_features).to(dtype), torch.ones(out_features, in_features).to(dtype)
    bias = torch.full((out_features,), 2.0)
    out = run(form, scaled_linear, x, weight, torch.ones(tokens), torch.ones(out_features), bias)
    assert torch.equal(out, torch.full((tokens, out_features), 2.0 + in_features).bfloat16())


@every_implementation
@every_format
def test_tokens_and_features_are_independent(form: str, dtype: torch.dtype) -> None:
    x, weight = numbers((19, 40), dtype, 0), numbers((37, 40), dtype, 1)
    x_scale, weight_scale = scales(19, 0.01, 2), scales(37, 0.01, 3)
    clean = run(form, scaled_linear, x, weight, x_scale, weight_scale)
    x_scale[7], weight_scale[5] = torch.nan, torch.nan
    out = run(form, scaled_linear, x, weight, x_scale, weight_scale)
    assert out[7].isnan().all()
    assert out[:, 5].isnan().all()
    kept = torch.ones_like(out, dtype=torch.bool)
    kept[7], kept[:, 5] = False, False
    assert torch.equal(out[kept], clean[kept])


@every_format
def test_reads_no_copy_and_writes_the_output_once(dtype: torch.dtype) -> None:
    x, weight = torch.ones(21, 3, 24).to(dtype)[:, 1], torch.ones(70, 24).to(dtype)
    parts = torch.ones(21), torch.ones(70), torch.ones(70)
    pointers = launched_on(scaled_linear, x, weight, *parts)
    assert {t.data_ptr() for t in (x, weight, *parts)} <= pointers
    assert len(pointers) == 6, "and the output"
    for options, itemsize in (({"out_dtype": torch.float16}, 2), ({"out_scale": torch.ones(21)}, 1)):
        if itemsize == 2 or dtype != torch.int8:
            with corrected_interpreter() as counts, force_impl("triton"):
                scaled_linear(x, weight, *parts, **options)
            assert counts.bytes_stored == 21 * 70 * itemsize


@every_format
def test_rows_past_2_to_the_31_elements(dtype: torch.dtype) -> None:
    x, weight = numbers((4, 8), dtype, 0), numbers((4, 8), dtype, 1)
    parts = torch.ones(4), torch.ones(4)
    expected = run("triton", scaled_linear, x, weight, *parts)
    with corrected_interpreter(), force_impl("triton"):
        assert torch.equal(scaled_linear(spread(x), weight, *parts), expected)
        assert torch.equal(scaled_linear(x, spread(weight), *parts), expected)


# torch's own comparison of inputs before and after a call has no e4m3.
ON_E4M3 = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@every_format
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl: str, dtype: torch.dtype) -> None:
    x, weight = numbers((5, 48), dtype, 0)[:, :24], numbers((9, 24), dtype, 1)
    parts = torch.rand(5), torch.rand(9), torch.rand(9)
    before = [t.clone().float() for t in (x, weight, *parts)]
    op = torch.ops.vit_kernels.scaled_linear.default
    options: dict[str, Any] = {} if dtype == torch.int8 else {"test_utils": ON_E4M3}
    with corrected_interpreter():
        torch.library.opcheck(op, (x, weight, *parts, None, "gelu", torch.bfloat16, impl), **options)
        if dtype != torch.int8:
            torch.library.opcheck(op, (x, weight, *parts[:2], None, torch.rand(5), None, dtype, impl), **options)
        if impl == "eager":
            torch.library.opcheck(torch.ops.vit_kernels.eight_bit_product.default, (x, weight, impl), **options)
    for tensor, kept in zip((x, weight, *parts), before, strict=True):
        assert torch.equal(tensor.float(), kept)


@pytest.mark.usefixtures("fresh_dynamo")
@every_implementation
@every_format
def test_inductor_makes_one_graph_for_any_number_of_tokens(form: str, dtype: torch.dtype) -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(scaled_linear, backend=counter, fullgraph=True)
    weight, weight_scale = numbers((40, 24), dtype, 1), scales(40, 0.01, 2)
    for tokens in (1, 65, 2, 0, 33):
        x, x_scale = numbers((tokens, 24), dtype, tokens), scales(tokens, 0.01, tokens)
        mark_unbacked(x, 0)
        mark_unbacked(x_scale, 0)
        with corrected_interpreter(), force_impl(form):
            out = compiled(x, weight, x_scale, weight_scale, activation="gelu")
        expected = scaled_linear_reference(x, weight, x_scale, weight_scale, activation="gelu")
        assert_close_to_reference(out, expected, (expected * (1 + 2**-20)).bfloat16())
    assert counter.frame_count == 1


@every_implementation
def test_derivatives_are_refused_by_name(form: str) -> None:
    x, bias = numbers((4, 8), torch.int8, 0), torch.ones(4, requires_grad=True)
    one = torch.ones(4)
    with corrected_interpreter(), force_impl(form):
        with pytest.raises(ValueError, match=r"^bias: got a tensor that requires grad, .* rounds to 8 bits"):
            scaled_linear(x, x, one, one, bias)
        with torch.no_grad():
            assert not scaled_linear(x, x, one, one, bias).requires_grad
        direct = torch.ops.vit_kernels.scaled_linear.default(x, x, one, one, bias, None, None, torch.float32, form)
        with pytest.raises(NotImplementedError, match="scaled_linear rounds to 8 bits and has no gradient"):
            direct.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@every_implementation
def test_tangents_are_refused_by_name(form: str) -> None:
    x, one = numbers((4, 8), torch.int8, 0), torch.ones(4)
    with corrected_interpreter(), force_impl(form), forward_ad.dual_level():
        scale = forward_ad.make_dual(one, one)
        with pytest.raises(NotImplementedError, match=r"^x_scale: got a tensor with a tangent, but scaled_linear"):
            scaled_linear(x, x, scale, one)


@every_implementation
@every_format
def test_autocast_vmap_and_negation(form: str, dtype: torch.dtype) -> None:
    x, weight = numbers((6, 24), dtype, 0), numbers((9, 24), dtype, 1)
    x_scale, weight_scale = scales(6, 0.01, 2), scales(9, 0.01, 3)
    expected = run(form, scaled_linear, x, weight, x_scale, weight_scale, out_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            run(form, scaled_linear, x, weight, x_scale, weight_scale, out_dtype=torch.float32), expected
        )
    negated = torch._neg_view(-x_scale)
    assert torch.equal(run(form, scaled_linear, x, weight, negated, weight_scale, out_dtype=torch.float32), expected)
    halves = (x.view(torch.int8).view(2, 3, 24).view(dtype), x_scale.view(2, 3))

    def of_half(x: Tensor, x_scale: Tensor) -> Tensor:
        return scaled_linear(x, weight, x_scale, weight_scale, out_dtype=torch.float32)

    with corrected_interpreter(), force_impl(form):
        assert torch.equal(torch.func.vmap(of_half)(*halves), expected.view(2, 3, 9))


SATURATES = """
import torch
from vit_kernels import scaled_linear
x = torch.full((4, 64), 100, dtype=torch.int8)
try:
    print(scaled_linear(x, x, torch.ones(4), torch.ones(4), out_dtype=torch.float32)[0, 0].item())
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this CPU has no VNNI instructions to forbid")
@pytest.mark.parametrize("limit", ["AVX2", "AVX512_CORE", None])
def test_a_cpu_whose_products_saturate_is_refused(limit: str | None) -> None:
    environment = os.environ | ({"ONEDNN_MAX_CPU_ISA": limit} if limit else {})
    result = subprocess.run(
        [sys.executable, "-c", SATURATES], env=environment, capture_output=True, text=True, check=True
    )
    expected = "640000.0" if limit is None else "x: got int8 on a CPU whose products of int8 saturate"
    assert result.stdout.startswith(expected)


def test_products_are_tried_once_a_process() -> None:
    module: Any = sys.modules["vit_kernels.scaled_linear"]
    module._int8_products_are_exact.cache_clear()
    x = torch.ones(4, 8, dtype=torch.int8)
    with mock.patch("torch._int_mm", side_effect=torch._int_mm) as products, force_impl("eager"):
        for _ in range(3):
            op(x, x, torch.ones(4), torch.ones(4))
    assert products.call_count == 4


@pytest.mark.parametrize("dtype", E4M3, ids=lambda dtype: str(dtype)[6:])
def test_the_stock_interpreter_is_refused(dtype: torch.dtype) -> None:
    x, one = numbers((4, 16), dtype, 0), torch.ones(4)
    with force_impl("triton"):
        with pytest.raises(RuntimeError, match=f"interpreter is wrong in {dtype}; call it inside"):
            scaled_linear(x, x, one, one, out_dtype=torch.float32)
        with pytest.raises(RuntimeError, match=r"interpreter is wrong in torch.bfloat16; call it inside"):
            scaled_linear(x.to(torch.float32).to(torch.int8), x.to(torch.float32).to(torch.int8), one, one)


def test_every_row_of_configurations_fits() -> None:
    for dtype in FORMATS:
        for target in ("interpreter", "sm_80", "sm_90", "sm_100", "gfx942", "gfx950"):
            for configuration in configurations.scaled_linear_candidates(dtype, target):
                assert {"BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "num_warps", "num_stages"} == configuration.keys()


X, WEIGHT = torch.zeros(4, 8, dtype=torch.int8), torch.zeros(6, 8, dtype=torch.int8)
X_SCALE, WEIGHT_SCALE, BIAS = torch.zeros(4), torch.zeros(6), torch.zeros(6)

MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not a tensor": ({"x": [1]}, TypeError, "x: got list, expected a tensor [tokens, in_features]"),
    "rank 3": ({"x": X[None]}, ValueError, "x: got shape (1, 4, 8), expected [tokens, in_features]"),
    "floats": ({"x": X.float()}, TypeError, "x: got torch.float32, expected one of (torch.int8, torch.float8_e4m3fn"),
    "e5m2": ({"x": X.float().to(torch.float8_e5m2)}, TypeError, "x: got torch.float8_e5m2, expected one of"),
    "transposed": ({"x": torch.zeros(8, 4).to(torch.int8).mT}, ValueError, "x: got strides (1, 4), expected a contig"),
    "no weight": ({"weight": None}, TypeError, "weight: got NoneType, expected a tensor [out_features, in_features]"),
    "narrow weight": ({"weight": WEIGHT[:, :7]}, ValueError, "weight: got 7 input features, expected 8 as x has"),
    "e4m3 weight": (
        {"weight": WEIGHT.float().to(torch.float8_e4m3fn)},
        TypeError,
        "weight: got torch.float8_e4m3fn, expected torch.int8 as x has",
    ),
    "scale of a number": ({"x_scale": 1.0}, TypeError, "x_scale: got float, expected a tensor [rows of x]"),
    "scale of rank 2": ({"x_scale": X_SCALE[:, None]}, ValueError, "x_scale: got shape (4, 1), expected [rows of x]"),
    "short scale": (
        {"x_scale": X_SCALE[:3]}, ValueError, "x_scale: expected one a row of x, got scales 3, rows 4"
    ),
    "scale in bf16": ({"x_scale": X_SCALE.bfloat16()}, TypeError, "x_scale: got torch.bfloat16, expected "),
    "scale elsewhere": ({"x_scale": X_SCALE.to("meta")}, ValueError, "x_scale: got device meta, expected cpu as x has"),
    "strided scale": (
        {"weight_scale": torch.zeros(12)[::2]}, ValueError, "weight_scale: got strides (2,), expected a contiguous last"
    ),
    "long weight scale": (
        {"weight_scale": torch.zeros(7)},
        ValueError,
        "weight_scale: expected one a row of weight, got scales 7, rows 6",
    ),
    "out_scale of int8": ({"out_scale": X_SCALE}, TypeError, "out_scale: got one beside int8, which has no NaN"),
    "short bias": ({"bias": BIAS[:5]}, ValueError, "bias: got 5 features, expected 6 as weight has"),
    "double bias": ({"bias": BIAS.double()}, TypeError, "bias: got torch.float64, expected one of (torch.float32,"),
    "strided bias": ({"bias": torch.zeros(12)[::2]}, ValueError, "bias: got strides (2,), expected a contiguous last"),
    "bias elsewhere": ({"bias": BIAS.to("meta")}, ValueError, "bias: got device meta, expected cpu as x has"),
    "activation": (
        {"activation": "silu"}, ValueError, "activation: got 'silu', expected None or one of ('gelu', 'gelu_tanh')"
    ),
    "out_dtype": ({"out_dtype": torch.int8}, TypeError, "out_dtype: got torch.int8, expected one of (torch.float32,"),
}  # fmt: skip


@every_implementation
@pytest.mark.parametrize(("wrong", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_the_error_names_the_argument(wrong: dict[str, Any], error: type[Exception], message: str, form: str) -> None:
    right: dict[str, Any] = {"x": X, "weight": WEIGHT, "x_scale": X_SCALE, "weight_scale": WEIGHT_SCALE, "bias": BIAS}
    with corrected_interpreter(), force_impl(form):
        scaled_linear(**right)
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            scaled_linear(**right | wrong)
