"""What surrounds a component: the tag it is constructed under, and the context of a forward call.

Both are local to a thread, and to an asyncio task of it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from vit_encoder.compilation.config import CompilationConfig
from vit_encoder.compilation.thread_state import ForwardContext, ModelTag, forward_context, model_tag, surroundings

_owners: weakref.WeakValueDictionary[str, type] = weakref.WeakValueDictionary()


@contextlib.contextmanager
def set_model_tag(tag: str, is_encoder: bool = False) -> Iterator[None]:
    """Decorated modules constructed in the block belong to the component `tag`.

    A tag belongs to one class: all instances of it that are constructed under the tag are one component.

    Args:
        tag: names the component's artefacts and dumps.
        is_encoder: no upper bound on its sizes; see `CompilationConfig.compile_ranges_endpoints`.

    Raises:
        TypeError: the tag is not a string.
        ValueError: it is empty; or, in the block, another class has the tag already.
        RuntimeError: the block is left in another thread or task than it was entered in.
    """
    if not isinstance(tag, str):
        raise TypeError(f"tag: got {tag!r}, expected a string")
    if not tag or "/" in tag:
        raise ValueError(f"tag: got {tag!r}, expected a name without slashes")
    with _set(model_tag, ModelTag(tag, is_encoder), "set_model_tag"):
        yield


def claim_tag(cls: type) -> ModelTag | None:
    """The tag that an instance of `cls` is being constructed under, now that class's."""
    tag = surroundings.tag
    if tag is not None and _owners.setdefault(tag.name, cls) is not cls:
        raise ValueError(
            f"set_model_tag: got {tag.name!r} for {cls.__qualname__}, expected another tag: it belongs to "
            f"{_owners[tag.name].__qualname__}"
        )
    return tag


@contextlib.contextmanager
def set_forward_context(config: CompilationConfig | None = None, **attention_metadata: Tensor) -> Iterator[None]:
    """Give the decorated modules called in the block a configuration and per-batch tensors.

    A tensor stands in for forward's argument of its name where the caller leaves that out or passes None: it enters
    the graph as an input like any other. Modules whose forward has no such argument ignore it. Of the configurations
    the one a module was constructed with wins, then this one, then the default. An inner context hides an outer one's
    tensors, and its configuration if it has one itself.

    Args:
        config: a configuration, or None to leave it to the outer context.
        attention_metadata: tensors such as `cu_seqlens`, made once a batch.

    Raises:
        TypeError: a value of another type.
        RuntimeError: the block is left in another thread or task than it was entered in.
    """
    if not isinstance(config, CompilationConfig | None):
        raise TypeError(f"config: got {type(config).__name__}, expected a CompilationConfig or None")
    for name, tensor in attention_metadata.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
    outer = surroundings.context
    if config is None and outer is not None:
        config = outer.config
    with _set(forward_context, ForwardContext(config, MappingProxyType(attention_metadata)), "set_forward_context"):
        yield


@contextlib.contextmanager
def _set(variable: ContextVar[Any], value: Any, name: str) -> Iterator[None]:
    outer = variable.get()
    variable.set(value)
    try:
        yield
    finally:
        if variable.get() is not value:
            raise RuntimeError(f"{name}: left in another thread, task or order than it was entered in")
        variable.set(outer)


def get_forward_context() -> ForwardContext:
    """The innermost forward context of this thread, or asyncio task.

    Raises:
        RuntimeError: there is none; or the call is being traced, which would capture the context's tensors and compile
            again for each: take them as arguments of forward.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("get_forward_context: got a call inside a graph, expected an argument of forward instead")
    if surroundings.context is None:
        raise RuntimeError("get_forward_context: got no context, expected a call inside set_forward_context(...)")
    return surroundings.context
