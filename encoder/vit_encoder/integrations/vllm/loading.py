"""What is done to each model when vLLM has loaded it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.model_loader import BaseModelLoader
from vllm.model_executor.models.interfaces import supports_multimodal

from vit_encoder.integrations.vllm.attention import sentence, summary

logger = init_logger("vllm.plugins.vit_kernels")
_followed: set[Any] = set()


def follow_loading(then: Callable[[nn.Module], None]) -> None:
    """Call a function with each model that vLLM's loaders load in this process; the same function is called once.

    A loader that calls another's `load_model` has the function called by both.
    """
    for loader in _loaders(BaseModelLoader):
        if "load_model" in vars(loader) and (loader, then) not in _followed:
            _followed.add((loader, then))
            loader.load_model = _followed_by(loader.load_model, then)


def _loaders(loader: Any) -> Iterator[Any]:
    yield loader
    for other in loader.__subclasses__():
        yield from _loaders(other)


def _followed_by(load_model: Callable[..., nn.Module], then: Callable[[nn.Module], None]) -> Callable[..., nn.Module]:
    @functools.wraps(load_model)
    def load(*args: Any, **kwargs: Any) -> nn.Module:
        model = load_model(*args, **kwargs)
        then(model)
        return model

    return load


def need_no_gradients(model: nn.Module) -> None:
    """Let a model whose encoder vLLM compiles have no gradients, as it never computes one.

    On a CPU vLLM 0.32 compiles encoders with gradients on: a graph then keeps what a backward pass would need, and a
    block that gets inference tensors fails.
    """
    if any(getattr(module, "_is_encoder", False) for module in model.modules()):
        model.requires_grad_(False)


def tell_whose_attention(model: nn.Module) -> None:
    """One line of the log: how many attention layers of a model's encoders are ours, and why others are not."""
    found = summary(model)
    # A text model has none, and a draft model is often one.
    if found or supports_multimodal(model):
        logger.info_once("vit_kernels: %s", sentence(found))
