"""What the ops on 8-bit numbers share: the formats, activations in float32, and rows quantised by their maximum."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_kernels import _dispatch, _validation

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}
"""The largest number of each format that is used: -128 is not, so that int8 is symmetric."""

SMALLEST_SCALE = 2.0**-126
"""Of a row of zeros, or of numbers that a smaller scale, which GPUs may flush to zero, would not tell from zero."""

ACTIVATIONS = ("gelu", "gelu_tanh")


def check_format(name: str, dtype: Any) -> None:
    """`dtype` is one of the 8-bit formats."""
    if dtype not in LARGEST:
        raise TypeError(f"{name}: got {dtype}, expected one of {tuple(LARGEST)}")


def check_floating(name: str, dtype: Any) -> None:
    """`dtype` is one that the kernels read and write."""
    if dtype not in _validation.KERNEL_DTYPES:
        raise TypeError(f"{name}: got {dtype}, expected one of {_validation.KERNEL_DTYPES}")


def check_activation(activation: Any, expected: tuple[str, ...]) -> None:
    """`activation` is None or one of those expected."""
    if activation is not None and activation not in expected:
        raise ValueError(f"activation: got {activation!r}, expected None or one of {expected}")


def check_scale(name: str, scale: Tensor, rows: int | torch.SymInt, of: str, x: Tensor) -> None:
    """`scale` holds a float32 for each row of the tensor named `of`, beside x."""
    _validation.check_tensor(name, scale, 1, f"[rows of {of}]")
    if scale.dtype != torch.float32:
        raise TypeError(f"{name}: got {scale.dtype}, expected torch.float32")
    _validation.check_same_device(name, scale, "x", x)
    _validation.check_last_dim_contiguous(name, scale)
    _validation.check_sizes(
        scale.shape[0] == rows, f"{name}: expected one a row of {of}", scales=scale.shape[0], rows=rows
    )


def check_interpreter(x: Tensor, *dtypes: torch.dtype | None) -> None:
    """Raise RuntimeError where Triton's interpreter would be given a dtype that it is wrong in, uncorrected.

    Of x itself in bfloat16 the dispatch sees to that.
    """
    wrong = [dtype for dtype in (x.dtype, *dtypes) if dtype in (torch.bfloat16, *LARGEST) and dtype != torch.int8]
    if x.device.type == "cpu" and wrong and not _dispatch.interpreter_is_corrected:
        raise RuntimeError(
            f"implementation 'triton': Triton's interpreter is wrong in {wrong[0]}; call it inside "
            "vit_kernels.testing.corrected_interpreter()"
        )


def activate(y: Tensor, activation: str | None) -> Tensor:
    """None, the erf GELU or its tanh form of float32."""
    if activation is None:
        return y
    # From 10 on it is its argument, of which torch's own makes infinity on CPUs where it is large, and NaN of infinity.
    return torch.where(y > 10, y, F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none"))


def quantise(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of float32 as (8-bit numbers, float32 scale a row), the largest magnitude of each row as the largest number.

    A row with NaN or an infinity has that as its scale, and zeros.
    """
    scale = y.abs().amax(-1) / LARGEST[dtype] if y.shape[-1] else y.new_zeros(y.shape[:-1])
    scale = torch.where(scale < SMALLEST_SCALE, SMALLEST_SCALE, scale)
    scaled = torch.where(scale.isfinite()[..., None], y * scale.reciprocal()[..., None], 0.0)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale
