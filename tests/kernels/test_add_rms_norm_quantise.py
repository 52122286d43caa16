"""add_rms_norm_quantise is add_layer_norm_quantise without a mean and a bias; that file has its properties."""

import pytest
import torch
from vit_kernels import add_rms_norm_quantise, force_impl
from vit_kernels.reference import add_norm_reference
from vit_kernels.testing import corrected_interpreter, seeded_tensor

from tests.kernels.eight_bit import assert_quantised, every_format


@pytest.mark.quick
@every_format
def test_example(dtype: torch.dtype) -> None:
    """The Triton kernel on CPU tensors, of a mean that is not subtracted."""
    x, residual = (seeded_tensor((20, 16), torch.float32, seed=seed) + 3 for seed in (0, 1))  # [tokens, channels]
    weight = seeded_tensor((16,), torch.float32, seed=2)
    with corrected_interpreter(), force_impl("triton"):
        hidden, q, scale = add_rms_norm_quantise(x, residual, weight, dtype=dtype)
    assert torch.equal(hidden, x + residual)
    _, normed = add_norm_reference(x, residual, weight, None, 1e-6)  # float64
    assert_quantised(q, scale, normed, 1e-5)
