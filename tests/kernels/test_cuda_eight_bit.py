"""The ops on 8-bit numbers on a GPU, against fp64 references: run them with `pytest -m cuda`."""

import pytest
import torch
from vit_kernels import add_layer_norm_quantise, add_rms_norm_quantise, quantise_rows, scaled_linear
from vit_kernels._triton.configurations import current_target, scaled_linear_candidates
from vit_kernels.reference import activation_reference, add_norm_reference, scaled_linear_reference
from vit_kernels.testing import nan_filled_empty, seeded_tensor

from tests.gpu import DEVICE, REHEARSING, launching
from tests.kernels.eight_bit import assert_nearest, assert_quantised, every_format, numbers, scales

__all__ = ["launching"]

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("launching")]

IN_FEATURES = 64 if REHEARSING else 1408


def require_products(dtype: torch.dtype) -> None:
    if not scaled_linear_candidates(dtype, "interpreter" if REHEARSING else current_target()):
        pytest.skip(f"this GPU has no products of {dtype}")


@every_format
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
def test_scaled_linear(activation: str | None, dtype: torch.dtype) -> None:
    require_products(dtype)
    x, weight = (numbers((rows, IN_FEATURES), dtype, rows).to(DEVICE) for rows in (200, 300))
    x_scale, weight_scale = scales(200, 0.01, 2).to(DEVICE), scales(300, 0.01, 3).to(DEVICE)
    bias = seeded_tensor((300,), torch.float32, 4).to(DEVICE)
    expected = scaled_linear_reference(x, weight, x_scale, weight_scale, bias, activation=activation)
    magnitude = scaled_linear_reference(x.float().abs(), weight.float().abs(), x_scale, weight_scale)
    parts = x, weight, x_scale, weight_scale, bias
    with nan_filled_empty():
        out = scaled_linear(*parts, activation=activation, out_dtype=torch.float32)
    # Sums of int8 are exact; those of e4m3 have as few as 13 bits within a block.
    bits = 21 if dtype == torch.int8 else 11
    assert ((out.double() - expected).abs() <= (magnitude + expected.abs()) * 2.0**-bits + 1e-5).all()
    if dtype != torch.int8:
        out_scale = scales(200, 0.1, 5).to(DEVICE)
        q = scaled_linear(*parts, activation=activation, out_scale=out_scale)
        error = magnitude * 2.0**-bits / out_scale.double()[:, None]
        assert_nearest(q, expected / out_scale.double()[:, None], error + 1e-3)


@every_format
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_in_8_bits(x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    require_products(dtype)
    x, residual = seeded_tensor((2, 70, 1280), x_dtype, 0).to(DEVICE)
    weight, bias = seeded_tensor((2, 1280), x_dtype, 1).to(DEVICE)
    for activation in (None, "gelu", "gelu_tanh", "gated_silu"):
        with nan_filled_empty():
            q, scale = quantise_rows(x, activation=activation, dtype=dtype)
        assert_quantised(q, scale, activation_reference(x, activation), 1e-4)
    for op, bias_of, eps in ((add_layer_norm_quantise, (bias,), 1e-5), (add_rms_norm_quantise, (), 1e-6)):
        with nan_filled_empty():
            hidden, q, scale = op(x, residual, weight, *bias_of, eps=eps, dtype=dtype)
        _, normed = add_norm_reference(x, residual, weight, bias if bias_of else None, eps)
        assert torch.equal(hidden, x + residual)
        assert_quantised(q, scale, normed, 1e-4)
