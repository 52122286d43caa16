"""The encoders whose generated graphs are compared, with random weights that hold no data, on a device that is none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from vit_encoder import Llama4VisionConfig, Llama4VisionModel, attention
from vit_kernels import force_impl, rotary_2d

from experiments.common.peers import transformers_vision_model

Forward = Callable[[Tensor], Tensor]

_library = torch.library.Library("graph_ledger", "DEF")
_library.define("flash_attention(Tensor q, Tensor k, Tensor v) -> Tensor")


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Stands for flash-attn's op: [tiles, tokens, heads, head_dim], read in any strides once, contiguous out."""
    out: Tensor = torch.ops.graph_ledger.flash_attention.default(q, k, v)
    return out


torch.library.register_fake("graph_ledger::flash_attention", lambda q, k, v: q.new_empty(q.shape), lib=_library)


@contextlib.contextmanager
def ours(layers: int) -> Iterator[Forward]:
    """Llama 4 Scout's encoder with that many layers, on its Triton ops."""
    yield _encoder(layers)


@contextlib.contextmanager
def ours_with_fused_gelu(layers: int) -> Iterator[Forward]:
    """The same with bias and GELU in the epilogue of our own matrix product, which no GPU has timed."""
    yield _encoder(layers, fuse_gelu=True)


@contextlib.contextmanager
def ours_on_pytorch(layers: int) -> Iterator[Forward]:
    """The same encoder with PyTorch implementations that Inductor can fuse, for everything but attention."""
    # The in-place rotary is an operator in every implementation.
    with force_impl("eager"), mock.patch.object(attention, "rotated", rotated_on_pytorch):
        yield _encoder(layers)


@contextlib.contextmanager
def transformers(layers: int) -> Iterator[Forward]:
    """transformers' Llama4VisionModel, with one opaque call where its flash attention calls flash-attn."""
    with torch.device("cuda"):
        peer: Any = transformers_vision_model(_encoder(layers))
    from transformers import AttentionInterface

    AttentionInterface.register("graph_ledger", _attention_of_transformers)
    peer.config._attn_implementation = "graph_ledger"
    yield lambda pixel_values: peer(pixel_values=pixel_values).last_hidden_state


def _encoder(layers: int, *, fuse_gelu: bool = False) -> Llama4VisionModel:
    with torch.device("cuda"):
        config = replace(Llama4VisionConfig.scout(), num_hidden_layers=layers)
        return Llama4VisionModel(config, fuse_gelu=fuse_gelu)


def rotated_on_pytorch(qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """In place of `attention.rotated`, with an implementation that Inductor can fuse."""
    q, k, v = qkv.chunk(3, dim=1)
    return *rotary_2d(q, k, cos, sin, interleaved=interleaved), v


def _attention_of_transformers(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [tiles, tokens, heads, head_dim]
    return flash_attention(q, k, v), None


ENCODERS: dict[str, Callable[[int], contextlib.AbstractContextManager[Forward]]] = {
    "ours": ours,
    "ours, fused GELU": ours_with_fused_gelu,
    "ours, PyTorch ops": ours_on_pytorch,
    "transformers": transformers,
}
"""Each holds while the encoder is traced."""
