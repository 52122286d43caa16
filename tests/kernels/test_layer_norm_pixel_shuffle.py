"""layer_norm_pixel_shuffle is the layer norm, then the pixel shuffle, with one read and one write."""

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
from vit_kernels import force_impl, layer_norm_pixel_shuffle
from vit_kernels._triton import layer_norm_pixel_shuffle as kernel
from vit_kernels.reference import layer_norm_pixel_shuffle_reference, pixel_shuffle_reference
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


@pytest.mark.quick
def test_example() -> None:
    """The Triton kernel on CPU tensors: two tiles of 2 x 4 tokens."""
    x = seeded_tensor((2, 8, 16), torch.bfloat16, seed=0)  # [tiles, height * width, channels]
    weight, bias = (seeded_tensor((16,), torch.bfloat16, seed=seed) for seed in (1, 2))
    with corrected_interpreter(), force_impl("triton"):
        out = layer_norm_pixel_shuffle(x, weight, bias, height=2, width=4)  # [2, 2, 64]
    expected = layer_norm_pixel_shuffle_reference(x, weight, bias, 2, 4, 2)  # float64
    assert_close_to_reference(out, expected, in_pytorch(x, weight, bias, 2, 4, 2))


class Case(NamedTuple):
    padded: NanPadded
    weight: Tensor
    bias: Tensor
    height: int
    width: int
    factor: int


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    """Grids of 2 x 2 to 3 x 3 output tokens, square or not, in any layout, some of large mean."""
    factor = draw(st.integers(1, 3))
    # In a few tokens PyTorch's own error, by which the others are judged, can be next to nothing.
    height, width = (factor * draw(st.integers(2, 3)) for _ in range(2))
    tiles, channels = draw(st.sampled_from([2, 0])), draw(st.integers(24, 72))
    padded = draw(strided_tensors((tiles, height * width, channels), dtype))
    padded.tensor.add_(draw(st.sampled_from([0, 8])))
    weight, bias = (nan_padded(seeded_tensor((channels,), dtype, draw(seeds())), [(8, 8)]).tensor for _ in range(2))
    return Case(padded, weight, bias, height, width, factor)


def in_pytorch(x: Tensor, weight: Tensor, bias: Tensor, *grid: Any, eps: float = 1e-5) -> Tensor:
    return pixel_shuffle_reference(F.layer_norm(x, x.shape[-1:], weight, bias, eps), *grid)


@pytest.mark.quick
@pytest.mark.parametrize(("form", "dtypes_of_form"), EVERY_FORM_AND_DTYPE)
@given(data=st.data(), eps=st.sampled_from([1e-5, 1e-2]))
def test_matches_the_reference(
    form: str, dtypes_of_form: st.SearchStrategy[torch.dtype], data: st.DataObject, eps: float
) -> None:
    padded, weight, bias, *grid = data.draw(cases(data.draw(dtypes_of_form)))
    out = run(form, layer_norm_pixel_shuffle, padded.tensor, weight, bias, *grid, eps=eps)
    expected = layer_norm_pixel_shuffle_reference(padded.tensor, weight, bias, grid[0], grid[1], grid[2], eps)
    assert_close_to_reference(out, expected, in_pytorch(padded.tensor, weight, bias, *grid, eps=eps))
    assert out.dtype == padded.tensor.dtype
    assert out.is_contiguous()
    padded.assert_padding_untouched()


@pytest.mark.parametrize("channels", [1, 511, 512, 513, 1408])
def test_channels_around_the_block(channels: int) -> None:
    x, weight, bias = (
        seeded_tensor(shape, torch.bfloat16, 0) for shape in ((1, 4, channels), (channels,), (channels,))
    )
    expected = layer_norm_pixel_shuffle_reference(x, weight, bias, 2, 2)
    out = run("triton", layer_norm_pixel_shuffle, x, weight, bias, 2, 2)
    assert_close_to_reference(out, expected, in_pytorch(x, weight, bias, 2, 2))


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data())
def test_tokens_are_independent(form: str, data: st.DataObject) -> None:
    padded, weight, bias, *grid = data.draw(
        cases(data.draw(dtypes_of(form))).filter(lambda case: case.padded.tensor.numel())
    )
    clean = run(form, layer_norm_pixel_shuffle, padded.tensor, weight, bias, *grid)
    tile, token = (data.draw(st.integers(0, n - 1)) for n in padded.tensor.shape[:2])
    padded.tensor[tile, token] = torch.nan
    out = run(form, layer_norm_pixel_shuffle, padded.tensor, weight, bias, *grid)
    touched = pixel_shuffle_reference(padded.tensor, *grid).isnan()
    assert out[touched].isnan().all()
    assert_same_bits(out[~touched], clean[~touched])


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data())
def test_a_constant_token_gives_the_bias(form: str, data: st.DataObject) -> None:
    padded, weight, bias, *grid = data.draw(cases(data.draw(dtypes_of(form))))
    padded.tensor.fill_(2.0)
    out = run(form, layer_norm_pixel_shuffle, padded.tensor, weight, bias, *grid)
    assert_same_bits(out, bias.repeat(grid[2] ** 2).expand_as(out).contiguous())


