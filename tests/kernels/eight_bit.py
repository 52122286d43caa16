"""What the tests of ops on 8-bit numbers share: values, and what is right of a result in 8 bits."""

import pytest
import torch
from torch import Tensor
from vit_kernels.testing import seeded_tensor

E4M3 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
FORMATS = (torch.int8, *E4M3)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}
SMALLEST_NORMAL = {torch.float8_e4m3fn: 2.0**-6, torch.float8_e4m3fnuz: 2.0**-7}
every_format = pytest.mark.parametrize("dtype", FORMATS, ids=lambda dtype: str(dtype)[6:])


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """8-bit numbers of a normal distribution, a few of them the largest, and zeros."""
    values = seeded_tensor(shape, torch.float32, seed) * (LARGEST[dtype] / 3)
    return (values.round() if dtype == torch.int8 else values).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def scales(rows: int, size: float, seed: int) -> Tensor:
    """Positive ones, about `size`."""
    return seeded_tensor((rows,), torch.float32, seed).abs() * size + size / 10


def half_step(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error of one rounding to the format."""
    if dtype == torch.int8:
        return torch.full_like(exact, 0.5)
    return torch.exp2(exact.abs().clamp(SMALLEST_NORMAL[dtype], LARGEST[dtype]).log2().floor() - 4)


def assert_nearest(q: Tensor, expected: Tensor, error: Tensor | float = 0.0) -> None:
    """Numbers next to the expected ones, or the largest, and NaN where those are not finite.

    Args:
        error: of the expected numbers, relative to a rounding of float32 of which more is allowed anyway.
    """
    exact = expected.clamp(-LARGEST[q.dtype], LARGEST[q.dtype])
    finite = expected.isfinite()
    assert torch.equal(q.float().isnan(), ~finite)
    allowed = half_step(exact, q.dtype) + exact.abs() * 2**-20 + error
    assert ((q.double() - exact).abs() <= allowed)[finite].all()


def assert_quantised(q: Tensor, scale: Tensor, expected: Tensor, error: Tensor | float) -> None:
    """Rows of 8-bit numbers with the scales that their largest magnitudes ask for.

    A row that is not finite has a scale that is not, and zeros.

    Args:
        expected: [rows, features] in fp64.
        error: [rows, 1], the error of float32 that is allowed before the rounding to 8 bits.
    """
    largest = LARGEST[q.dtype]
    assert q.is_contiguous()
    assert scale.dtype == torch.float32
    finite = expected.isfinite().all(-1)
    assert torch.equal(scale.isfinite(), finite)
    assert torch.equal(scale.isnan(), expected.isnan().any(-1))
    assert not q[~finite].float().any()
    q, scale, expected = q[finite], scale[finite].double()[:, None], expected[finite]
    error = error[finite] if isinstance(error, Tensor) else error
    if not q.numel():
        return
    wanted = (expected.abs().amax(-1, keepdim=True) / largest).clamp(min=2.0**-126)
    assert ((scale - wanted).abs() <= wanted * 2**-20 + error / largest).all()
    assert_nearest(q, expected / scale, error / scale)
    reached = q.float().abs().amax(-1) == largest
    assert (reached | (scale[:, 0] < 2.0**-125)).all()
