"""`varlen_attention` behind transformers' attention interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vit_kernels import varlen_attention

from vit_encoder.integrations.transformers.masks import Sequences, sequences_of_mask

NAME = "vit_varlen"
# transformers packs sequences for attention whose name has "flash" in it.
PACKED_NAME = "vit_varlen_flash"
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
    with the dtype's minimum); a bias is refused. An encoder that packs its sequences (Qwen2-VL and later, GLM-4V,
    PaddleOCR-VL) calls attention once for each of them, unless its name says flash attention: `use_packed_attention`
    gives it ours under such a name. `output_attentions=True` gives no weights, with one warning, as for SDPA.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for name, forward in ((NAME, varlen_attention_forward), (PACKED_NAME, _packed_attention_forward)):
        AttentionInterface.register(name, forward)
        AttentionMaskInterface.register(name, sdpa_mask)


def use_packed_attention(model: nn.Module) -> Callable[[], None]:
    """Give an encoder that packs its sequences our attention in one call a layer, as "vit_varlen_flash".

    transformers' Qwen2-VL, Qwen2.5-VL, Qwen3-VL and the like split a batch at its frames or windows, on the host and in
    every layer, unless the implementation's name has "flash" in it; `set_attn_implementation` takes such names for
    packages to be loaded, and refuses ours. With the tensors of `transformers.vision_utils` given to the encoder as
    keyword arguments, and a constant `max_seqlen`, which ours ignores, its forward reads nothing on the host. It
    compiles with `fullgraph=True`: to one graph for all sizes where the first dimension of each tensor is marked
    (`torch._dynamo.decorators.mark_unbacked`), else to further ones for a single image, frame or window.

    Args:
        model: an encoder, or a whole model with a `vision_config`, of which the encoder alone is changed.

    Returns:
        A function that gives the encoder back the implementation it had.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        TypeError: this is no model of transformers.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: got {type(model).__name__}, expected a PreTrainedModel")
    register_attention()
    config: Any = getattr(model.config, "vision_config", model.config)
    before = config._attn_implementation
    config._attn_implementation = PACKED_NAME

    def restore() -> None:
        config._attn_implementation = before

    return restore


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


def _packed_attention_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """As `varlen_attention_forward`, for callers that take it for flash attention.

    Raises:
        ValueError: also positions without boundaries: flash attention finds the sequences in them.
    """
    if kwargs.get("position_ids") is not None and kwargs.get("cu_seq_lens_q") is None:
        raise ValueError(
            f"position_ids: got {kwargs['position_ids']!r:.80}, expected cu_seq_lens_q and cu_seq_lens_k: "
            f"{PACKED_NAME} does not find sequences by them; {NAME} gets a mask instead"
        )
    return varlen_attention_forward(*args, **kwargs)


def _check_last(name: str, boundaries: Tensor, rows: int) -> None:
    """Refuse the text model's boundaries, which some models hand down to all that they call."""
    if boundaries.device.type == "cpu" and not torch.compiler.is_compiling():
        if boundaries[-1] != rows:
            raise ValueError(
                f"{name}: expected the boundaries of the {rows} tokens of this call, got {boundaries.tolist()!r:.80}"
            )
    else:
        # Nothing waits for the device; there it is a device-side assertion. A number in its text would be a constant of
        # the graph, which would then be compiled for each number of tokens.
        torch._assert_async(boundaries[-1] == rows, f"{name}: expected the boundaries of the tokens of this call")


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
