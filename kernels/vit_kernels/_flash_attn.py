"""varlen_attention through the flash-attn package, where that is installed."""

import importlib.util

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("flash_attn") is not None


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, scale: float
) -> Tensor:
    """The contract of `vit_kernels::varlen_attention` on top of `flash_attn_varlen_func`.

    The package wants the longest sequence as a Python int; the number of tokens bounds it without a read of the
    device. It leaves rows beyond the last sequence unwritten, so they are zeroed here.

    Raises:
        TypeError: a dtype other than float16 and bfloat16.
    """
    from flash_attn import flash_attn_varlen_func

    if q.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"q: got {q.dtype} for implementation 'flash_attn', expected torch.float16 or torch.bfloat16")
    out = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens if cu_seqlens_k is None else cu_seqlens_k,
        max_seqlen_q=q.shape[0],
        max_seqlen_k=k.shape[0],
        softmax_scale=scale,
    )
    outside = torch.arange(q.shape[0], device=q.device) >= cu_seqlens[-1]
    return out.masked_fill_(outside[:, None, None], 0)
