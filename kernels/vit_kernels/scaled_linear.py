"""A linear layer on 8-bit numbers, its scales, bias and activation in one pass."""

import functools
from typing import Any

import torch
from torch import Tensor

from vit_kernels import _dispatch, _eight_bit, _transforms, _validation

MOST_FEATURES_OF_INT8 = (2**31 - 1) // 128**2
"""A sum of more products could leave int32."""


def scaled_linear(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out_scale: Tensor | None = None,
) -> Tensor:
    """`activation(x_scale[:, None] * weight_scale * (x @ weight.T) + bias)` of 8-bit x and weight, rounded once.

    Sums of int8 are exact in int32; those of e4m3 are in float32, on sm_90 in the fewer bits of its matrix
    instruction. Scales, bias and activation are in float32. The eager implementation is inlined around the product, so
    that a compiler fuses it: on a CPU that is oneDNN's product of int8, which saturates without a word where the CPU
    has no VNNI instructions, so it is tried once a process and refused there; e4m3 is multiplied as float32.

    With `out_scale` the result is divided by it and stored in the format of x, saturated at the largest number: what
    the next `scaled_linear` takes. What is NaN or infinite then is NaN. Only e4m3 has NaN; int8, which depends on its
    scale, is quantised from its values instead.

    There is no gradient: rounding to 8 bits has none.

    Source: Micikevicius et al., FP8 Formats for Deep Learning (arXiv 2209.05433); Dettmers et al., LLM.int8() (arXiv
    2208.07339), equation 3.

    Args:
        x: [tokens, in_features], int8, float8_e4m3fn or float8_e4m3fnuz. Any strides with a contiguous last dimension.
            The Triton implementation takes e4m3 where the GPU multiplies it: OCP's from sm_90 on and on gfx950, fnuz on
            gfx942.
        weight: [out_features, in_features], dtype and strides as for x.
        x_scale: [tokens], float32, contiguous. A scale of NaN or infinity makes its row NaN or infinite.
        weight_scale: [out_features], likewise.
        bias: [out_features], float32, float16 or bfloat16, contiguous.
        activation: "gelu" is the erf form, "gelu_tanh" its approximation.
        out_dtype: float32, float16 or bfloat16; not looked at with out_scale.
        out_scale: [tokens], float32, contiguous; for e4m3 only.

    Returns:
        [tokens, out_features], contiguous, in out_dtype, or in the dtype of x with out_scale.

    Raises:
        TypeError: a dtype that is not one of these or that differs.
        ValueError: a shape, stride, device, or activation that does not fit; more than 131,071 features of int8; or a
            tensor requires grad under torch.is_grad_enabled().
        RuntimeError: this CPU's products of int8 saturate.
        NotImplementedError: a tensor has a tangent of forward-mode AD.
    """
    impl = _dispatch.choose("scaled_linear", x)
    _validate(x, weight, x_scale, weight_scale, bias, out_scale)
    _eight_bit.check_activation(activation, _eight_bit.ACTIVATIONS)
    if out_scale is None:
        _eight_bit.check_floating("out_dtype", out_dtype)
    else:
        out_dtype = x.dtype
    floats = {"x_scale": x_scale, "weight_scale": weight_scale, "bias": bias, "out_scale": out_scale}
    _transforms.refuse_derivatives("scaled_linear", **floats)
    arguments = (x, weight, x_scale, weight_scale, bias, out_scale, activation, out_dtype)
    if impl == "eager":
        return eager(*arguments)
    result: Tensor = torch.ops.vit_kernels.scaled_linear.default(*arguments, impl)
    return result


