"""Pixel shuffle: factor x factor neighbourhoods of a token grid become channels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vit_kernels import _dispatch, _pixel_grid


def pixel_shuffle(x: Tensor, height: int, width: int, factor: int = 2) -> Tensor:
    """Gather each factor x factor neighbourhood of a height x width grid of tokens into one token.

    With rows = height // factor and columns = width // factor,
    `out[t, i * columns + j, (dh * factor + dw) * channels + c] = x[t, (factor * i + dh) * width + factor * j + dw, c]`.
    The eager implementation is inlined, so that a compiler fuses it. Autocast changes nothing.

    Source: Meta's llama-models, `llama4/vision/encoder.py`, `PixelShuffle`.

    Args:
        x: [tiles, height * width, channels], float32, float16, bfloat16 (eager: float64 too). Any strides with a
            contiguous last dimension, so a class token can be sliced off without a copy.
        height, width: the grid, both multiples of factor.
        factor: side of a neighbourhood.

    Returns:
        [tiles, (height // factor) * (width // factor), channels * factor**2], contiguous, dtype of x.

    Raises:
        TypeError: x has a dtype that the implementation does not take, or the grid is not of integers.
        ValueError: a shape, stride or factor that does not fit.
        NotImplementedError: the Triton implementation is given a tangent of forward-mode AD.
    """
    impl = _dispatch.choose("pixel_shuffle", x)
    height, width, factor = _pixel_grid.check_grid(x, height, width, factor, impl)
    if impl == "eager":
        return _pixel_grid.shuffle(x, height, width, factor)
    return torch.ops.vit_kernels.pixel_shuffle.default(x, height, width, factor, impl)


def fake(x: Tensor, height: int, width: int, factor: int) -> Tensor:
    """Shape, dtype and strides of the output."""
    return x.new_empty(x.shape[0], (height // factor) * (width // factor), x.shape[2] * factor * factor)


def fake_backward(grad: Tensor, height: int, width: int, factor: int) -> Tensor:
    """Shape, dtype and strides of the gradient."""
    return grad.new_empty(grad.shape[0], height * width, grad.shape[2] // (factor * factor))


def _launch(x: Tensor, height: int, width: int, factor: int) -> Tensor:
    from vit_kernels._triton.pixel_shuffle import launch

    return launch(x, height, width, factor)


def _launch_backward(grad: Tensor, height: int, width: int, factor: int) -> Tensor:
    from vit_kernels._triton.pixel_shuffle import launch_backward

    return launch_backward(grad, height, width, factor)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.grid, ctx.impl = inputs


def _backward_through(name: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward that calls the op `name` on the gradient."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The kernel reads the last dimension as one run; autograd's gradients may be expanded.
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        return getattr(torch.ops.vit_kernels, name).default(grad, *ctx.grid, ctx.impl), None, None, None, None

    return backward


_dispatch.define(
    "pixel_shuffle(Tensor x, SymInt height, SymInt width, SymInt factor, str? impl) -> Tensor",
    fake=fake,
    implementations={"eager": _pixel_grid.shuffle, "triton": _launch},
    setup_context=_setup_context,
    backward=_backward_through("pixel_shuffle_backward"),
)
_dispatch.define(
    "pixel_shuffle_backward(Tensor grad, SymInt height, SymInt width, SymInt factor, str? impl) -> Tensor",
    fake=fake_backward,
    implementations={"eager": _pixel_grid.unshuffle, "triton": _launch_backward},
    setup_context=_setup_context,
    backward=_backward_through("pixel_shuffle"),
)
