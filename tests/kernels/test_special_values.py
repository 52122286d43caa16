"""Infinities, NaN, zeros, subnormal and huge numbers, and tensors without elements, in every op and implementation.

The rule: an op gives NaN and infinities where the fp64 reference does and nowhere else, but

- where a sum of the magnitudes that it adds is beyond float32, the format overflows, and anything may come;
- where the reference is infinite because a tiny probability meets an infinite value, a probability that underflows
  makes it NaN.
"""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vit_kernels import (
    force_impl,
    layer_norm_pixel_shuffle,
    linear_gelu,
    pixel_shuffle,
    rotary_2d,
    rotary_2d_qkv_,
    varlen_attention,
)
from vit_kernels import varlen_attention_backward as eager_backward
from vit_kernels._triton.varlen_attention_backward import launch as launch_backward
from vit_kernels.reference import (
    layer_norm_pixel_shuffle_reference,
    linear_gelu_reference,
    pixel_shuffle_reference,
    rotary_2d_reference,
    varlen_attention_lse_reference,
    varlen_attention_reference,
)
from vit_kernels.testing import assert_close_to_reference, corrected_interpreter, nan_filled_empty, seeded_tensor
from vit_kernels.testing.strategies import dtypes, seeds, special_tensors

from tests.support import COMPILED_FORMS, IMPLEMENTATIONS, assert_same_bits, run

FLOAT32_MAX = torch.finfo(torch.float32).max
INF = float("inf")
QUIET = (0.0, -0.0, INF, -INF, float("nan"), 1e-7)
"""Special values that make no sum of others meaningless, as the largest numbers do."""


def boundaries(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def assert_right_but(excused: Tensor, actual: Tensor, expected: Tensor, pytorch: Tensor) -> None:
    """As `assert_close_to_reference`, of all elements that are not excused."""
    assert_close_to_reference(*(x.masked_fill(excused, 0) for x in (actual, expected, pytorch)))


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data(), dtype=dtypes())
def test_pixel_shuffle_moves_every_bit(form: str, data: st.DataObject, dtype: torch.dtype) -> None:
    x = data.draw(special_tensors((2, 8, 5), dtype)).requires_grad_()
    out = run(form, pixel_shuffle, x, 2, 4)
    assert_same_bits(out.detach(), pixel_shuffle_reference(x.detach(), 2, 4))
    with corrected_interpreter():
        (grad,) = torch.autograd.grad(out, x, out.detach())
    assert_same_bits(grad, x.detach())


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data(), dtype=dtypes(), interleaved=st.booleans())
def test_rotary_2d(form: str, data: st.DataObject, dtype: torch.dtype, interleaved: bool) -> None:
    q, k = (data.draw(special_tensors((6, heads, 16), dtype)) for heads in (2, 1))
    cos, sin = (x.clamp(-1, 1) for x in seeded_tensor((2, 3, 8), torch.float32, data.draw(seeds())))
    expected = rotary_2d_reference(q, k, cos, sin, interleaved=interleaved)
    magnitude = rotary_2d_reference(q.abs(), k.abs(), cos.abs(), -sin.abs(), interleaved=interleaved)
    magnitude_too = rotary_2d_reference(q.abs(), k.abs(), cos.abs(), sin.abs(), interleaved=interleaved)
    in_pytorch = rotary_2d_reference(q, k, cos, sin, interleaved=interleaved)
    qkv = torch.cat([q, k, k], 1)
    outs = [run(form, rotary_2d, q, k, cos, sin, interleaved=interleaved)]
    run(form, rotary_2d_qkv_, qkv, cos, sin, kv_heads=1, interleaved=interleaved)
    outs.append((qkv[:, :2], qkv[:, 2:3]))
    for out in outs:
        for x, wanted, pytorch, *magnitudes in zip(out, expected, in_pytorch, magnitude, magnitude_too, strict=True):
            overflows = torch.stack(magnitudes).amax(0) > min(FLOAT32_MAX, torch.finfo(dtype).max)
            overflows &= torch.stack(magnitudes).amax(0) < INF
            # Two products and their sum, each rounded in float32, then to the dtype.
            rounded = (pytorch * (1 + 2.0**-23)).to(dtype)
            assert_right_but(overflows, x, wanted, rounded)
    assert_same_bits(qkv[:, 3:].contiguous(), k)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data(), dtype=dtypes())
