"""pixel_shuffle only moves values: equal to its reference bit for bit, a bijection, and never a copy of its input."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from vit_kernels import force_impl, pixel_shuffle
from vit_kernels.reference import pixel_shuffle_reference
from vit_kernels.testing import NanPadded, corrected_interpreter, nan_filled_empty, nan_padded, seeded_tensor
from vit_kernels.testing.strategies import dtypes, seeds, strided_tensors

from tests.support import (
    EVERY_FORM_AND_DTYPE,
    FORMS,
    IMPLEMENTATIONS,
    assert_same_bits,
    bits,
    dtypes_of,
    launched_on,
    run,
)


@pytest.mark.quick
def test_example() -> None:
    """The Triton kernel on CPU tensors: two tiles of 2 x 4 tokens."""
    x = seeded_tensor((2, 8, 16), torch.bfloat16, seed=0)  # [tiles, height * width, channels]
    with corrected_interpreter(), force_impl("triton"):
        out = pixel_shuffle(x, height=2, width=4)
    assert out.shape == (2, 2, 64)  # [tiles, (height // 2) * (width // 2), 4 * channels]
    assert torch.equal(out, pixel_shuffle_reference(x, 2, 4, 2))


class Case(NamedTuple):
    padded: NanPadded
    height: int
    width: int
    factor: int


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    """Grids of up to 4 x 4 output tokens, square or not, in any layout."""
    factor = draw(st.integers(1, 3))
    height, width = (factor * draw(st.integers(1, 4)) for _ in range(2))
    tiles, channels = draw(st.sampled_from([1, 2, 3, 0])), draw(st.integers(1, 40))
    return Case(draw(strided_tensors((tiles, height * width, channels), dtype)), height, width, factor)


@pytest.mark.quick
@pytest.mark.parametrize(("form", "dtypes_of_form"), EVERY_FORM_AND_DTYPE)
@given(data=st.data())
def test_matches_the_reference(form: str, dtypes_of_form: st.SearchStrategy[torch.dtype], data: st.DataObject) -> None:
    padded, *grid = data.draw(cases(data.draw(dtypes_of_form)))
    out = run(form, pixel_shuffle, padded.tensor, *grid)
    assert_same_bits(out, pixel_shuffle_reference(padded.tensor, *grid))
    assert out.is_contiguous()
    padded.assert_padding_untouched()


@pytest.mark.parametrize("channels", [511, 512, 513, 1408])
def test_channels_around_the_block(channels: int) -> None:
    x = seeded_tensor((1, 4, channels), torch.bfloat16, channels)
    assert_same_bits(run("triton", pixel_shuffle, x, 2, 2), pixel_shuffle_reference(x, 2, 2))


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(
    dtype=dtypes(), tiles=st.integers(1, 2), rows=st.integers(1, 4), columns=st.integers(1, 4), factor=st.integers(1, 3)
)
def test_is_a_bijection(form: str, dtype: torch.dtype, tiles: int, rows: int, columns: int, factor: int) -> None:
    # Bit patterns 0, 1, 2, ... are distinct values and none is NaN.
    shape = (tiles, factor * rows * factor * columns, 5)
    x = torch.arange(torch.Size(shape).numel(), dtype=bits(torch.empty(0, dtype=dtype)).dtype).view(dtype).view(shape)
    out = run(form, pixel_shuffle, x, factor * rows, factor * columns, factor)
    torch.testing.assert_close(bits(out).flatten().sort().values, bits(x).flatten(), rtol=0, atol=0)


@pytest.mark.quick
@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_the_backward_is_the_inverse(form: str, data: st.DataObject) -> None:
    dtype = data.draw(dtypes_of(form))
    padded, *grid = data.draw(cases(dtype))
    x = padded.tensor.detach().requires_grad_()
    shuffled = pixel_shuffle_reference(padded.tensor, *grid)
    grad = data.draw(strided_tensors(shuffled.shape, dtype))
    grad.tensor.copy_(shuffled)
    with corrected_interpreter(), nan_filled_empty():
        out = run(form, pixel_shuffle, x, *grid)
        (inverse,) = torch.autograd.grad(out, x, grad.tensor)
    assert_same_bits(inverse, x.detach())
    grad.assert_padding_untouched()


def test_the_backward_is_a_kernel_that_reads_the_gradient_where_it_lies() -> None:
    x = seeded_tensor((2, 24, 10), torch.bfloat16, 0).requires_grad_()
    with corrected_interpreter(), force_impl("triton"):
        out = pixel_shuffle(x, 4, 6)
    grad = nan_padded(out.detach(), [(0, 1), (1, 2), (0, 8)]).tensor
    with corrected_interpreter() as counts:
        pointers = launched_on(lambda: torch.autograd.grad(out, x, grad))
    assert grad.data_ptr() in pointers
    assert len(pointers) == 2
    assert counts.bytes_loaded == counts.bytes_stored == x.nbytes


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_the_gradient_may_be_an_expanded_number(form: str) -> None:
    x = seeded_tensor((2, 24, 10), torch.float32, 0).requires_grad_()
    with corrected_interpreter(), force_impl(form):
        (actual,) = torch.autograd.grad(pixel_shuffle(x, 4, 6).sum(), x)
    assert_same_bits(actual, torch.ones_like(x))


def test_every_byte_is_read_once_and_written_once() -> None:
    x = class_token_sliced_off(2, torch.bfloat16, 0)
    with corrected_interpreter() as counts, force_impl("triton"):
        pixel_shuffle(x, 4, 6)
    assert counts.bytes_loaded == counts.bytes_stored == x.numel() * 2


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data())
def test_tiles_are_independent(form: str, data: st.DataObject) -> None:
    padded, *grid = data.draw(cases(data.draw(dtypes_of(form))))
    tiles = padded.tensor.shape[0]
    order = data.draw(st.permutations(range(tiles)))
    out = run(form, pixel_shuffle, padded.tensor, *grid)
    assert_same_bits(run(form, pixel_shuffle, padded.tensor[order], *grid), out[order])
    split = data.draw(st.integers(0, tiles))
    parts = [run(form, pixel_shuffle, part, *grid) for part in (padded.tensor[:split], padded.tensor[split:])]
    assert_same_bits(torch.cat(parts), out)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data())
def test_nan_stays_in_its_neighbourhood(form: str, data: st.DataObject) -> None:
    padded, height, width, factor = data.draw(
        cases(data.draw(dtypes_of(form))).filter(lambda case: case[0].tensor.numel())
    )
    tile, row, column = (data.draw(st.integers(0, n - 1)) for n in (padded.tensor.shape[0], height, width))
    clean = run(form, pixel_shuffle, padded.tensor, height, width, factor)
    padded.tensor[tile, row * width + column] = torch.nan
    out = run(form, pixel_shuffle, padded.tensor, height, width, factor)
    token = row // factor * (width // factor) + column // factor
    assert out[tile, token].isnan().sum() == padded.tensor.shape[2]
    out[tile, token] = clean[tile, token]
    assert_same_bits(out, clean)


class CopyCounter(TorchDispatchMode):
    """Count the operators that copy a tensor."""

    copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.copies += func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default)
        return func(*args, **(kwargs or {}))


def class_token_sliced_off(tiles: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """24 patches a tile, followed in memory by a class token that is NaN."""
    return nan_padded(seeded_tensor((tiles, 24, 10), dtype, seed), [(0, 0), (0, 1), (0, 0)]).tensor


@given(tiles=st.integers(1, 5), dtype=dtypes(), seed=seeds())
def test_a_class_token_is_sliced_off_without_a_copy(tiles: int, dtype: torch.dtype, seed: int) -> None:
    x = class_token_sliced_off(tiles, dtype, seed)
    assert x.data_ptr() in launched_on(pixel_shuffle, x, 4, 6)
    with CopyCounter() as counter:
        out = pixel_shuffle(x, 4, 6)
    assert counter.copies == 1, "the one that writes the output"
    assert_same_bits(out, pixel_shuffle_reference(x, 4, 6))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_inductor_makes_one_graph_for_any_number_of_tiles(form: str) -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(pixel_shuffle, backend=counter, fullgraph=True)

    @given(tiles=st.integers(0, 17), seed=seeds())
    def every_batch_is_right(tiles: int, seed: int) -> None:
        x = class_token_sliced_off(tiles, torch.bfloat16, seed)
        mark_unbacked(x, 0)
        with corrected_interpreter(), force_impl(form):
            assert_same_bits(compiled(x, 4, 6), pixel_shuffle_reference(x, 4, 6))

    every_batch_is_right()
    assert counter.frame_count == 1


@given(rows=st.integers(1, 3), columns=st.integers(1, 3), factor=st.integers(1, 3), seed=seeds())
def test_gradcheck(rows: int, columns: int, factor: int, seed: int) -> None:
    x = seeded_tensor((2, factor * rows * factor * columns, 2), torch.float64, seed).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pixel_shuffle(x, factor * rows, factor * columns, factor), x)
    # The op too, whose backward is ours; its implementation runs the same PyTorch operators.
    op = torch.ops.vit_kernels.pixel_shuffle.default
    assert torch.autograd.gradcheck(lambda x: op(x, factor * rows, factor * columns, factor, "eager"), x)
    assert torch.autograd.gradgradcheck(lambda x: op(x, factor * rows, factor * columns, factor, "eager"), x)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tiles", "height", "width", "factor"), [(2, 4, 6, 2), (1, 3, 3, 3), (0, 2, 2, 1)])
def test_opcheck(impl: str, requires_grad: bool, tiles: int, height: int, width: int, factor: int) -> None:
    x = seeded_tensor((tiles, height * width + 1, 7), torch.float32, 0)[:, :-1].detach().requires_grad_(requires_grad)
    with corrected_interpreter():
        torch.library.opcheck(torch.ops.vit_kernels.pixel_shuffle.default, (x, height, width, factor, impl))
        grad = pixel_shuffle(x, height, width, factor).detach().requires_grad_(requires_grad)
        torch.library.opcheck(torch.ops.vit_kernels.pixel_shuffle_backward.default, (grad, height, width, factor, impl))
