"""Layer normalisation and pixel shuffle of a grid of tokens in one pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_kernels import _dispatch, _pixel_grid, _validation


def layer_norm_pixel_shuffle(
    x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, factor: int = 2, eps: float = 1e-5
) -> Tensor:
    """`pixel_shuffle` of the layer norm of each token, with one read of x and one write.

    Mean and variance are computed in float32, the result is rounded once. The eager implementation is inlined,
    so that a compiler fuses it. The gradient computes the statistics again. Autocast changes nothing: the result has
    the dtype of x, where CUDA's layer norm would return float32.

    Source: Ba et al., Layer Normalization (arXiv 1607.06450), equation 4; Meta's llama-models,
    `llama4/vision/encoder.py`, `PixelShuffle`.

    Args:
        x: [tiles, height * width, channels], float32, float16, bfloat16 (eager: float64 too). Any strides with a
            contiguous last dimension, so a class token can be sliced off without a copy.
        weight, bias: [channels], both in the dtype of x, or in float32 beside x in a half precision.
        height, width: the grid, both multiples of factor.
        factor: side of a neighbourhood.
        eps: added to the variance.

    Returns:
        [tiles, (height // factor) * (width // factor), channels * factor**2], contiguous, dtype of x.

    Raises:
        TypeError: a dtype that the implementation does not take or that differs, the grid is not of integers, or eps
            is no number.
        ValueError: a shape, stride, device, factor or eps that does not fit.
        NotImplementedError: the Triton implementation is given a tangent of forward-mode AD.
    """
    impl = _dispatch.choose("layer_norm_pixel_shuffle", x)
    height, width, factor = _pixel_grid.check_grid(x, height, width, factor, impl)
    eps = _validation.positive_number("eps", eps)
    _validate(x, weight, bias)
    if impl == "eager":
        return eager(x, weight, bias, height, width, factor, eps)
    op = torch.ops.vit_kernels.layer_norm_pixel_shuffle.default
    result: Tensor = op(x, weight, bias, height, width, factor, eps, impl)
    return result


def _validate(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    for name, parameter in (("weight", weight), ("bias", bias)):
        _validation.check_tensor(name, parameter, 1, "[channels]")
        _validation.check_same_device(name, parameter, "x", x)
        if parameter.dtype != torch.float32 or x.dtype == torch.float64:
            _validation.check_like(name, parameter, "x", x)
        _validation.check_like(name, parameter, "weight", weight)
        _validation.check_last_dim_contiguous(name, parameter)
        if parameter.shape[0] != x.shape[2]:
            raise ValueError(f"{name}: got {parameter.shape[0]} channels, expected {x.shape[2]} as x has")


def eager(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, factor: int, eps: float) -> Tensor:
    """The eager implementation: the norm in PyTorch, then the shuffle."""
    # On CUDA the result under autocast would be float32.
    normed = F.layer_norm(x.to(weight.dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)
    return _pixel_grid.shuffle(normed, height, width, factor)


def fake(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, factor: int, eps: float) -> Tensor:
    """Shape, dtype and strides of the output."""
    return x.new_empty(x.shape[0], (height // factor) * (width // factor), x.shape[2] * factor * factor)


def _launch(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, factor: int, eps: float) -> Tensor:
    from vit_kernels._triton.layer_norm_pixel_shuffle import launch

    return launch(x, weight, bias, height, width, factor, eps)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.grid, ctx.eps, ctx.impl = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved, weight, bias = ctx.saved_tensors
    x = saved.to(weight.dtype)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grad = torch.ops.vit_kernels.pixel_shuffle_backward.default(grad, *ctx.grid, ctx.impl)
    channels = [x.shape[2]]
    _, mean, rstd = torch.native_layer_norm(x, channels, weight, bias, ctx.eps)
    grad_x, *grads = torch.ops.aten.native_layer_norm_backward.default(
        grad.to(weight.dtype), x, channels, mean, rstd, weight, bias, ctx.needs_input_grad[:3]
    )
    return None if grad_x is None else grad_x.to(saved.dtype), *grads, None, None, None, None, None


_dispatch.define(
    "layer_norm_pixel_shuffle(Tensor x, Tensor weight, Tensor bias, SymInt height, SymInt width, SymInt factor,"
    " float eps, str? impl) -> Tensor",
    fake=fake,
    implementations={"eager": eager, "triton": _launch},
    setup_context=_setup_context,
    backward=_backward,
)
