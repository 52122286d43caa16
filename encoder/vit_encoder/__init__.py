"""Vision encoders built on vit_kernels, and the compile scaffold that keeps them one graph."""

from vit_encoder.compilation import (
    CompilationConfig,
    DynamicDims,
    compilation_counter,
    export,
    get_forward_context,
    ignore_torch_compile,
    load,
    set_forward_context,
    set_model_tag,
    should_torch_compile_mm_encoder,
    support_torch_compile,
    whole_graph,
)
from vit_encoder.llama4 import (
    Llama4ImageSettings,
    Llama4MultiModalProjector,
    Llama4VisionConfig,
    Llama4VisionModel,
    TiledImage,
    encode_images,
    tile_image,
)
from vit_encoder.qwen2_5_vl import Qwen2_5_VLImageSettings, Qwen2_5_VLVisionConfig, Qwen2_5_VLVisionModel
from vit_encoder.qwen3_vl import Qwen3VLImageSettings, Qwen3VLVisionConfig, Qwen3VLVisionModel

__all__ = [
    "CompilationConfig",
    "DynamicDims",
    "Llama4ImageSettings",
    "Llama4MultiModalProjector",
    "Llama4VisionConfig",
    "Llama4VisionModel",
    "Qwen2_5_VLImageSettings",
    "Qwen2_5_VLVisionConfig",
    "Qwen2_5_VLVisionModel",
    "Qwen3VLImageSettings",
    "Qwen3VLVisionConfig",
    "Qwen3VLVisionModel",
    "TiledImage",
    "compilation_counter",
    "encode_images",
    "export",
    "get_forward_context",
    "ignore_torch_compile",
    "load",
    "set_forward_context",
    "set_model_tag",
    "should_torch_compile_mm_encoder",
    "support_torch_compile",
    "tile_image",
    "whole_graph",
]
