"""An addition, the norm of the sum and its 8-bit form in one pass."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_kernels import _dispatch, _eight_bit, _transforms, _validation


def add_layer_norm_quantise(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor, Tensor]:
    """x + residual, and the layer norm of that in 8 bits with a scale a token: what `scaled_linear` takes.

    The sum is rounded to the dtype of x, and it is that of which the norm is made; mean, variance and norm are in
    float32 and never written. The largest magnitude of a token becomes the largest number of the format: 127, 448 or
    240. A token of which the norm has NaN or infinity has that as its scale, and zeros. The eager implementation is
    inlined, so that a compiler fuses it. There is no gradient: rounding to 8 bits has none. Autocast changes nothing.

    Source: Ba et al., Layer Normalization (arXiv 1607.06450), equation 4; Dettmers et al., LLM.int8() (arXiv
    2208.07339), equation 3.

    Args:
        x, residual: [tokens, channels], float32, float16 or bfloat16. Any strides with a contiguous last dimension.
        weight, bias: [channels], both in the dtype of x, or in float32.
        eps: added to the variance.
        dtype: int8, float8_e4m3fn or float8_e4m3fnuz.

    Returns:
        The sum [tokens, channels] in the dtype of x; the norm [tokens, channels] in `dtype`, to be multiplied by the
        scales [tokens] in float32. All contiguous.

    Raises:
        TypeError: a dtype that is not one of these or that differs, or eps is no number.
        ValueError: a shape, stride, device or eps that does not fit; or a tensor requires grad under
            torch.is_grad_enabled().
        NotImplementedError: a tensor has a tangent of forward-mode AD.
    """
    return _add_norm_quantise("add_layer_norm_quantise", x, residual, {"weight": weight, "bias": bias}, eps, dtype)


def add_rms_norm_quantise(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-6, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor, Tensor]:
    """As `add_layer_norm_quantise`, of the RMS norm, which subtracts no mean and adds no bias.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467), equation 4.
    """
    return _add_norm_quantise("add_rms_norm_quantise", x, residual, {"weight": weight}, eps, dtype)


def _add_norm_quantise(
    op: str, x: Tensor, residual: Tensor, parameters: dict[str, Tensor], eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    impl = _dispatch.choose(op, x)
    eps = _validation.positive_number("eps", eps)
    _eight_bit.check_format("dtype", dtype)
    _validate(x, residual, parameters)
    _transforms.refuse_derivatives(op, x=x, residual=residual, **parameters)
    arguments = (x, residual, parameters["weight"], parameters.get("bias"), eps, dtype)
    if impl == "eager":
        return eager(*arguments)
    call = torch.ops.vit_kernels.add_layer_norm_quantise.default
    result: tuple[Tensor, Tensor, Tensor] = call(*arguments, impl)
    return result


def _validate(x: Tensor, residual: Tensor, parameters: dict[str, Tensor]) -> None:
    for name, tensor in (("x", x), ("residual", residual)):
        _validation.check_tensor(name, tensor, 2, "[tokens, channels]")
        _eight_bit.check_floating(name, tensor.dtype)
        _validation.check_last_dim_contiguous(name, tensor)
    _validation.check_like("residual", residual, "x", x)
    _validation.check_sizes(
        residual.shape[0] == x.shape[0],
        "residual: expected as many tokens as x has",
        residual=residual.shape[0],
        x=x.shape[0],
    )
    if residual.shape[1] != x.shape[1]:
        raise ValueError(f"residual: got {residual.shape[1]} channels, expected {x.shape[1]} as x has")
    for name, parameter in parameters.items():
        _validation.check_tensor(name, parameter, 1, "[channels]")
        _validation.check_same_device(name, parameter, "x", x)
        if parameter.dtype != torch.float32:
            _validation.check_like(name, parameter, "x", x)
        _validation.check_like(name, parameter, "weight", parameters["weight"])
        _validation.check_last_dim_contiguous(name, parameter)
        if parameter.shape[0] != x.shape[1]:
            raise ValueError(f"{name}: got {parameter.shape[0]} channels, expected {x.shape[1]} as x has")


def eager(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The eager implementation; without a bias that is the RMS norm."""
    hidden = x + residual
    wide, channels = hidden.float(), x.shape[-1:]
    if bias is None:
        y = F.rms_norm(wide, channels, weight.float(), eps)
    else:
        y = F.layer_norm(wide, channels, weight.float(), bias.float(), eps)
    return hidden, *_eight_bit.quantise(y, dtype)


def fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Shape, dtype and strides of the outputs."""
    tokens, channels = x.shape
    return (
        x.new_empty(tokens, channels),
        x.new_empty(tokens, channels, dtype=dtype),
        x.new_empty(tokens, dtype=torch.float32),
    )


def _launch(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    from vit_kernels._triton.add_layer_norm_quantise import launch

    _eight_bit.check_interpreter(x, weight.dtype, dtype)
    return launch(x, residual, weight, bias, eps, dtype)


_dispatch.define(
    "add_layer_norm_quantise(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, ScalarType dtype,"
    " str? impl) -> (Tensor, Tensor, Tensor)",
    fake=fake,
    implementations={"eager": eager, "triton": _launch},
    backward=_transforms.no_backward("add_layer_norm_quantise"),
)
