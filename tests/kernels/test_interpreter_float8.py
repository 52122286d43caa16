"""corrected_interpreter(): e4m3 in both forms, bit for bit against every number that the format has."""

# Triton kernels are not typed Python.
# mypy: allow-untyped-defs

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from vit_kernels.testing import corrected_interpreter, seeded_tensor

E4M3 = [torch.float8_e4m3fn, torch.float8_e4m3fnuz]
every_format = pytest.mark.parametrize("dtype", E4M3)
LANES = 64


def every_number(dtype: torch.dtype) -> torch.Tensor:
    """All 256 bit patterns."""
    return torch.arange(256).to(torch.uint8).view(dtype)


@triton.jit
def cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out_ptr + lane, tl.load(x_ptr + lane).to(out_ptr.dtype.element_ty))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.numel(), dtype=dtype)
    with corrected_interpreter():
        cast_kernel[(1,)](x, out, BLOCK=x.numel())
    return out


def nearest(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest number, of two as near that with an even pattern, found among all; float32 in, float64 out."""
    numbers = every_number(dtype)
    numbers = numbers[numbers.float().isfinite()]
    # fp64 cannot tell the distances of much larger ones apart.
    distance = (values.double().clamp(-1000, 1000)[:, None] - numbers.double()).abs()
    odd = (numbers.view(torch.uint8) & 1).double()
    closest = distance == distance.amin(1, keepdim=True)
    chosen = torch.where(closest, odd, 2).argmin(1)
    return numbers.double()[chosen].where(~values.isnan(), torch.nan)


@every_format
@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_number_is_read(dtype: torch.dtype, to: torch.dtype) -> None:
    x = every_number(dtype)
    torch.testing.assert_close(cast(x, to), x.to(to), rtol=0, atol=0, equal_nan=True)
    assert x.float().isnan().any()


def halves(dtype: torch.dtype) -> np.ndarray:
    """Numbers, what lies half-way between two, and the floats beside that."""
    numbers = every_number(dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    middles = (numbers[1:] + numbers[:-1]) / 2
    return torch.cat([numbers, middles, middles.nextafter(middles + 1), middles.nextafter(middles - 1)]).numpy()


floats = st.floats(-600, 600, width=32) | st.floats(-(2**-5), 2**-5, width=32)
EDGES = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 448, 449, 464, 465, 480, 1e38, -1e38, 240, 248, -249, 1e-40] * 4)


@every_format
@given(values=arrays(np.float32, LANES, elements=floats))
@example(values=EDGES.astype(np.float32))
def test_a_float_becomes_the_nearest_number(dtype: torch.dtype, values: np.ndarray) -> None:
    x = torch.from_numpy(values)
    actual = cast(x, dtype)
    torch.testing.assert_close(actual.double(), nearest(x, dtype), rtol=0, atol=0, equal_nan=True)
    largest = float(torch.finfo(dtype).max)
    inside = x.abs() <= largest
    assert torch.equal(actual[inside].view(torch.uint8), x[inside].to(dtype).view(torch.uint8)), "the sign of zero too"


@every_format
def test_halves_go_to_even(dtype: torch.dtype) -> None:
    x = torch.from_numpy(halves(dtype))
    padded = torch.cat([x, torch.zeros(1024 - len(x))])
    actual = cast(padded, dtype)
    torch.testing.assert_close(actual.double(), nearest(padded, dtype), rtol=0, atol=0)
    assert torch.equal(actual.view(torch.uint8), padded.to(dtype).view(torch.uint8))


@every_format
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16])
def test_other_sources_are_rounded_once(dtype: torch.dtype, source: torch.dtype) -> None:
    x = (seeded_tensor((256,), torch.float32, 0) * 60).to(source)
    assert torch.equal(cast(x, dtype).view(torch.uint8), x.float().to(dtype).view(torch.uint8))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :], mask=(m < M - 1)[:, None], other=0.0)
    b = tl.load(b_ptr + n[None, :] * K + k[:, None])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, tl.zeros([M, N], tl.float32)))


@every_format
def test_dot_multiplies_the_numbers(dtype: torch.dtype) -> None:
    a, b = (
        seeded_tensor(shape, torch.float32, seed).mul(3).to(dtype) for seed, shape in enumerate([(16, 64), (32, 64)])
    )
    a[3, 5] = torch.nan
    out = torch.empty(16, 32)
    with corrected_interpreter():
        dot_kernel[(1,)](a, b, out, M=16, N=32, K=64)
    expected = a.double() @ b.double().T
    expected[-1] = 0
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-4, equal_nan=True)
    assert out[3].isnan().all()


@triton.jit
def int8_dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a, b = tl.load(a_ptr + i[:, None] * SIZE + i[None, :]), tl.load(b_ptr + i[None, :] * SIZE + i[:, None])
    tl.store(
        out_ptr + i[:, None] * SIZE + i[None, :], tl.dot(a, b, tl.zeros([SIZE, SIZE], tl.int32), out_dtype=tl.int32)
    )


def test_dot_of_int8_is_exact() -> None:
    a, b = (
        torch.randint(-128, 128, (64, 64), generator=torch.Generator().manual_seed(i)).to(torch.int8) for i in (0, 1)
    )
    a[0], b[0] = -128, -128
    out = torch.empty(64, 64, dtype=torch.int32)
    with corrected_interpreter():
        int8_dot_kernel[(1,)](a, b, out, SIZE=64)
    assert torch.equal(out.long(), a.long() @ b.long().T)


def test_the_stock_interpreter_is_wrong() -> None:
    """When this fails, Triton has learnt e4m3: see which corrections can go."""
    x = torch.from_numpy(halves(torch.float8_e4m3fn))[:512]
    out = torch.empty(512, dtype=torch.float8_e4m3fn)
    cast_kernel[(1,)](x, out, BLOCK=512)
    assert not torch.equal(out.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))
