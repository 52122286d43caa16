"""Our encoder in the place of transformers' Llama 4 vision model, on the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_encoder.compilation import CompilationConfig
from vit_encoder.llama4 import Llama4VisionConfig, Llama4VisionModel


def apply_to_llama4(model: nn.Module, *, compile: bool | CompilationConfig = False) -> None:
    """Let a loaded Llama 4 model of transformers compute its image features with our encoder.

    The model stays itself: its modules, parameters, state_dict and hooks keep their names, and saving, casting, moving
    and copying it works as before. Only the vision model's `forward` is replaced. Weights are held once: linear layers
    and norms are shared, and the query, key and value projections become views of one packed tensor. Applying again
    only changes `compile`; `revert_llama4` undoes it. Hooks on the projections inside the vision model are not called.

    Args:
        model: transformers' Llama4ForConditionalGeneration or Llama4VisionModel, its weights loaded on one device.
        compile: whether to compile the encoder as one graph, or how.

    Raises:
        TypeError: another model, or a projection that is no plain Linear (quantised, or with an adapter).
        ValueError: weights that are not loaded or on several devices, or a configuration that
            `Llama4VisionConfig.from_hf` refuses. At a call also: hidden states or attention weights asked for, or
            dropout in training, of which our encoder has none.
    """
    vision = _vision_model(model)
    config = compile if isinstance(compile, CompilationConfig) else CompilationConfig(compile_mm_encoder=compile)
    forward = vision.__dict__.get("forward")
    if isinstance(forward, _Forward):
        forward.encoder.compilation_config = config
        return
    _check_weights(vision)
    vision.forward = _Forward(vision, config)


def revert_llama4(model: nn.Module) -> None:
    """Undo `apply_to_llama4`; the projections stay views of one tensor, which nothing needs to know.

    Raises:
        TypeError: not a Llama 4 model of transformers.
        ValueError: it was not applied to this model.
    """
    vision = _vision_model(model)
    if not isinstance(vision.__dict__.get("forward"), _Forward):
        raise ValueError("model: got one that computes its own image features, expected one after apply_to_llama4")
    del vision.forward


def _vision_model(model: nn.Module) -> Any:
    from transformers.models.llama4 import modeling_llama4

    vision = model.vision_model if isinstance(model, modeling_llama4.Llama4ForConditionalGeneration) else model
    if not isinstance(vision, modeling_llama4.Llama4VisionModel):
        raise TypeError(
            f"model: got {type(model).__name__}, expected Llama4ForConditionalGeneration or Llama4VisionModel of "
            "transformers"
        )
    return vision


def _check_weights(vision: nn.Module) -> None:
    devices = {parameter.device for parameter in vision.parameters()}
    # accelerate's hooks move weights in and out, or activations between devices.
    hooked = any(hasattr(module, "_hf_hook") for module in vision.modules())
    if hooked or len(devices) != 1 or torch.device("meta") in devices:
        raise ValueError(
            f"model: got a vision model on {', '.join(sorted(map(str, devices)))}"
            f"{' with hooks of accelerate' if hooked else ''}, expected loaded weights on one device"
        )


class _Forward:
    """The vision model's forward; an object, so that a copy of the model gets one of its own."""

    def __init__(self, vision: Any, config: CompilationConfig) -> None:
        self.vision = vision
        self.encoder = _encoder(vision, config)

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

        config = self.vision.config
        for name, given in (("output_attentions", output_attentions), ("output_hidden_states", output_hidden_states)):
            if getattr(config, name, False) if given is None else given:
                raise ValueError(f"{name}: got True, expected False, or revert_llama4 first: our encoder keeps none")
        if self.vision.training and (config.attention_dropout or config.projector_dropout):
            raise ValueError("model: got training mode and dropout, expected eval mode, or dropout of 0 in its config")
        _follow(self.encoder, self.vision)
        features = self.encoder(pixel_values)  # [tiles, tokens, vision_output_dim]
        if return_dict is False or (return_dict is None and not config.return_dict):
            return (features,)
        # transformers 5.0 takes the features from pooler_output, later ones from last_hidden_state.
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=features)


