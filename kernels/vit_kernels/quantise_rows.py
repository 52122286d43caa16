"""An activation and its 8-bit form, scaled by the largest magnitude of each row, in one pass."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_kernels import _dispatch, _eight_bit, _transforms, _validation

ACTIVATIONS = (*_eight_bit.ACTIVATIONS, "gated_silu")


def quantise_rows(
    x: Tensor, *, activation: str | None = None, dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """activation(x) in 8 bits, with a scale a row: what `scaled_linear` takes.

    The activation is computed in float32 and never written. The largest magnitude of a row becomes the largest number
    of the format: 127, 448 or 240. A row that has NaN or infinity has that as its scale, and zeros. The eager
    implementation is inlined, so that a compiler fuses it. There is no gradient: rounding to 8 bits has none.

    Source: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202), equation 5, for the gated form; Dettmers et
    al., LLM.int8() (arXiv 2208.07339), equation 3.

    Args:
        x: [rows, features], float32, float16 or bfloat16. Any strides with a contiguous last dimension.
        activation: None; "gelu", the erf form, or "gelu_tanh"; "gated_silu" is the SiLU of the first half of the
            features times the second half.
        dtype: int8, float8_e4m3fn or float8_e4m3fnuz.

    Returns:
        [rows, features], or half as many features where gated, in `dtype`, to be multiplied by the scales [rows] in
        float32. Both contiguous.

    Raises:
        TypeError: a dtype that is not one of these.
        ValueError: a shape, stride or activation that does not fit; or x requires grad under torch.is_grad_enabled().
        NotImplementedError: x has a tangent of forward-mode AD.
    """
    impl = _dispatch.choose("quantise_rows", x)
    _validation.check_tensor("x", x, 2, "[rows, features]")
    _eight_bit.check_floating("x", x.dtype)
    _validation.check_last_dim_contiguous("x", x)
    _eight_bit.check_format("dtype", dtype)
    _eight_bit.check_activation(activation, ACTIVATIONS)
    if activation == "gated_silu" and x.shape[1] % 2:
        raise ValueError(f"x: got {x.shape[1]} features, expected an even number beside 'gated_silu'")
    _transforms.refuse_derivatives("quantise_rows", x=x)
    if impl == "eager":
        return eager(x, activation, dtype)
    result: tuple[Tensor, Tensor] = torch.ops.vit_kernels.quantise_rows.default(x, activation, dtype, impl)
    return result


def eager(x: Tensor, activation: str | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The eager implementation."""
    if activation == "gated_silu":
        gate, up = x.float().chunk(2, dim=-1)
        return _eight_bit.quantise(F.silu(gate) * up, dtype)
    return _eight_bit.quantise(_eight_bit.activate(x.float(), activation), dtype)


def fake(x: Tensor, activation: str | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Shape, dtype and strides of the outputs."""
    features = x.shape[1] // 2 if activation == "gated_silu" else x.shape[1]
    return x.new_empty(x.shape[0], features, dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float32)


def _launch(x: Tensor, activation: str | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from vit_kernels._triton.quantise_rows import launch

    _eight_bit.check_interpreter(x, dtype)
    return launch(x, activation, dtype)


_dispatch.define(
    "quantise_rows(Tensor x, str? activation, ScalarType dtype, str? impl) -> (Tensor, Tensor)",
    fake=fake,
    implementations={"eager": eager, "triton": _launch},
    backward=_transforms.no_backward("quantise_rows"),
)
