"""Our encoder in the place of transformers' Llama 4 vision model, on the same weights."""

from __future__ import annotations

from typing import Any

import torch
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
from vit_encoder.llama4 import Llama4VisionConfig, Llama4VisionModel


def apply_to_llama4(model: nn.Module, *, compile: bool | CompilationConfig = False) -> None:
    """Let a loaded Llama 4 model of transformers compute its image features with our encoder.

    The model stays itself: its modules, parameters, state_dict and hooks keep their names, and saving, casting, moving
    and copying it works as before. Only the vision model's `forward` is replaced. Weights are held once: linear layers
    and norms are shared, and the query, key and value projections become views of one packed tensor. Applying again
    only changes `compile`; `revert_llama4` undoes it. Adapters and quantised layers may stand in the place of the
    linear layers that are called (`o_proj`, `fc1`, `fc2`), and are refused elsewhere. Hooks on the other modules inside
    the vision model are not called.

    `gradient_checkpointing_enable()`, before or after, holds for our layers as for transformers' own: in training each
    keeps its input alone, compiled or not. `output_hidden_states` and `output_attentions` of the whole model mean the
    text model's; asked of the vision model itself they are refused.

    Args:
        model: transformers' Llama4ForConditionalGeneration or Llama4VisionModel, its weights loaded on one device.
        compile: whether to compile the encoder as one graph, or how.

    Raises:
        TypeError: another model, or a module of which we take the weights without calling it and that is not what
            transformers makes: a projection that is quantised or has an adapter, layers taken out or wrapped, a forward
            of its own. At a call also, when it was put in since.
        ValueError: weights that are not loaded, on several devices or shared by projections, or a configuration that
            `Llama4VisionConfig.from_hf` refuses. At a call also: hidden states or attention weights asked of the vision
            model, or dropout in training, of which our encoder has none.
    """
    vision = _vision_model(model)
    put(vision, compilation_config(compile), lambda: _Forward(vision, _encoder, _shared))


def revert_llama4(model: nn.Module) -> None:
    """Undo `apply_to_llama4`; the projections stay views of one tensor, which nothing needs to know.

    Raises:
        TypeError: not a Llama 4 model of transformers.
        ValueError: it was not applied to this model.
    """
    take_back(_vision_model(model))


def _vision_model(model: nn.Module) -> Any:
    from transformers.models.llama4 import modeling_llama4

    vision = model.vision_model if isinstance(model, modeling_llama4.Llama4ForConditionalGeneration) else model
    if type(vision) is not modeling_llama4.Llama4VisionModel:
        raise TypeError(
            f"model: got {type(vision).__name__}, expected Llama4ForConditionalGeneration or Llama4VisionModel of "
            "transformers"
        )
    return vision


class _Forward(SharedForward):
    def __call__(
        self,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' Llama4VisionModel.forward, which ignores the attention mask and further arguments too."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling
        from transformers.models.llama4.modeling_llama4 import Llama4ForConditionalGeneration

        config = self.vision.config
        self.refuse_extras(output_attentions, output_hidden_states, (Llama4ForConditionalGeneration,))
        if self.vision.training and (config.attention_dropout or config.projector_dropout):
            raise ValueError("model: got training mode and dropout, expected eval mode, or dropout of 0 in its config")
        self.follow()
        features = self.encoder(pixel_values)  # [tiles, tokens, vision_output_dim]
        if return_dict is False or (return_dict is None and not config.return_dict):
            return (features,)
        # transformers 5.0 takes the features from pooler_output, later ones from last_hidden_state.
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=features)

    def relink(self) -> None:
        """The tables of the rotary embedding follow the weights to their device."""
        super().relink()
        device = self.encoder.class_embedding.device
        if self.encoder.rotary.cos.device != device:
            self.encoder.rotary.to(device)


def _encoder(vision: Any) -> Llama4VisionModel:
    with torch.device("meta"):
        encoder = Llama4VisionModel(Llama4VisionConfig.from_hf(vision.config))
    ours: Any
    before: tuple[nn.Module, str] = encoder, "norm_in"
    for ours, theirs in zip(encoder.layers, vision.model.layers, strict=True):
        ours.attention.qkv = PackedLinear(theirs.self_attn, "q_proj", "k_proj", "v_proj")
        ours.forward = CheckpointedLayer(ours, theirs, before)
        before = ours, "norm_out"
    return encoder


def _shared(encoder: Llama4VisionModel, vision: Any) -> Shared:
    yield encoder, "class_embedding", vision.class_embedding
    yield encoder, "position_embedding", vision.positional_embedding_vlm
    yield encoder, "patch_embed", vision.patch_embedding.linear
    yield encoder, "norm_pre", vision.layernorm_pre
    norms = [*(theirs.input_layernorm for theirs in vision.model.layers), vision.layernorm_post]
    yield encoder, "norm_in", norms[0]
    yield encoder.adapter, "fc1", vision.vision_adapter.mlp.fc1
    yield encoder.adapter, "fc2", vision.vision_adapter.mlp.fc2
    ours: Any
    for ours, theirs, norm_out in zip(encoder.layers, vision.model.layers, norms[1:], strict=True):
        yield ours, "norm_out", norm_out
        yield ours.attention, "out_proj", theirs.self_attn.o_proj
        yield ours, "norm_2", theirs.post_attention_layernorm
        yield ours.mlp, "fc1", theirs.mlp.fc1
        yield ours.mlp, "fc2", theirs.mlp.fc2
