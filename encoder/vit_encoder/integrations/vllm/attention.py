"""vLLM's attention of vision and audio encoders on `varlen_attention`, in every model that is built on it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from vit_kernels import varlen_attention
from vllm.logger import init_logger
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.v1.attention.backends.registry import AttentionBackendEnum

NAME = "MMEncoderAttention"
OURS = "ours"
logger = init_logger("vllm.plugins.vit_kernels")
_warned: set[str] = set()


class VarlenEncoderAttention(MMEncoderAttention):
    """One call of `varlen_attention`, or vLLM's own implementation where that does not take the layer.

    Which of them is decided once, when the layer is made, from what never changes: a choice at each call would split
    compiled graphs, and nobody would learn of a slow layer.

    Raises:
        ValueError: vLLM was told to use FlashInfer or fp8. FlashInfer's sequence boundaries are offsets of elements,
            which the model makes for all of its layers at once: taken for boundaries in tokens they would be wrong
            without a word.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.fp8_enabled:
            raise ValueError("mm_encoder_attn_dtype: got 'fp8', expected none: varlen_attention has no fp8")
        if self.attn_backend == AttentionBackendEnum.FLASHINFER:
            raise ValueError(
                "mm_encoder_attn_backend: got FLASHINFER, expected none or another one: its sequence boundaries are no "
                "boundaries in tokens, which varlen_attention takes"
            )
        self.reason = _misfit(self.head_size, self.dtype)
        if self.reason is None:
            self._forward_method = self._forward_varlen
        elif self.reason not in _warned:
            _warned.add(self.reason)
            name = self.layer_name or f"of {self.num_heads} heads"
            logger.warning("vit_kernels: the attention layer %s stays vLLM's: %s", name, self.reason)

    def _forward_varlen(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: Tensor | None = None,
        sequence_lengths: Tensor | None = None,
    ) -> Tensor:
        """Shapes: [batch, tokens, heads * head_dim], or with these two apart -> the shape of query.

        Args:
            query, key, value: of one dtype. Keys and values may have fewer heads; without cu_seqlens they may have
                another number of tokens.
            cu_seqlens: int32 or int64 [sequences + 1], the boundaries of sequences in all rows of the batch, one after
                the other; None where each row is a sequence. Tokens outside of them give zeros.
            max_seqlen, sequence_lengths: for other backends.
        """
        batch, tokens = query.shape[:2]
        tokens_k = key.shape[1]
        split = self.view_qkv_to_4d(query, key, value, batch, tokens, tokens_k)
        q, k, v = (x.flatten(0, 1) for x in split)  # [batch * tokens, heads, head_dim]
        if cu_seqlens is not None:
            return varlen_attention(q, k, v, cu_seqlens.int(), scale=self.scale).view(query.shape)
        rows = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
        out = varlen_attention(q, k, v, rows * tokens, cu_seqlens_k=rows * tokens_k, scale=self.scale)
        return out.view(query.shape)


def _misfit(head_size: int, dtype: torch.dtype) -> str | None:
    """Why `varlen_attention` does not take a layer; None where it does."""
    if head_size % 8 or not 16 <= head_size <= 256:
        return f"head_size {head_size} is no multiple of 8 in 16..256"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{dtype} is not float32, float16 or bfloat16"
    return None


def swap_in() -> str | None:
    """Put ours in the place of vLLM's, in this process; once more changes nothing.

    Returns:
        The class that another plugin put there, which stays; None where it is ours.
    """
    there = op_registry_oot.get(NAME)
    # vLLM refuses to register an op twice.
    if there is None:
        CustomOp.register_oot(VarlenEncoderAttention, name=NAME)
    elif there is not VarlenEncoderAttention:
        return _described(there)
    return None


def summary(model: nn.Module) -> Counter[str]:
    """How many attention layers of a model's encoders are ours, and how many stay another's for each reason."""
    kinds = (MMEncoderAttention, op_registry_oot.get(NAME, MMEncoderAttention))
    return Counter(_whose(layer) for layer in model.modules() if isinstance(layer, kinds))


def _whose(layer: nn.Module) -> str:
    if isinstance(layer, VarlenEncoderAttention):
        return layer.reason or OURS
    return f"it is {_described(type(layer))}"


def _described(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def sentence(found: Counter[str]) -> str:
    """What `summary` found, for the log: "attention of 27 encoder layers is ours; 1 not: head_size 60 is ..."."""
    ours = found[OURS]
    others = [f"{count} not: {reason}" for reason, count in found.items() if reason != OURS]
    return "; ".join([f"attention of {ours} encoder layer{'s' * (ours != 1)} is ours", *others])