def class_token_sliced_off(tiles: int, dtype: torch.dtype, channels: int = 10) -> Tensor:
    """24 patches a tile, followed in memory by a class token that is NaN."""
    return nan_padded(seeded_tensor((tiles, 24, channels), dtype, 0), [(0, 0), (0, 1), (0, 0)]).tensor


@given(tiles=st.integers(1, 3), dtype=dtypes(), channels=st.integers(2, 20))
def test_one_read_and_one_write_and_no_copy_of_a_sliced_class_token(
    tiles: int, dtype: torch.dtype, channels: int
) -> None:
    x, weight = class_token_sliced_off(tiles, dtype, channels), torch.ones(channels, dtype=dtype)
    bias = torch.zeros_like(weight)
    pointers = launched_on(layer_norm_pixel_shuffle, x, weight, bias, 4, 6)
    assert {t.data_ptr() for t in (x, weight, bias)} <= pointers
    assert len(pointers) == 4, "and the output"
    with corrected_interpreter() as counts, force_impl("triton"):
        layer_norm_pixel_shuffle(x, weight, bias, 4, 6)
    # Blocks of four tokens in a row of six read the parameters twice a row, from a cache.
    assert counts.bytes_loaded == x.numel() * x.itemsize + tiles * 4 * 2 * (weight.nbytes + bias.nbytes)
    assert counts.bytes_stored == x.numel() * x.itemsize


@pytest.mark.quick
@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_gradients_are_autograds(form: str, data: st.DataObject) -> None:
    dtype = data.draw(dtypes())
    padded, weight, bias, *grid = data.draw(cases(dtype).filter(lambda case: case.padded.tensor.numel()))
    inputs: list[Any] = [x.detach().requires_grad_() for x in (padded.tensor, weight, bias)]
    grad = data.draw(strided_tensors(in_pytorch(*inputs, *grid).shape, dtype)).tensor

    def op(*inputs: Tensor) -> Tensor:
        name = torch.ops.vit_kernels.layer_norm_pixel_shuffle.default
        out: Tensor = name(*inputs, *grid, 1e-5, form.split()[-1])
        return out

    with corrected_interpreter(), nan_filled_empty():
        actual = torch.autograd.grad(run(form, op, *inputs), inputs, grad)
    pytorch = torch.autograd.grad(in_pytorch(*inputs, *grid), inputs, grad)
    exact: list[Any] = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(in_pytorch(*exact, *grid), exact, grad.double())
    for x, wanted, theirs in zip(actual, expected, pytorch, strict=True):
        assert_close_to_reference(x, wanted, theirs)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_input_gets_no_gradient(frozen: int) -> None:
    x, weight, bias = inputs = [
        seeded_tensor(shape, torch.float32, 0).requires_grad_(i != frozen)
        for i, shape in enumerate([(1, 4, 8), (8,), (8,)])
    ]
    with corrected_interpreter(), force_impl("triton"):
        layer_norm_pixel_shuffle(x, weight, bias, 2, 2).square().sum().backward()
    assert [x.grad is not None for x in inputs] == [i != frozen for i in range(3)]


def test_gradcheck() -> None:
    inputs = [
        seeded_tensor(shape, torch.float64, i).requires_grad_() for i, shape in enumerate([(2, 8, 3), (3,), (3,)])
    ]
    assert torch.autograd.gradcheck(lambda x, w, b: layer_norm_pixel_shuffle(x, w, b, 2, 4), inputs)
    op = torch.ops.vit_kernels.layer_norm_pixel_shuffle.default
    assert torch.autograd.gradcheck(lambda *inputs: op(*inputs, 2, 4, 2, 1e-5, "eager"), inputs)
    assert torch.autograd.gradgradcheck(lambda *inputs: op(*inputs, 2, 4, 2, 1e-5, "eager"), inputs)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl: str, requires_grad: bool) -> None:
    x = seeded_tensor((2, 25, 7), torch.float32, 0)[:, :-1].detach()
    inputs = [t.requires_grad_(requires_grad) for t in (x, torch.rand(7), torch.rand(7))]
    with corrected_interpreter():
        op = torch.ops.vit_kernels.layer_norm_pixel_shuffle.default
        torch.library.opcheck(op, (*inputs, 4, 6, 2, 1e-5, impl))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_inductor_makes_one_graph_for_any_number_of_tiles(form: str) -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer_norm_pixel_shuffle, backend=counter, fullgraph=True)
    weight, bias = (seeded_tensor((10,), torch.bfloat16, seed) for seed in range(2))
    for tiles in (1, 17, 2, 0, 5):
        x = class_token_sliced_off(tiles, torch.bfloat16)
        mark_unbacked(x, 0)
        expected = layer_norm_pixel_shuffle_reference(x, weight, bias, 4, 6)
        with corrected_interpreter(), force_impl(form):
            assert_close_to_reference(compiled(x, weight, bias, 4, 6), expected, in_pytorch(x, weight, bias, 4, 6, 2))
    assert counter.frame_count == 1


