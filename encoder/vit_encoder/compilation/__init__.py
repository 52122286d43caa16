"""Compile scaffold: one whole graph for an encoder."""

from vit_encoder.compilation.config import CompilationConfig, should_torch_compile_mm_encoder
from vit_encoder.compilation.context import get_forward_context, set_forward_context, set_model_tag
from vit_encoder.compilation.counter import compilation_counter
from vit_encoder.compilation.decorator import DynamicDims, ignore_torch_compile, support_torch_compile
from vit_encoder.compilation.deployment.export import export
from vit_encoder.compilation.deployment.load import DeployedModule, load
from vit_encoder.compilation.thread_state import ForwardContext, compiles_regions
from vit_encoder.testing.whole_graph import GraphReport, whole_graph

__all__ = [
    "CompilationConfig",
    "DeployedModule",
    "DynamicDims",
    "ForwardContext",
    "GraphReport",
    "compilation_counter",
    "compiles_regions",
    "export",
    "get_forward_context",
    "ignore_torch_compile",
    "load",
    "set_forward_context",
    "set_model_tag",
    "should_torch_compile_mm_encoder",
    "support_torch_compile",
    "whole_graph",
]
