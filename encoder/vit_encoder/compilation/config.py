"""What to compile and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

DynamicShapes = Literal["unbacked", "backed_size_oblivious", "backed"]


@dataclass(frozen=True, kw_only=True)
class CompilationConfig:
    """How the components decorated with `support_torch_compile` are compiled.

    Named as in vLLM's `CompilationConfig` where that has the field.

    Args:
        compile_mm_encoder: compile multimodal encoders; off by default, as upstream.
        backend: a torch.compile backend's name or a callable (graph module, example inputs) -> callable.
        dynamic_shapes: how dynamic dimensions are traced. `unbacked` gives one graph for every size.
            `backed_size_oblivious` does so as far as Dynamo goes; torch 2.13's Inductor adds a guard that can single
            out size 1 and cost a second graph. `backed` gives two, as the sizes 0 and 1 are special to it. Fake tensors
            cannot be traced `unbacked`. With gradients `unbacked` is traced as `backed_size_oblivious`: torch 2.13
            gets gradients wrong otherwise.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: an unknown backend or way of dynamic shapes.
    """

    compile_mm_encoder: bool = False
    backend: str | Callable[..., Any] = "inductor"
    dynamic_shapes: DynamicShapes = "unbacked"

    def __post_init__(self) -> None:
        if not isinstance(self.compile_mm_encoder, bool):
            raise TypeError(f"compile_mm_encoder: got {self.compile_mm_encoder!r}, expected a bool")
        if not isinstance(self.backend, str) and not callable(self.backend):
            raise TypeError(f"backend: got {self.backend!r}, expected a name or a callable")
        if isinstance(self.backend, str) and self.backend not in torch._dynamo.list_backends(exclude_tags=()):
            known = ", ".join(torch._dynamo.list_backends(exclude_tags=()))
            raise ValueError(f"backend: got {self.backend!r}, expected one of {known}")
        if self.dynamic_shapes not in get_args(DynamicShapes):
            raise ValueError(
                f"dynamic_shapes: got {self.dynamic_shapes!r}, expected one of {', '.join(get_args(DynamicShapes))}"
            )


def should_torch_compile_mm_encoder(config: CompilationConfig) -> bool:
    """The ready-made `enable_if` of multimodal encoders."""
    return config.compile_mm_encoder
