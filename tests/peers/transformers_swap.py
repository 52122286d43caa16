"""Ours in the place of transformers' own, without the suites knowing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import nn
from vit_encoder.integrations.transformers import apply_to_llama4, apply_to_qwen2_5_vl, register_attention


@contextmanager
def swapped(run: str) -> Iterator[None]:
    """Within this every vision model that transformers makes is ours: by its attention, or by `apply_to_*`."""
    with _attention_forced() if run == "vit_varlen" else _encoders_applied():
        yield


def _is_vision(model: Any) -> bool:
    return model.main_input_name == "pixel_values" or "image" in (getattr(model, "input_modalities", None) or ())


@contextmanager
def _attention_forced() -> Iterator[None]:
    """`sdpa`, asked for or by default, is `vit_varlen` in vision models; `eager` stays, to be compared with."""
    from transformers import PreTrainedModel

    register_attention()
    original = PreTrainedModel.get_correct_attn_implementation

    @functools.wraps(original)
    def forced(self: Any, *args: Any, **kwargs: Any) -> str:
        chosen = original(self, *args, **kwargs)
        return "vit_varlen" if chosen == "sdpa" and _is_vision(self) else chosen

    with mock.patch.object(PreTrainedModel, "get_correct_attn_implementation", forced):
        yield


@contextmanager
def _encoders_applied() -> Iterator[None]:
    """Llama 4 and Qwen2.5-VL vision models get our encoder as soon as they have weights."""
    from transformers import PreTrainedModel
    from transformers.models.llama4.modeling_llama4 import Llama4VisionModel
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    appliers: dict[type, Callable[[nn.Module], None]] = {
        Llama4VisionModel: apply_to_llama4,
        Qwen2_5_VisionTransformerPretrainedModel: apply_to_qwen2_5_vl,
    }

    def apply(model: nn.Module) -> None:
        for module in model.modules():
            applier = appliers.get(type(module))
            if applier is not None and not any(parameter.is_meta for parameter in module.parameters()):
                applier(module)

    load = PreTrainedModel.from_pretrained.__func__

    @functools.wraps(load)
    def loaded(cls: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(cls, *args, **kwargs)
        apply(result[0] if isinstance(result, tuple) else result)
        return result

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(loaded)))
        for vision in appliers:
            patches.enter_context(mock.patch.object(vision, "__init__", _then(vision, apply)))
        yield


def _then(vision: Any, apply: Callable[[nn.Module], None]) -> Callable[..., None]:
    init = vision.__init__

    @functools.wraps(init)
    def initialised(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        apply(self)

    return initialised
