"""Strides that are compiled in where they are a model's, and passed where they grow with a batch."""

import math

import torch


def head_stride(x: torch.Tensor) -> tuple[int, int]:
    """x.stride(1) of x [tokens, heads, head_dim] as a number times a constant to compile in.

    The heads of a token lie a constant apart: 1 times that constant, and Triton compiles the 1 in too. Where tokens
    lie between one head and the next, the constant is what of 16 bytes the stride is a multiple of, so that a kernel
    is compiled once for all numbers of tokens and still reads 16 bytes at a time.
    """
    if x.shape[1] == 1:
        return 1, 0
    stride = x.stride(1)
    return (1, stride) if stride <= x.stride(0) else _factored(stride)


def token_stride(x: torch.Tensor) -> tuple[int, int]:
    """x.stride(0), likewise: a constant where one token follows the other, as in a new tensor."""
    stride = x.stride(0)
    return (1, stride) if stride == x.shape[1] * x.shape[2] else _factored(stride)


def token_granule(*tensors: torch.Tensor) -> int:
    """What to divide x.stride(0) of tensors by, and have a kernel multiply it by again: 1 to 8 elements.

    The JIT sees of a stride only whether it is a multiple of 16. An odd number of heads of 88 in a packed projection,
    such as a rank's of many, makes rows of a multiple of 8: 16 bytes, but Triton would read 2 at a time, unless the
    stride is a product with a constant. 1 where the JIT sees enough, or where the product could overflow.
    """
    strides = [x.stride(0) for x in tensors]
    if all(stride % 16 == 0 for stride in strides) or max(strides) >= 2**31:
        return 1
    return math.gcd(8, *strides)


def _factored(stride: int) -> tuple[int, int]:
    constant = math.gcd(stride, 8)
    return stride // constant, constant
