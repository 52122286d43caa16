"""A linear layer and its erf GELU in one pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_kernels import _dispatch, _transforms, _validation


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu(x @ weight.T + bias)` with the bias and the GELU in the epilogue of the matrix product.

    What the linear layer gives is never written: of a vision encoder's widest activation that saves a write and two
    reads. It is rounded once, after the GELU. cuBLASLt's GELU epilogue is the tanh form, which is another function.
    The eager implementation is inlined, so that a compiler fuses it. The gradient computes the linear layer again.
    Under autocast x, weight and bias are cast to its dtype, float64 excepted, as torch's own linear layer casts them.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units (arXiv 1606.08415), section 2, with the exact cdf.

    Args:
        x: [tokens, in_features], float32, float16, bfloat16 (eager: float64 too). Any strides with a contiguous last
            dimension.
        weight: [out_features, in_features], dtype of x, strides as for x.
        bias: [out_features], dtype of x, contiguous.

    Returns:
        [tokens, out_features], contiguous, dtype of x.

    Raises:
        TypeError: a dtype that the implementation does not take or that differs.
        ValueError: a shape, stride or device that does not fit.
        NotImplementedError: the Triton implementation is given a tangent of forward-mode AD.
    """
    x, weight, bias = _transforms.cast_for_autocast(x, weight, bias)
    impl = _dispatch.choose("linear_gelu", x)
    _validate(x, weight, bias, impl)
    if impl == "eager" and _transforms.is_autocast(x):
        # It would round the product.
        with torch.autocast(x.device.type, enabled=False):
            return eager(x, weight, bias)
    if impl == "eager":
        return eager(x, weight, bias)
    result: Tensor = torch.ops.vit_kernels.linear_gelu.default(x, weight, bias, impl)
    return result


def _validate(x: Tensor, weight: Tensor, bias: Tensor, impl: str) -> None:
    _validation.check_tensor("x", x, 2, "[tokens, in_features]")
    _validation.check_dtype("x", x, impl)
    _validation.check_tensor("weight", weight, 2, "[out_features, in_features]")
    _validation.check_tensor("bias", bias, 1, "[out_features]")
    for name, parameter in (("weight", weight), ("bias", bias)):
        _validation.check_like(name, parameter, "x", x)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        _validation.check_last_dim_contiguous(name, tensor)
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: got {weight.shape[1]} input features, expected {x.shape[1]} as x has")
    if bias.shape[0] != weight.shape[0]:
        raise ValueError(f"bias: got {bias.shape[0]} features, expected {weight.shape[0]} as weight has")


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The eager implementation; half precisions are multiplied in float32, to be rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    u = F.linear(x.to(wide), weight.to(wide), bias.to(wide))
    # From 10 on it is its argument, of which torch's own makes infinity on CPUs where it is large, and NaN of infinity.
    return torch.where(u > 10, u, F.gelu(u)).to(x.dtype)


def fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Shape, dtype and strides of the output."""
    return x.new_empty(x.shape[0], weight.shape[0])


def _launch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from vit_kernels._triton.linear_gelu import launch

    return launch(x, weight, bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    # float16 would overflow where the output does not.
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype
    u = F.linear(x.to(wide), weight.to(wide), bias.to(wide))
    grad = torch.ops.aten.gelu_backward.default(grad.to(wide), u).to(x.dtype)
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    return (
        grad @ weight if needs_x else None,
        grad.mT @ x if needs_weight else None,
        grad.sum(0) if needs_bias else None,
        None,
    )


_dispatch.define(
    "linear_gelu(Tensor x, Tensor weight, Tensor bias, str? impl) -> Tensor",
    fake=fake,
    implementations={"eager": eager, "triton": _launch},
    setup_context=_setup_context,
    backward=_backward,
    autocast=("x", "weight", "bias"),
)
