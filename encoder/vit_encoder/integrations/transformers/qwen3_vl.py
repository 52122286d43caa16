"""Our encoder in the place of transformers' Qwen3-VL vision model, and Qwen3.5's and Omni's, on the same weights."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from vit_encoder.compilation import CompilationConfig
from vit_encoder.integrations.transformers.qwen2_5_vl import FlatConvolution
from vit_encoder.integrations.transformers.shared import (
    CheckpointedLayer,
    Shared,
    SharedForward,
    compilation_config,
    put,
    take_back,
)
from vit_encoder.qwen3_vl import Qwen3VLVisionConfig, Qwen3VLVisionModel

# What transformers lets its callers compute ahead.
_COMPUTED = ("cu_seqlens", "position_ids", "interp_indices", "interp_weights")
# transformers' modules, and in each the vision model and what it is part of.
_MODELS = {
    "qwen3_vl": ("Qwen3VLVisionModel", "Qwen3VLModel", "Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": ("Qwen3VLMoeVisionModel", "Qwen3VLMoeModel", "Qwen3VLMoeForConditionalGeneration"),
    "qwen3_5": ("Qwen3_5VisionModel", "Qwen3_5Model", "Qwen3_5ForConditionalGeneration"),
    "qwen3_5_moe": ("Qwen3_5MoeVisionModel", "Qwen3_5MoeModel", "Qwen3_5MoeForConditionalGeneration"),
    "qwen3_omni_moe": (
        "Qwen3OmniMoeVisionEncoder",
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        "Qwen3OmniMoeForConditionalGeneration",
    ),
}


def apply_to_qwen3_vl(model: nn.Module, *, compile: bool | CompilationConfig = False) -> None:
    """Let a loaded Qwen3-VL, Qwen3.5 or Qwen3-Omni model of transformers compute image and video features with ours.

    As `apply_to_llama4`; all frames of a batch are one call of attention, where transformers makes one call each. The
    features are in `pooler_output` and `deepstack_features`, and behind the first place of a tuple; there is no
    `last_hidden_state`, which only the merger sees.

    Args:
        model: transformers' ...ForConditionalGeneration or ...Model of Qwen3-VL, Qwen3-VL-MoE, Qwen3.5 or
            Qwen3.5-MoE, Qwen3-Omni or its thinker, or the vision model of any, its weights loaded on one device.
        compile: whether to compile the encoder as one graph, or how.

    Raises:
        TypeError: another model, or a module of it that `apply_to_llama4` would refuse; here the convolution, the table
            of position embeddings and the norms too are modules of which we take the weights. At a call also, when one
            was put in since.
        ValueError: weights that are not loaded or on several devices, or a configuration that
            `Qwen3VLVisionConfig.from_hf` refuses. At a call also: hidden states or attention weights asked of the
            vision model, or what follows from `grid_thw` given.
    """
    vision = _vision_model(model)
    put(vision, compilation_config(compile), lambda: _Forward(vision, _encoder, _shared))


def revert_qwen3_vl(model: nn.Module) -> None:
    """Undo `apply_to_qwen3_vl`.

    Raises:
        TypeError: no such model of transformers.
        ValueError: it was not applied to this model.
    """
    take_back(_vision_model(model))


def _classes(module: str) -> tuple[type, ...]:
    """Those of one of transformers' modules that this version of it has."""
    try:
        theirs = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    except ImportError:
        return ()
    return tuple(getattr(theirs, name) for name in _MODELS[module] if hasattr(theirs, name))


def _vision_model(model: Any) -> Any:
    modules = [base.__module__.rpartition(".modeling_")[2] for base in type(model).__mro__]
    vision, *whole = next((found for name in modules if name in _MODELS and (found := _classes(name))), (None,))
    inner = model
    while isinstance(inner, tuple(whole)):
        inner = next(getattr(inner, part) for part in ("visual", "model", "thinker") if hasattr(inner, part))
    if type(inner) is not vision:
        raise TypeError(
            f"model: got {type(model).__name__}, expected Qwen3VLForConditionalGeneration, Qwen3VLModel, "
            "Qwen3VLVisionModel or one of Qwen3-VL-MoE, Qwen3.5 or Qwen3-Omni, of transformers"
        )
    return inner


