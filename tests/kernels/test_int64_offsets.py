"""Addresses past 2**31 elements: rows of a view lie 2**30 apart, in memory that is reserved but hardly touched."""

import torch
from torch import Tensor
from vit_kernels import force_impl, pixel_shuffle, rotary_2d, varlen_attention
from vit_kernels.testing import corrected_interpreter, seeded_tensor

STRIDE = 2**30


def spread(x: Tensor) -> Tensor:
    """The same values with 2**30 elements from one row to the next."""
    storage = torch.empty((x.shape[0] - 1) * STRIDE + x[0].numel(), dtype=x.dtype)
    view = storage.as_strided(x.shape, (STRIDE, *x.stride()[1:]))
    view.copy_(x)
    return view


def test_varlen_attention() -> None:
    q, k, v = (seeded_tensor((4, 2, 24), dtype=torch.float16, seed=seed) for seed in range(3))
    cu_seqlens = torch.tensor([0, 1, 4], dtype=torch.int32)
    with corrected_interpreter(), force_impl("triton"):
        expected = varlen_attention(q, k, v, cu_seqlens)
        for far in range(3):
            far_q, far_k, far_v = (spread(x) if i == far else x for i, x in enumerate((q, k, v)))
            assert torch.equal(varlen_attention(far_q, far_k, far_v, cu_seqlens), expected)


def test_rotary_2d() -> None:
    q, k = (seeded_tensor((4, 2, 24), dtype=torch.float16, seed=seed) for seed in range(2))
    cos, sin = (seeded_tensor((2, 12), dtype=torch.float32, seed=seed) for seed in (2, 3))
    with corrected_interpreter(), force_impl("triton"):
        expected = rotary_2d(q, k, cos, sin)
        for inputs in ((spread(q), k), (q, spread(k))):
            for actual, wanted in zip(rotary_2d(*inputs, cos, sin), expected, strict=True):
                assert torch.equal(actual, wanted)


def test_pixel_shuffle() -> None:
    x = seeded_tensor((4, 4, 8), dtype=torch.float16, seed=0)
    with corrected_interpreter(), force_impl("triton"):
        expected = pixel_shuffle(x, 2, 2)
        assert torch.equal(pixel_shuffle(spread(x), 2, 2), expected)
        rows = spread(x[0])[None]
        assert torch.equal(pixel_shuffle(rows, 2, 2), expected[:1])
