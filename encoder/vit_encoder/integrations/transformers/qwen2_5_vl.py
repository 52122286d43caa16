"""Our encoder in the place of transformers' Qwen2.5-VL vision model, on the same weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_encoder.compilation import CompilationConfig
from vit_encoder.integrations.transformers.shared import (
    CheckpointedLayer,
    PackedLinear,
    Shared,
    SharedForward,
    compilation_config,
    put,
    take_back,
)
from vit_encoder.qwen2_5_vl import Qwen2_5_VLVisionConfig, Qwen2_5_VLVisionModel

# What transformers lets its callers compute ahead.
_COMPUTED = ("cu_seqlens", "cu_window_seqlens", "position_ids", "window_index")


def apply_to_qwen2_5_vl(model: nn.Module, *, compile: bool | CompilationConfig = False) -> None:
    """Let a loaded Qwen2.5-VL model of transformers compute its image and video features with our encoder.

    As `apply_to_llama4`; here the gate and up projections of each block become views of one packed tensor. All windows
    and frames of a batch are one call of attention, where transformers makes one call each. The features are in
    `pooler_output`, and in the second place of a tuple; there is no `last_hidden_state`, which only the merger sees.

    Args:
        model: transformers' Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel, or the vision model of either, its
            weights loaded on one device.
        compile: whether to compile the encoder as one graph, or how.

    Raises:
        TypeError: another model, or a module of it that `apply_to_llama4` would refuse; here the convolution and the
            norms too are modules of which we take the weights. At a call also, when one was put in since.
        ValueError: weights that are not loaded, on several devices or shared by projections, or a configuration that
            `Qwen2_5_VLVisionConfig.from_hf` refuses. At a call also: hidden states or attention weights asked of the
            vision model, or what follows from `grid_thw` given.
    """
    vision = _vision_model(model)
    put(vision, compilation_config(compile), lambda: _Forward(vision, _encoder, _shared))


def revert_qwen2_5_vl(model: nn.Module) -> None:
    """Undo `apply_to_qwen2_5_vl`; the projections stay views of one tensor, which nothing needs to know.

    Raises:
        TypeError: not a Qwen2.5-VL model of transformers.
        ValueError: it was not applied to this model.
    """
    take_back(_vision_model(model))


def _vision_model(model: Any) -> Any:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as theirs

    inner = model.model if isinstance(model, theirs.Qwen2_5_VLForConditionalGeneration) else model
    vision = inner.visual if isinstance(inner, theirs.Qwen2_5_VLModel) else inner
    if type(vision) is not theirs.Qwen2_5_VisionTransformerPretrainedModel:
        raise TypeError(
            f"model: got {type(vision).__name__}, expected Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel or "
            "Qwen2_5_VisionTransformerPretrainedModel of transformers"
        )
    return vision


class _Forward(SharedForward):
    def __call__(
        self,
        hidden_states: Tensor,
        grid_thw: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' Qwen2_5_VisionTransformerPretrainedModel.forward, which ignores further arguments too."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling
        from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as theirs

        whole = (theirs.Qwen2_5_VLModel, theirs.Qwen2_5_VLForConditionalGeneration)
        self.refuse_extras(output_attentions, output_hidden_states, whole)
        for name in _COMPUTED:
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: got {type(kwargs[name]).__name__}, expected None: it follows from grid_thw")
        self.follow()
        weight = self.vision.patch_embed.proj.weight
        features = self.encoder(hidden_states.to(weight.dtype), grid_thw.cpu())  # [units, out_hidden_size]
        if kwargs.get("return_dict", self.vision.config.return_dict) is False:
            # The hidden states keep their place.
            return None, features
        return BaseModelOutputWithPooling(pooler_output=features)


class FlatConvolution(nn.Module):
    """The patch embedding's convolution as the linear layer that it is: each patch is one position of its kernel."""

    embedding: Any

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    @property
    def weight(self) -> Any:
        """[hidden, channels, frames, height, width]."""
        return self.embedding.proj.weight

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [patches, patch_dim] -> [patches, hidden]."""
        return F.linear(x, self.weight.flatten(1), self.embedding.proj.bias)


def _encoder(vision: Any) -> Qwen2_5_VLVisionModel:
    with torch.device("meta"):
        model = Qwen2_5_VLVisionModel(Qwen2_5_VLVisionConfig.from_hf(vision.config))
    model.encoder.patch_embed = FlatConvolution(vision.patch_embed)  # type: ignore[assignment]
    ours: Any
    before: tuple[nn.Module, str] = model.encoder, "norm_in"
    for ours, theirs in zip(model.encoder.layers, vision.blocks, strict=True):
        ours.mlp.gate_up = PackedLinear(theirs.mlp, "gate_proj", "up_proj")
        ours.forward = CheckpointedLayer(ours, theirs, before)
        before = ours, "norm_out"
    return model


def _shared(model: Qwen2_5_VLVisionModel, vision: Any) -> Shared:
    encoder = model.encoder
    norms = [*(theirs.norm1 for theirs in vision.blocks), vision.merger.ln_q]
    yield encoder.norm_in, "weight", norms[0].weight
    yield encoder.merger, "fc1", vision.merger.mlp[0]
    yield encoder.merger, "fc2", vision.merger.mlp[2]
    ours: Any
    for ours, theirs, norm_out in zip(encoder.layers, vision.blocks, norms[1:], strict=True):
        yield ours.norm_out, "weight", norm_out.weight
        yield ours.attention, "qkv", theirs.attn.qkv
        yield ours.attention, "out_proj", theirs.attn.proj
        yield ours.norm_2, "weight", theirs.norm2.weight
        yield ours.mlp, "down", theirs.mlp.down_proj