class _Forward(SharedForward):
    def __call__(
        self,
        hidden_states: Tensor,
        grid_thw: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' Qwen3VLVisionModel.forward, which ignores further arguments too."""
        module = type(self.vision).__module__
        theirs = importlib.import_module(module)
        _, *whole = _classes(module.rpartition(".modeling_")[2])
        self.refuse_extras(output_attentions, output_hidden_states, tuple(whole))
        for name in _COMPUTED:
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: got {type(kwargs[name]).__name__}, expected None: it follows from grid_thw")
        self.follow()
        features = self.encoder(hidden_states.to(self.vision.patch_embed.proj.weight.dtype), grid_thw.cpu())
        first, deepstack = self.encoder.split(features)  # [units, out_hidden_size] each
        has_deepstack = hasattr(self.vision, "deepstack_visual_indexes")
        if kwargs.get("return_dict", self.vision.config.return_dict) is False:
            # The hidden states keep their place.
            return (None, first, list(deepstack)) if has_deepstack else (None, first)
        if has_deepstack:
            return theirs.BaseModelOutputWithDeepstackFeatures(pooler_output=first, deepstack_features=list(deepstack))
        return theirs.BaseModelOutputWithPooling(pooler_output=first)


def _encoder(vision: Any) -> Qwen3VLVisionModel:
    with torch.device("meta"):
        model = Qwen3VLVisionModel(Qwen3VLVisionConfig.from_hf(vision.config))
    model.encoder.patch_embed = FlatConvolution(vision.patch_embed)  # type: ignore[assignment]
    ours: Any
    before: tuple[nn.Module, str] = model.encoder, "norm_in"
    for ours, theirs in zip(model.encoder.layers, vision.blocks, strict=True):
        ours.forward = CheckpointedLayer(ours, theirs, before)
        before = ours, "norm_out"
    return model


def _shared(model: Qwen3VLVisionModel, vision: Any) -> Shared:
    encoder = model.encoder
    yield encoder, "position_embedding", vision.pos_embed.weight
    norms = [*(theirs.norm1 for theirs in vision.blocks), _norm(vision.merger)]
    yield from _norm_weights(encoder.norm_in, norms[0])
    ours: Any
    for ours, theirs, norm_out in zip(encoder.layers, vision.blocks, norms[1:], strict=True):
        yield from _norm_weights(ours.norm_out, norm_out)
        yield ours.attention, "qkv", theirs.attn.qkv
        yield ours.attention, "out_proj", theirs.attn.proj
        yield from _norm_weights(ours.norm_2, theirs.norm2)
        yield ours.mlp, "fc1", theirs.mlp.linear_fc1
        yield ours.mlp, "fc2", theirs.mlp.linear_fc2
    yield from _linears(encoder.merger, vision.merger)
    for ours, theirs in zip(encoder.deepstack, getattr(vision, "deepstack_merger_list", ()), strict=True):
        yield from _norm_weights(ours.norm, _norm(theirs))
        yield from _linears(ours, theirs)


def _norm(merger: Any) -> Any:
    return merger.ln_q if hasattr(merger, "ln_q") else merger.norm


def _norm_weights(ours: nn.Module, theirs: Any) -> Shared:
    # Not the module: its eps is a float that Dynamo may make an input of.
    yield ours, "weight", theirs.weight
    yield ours, "bias", theirs.bias


def _linears(ours: nn.Module, theirs: Any) -> Shared:
    fc1, fc2 = (theirs.mlp[0], theirs.mlp[2]) if hasattr(theirs, "mlp") else (theirs.linear_fc1, theirs.linear_fc2)
    yield ours, "fc1", fc1
    yield ours, "fc2", fc2