def test_tokens_past_2_to_the_31_elements() -> None:
    x = seeded_tensor((4, 4, 8), torch.float16, 0)
    weight, bias = torch.ones(8).half(), torch.zeros(8).half()
    expected = run("triton", layer_norm_pixel_shuffle, x, weight, bias, 2, 2)
    with corrected_interpreter(), force_impl("triton"):
        assert torch.equal(layer_norm_pixel_shuffle(spread(x), weight, bias, 2, 2), expected)
        rows = spread(x[0])[None]
        assert torch.equal(layer_norm_pixel_shuffle(rows, weight, bias, 2, 2), expected[:1])


X, ONES = torch.zeros(2, 24, 6), torch.ones(6)

MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not a tensor": ({"x": [1.0]}, TypeError, "x: got list, expected a tensor [tiles, height * width, channels]"),
    "rank 2": ({"x": X[0]}, ValueError, "x: got shape (24, 6), expected [tiles, height * width, channels]"),
    "integers": ({"x": X.int()}, TypeError, "x: got torch.int32 for implementation"),
    "transposed": ({"x": X.mT.contiguous().mT}, ValueError, "x: got strides (144, 1, 24), expected a contiguous last"),
    "class token": ({"x": torch.zeros(2, 25, 6)}, ValueError, "x: got 25 tokens a tile, expected height * width = 24"),
    "odd height": ({"height": 3, "width": 8}, ValueError, "height, width: got 3 x 8, expected multiples of factor 2"),
    "no factor": ({"factor": 0}, ValueError, "factor: got 0, expected a positive integer"),
    "half a factor": ({"factor": 0.5}, TypeError, "factor: got 0.5, expected an integer"),
    "no weight": ({"weight": None}, TypeError, "weight: got NoneType, expected a tensor [channels]"),
    "short weight": ({"weight": ONES[:5]}, ValueError, "weight: got 5 channels, expected 6 as x has"),
    "double weight": (
        {"weight": ONES.double()},
        TypeError,
        "weight: got torch.float64, expected torch.float32 as x has",
    ),
    "strided bias": ({"bias": torch.ones(12)[::2]}, ValueError, "bias: got strides (2,), expected a contiguous last"),
    "bias elsewhere": ({"bias": ONES.to("meta")}, ValueError, "bias: got device meta, expected cpu as x has"),
    "eps of 0": ({"eps": 0.0}, ValueError, "eps: got 0.0, expected a positive finite number"),
    "eps of inf": ({"eps": torch.inf}, ValueError, "eps: got inf, expected a positive finite number"),
    "eps of text": ({"eps": "x"}, TypeError, "eps: got str, expected a number"),
    "half a weight": ({"weight": ONES.half(), "bias": ONES.half()}, TypeError, "weight: got torch.float16, expected"),
    "bias unlike weight": (
        {"x": X.half(), "bias": ONES.half()},
        TypeError,
        "bias: got torch.float16, expected torch.float32 as weight has",
    ),
    "eps of nan": ({"eps": torch.nan}, ValueError, "eps: got nan, expected a positive finite number"),
}


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize(("wrong", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_the_error_names_the_argument(wrong: dict[str, Any], error: type[Exception], message: str, form: str) -> None:
    right: dict[str, Any] = {"x": X, "weight": ONES, "bias": ONES, "height": 4, "width": 6}
    with force_impl(form):
        layer_norm_pixel_shuffle(**right)
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            layer_norm_pixel_shuffle(**right | wrong)


@pytest.mark.parametrize(
    ("version", "dtype", "target", "options"),
    [
        ("3.6.0", torch.bfloat16, "sm_90", {"maxnreg": 96}),
        ("3.6.0", torch.float32, "sm_90", {}),
        ("3.6.0", torch.bfloat16, "gfx942", {}),
        ("3.7.1", torch.bfloat16, "sm_90", {}),
    ],
)
def test_the_register_limit_is_for_the_compiler_that_needs_it(
    version: str, dtype: torch.dtype, target: str, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernel.options(dtype) == {}
    monkeypatch.setattr("triton.__version__", version)
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    monkeypatch.setattr(kernel, "current_target", lambda: target)
    assert kernel.options(dtype) == options
