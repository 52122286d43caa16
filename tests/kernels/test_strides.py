"""What a kernel is told of strides: constants where they are a model's, and enough to read 16 bytes at a time."""

import pytest
import torch
from vit_kernels._triton.strides import head_stride, token_granule


def rows(stride: int) -> torch.Tensor:
    """Two tokens of a head of 16, so far apart."""
    return torch.empty_strided((2, 1, 16), (stride, 16, 1), device="meta")


@pytest.mark.parametrize(
    ("strides", "granule"),
    [
        # Three packed heads of 88, such as a rank's of 16, are no multiple of 16; of two heads they are.
        ([3 * 88, 3 * 88, 3 * 88], 8),
        ([3 * 2 * 88] * 3, 1),
        ([3 * 2 * 88, 88], 8),
        ([20, 24], 4),
        ([17, 16], 1),
        ([0, 32], 1),
        # The product of 32 bits would overflow.
        ([2**31 + 8], 1),
    ],
)
def test_strides_that_are_no_multiple_of_16_are_products(strides: list[int], granule: int) -> None:
    assert token_granule(*map(rows, strides)) == granule


def test_heads_of_a_token_are_a_constant_apart() -> None:
    packed = torch.empty(5, 9, 88, device="meta")
    assert head_stride(packed) == (1, 88)
    assert head_stride(packed.transpose(0, 1).contiguous().transpose(0, 1)) == (5 * 88 // 8, 8)
    assert head_stride(packed[:, :1]) == (1, 0)
