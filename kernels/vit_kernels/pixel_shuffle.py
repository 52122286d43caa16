"""Pixel shuffle: factor x factor neighbourhoods of a token grid become channels."""

from typing import Any

import torch
from torch import Tensor

from vit_kernels import _dispatch, _validation


def pixel_shuffle(x: Tensor, height: int, width: int, factor: int = 2) -> Tensor:
    """Gather each factor x factor neighbourhood of a height x width grid of tokens into one token.

    With rows = height // factor and columns = width // factor,
    `out[t, i * columns + j, (dh * factor + dw) * channels + c] = x[t, (factor * i + dh) * width + factor * j + dw, c]`.
    On a CPU the body is inlined, so that a compiler fuses it.

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
    """
    impl = _dispatch.choose("pixel_shuffle", x)
    _validate(x, height, width, factor, impl)
    if impl == "eager":
        return eager(x, height, width, factor)
    return torch.ops.vit_kernels.pixel_shuffle.default(x, height, width, factor, impl)


def eager(x: Tensor, height: int, width: int, factor: int) -> Tensor:
    """The PyTorch body."""
    tiles, _, channels = x.shape
    rows, columns = height // factor, width // factor
    neighbourhoods = x.unflatten(1, (rows, factor, columns, factor)).transpose(2, 3)
    # Always a copy: where nothing moves, a reshape alone would return the input's memory.
    moved = neighbourhoods.clone(memory_format=torch.contiguous_format)
    return moved.view(tiles, rows * columns, factor * factor * channels)


def fake(x: Tensor, height: int, width: int, factor: int) -> Tensor:
    """Shape, dtype and strides of the output."""
    return x.new_empty(x.shape[0], (height // factor) * (width // factor), x.shape[2] * factor * factor)


def _launch(x: Tensor, height: int, width: int, factor: int) -> Tensor:
    from vit_kernels._triton.pixel_shuffle import launch

    return launch(x, height, width, factor)


def _validate(x: Tensor, height: int, width: int, factor: int, impl: str) -> None:
    _validation.check_tensor("x", x, 3, "[tiles, height * width, channels]")
    _validation.check_dtype("x", x, impl)
    _validation.check_last_dim_contiguous("x", x)
    for name, value in (("height", height), ("width", width), ("factor", factor)):
        if not isinstance(value, int | torch.SymInt):
            raise TypeError(f"{name}: got {value!r}, expected an integer")
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected a positive integer")
    if height % factor or width % factor:
        raise ValueError(f"height, width: got {height} x {width}, expected multiples of factor {factor}")
    if x.shape[1] != height * width:
        raise ValueError(f"x: got {x.shape[1]} tokens a tile, expected height * width = {height * width}")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.height, ctx.width, ctx.factor, _ = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, columns = ctx.height // ctx.factor, ctx.width // ctx.factor
    cells = grad.unflatten(1, (rows, columns)).unflatten(3, (ctx.factor, ctx.factor, -1))
    return cells.transpose(2, 3).flatten(1, 4), None, None, None, None


_dispatch.define(
    "pixel_shuffle(Tensor x, SymInt height, SymInt width, SymInt factor, str? impl) -> Tensor",
    fake=fake,
    bodies={"eager": eager, "triton": _launch},
    setup_context=_setup_context,
    backward=_backward,
)
