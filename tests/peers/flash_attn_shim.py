"""flash-attn's variable-length functions on `varlen_attention`, under the names that flash-attn's tests import."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor
from vit_kernels import varlen_attention

from tests.peers.suite_loading import load_file

# Option: what flash-attn takes for none. The others change the result, and are not ours to compute.
_NONE: dict[str, Any] = {
    "dropout_p": 0.0,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "block_table": None,
}


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **options: Any,
) -> Any:
    """As flash-attn's, of which it refuses what `varlen_attention` does not compute.

    Raises:
        ValueError: an option that changes the result, or what `varlen_attention` refuses.
    """
    for name, value in (options | {"dropout_p": dropout_p, "causal": causal}).items():
        if value is not _NONE[name] and value != _NONE[name]:
            raise ValueError(f"{name}: got {value!r:.80}, expected {_NONE[name]!r}: varlen_attention does not have it")
    # Gradients are deterministic whether asked for or not.
    out, lse = varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen=max_seqlen_q, scale=softmax_scale, return_lse=True
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """kv: [tokens, 2, heads, head_dim]."""
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(q, k, v, *args, **kwargs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args: Any, **kwargs: Any
) -> Any:
    """qkv: [tokens, 3, heads, head_dim]."""
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)


def _not_ours(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("this function of flash-attn has no counterpart here")


def install(folder: Path) -> None:
    """Make `import flash_attn` give the functions above; padding comes from flash-attn's own file in `folder`."""
    package = ModuleType("flash_attn")
    package.__path__ = []
    for function in (flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func):
        setattr(package, function.__name__, function)
    for name in ("flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_with_kvcache"):
        setattr(package, name, _not_ours)
    sys.modules["flash_attn"] = package
    for name, lacking in (("flash_attn_interface", "_get_block_size_n"), ("layers.rotary", "apply_rotary_emb")):
        module = ModuleType(f"flash_attn.{name}")
        setattr(module, lacking, _not_ours)
        sys.modules[module.__name__] = module
    load_file("flash_attn.bert_padding", folder / "flash_attn/bert_padding.py")