def _validate(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, out_scale: Tensor | None
) -> None:
    _validation.check_tensor("x", x, 2, "[tokens, in_features]")
    _eight_bit.check_format("x", x.dtype)
    _validation.check_tensor("weight", weight, 2, "[out_features, in_features]")
    _validation.check_like("weight", weight, "x", x)
    for name, tensor in (("x", x), ("weight", weight)):
        _validation.check_last_dim_contiguous(name, tensor)
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: got {weight.shape[1]} input features, expected {x.shape[1]} as x has")
    if x.dtype == torch.int8 and x.shape[1] > MOST_FEATURES_OF_INT8:
        raise ValueError(f"x: got {x.shape[1]} features of int8, expected at most {MOST_FEATURES_OF_INT8}")
    _eight_bit.check_scale("x_scale", x_scale, x.shape[0], "x", x)
    _eight_bit.check_scale("weight_scale", weight_scale, weight.shape[0], "weight", x)
    if out_scale is not None:
        if x.dtype == torch.int8:
            raise TypeError("out_scale: got one beside int8, which has no NaN to store, expected one for e4m3 only")
        _eight_bit.check_scale("out_scale", out_scale, x.shape[0], "x", x)
    if bias is not None:
        _validation.check_tensor("bias", bias, 1, "[out_features]")
        _eight_bit.check_floating("bias", bias.dtype)
        _validation.check_same_device("bias", bias, "x", x)
        _validation.check_last_dim_contiguous("bias", bias)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias: got {bias.shape[0]} features, expected {weight.shape[0]} as weight has")


def eager(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The eager implementation: an exact product, the rest in float32."""
    product = torch.ops.vit_kernels.eight_bit_product.default(x, weight, "eager")
    y = product.float() * x_scale[:, None] * weight_scale
    if bias is not None:
        y = y + bias.float()
    y = _eight_bit.activate(y, activation)
    if out_scale is None:
        return y.to(out_dtype)
    y = y / out_scale[:, None]
    largest = _eight_bit.LARGEST[out_dtype]
    return torch.where(y.isfinite(), y.clamp(-largest, largest), torch.nan).to(out_dtype)


def fake(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Shape, dtype and strides of the output."""
    return x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)


def _launch(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    from vit_kernels._triton.scaled_linear import launch

    bias, out_dtype = rest[2], rest[-1]
    _eight_bit.check_interpreter(x, out_dtype, None if bias is None else bias.dtype)
    return launch(x, weight, *rest)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T: int8 exactly in int32, e4m3 in float32."""
    if x.dtype != torch.int8:
        return x.float() @ weight.float().T
    if x.device.type != "cpu":
        # torch's int8 product on CUDA takes some shapes only; fp64 is exact.
        return (x.double() @ weight.double().T).int()
    if not _int8_products_are_exact():
        raise RuntimeError(
            "x: got int8 on a CPU whose products of int8 saturate (it has no VNNI instructions, or ONEDNN_MAX_CPU_ISA "
            "forbids them), expected one with avx512_vnni or avx_vnni"
        )
    if x.shape[1] == 1:
        # torch 2.13 reads other memory than that of a dense weight with a single feature.
        return x.int() * weight.int().T
    return torch._int_mm(x, weight.T)


@functools.cache
def _int8_products_are_exact() -> bool:
    """Without VNNI, pairs of products are added in int16, which ends at 32,767."""
    x = torch.full((32, 64), 127, dtype=torch.int8, device="cpu")
    return bool((torch._int_mm(x, x.T) == 64 * 127**2).all())


def fake_product(x: Tensor, weight: Tensor) -> Tensor:
    """Shape, dtype and strides of the product."""
    dtype = torch.int32 if x.dtype == torch.int8 else torch.float32
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


_dispatch.define(
    "scaled_linear(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, Tensor? out_scale,"
    " str? activation, ScalarType out_dtype, str? impl) -> Tensor",
    fake=fake,
    implementations={"eager": eager, "triton": _launch},
    backward=_transforms.no_backward("scaled_linear"),
)
_dispatch.define(
    "eight_bit_product(Tensor x, Tensor weight, str? impl) -> Tensor",
    fake=fake_product,
    implementations={"eager": product},
)
