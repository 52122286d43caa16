"""varlen_attention through the flash-attn package, where that is installed."""

import importlib.util

import torch
from torch import Tensor

from vit_kernels import _validation

INSTALLED = importlib.util.find_spec("flash_attn") is not None


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, scale: float
) -> Tensor:
    """The contract of `vit_kernels::varlen_attention` on top of `flash_attn_varlen_func`.

    The package wants the longest sequence as a Python int; the number of tokens bounds it without a read of the
    device. It leaves rows beyond the last sequence unwritten, so they are zeroed here.

    Raises:
        TypeError: a dtype other than float16 and bfloat16.
        ValueError: boundaries that do not fit, where they are checked.
    """
    from flash_attn import flash_attn_varlen_func

    if q.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"q: got {q.dtype} for implementation 'flash_attn', expected torch.float16 or torch.bfloat16")
    _validation.check_cu_seqlens_where_possible(cu_seqlens, cu_seqlens_k, q, k)
    if cu_seqlens.shape[0] == 1 or q.shape[0] == 0 or k.shape[0] == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=_inside(cu_seqlens, q.shape[0]),
        cu_seqlens_k=_inside(cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, k.shape[0]),
        # With a longest query of 1 the package regroups heads by batch, which empty sequences break.
        max_seqlen_q=max(q.shape[0], 2),
        max_seqlen_k=k.shape[0],
        softmax_scale=scale,
    )
    outside = torch.arange(q.shape[0], device=q.device) >= cu_seqlens[-1]
    return out.masked_fill_(outside[:, None, None], 0)


def _inside(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Boundaries that never decrease and stay within the tokens, whatever came: the package trusts them."""
    return cu_seqlens.clamp(0, tokens).cummax(0).values.to(torch.int32)
