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


def _factored(stride: int) -> tuple[int, int]:
    constant = math.gcd(stride, 8)
    return stride // constant, constant
