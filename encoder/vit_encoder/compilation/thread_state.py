"""What belongs to a thread: the tag and the context that surround a call, and what a call that is traced may do.

Tag and context are local to an asyncio task of it too.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from vit_encoder.compilation.config import CompilationConfig


@dataclass(frozen=True)
class ModelTag:
    """A component's name in caches and dumps, and whether its sizes are bounded by nothing."""

    name: str
    is_encoder: bool


@dataclass(frozen=True)
class ForwardContext:
    """What `set_forward_context` carries.

    Args:
        config: used by components that were constructed without one.
        attention_metadata: tensors by the names of forward's arguments that they stand in for.
    """

    config: CompilationConfig | None = None
    attention_metadata: Mapping[str, Tensor] = field(default_factory=dict)


model_tag: ContextVar[ModelTag | None] = ContextVar("vit_encoder.set_model_tag", default=None)
forward_context: ContextVar[ForwardContext | None] = ContextVar("vit_encoder.set_forward_context", default=None)


class _Surroundings(ModuleType):
    """A module, because Dynamo reads attributes of modules without tracing how, and guards on what it read.

    ContextVar.get it cannot trace.
    """

    @property
    def tag(self) -> ModelTag | None:
        return model_tag.get()

    @property
    def context(self) -> ForwardContext | None:
        return forward_context.get()


surroundings = _Surroundings("vit_encoder.compilation.thread_state.surroundings")


class _Tracing(threading.local):
    # Set in `__init__`, as Dynamo asks of a threading.local.
    def __init__(self) -> None:
        # Whether a call of a decorated module may compile now, and whether what it traces may call nested regions.
        self.may_compile = False
        self.has_regions = False
        # Whether the call is a decorated module's own, so that `prepare_compilation` was called before it was traced.
        self.prepared = False


tracing = _Tracing()


def compiles_regions() -> bool:
    """Whether forward, while it is traced, should call its nested regions rather than the functions in them.

    With gradients only a decorated module's own compilation on a version of torch where they were seen to be right says
    yes: Inductor of torch 2.11 to 2.15 is silently wrong about them by itself, in a caller's `torch.compile` too.
    """
    return tracing.has_regions or not torch.is_grad_enabled()
