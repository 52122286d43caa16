"""Compile scaffold: one whole graph for an encoder."""

from vit_encoder.compilation.config import CompilationConfig, should_torch_compile_mm_encoder
from vit_encoder.compilation.counter import compilation_counter
from vit_encoder.compilation.decorator import support_torch_compile
from vit_encoder.compilation.whole_graph import GraphReport, whole_graph

__all__ = [
    "CompilationConfig",
    "GraphReport",
    "compilation_counter",
    "should_torch_compile_mm_encoder",
    "support_torch_compile",
    "whole_graph",
]