def _encoder(vision: Any, config: CompilationConfig) -> Llama4VisionModel:
    """Our encoder made of the modules of transformers'."""
    with torch.device("meta"):
        encoder = Llama4VisionModel(Llama4VisionConfig.from_hf(vision.config), compilation_config=config)
    for ours, theirs in zip(encoder.layers, vision.model.layers, strict=True):
        ours.attention.qkv = PackedQKV(theirs.self_attn)  # type: ignore[union-attr]
    _follow(encoder, vision)
    return encoder.train(vision.training)


def _shared(encoder: Llama4VisionModel, vision: Any) -> Iterator[tuple[nn.Module, str, Any]]:
    """(owner, name, module or parameter): what our encoder takes as it is."""
    yield encoder, "class_embedding", vision.class_embedding
    yield encoder, "position_embedding", vision.positional_embedding_vlm
    yield encoder, "patch_embed", vision.patch_embedding.linear
    yield encoder, "norm_pre", vision.layernorm_pre
    yield encoder, "norm_post", vision.layernorm_post
    yield encoder.adapter, "fc1", vision.vision_adapter.mlp.fc1
    yield encoder.adapter, "fc2", vision.vision_adapter.mlp.fc2
    ours: Any
    for ours, theirs in zip(encoder.layers, vision.model.layers, strict=True):
        yield ours, "norm_1", theirs.input_layernorm
        yield ours.attention, "out_proj", theirs.self_attn.o_proj
        yield ours, "norm_2", theirs.post_attention_layernorm
        yield ours.mlp, "fc1", theirs.mlp.fc1
        yield ours.mlp, "fc2", theirs.mlp.fc2


@torch.compiler.disable(reason="a parameter's address is no part of a graph")
def _follow(encoder: Llama4VisionModel, vision: Any) -> None:
    """Take over what was moved, cast or replaced in the vision model since."""
    for owner, name, thing in _shared(encoder, vision):
        if getattr(owner, name) is not thing:
            setattr(owner, name, thing)
    layer: Any
    for layer in encoder.layers:
        layer.attention.qkv.follow()
    device = encoder.class_embedding.device
    if encoder.rotary.cos.device != device:
        encoder.rotary.to(device)


class PackedQKV(nn.Module):
    """The query, key and value projections of transformers as one, their weights and biases views of its own."""

    weight: Tensor
    bias: Tensor

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention
        self.addresses: tuple[int, ...] = ()

    def _parts(self) -> tuple[nn.Linear, ...]:
        return self.attention.q_proj, self.attention.k_proj, self.attention.v_proj

    def follow(self) -> None:
        """Pack the weights again if they no longer lie in the packed ones.

        Raises:
            TypeError: a projection is no plain Linear.
        """
        for part in self._parts():
            if type(part) is not nn.Linear:
                raise TypeError(f"model: got a projection of type {type(part).__name__}, expected torch.nn.Linear")
        if self.addresses != self._addresses():
            self._pack("weight")
            self._pack("bias")
            self.addresses = self._addresses()

    def _addresses(self) -> tuple[int, ...]:
        # The packed tensors are kept, so nothing else can come to lie there.
        return tuple(x.data_ptr() for part in self._parts() for x in (part.weight, part.bias))

    @torch.no_grad()
    def _pack(self, name: str) -> None:
        tensors = [getattr(part, name) for part in self._parts()]
        packed = torch.cat(tensors)
        self.register_buffer(name, packed, persistent=False)
        for tensor, rows in zip(tensors, packed.split([len(tensor) for tensor in tensors]), strict=True):
            tensor.data = rows

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [tokens, hidden] -> [tokens, 3 * hidden]."""
        if torch.is_grad_enabled() and any(x.requires_grad for part in self._parts() for x in (part.weight, part.bias)):
            # The packed tensors have no history that would lead gradients to the parts.
            weight = torch.cat([part.weight for part in self._parts()])
            return F.linear(x, weight, torch.cat([part.bias for part in self._parts()]))
        return F.linear(x, self.weight, self.bias)