def test_layer_norm_pixel_shuffle(form: str, data: st.DataObject, dtype: torch.dtype) -> None:
    x = data.draw(special_tensors((2, 4, 24), dtype))
    weight, bias = (data.draw(special_tensors((24,), dtype)) for _ in range(2))
    out = run(form, layer_norm_pixel_shuffle, x, weight, bias, 2, 2)
    expected = layer_norm_pixel_shuffle_reference(x, weight, bias, 2, 2)
    pytorch = pixel_shuffle_reference(F.layer_norm(x, (24,), weight, bias), 2, 2)
    squares = x.double().square().sum(-1, keepdim=True).nan_to_num(0, 0).expand(x.shape)
    scaled = 24 * weight.double().abs().nan_to_num(0, 0) + bias.double().abs().nan_to_num(0, 0)
    overflows = (squares > FLOAT32_MAX) | (scaled > torch.finfo(dtype).max)
    assert_right_but(pixel_shuffle_reference(overflows, 2, 2), out, expected, pytorch)


@pytest.mark.parametrize("form", [*IMPLEMENTATIONS, *COMPILED_FORMS])
@given(data=st.data(), dtype=dtypes())
def test_linear_gelu(form: str, data: st.DataObject, dtype: torch.dtype) -> None:
    x, weight, bias = (data.draw(special_tensors(shape, dtype)) for shape in ((5, 24), (9, 24), (9,)))
    out = run(form, linear_gelu, x, weight, bias)
    expected = linear_gelu_reference(x, weight, bias)
    wide = [t.float() for t in (x, weight, bias)]
    pytorch = F.gelu(F.linear(*wide)).to(dtype)
    finite = [t.double().abs().nan_to_num(0, 0) for t in (x, weight, bias)]
    overflows = 2 * F.linear(*finite) > FLOAT32_MAX
    assert_right_but(overflows, out, expected, pytorch)


