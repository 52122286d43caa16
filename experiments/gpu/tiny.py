"""One op, forward and backward, on shapes that a sanitizer gets through: `python -m experiments.gpu.tiny OP`."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from vit_kernels import (
    layer_norm_pixel_shuffle,
    linear_gelu,
    pixel_shuffle,
    rotary_2d,
    rotary_2d_qkv_,
    varlen_attention,
)
from vit_kernels.testing import seeded_tensor

from experiments.gpu import machine


def _tensor(*shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    return seeded_tensor(shape, dtype or machine.dtype(), seed).to(machine.device()).requires_grad_()


def _attention(head_dim: int) -> None:
    # A whole block and one token more; an empty sequence; a few tokens; and rows of no sequence.
    lengths = [0, 9, 9, 14] if machine.rehearsing() else [0, 65, 65, 78]
    qkv = _tensor(lengths[-1] + 3, 3, 2, head_dim)
    cu_seqlens = torch.tensor(lengths, dtype=torch.int32, device=machine.device())
    q, k, v = qkv.unbind(1)
    out, lse = varlen_attention(q, k, v, cu_seqlens, return_lse=True)
    (out.square().sum() + lse[:, : lengths[-1]].sum()).backward()


def _tables() -> tuple[Tensor, Tensor]:
    return _tensor(7, 44, dtype=torch.float32), _tensor(7, 44, seed=1, dtype=torch.float32)


def _rotary() -> None:
    q, k = rotary_2d(_tensor(14, 3, 88), _tensor(14, 3, 88, seed=1), *_tables())
    (q.square().sum() + k.sum()).backward()
    with torch.no_grad():
        rotary_2d_qkv_(_tensor(14, 9, 88).detach(), *_tables(), interleaved=False)


def _pixel_shuffle() -> None:
    pixel_shuffle(_tensor(2, 24, 40), 4, 6).square().sum().backward()


def _layer_norm_pixel_shuffle() -> None:
    x, weight, bias = _tensor(2, 24, 1408), _tensor(1408), _tensor(1408, seed=1)
    layer_norm_pixel_shuffle(x, weight, bias, 4, 6).square().sum().backward()


def _linear_gelu() -> None:
    sizes = (5, 24, 40) if machine.rehearsing() else (130, 88, 136)
    tokens, width, features = sizes
    linear_gelu(_tensor(tokens, width), _tensor(features, width), _tensor(features)).square().sum().backward()


OPS: dict[str, Callable[[], None]] = {
    "varlen_attention, head_dim 88": lambda: _attention(88),
    "varlen_attention, head_dim 80": lambda: _attention(80),
    "rotary_2d": _rotary,
    "pixel_shuffle": _pixel_shuffle,
    "layer_norm_pixel_shuffle": _layer_norm_pixel_shuffle,
    "linear_gelu": _linear_gelu,
}


if __name__ == "__main__":
    with machine.launching():
        OPS[sys.argv[1]]()
    machine.synchronize()
