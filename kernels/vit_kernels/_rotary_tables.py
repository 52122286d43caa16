"""The checks of cos and sin that the rotary ops share."""

import torch
from torch import Tensor

from vit_kernels import _validation


def check_tables(name: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """cos and sin [positions, head_dim // 2] fit x [tokens, heads, head_dim]."""
    if x.shape[2] < 2 or x.shape[2] % 2:
        raise ValueError(f"{name}: got head_dim {x.shape[2]}, expected a positive even number")
    for table_name, table in (("cos", cos), ("sin", sin)):
        _validation.check_tensor(table_name, table, 2, "[positions, head_dim // 2]")
        _validation.check_same_device(table_name, table, name, x)
        if table.dtype != torch.float32:
            raise TypeError(f"{table_name}: got {table.dtype}, expected torch.float32")
        if not table.is_contiguous():
            raise ValueError(f"{table_name}: got strides {table.stride()}, expected a contiguous tensor")
        if table.shape[0] < 1 or table.shape[1] != x.shape[2] // 2 or table.shape != cos.shape:
            raise ValueError(
                f"{table_name}: got shape {tuple(table.shape)}, expected [positions, head_dim // 2 = {x.shape[2] // 2}]"
            )
    _validation.check_sizes(
        x.shape[0] % cos.shape[0] == 0,
        f"{name}: expected a multiple of the positions of cos and sin as tokens",
        tokens=x.shape[0],
        positions=cos.shape[0],
    )
