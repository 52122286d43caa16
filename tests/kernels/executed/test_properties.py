"""What an op's property tests ask of it, asked of its compiled code, which is executed and watched for races.

Few examples: each new dtype, head_dim or layout is compiled first. Lengths, which are not, are drawn around the blocks.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vit_kernels import layer_norm_pixel_shuffle, linear_gelu, pixel_shuffle, rotary_2d, rotary_2d_qkv_
from vit_kernels.reference import (
    layer_norm_pixel_shuffle_reference,
    linear_gelu_reference,
    pixel_shuffle_reference,
    rotary_2d_qkv_reference,
)
from vit_kernels.testing import NanPadded, assert_close_to_reference, nan_padded, seeded_tensor
from vit_kernels.testing.strategies import BLOCK_NEIGHBOURS, seeds

from tests.kernels import test_layer_norm_pixel_shuffle as norms
from tests.kernels import test_linear_gelu as products
from tests.kernels import test_rotary_2d as rotations
from tests.kernels import test_varlen_attention as attention
from tests.kernels import test_varlen_attention_gradients as attention_gradients
from tests.support import EXECUTED_FORMS, assert_same_bits, run

pytestmark = pytest.mark.parametrize("form", EXECUTED_FORMS)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Layout(NamedTuple):
    """A model's attention: what the kernels are compiled for."""

    dtype: torch.dtype
    head_dim: int
    heads: int
    kv_heads: int
    packed: bool

    def __str__(self) -> str:
        """As the test's name has it."""
        heads = f"{self.heads}-{self.kv_heads}-heads" + ("-packed" if self.packed else "")
        return f"{str(self.dtype).removeprefix('torch.')}-{self.head_dim}-{heads}"


BF16, F16, F32 = DTYPES
LAYOUTS = (
    Layout(BF16, 88, 2, 2, packed=True),
    Layout(BF16, 88, 1, 1, packed=True),  # rows whose length is no multiple of 16 elements
    Layout(F16, 80, 4, 2, packed=False),
    Layout(BF16, 72, 2, 1, packed=False),
    Layout(BF16, 128, 1, 1, packed=False),
    Layout(F32, 24, 2, 2, packed=True),
)


@st.composite
def cases(draw: st.DrawFn, layout: Layout) -> attention.Case:
    """Sequences around the blocks, one of 16 tokens or more, by which PyTorch's error is typical."""
    around = st.sampled_from((*BLOCK_NEIGHBOURS, 33, 129))
    lengths = [*draw(st.lists(around, max_size=2)), draw(st.integers(16, 70)), draw(around)]
    tokens, seed = sum(lengths) + draw(st.integers(0, 3)), draw(seeds())
    padded: tuple[NanPadded, ...]
    if layout.packed:
        packed = nan_padded(
            seeded_tensor((tokens, 3 * layout.heads * layout.head_dim), layout.dtype, seed), [(1, 1), (0, 0)]
        )
        q, k, v = packed.tensor.unflatten(-1, (3, layout.heads, layout.head_dim)).unbind(1)
        padded = (packed,)
    else:
        padded = tuple(
            nan_padded(seeded_tensor((tokens, n, layout.head_dim), layout.dtype, seed + i), [(1, 1), (0, 0), (0, 0)])
            for i, n in enumerate((layout.heads, layout.kv_heads, layout.kv_heads))
        )
        q, k, v = (storage.tensor for storage in padded)
    for x in (q, k, v):
        x[sum(lengths) :] = torch.nan
    return attention.Case(q, k, v, attention.boundaries(lengths), None, padded)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@settings(max_examples=3)
@given(data=st.data())
def test_varlen_attention(form: str, layout: Layout, data: st.DataObject) -> None:
    case = data.draw(cases(layout))
    attention.assert_right(attention.attend(form, case), case)
    for storage in case.padded:
        storage.assert_padding_untouched()


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2], LAYOUTS[5]], ids=str)
@settings(max_examples=2)
@given(data=st.data())
def test_gradients_of_varlen_attention(form: str, layout: Layout, data: st.DataObject) -> None:
    case = data.draw(cases(layout))
    grad = seeded_tensor(case.q.shape, case.q.dtype, data.draw(seeds()))
    actual = attention_gradients.gradients(form, case, grad)
    expected = attention_gradients.expected_gradients(case, grad, torch.float64)
    pytorch = attention_gradients.pytorch_gradients(case, grad, expected)
    for x, wanted, baseline in zip(actual, expected, pytorch, strict=True):
        assert_close_to_reference(x, wanted, baseline)
        assert not x[int(case.cu_seqlens[-1]) :].any(), "tokens of no sequence"
    for storage in case.padded:
        storage.assert_padding_untouched()


@pytest.mark.parametrize("sequences", [129, 257])
def test_more_sequences_than_are_searched_at_once(form: str, sequences: int) -> None:
    lengths = [0] * (sequences - 3) + [1, 17, 20]
    case = attention.self_attention(lengths, 1, 1, 24, torch.float32, sequences)
    attention.assert_right(attention.attend(form, case), case)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@settings(max_examples=2)
@given(data=st.data(), head_dim=st.sampled_from([80, 88]), dtype=st.sampled_from(DTYPES))
def test_rotary_2d(form: str, interleaved: bool, data: st.DataObject, head_dim: int, dtype: torch.dtype) -> None:
    positions, tiles = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 2))
    q, k = (seeded_tensor((tiles * positions, n, head_dim), dtype, data.draw(seeds())) for n in (3, 2))
    cos, sin = rotations.tables(6 * seeded_tensor((positions, head_dim // 2), torch.float64, data.draw(seeds())))
    out = run(form, rotary_2d, q, k, cos, sin, interleaved=interleaved)
    rotations.assert_right(out, q, k, cos, sin, interleaved)


@settings(max_examples=3)
@given(data=st.data(), heads=st.sampled_from([1, 2]), interleaved=st.booleans())
def test_rotary_2d_qkv(form: str, data: st.DataObject, heads: int, interleaved: bool) -> None:
    positions, tiles = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 2))
    cos, sin = rotations.tables(6 * seeded_tensor((positions, 44), torch.float64, data.draw(seeds())))
    qkv = seeded_tensor((tiles * positions, 3 * heads, 88), torch.bfloat16, data.draw(seeds()))
    before, turned = qkv.clone(), 2 * heads
    run(form, rotary_2d_qkv_, qkv, cos, sin, interleaved=interleaved)
    expected = rotary_2d_qkv_reference(before, cos, sin, kv_heads=heads, interleaved=interleaved)
    pytorch = rotations.pytorch_rotation(before[:, :turned], cos, sin, interleaved)
    assert_close_to_reference(qkv[:, :turned], expected[:, :turned], pytorch)
    assert_same_bits(qkv[:, turned:], before[:, turned:])


def shuffle_and_back(x: Tensor, height: int, width: int, factor: int) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = pixel_shuffle(x, height, width, factor)
    (grad,) = torch.autograd.grad(out, x, out.detach())
    return out, grad


@settings(max_examples=3)
@given(data=st.data(), channels=st.sampled_from([40, 513, 1408]), dtype=st.sampled_from(DTYPES))
def test_pixel_shuffle_and_its_gradient(form: str, data: st.DataObject, channels: int, dtype: torch.dtype) -> None:
    height, width = (2 * data.draw(st.integers(1, 3)) for _ in range(2))
    x = seeded_tensor((2, height * width + 1, channels), dtype, data.draw(seeds()))[:, :-1]
    out, grad = run(form, shuffle_and_back, x, height, width, 2)
    assert_same_bits(out, pixel_shuffle_reference(x, height, width, 2))
    assert_same_bits(grad, x)


@settings(max_examples=3)
@given(data=st.data(), channels=st.sampled_from([72, 1280]), dtype=st.sampled_from(DTYPES))
def test_layer_norm_pixel_shuffle(form: str, data: st.DataObject, channels: int, dtype: torch.dtype) -> None:
    height, width = (2 * data.draw(st.integers(2, 3)) for _ in range(2))
    x = seeded_tensor((1, height * width + 1, channels), dtype, data.draw(seeds()))[:, :-1]
    weight, bias = (seeded_tensor((channels,), dtype, data.draw(seeds())) for _ in range(2))
    out = run(form, layer_norm_pixel_shuffle, x, weight, bias, height, width, 2)
    expected = layer_norm_pixel_shuffle_reference(x, weight, bias, height, width, 2)
    assert_close_to_reference(out, expected, norms.in_pytorch(x, weight, bias, height, width, 2))


@settings(max_examples=2)
@given(data=st.data(), in_features=st.sampled_from([40, 72]), dtype=st.sampled_from([BF16, F32]))
def test_linear_gelu(form: str, data: st.DataObject, in_features: int, dtype: torch.dtype) -> None:
    tokens, out_features = data.draw(st.integers(19, 140)), 8 * data.draw(st.integers(2, 18))
    x = seeded_tensor((tokens, in_features), dtype, data.draw(seeds()))
    weight = 2 * in_features**-0.5 * seeded_tensor((out_features, in_features), dtype, data.draw(seeds()))
    bias = seeded_tensor((out_features,), dtype, data.draw(seeds()))
    out = run(form, linear_gelu, x, weight, bias)
    assert_close_to_reference(out, linear_gelu_reference(x, weight, bias), products.in_pytorch(x, weight, bias))
