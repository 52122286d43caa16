"""The encoders whose generated graphs are compared, with random weights that hold no data, on a device that is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vit_encoder import Llama4VisionConfig, Llama4VisionModel
from vit_kernels import force_impl

from experiments.peers import transformers_vision_model

_library = torch.library.Library("graph_ledger", "DEF")
_library.define("flash_attention(Tensor q, Tensor k, Tensor v) -> Tensor")


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stands for flash-attn's op: [tiles, tokens, heads, head_dim], read in any strides once, contiguous out."""
    out: Tensor = torch.ops.graph_ledger.flash_attention.default(q, k, v)
    return out


torch.library.register_fake("graph_ledger::flash_attention", lambda q, k, v: q.new_empty(q.shape), lib=_library)


def ours(layers: int) -> Llama4VisionModel:
    """Llama 4 Scout's encoder with that many layers, on its Triton ops."""
    with torch.device("cuda"):
        return Llama4VisionModel(replace(Llama4VisionConfig.scout(), num_hidden_layers=layers))


def ours_on_pytorch(layers: int) -> Callable[[Tensor], Tensor]:
    """The same encoder with PyTorch bodies for everything but attention."""
    model = ours(layers)

    def forward(pixel_values: Tensor) -> Tensor:
        with force_impl("eager"):
            return model(pixel_values)

    return forward


def transformers(layers: int) -> Callable[[Tensor], Tensor]:
    """transformers' Llama4VisionModel, with one opaque call where its flash attention calls flash-attn."""
    model = ours(layers)
    with torch.device("cuda"):
        peer: Any = transformers_vision_model(model)
    from transformers import AttentionInterface

    AttentionInterface.register("graph_ledger", _attention_of_transformers)
    peer.config._attn_implementation = "graph_ledger"
    return lambda pixel_values: peer(pixel_values=pixel_values).last_hidden_state


def _attention_of_transformers(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [tiles, tokens, heads, head_dim]
    return flash_attention(q, k, v), None


ENCODERS: dict[str, Callable[[int], Callable[[Tensor], Tensor]]] = {
    "ours": ours,
    "ours, PyTorch ops": ours_on_pytorch,
    "transformers": transformers,
}