def attention_overflows(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Where scores, or sums of values, go beyond float32, or scores so far that fp64 cannot tell them apart."""
    q, k, v = (x.double().abs().nan_to_num(0, 0) for x in (q, k, v))
    excused = torch.zeros(q.shape, dtype=torch.bool)
    for start, stop in zip(boundaries(*lengths)[:-1].tolist(), boundaries(*lengths)[1:].tolist(), strict=True):
        rows = slice(start, stop)
        scores = torch.einsum("qhd,khd->qhk", q[rows], k[rows]) * max(scale, 1)
        excused[rows] |= (scores.amax(-1, keepdim=True) > 1e5) if stop > start else False
        excused[rows] |= v[rows].sum(0) > FLOAT32_MAX
    return excused


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data(), dtype=dtypes(), scale=st.sampled_from([0.25, 1.0, 1e-46]))
def test_varlen_attention(form: str, data: st.DataObject, dtype: torch.dtype, scale: float) -> None:
    lengths = (3, 0, 70)
    q, k, v = (data.draw(special_tensors((73, 1, 16), dtype)) for _ in range(3))
    if data.draw(st.booleans()):
        # Every score of the last sequence's first block is an infinity or NaN.
        k[3:67, 0, 0] = data.draw(st.sampled_from([INF, -INF]))
    cu_seqlens = boundaries(*lengths)
    out, lse = run(form, varlen_attention, q, k, v, cu_seqlens, scale=scale, return_lse=True)
    expected = varlen_attention_reference(q, k, v, cu_seqlens, scale=scale)
    excused = attention_overflows(q, k, v, lengths, scale)
    excused |= expected.isinf() & out.isnan()
    pytorch = [x.transpose(0, 1).split(lengths, 1) for x in (q.float(), k.float(), v.float())]
    kept = max(scale, 2.0**-149)
    sdpa = [F.scaled_dot_product_attention(a, b, c, scale=kept) for a, b, c in zip(*pytorch, strict=True)]
    assert_right_but(excused, out, expected, torch.cat(sdpa, 1).transpose(0, 1).to(dtype))
    expected_lse = varlen_attention_lse_reference(q, k, cu_seqlens, scale=scale)
    excused_lse = excused.all(-1).T | (expected_lse.isnan() & ~lse.isfinite())
    assert (lse.isfinite() == expected_lse.isfinite())[~excused_lse].all()
    torch.testing.assert_close(lse[~excused_lse].double(), expected_lse[~excused_lse], rtol=1e-5, atol=1e-4)


@given(data=st.data(), dtype=dtypes(), where=st.sampled_from(["q", "k", "v", "grad"]))
def test_gradients_of_varlen_attention(data: st.DataObject, dtype: torch.dtype, where: str) -> None:
    """NaN and infinities where eager has them in fp64; more only where an underflow meets infinity."""
    lengths, shape = (20, 33), (53, 1, 16)
    tensors = {name: seeded_tensor(shape, dtype, data.draw(seeds())) for name in ("q", "k", "v", "grad")}
    tensors[where] = data.draw(special_tensors(shape, dtype, QUIET))
    if where == "k" and data.draw(st.booleans()):
        tensors["k"][:17, 0, 3] = -INF
    q, k, v, grad = tensors.values()
    cu_seqlens = boundaries(*lengths)
    with corrected_interpreter(), force_impl("triton"), nan_filled_empty():
        out, lse = varlen_attention(q, k, v, cu_seqlens, scale=0.25, return_lse=True)
        actual = launch_backward(grad, None, q, k, v, out, lse, cu_seqlens, cu_seqlens, 0.25)
    wide_q, wide_k, wide_v, wide_out, wide_lse = (x.double() for x in (q, k, v, out, lse))
    expected = eager_backward.eager(
        grad.double(), None, wide_q, wide_k, wide_v, wide_out, wide_lse, cu_seqlens, None, 0.25
    )
    eager = eager_backward.eager(grad, None, q, k, v, out, lse, cu_seqlens, None, 0.25)
    for x, wanted, pytorch in zip(actual, expected, eager, strict=True):
        assert (x.isfinite() == wanted.isfinite()).all()
        assert (pytorch.isfinite() == wanted.isfinite()).all()
        torch.testing.assert_close(
            x.double().nan_to_num(0, 0, 0), wanted.nan_to_num(0, 0, 0), rtol=0.05, atol=0.05
        )  # near, the rest is judged in test_varlen_attention_gradients.py


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [1, 16, 64, 80])
def test_a_row_of_minus_infinity_alone_is_zero_and_so_are_its_gradients(form: str, length: int) -> None:
    q = torch.ones(4, 1, 16)
    q[1] = 0
    q[1, 0, 0] = -INF
    k = seeded_tensor((length, 1, 16), torch.float32, 0).abs()
    v = seeded_tensor((length, 1, 16), torch.float32, 1)
    q, k, v = inputs = [x.requires_grad_() for x in (q, k, v)]
    with corrected_interpreter(), force_impl(form), nan_filled_empty():
        out, lse = varlen_attention(q, k, v, boundaries(4), cu_seqlens_k=boundaries(length), return_lse=True)
        grad_q, grad_k, grad_v = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert not out[1].any()
    assert lse[0, 1] == -INF
    assert not grad_q[1].any()
    assert grad_v.isfinite().all()
    # 0 * -inf, as everywhere.
    assert grad_k[..., 0].isnan().all()
    assert grad_k[..., 1:].isfinite().all()


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [1e-46, 2e-45, 1e-39])
def test_a_scale_that_underflows_weighs_all_finite_scores_alike(form: str, scale: float) -> None:
    q, k, v = (seeded_tensor((40, 1, 16), torch.float32, seed).requires_grad_() for seed in range(3))
    k.data[7, 0, 0], q.data[:, 0, 0] = -INF, 1
    with corrected_interpreter(), force_impl(form), nan_filled_empty():
        out = varlen_attention(q, k, v, boundaries(40), scale=scale)
        (grad_v,) = torch.autograd.grad(out, v, torch.ones_like(out))
    kept = torch.arange(40) != 7
    torch.testing.assert_close(out, v[kept].mean(0).expand_as(out), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_v[:, 0], (kept[:, None] * 40 / 39).expand(40, 16), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_the_largest_scale_is_taken_and_a_larger_one_refused(form: str) -> None:
    q, v = torch.eye(16)[:, None] * 2.0**-126, seeded_tensor((16, 1, 16), torch.float32, 0)
    k = torch.eye(16)[:, None] * 2.0**30
    out = run(form, varlen_attention, q, k, v, boundaries(16), scale=2.0**127)
    assert_same_bits(out, v)
    with pytest.raises(ValueError, match=r"^scale: got 2e\+38, expected a positive finite number, at most 1.701e\+38"):
        run(form, varlen_attention, q, k, v, boundaries(16), scale=2e38)


@pytest.mark.parametrize("size", [30.0, 84.0, 1e3, 1e5, 1e9])
@pytest.mark.parametrize(("dtype", "twins"), [(torch.float32, 1), (torch.float32, 3), (torch.bfloat16, 1)])
def test_gradients_of_values_at_large_logits(size: float, dtype: torch.dtype, twins: int) -> None:
    """Logits of `size`**2: a log-sum-exp in one float32 is off by 2**-24 of that, and dv by as much times itself.

    In half precision the probability of one key that outweighs all others is exact, of several that are equal not.
    """
    q, v, grad = (seeded_tensor((69, 1, 24), dtype, seed) for seed in range(3))
    # Keys that are the same have the same probability, whatever the rounding of scores.
    k = seeded_tensor((69 // twins, 1, 24), dtype, 3).repeat_interleave(twins, 0)
    q, k, cu_seqlens = q * size, k * size, boundaries(30, 39)
    with corrected_interpreter(), force_impl("triton"), nan_filled_empty():
        out, lse = varlen_attention(q, k, v, cu_seqlens, return_lse=True)
        grads = launch_backward(grad, None, q, k, v, out, lse, cu_seqlens, cu_seqlens, 24**-0.5)
    wide = [x.double() for x in (grad, q, k, v)]
    expected, pytorch = (
        eager_backward.eager(g, None, q, k, v, out, lse, cu_seqlens, None, 24**-0.5)[2]
        for g, q, k, v in (wide, (grad, q, k, v))
    )
    assert_close_to_reference(grads[2], expected, pytorch)
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("form", [*IMPLEMENTATIONS, *COMPILED_FORMS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gelu_is_rounded_once(form: str, dtype: torch.dtype) -> None:
    x = torch.full((1, 64), -60.0, dtype=dtype)
    weight = torch.full((2, 64), 60.0, dtype=dtype)
    weight[1] *= -1
    out = run(form, linear_gelu, x, weight, torch.zeros(2, dtype=dtype))
    assert_same_bits(out, torch.tensor([[-0.0, 60.0 * 60 * 64]], dtype=dtype))


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_gradients_of_gelu_beyond_half_precision(form: str) -> None:
    x = torch.full((1, 64), -60.0).half().requires_grad_()
    weight = torch.stack([torch.full((64,), 60.0), torch.full((64,), -60.0)]).half().requires_grad_()
    bias = torch.zeros(2).half().requires_grad_()
    with corrected_interpreter(), force_impl(form), nan_filled_empty():
        out = linear_gelu(x, weight, bias)
        grads = torch.autograd.grad(out, (x, weight, bias), torch.ones_like(out))
    torch.testing.assert_close(grads[0], torch.full_like(x, -60))
    torch.testing.assert_close(grads[1], torch.tensor([[0.0], [-60.0]]).half().expand(2, 64))
    torch.testing.assert_close(grads[2], torch.tensor([0.0, 1.0]).half())


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize(("q_heads", "k_heads", "tokens"), [(0, 0, 6), (0, 2, 6), (2, 0, 6), (2, 2, 0), (0, 0, 0)])
def test_rotary_without_heads_or_tokens(form: str, q_heads: int, k_heads: int, tokens: int) -> None:
    q, k = (seeded_tensor((tokens, heads, 16), torch.float32, 0).requires_grad_() for heads in (q_heads, k_heads))
    tables = seeded_tensor((2, 3, 8), torch.float32, 1)
    out = run(form, rotary_2d, q, k, *tables)
    for x, wanted in zip(out, rotary_2d_reference(q, k, *tables), strict=True):
        torch.testing.assert_close(x.double(), wanted)
    with corrected_interpreter():
        grads = torch.autograd.grad(out, (q, k), [torch.ones_like(x) for x in out])
    assert [x.shape for x in grads] == [q.shape, k.shape]


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tiles", "channels"), [(2, 0), (0, 5), (0, 0)])
def test_grids_without_channels_or_tiles(form: str, tiles: int, channels: int) -> None:
    x, weight = torch.ones(tiles, 4, channels), torch.ones(channels)
    assert run(form, pixel_shuffle, x, 2, 2).shape == (tiles, 1, 4 * channels)
    assert run(form, layer_norm_pixel_shuffle, x, weight, weight, 2, 2).shape == (tiles, 1, 4 * channels)
    x.requires_grad_()
    with corrected_interpreter(), force_impl(form):
        for out in (pixel_shuffle(x, 2, 2), layer_norm_pixel_shuffle(x, weight, weight, 2, 2)):
            (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
            assert grad.shape == x.shape


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tokens", "in_features", "out_features"), [(0, 3, 2), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
def test_linear_gelu_without_elements(form: str, tokens: int, in_features: int, out_features: int) -> None:
    x, weight = torch.ones(tokens, in_features), torch.ones(out_features, in_features)
    bias = torch.full((out_features,), 2.0)
    out = run(form, linear_gelu, x, weight, bias)
    torch.testing.assert_close(out, F.gelu(torch.full((tokens, out_features), 2.0 + in_features)))
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    with corrected_interpreter(), force_impl(form):
        grads = torch.autograd.grad(linear_gelu(*inputs), inputs, torch.ones(tokens, out_features))
    assert [g.shape for g in grads] == [t.shape for t in inputs]


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_a_score_of_infinity_makes_its_row_nan_and_no_other(form: str) -> None:
    q, k, v = (seeded_tensor((70, 1, 16), torch.float32, seed) for seed in range(3))
    q[3, 0], q[3, 0, 0], k[:, 0, 0] = 0, INF, k[:, 0, 0].abs()
    out, lse = run(form, varlen_attention, q, k, v, boundaries(70), return_lse=True)
    assert out[3].isnan().all()
    assert lse[0, 3] == INF
    others = torch.arange(70) != 3
    assert out[others].isfinite().all()
    assert math.isfinite(lse[0, others].sum())
