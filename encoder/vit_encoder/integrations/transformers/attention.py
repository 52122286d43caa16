"""`varlen_attention` behind transformers' attention interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vit_kernels import varlen_attention

from vit_encoder.integrations.transformers.masks import Sequences, sequences_of_mask

NAME = "vit_varlen"
# What changes the result and is not ours to compute.
_UNSUPPORTED = (
    "block_indices", "cache", "indices", "position_bias", "s_aux", "sinks", "sliding_window", "softcap",
)  # fmt: skip


def register_attention() -> None:
    """Make `attn_implementation="vit_varlen"` known to transformers; once more changes nothing.

    It takes any of transformers' vision encoders that ask its attention interface: give it to the vision part alone,
    `attn_implementation={"vision_config": "vit_varlen"}`, since a causal language model is refused at its first call.
    Attention masks must split the tokens into few sequences (Pixtral's blocks, keys padded in one or two dimensions,
    Mllama's tiles); they are read on the host, once a forward, which waits for the device. Keys with padding between
    them are gathered. A query that sees no key gives zeros (SDPA: the same with a boolean mask, a mean of all values
    with the dtype's minimum); a bias is refused. An encoder that calls attention once a sequence (Qwen2.5-VL) stays
    right but gains nothing from packing. `output_attentions=True` gives no weights, with one warning, as for SDPA.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, varlen_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def varlen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, on `varlen_attention`.

    Source: transformers, `integrations/sdpa_attention.py`, whose conventions it keeps.

    Args:
        module: the calling module; its `is_causal` (True without one) counts where the argument is None.
        query: [batch, heads, tokens, head_dim].
        key, value: [batch, kv_heads, tokens_k, head_dim].
        attention_mask: boolean (True: attend) or additive (0, or at most the dtype's minimum), [batch or 1, heads or
            1, tokens or 1, tokens_k or 1], the same for every head.
        dropout: 0.
        scaling: as `varlen_attention`'s scale.
        is_causal: False.
        **kwargs: `cu_seq_lens_q` and `cu_seq_lens_k`, int32, are used where there is no mask; they end with the number
            of tokens. Others as below.

    Returns:
        [batch, tokens, heads, head_dim], and None for the weights.

    Raises:
        TypeError: a mask of integers, or what `varlen_attention` refuses.
        ValueError: dropout, a causal call, another option that changes the result, a mask that does not split the
            tokens into sequences, or what `varlen_attention` refuses.
    """
    batch, _, tokens, _ = query.shape
    tokens_k = key.shape[2]
    _refuse_options(module, attention_mask, dropout, is_causal, tokens, kwargs)
    if attention_mask is not None:
        sequences = sequences_of_mask(attention_mask, batch, tokens, tokens_k)
    elif kwargs.get("cu_seq_lens_q") is not None:
        sequences = Sequences(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"])
        for name, rows in (("cu_seq_lens_q", batch * tokens), ("cu_seq_lens_k", batch * tokens_k)):
            _check_last(name, kwargs[name], rows)
    else:
        boundaries = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
        sequences = Sequences(boundaries * tokens, boundaries * tokens_k)
    q, k, v = (
        _rows(x, index) for x, index in ((query, sequences.queries), (key, sequences.keys), (value, sequences.keys))
    )
    out = varlen_attention(q, k, v, sequences.cu_seqlens, cu_seqlens_k=sequences.cu_seqlens_k, scale=scaling)
    if sequences.places is not None:
        out = out.index_select(0, sequences.places)
    return out.unflatten(0, (batch, tokens)), None


def _check_last(name: str, boundaries: Tensor, rows: int) -> None:
    """Refuse the text model's boundaries, which some models hand down to all that they call."""
    told = f"{name}: expected the boundaries of the {rows} tokens of this call"
    if boundaries.device.type == "cpu" and not torch.compiler.is_compiling():
        if boundaries[-1] != rows:
            raise ValueError(f"{told}, got {boundaries.tolist()!r:.80}")
    else:
        # Nothing waits for the device; there it is a device-side assertion.
        torch._assert_async(boundaries[-1] == rows, told)


def _rows(x: Tensor, index: Tensor | None) -> Tensor:
    """Shapes: [batch, heads, tokens, head_dim] -> [batch * tokens or those of the index, heads, head_dim]."""
    x = x.transpose(1, 2).flatten(0, 1)
    if index is not None:
        return x.index_select(0, index)
    return x if x.stride(-1) == 1 else x.contiguous()


def _refuse_options(
    module: nn.Module,
    attention_mask: Tensor | None,
    dropout: float,
    is_causal: bool | None,
    tokens: int,
    kwargs: dict[str, Any],
) -> None:
    if dropout:
        raise ValueError(f"dropout: got {dropout}, expected 0: {NAME} has none")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal and attention_mask is None and tokens > 1:
        raise ValueError(
            f"is_causal: got True from {type(module).__name__}, expected False: {NAME} is for vision encoders; pass "
            f'attn_implementation={{"vision_config": "{NAME}"}} to a model with a language part'
        )
    if kwargs.get("output_attentions") and not torch.compiler.is_compiling():
        from transformers.utils import logging

        # As for SDPA: the caller may mean the text model's alone.
        logging.get_logger(__name__).warning_once(f"{NAME} holds no attention weights: output_attentions gives none")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: got {kwargs[name]!r:.80}, expected None: {NAME} does not support it")
