"""Triton kernels for vision transformers, registered as custom ops `torch.ops.vit_kernels.*`."""

import vit_kernels.varlen_attention_backward  # noqa: F401  (registers the op)
from vit_kernels._forced import force_impl
from vit_kernels._versions import warn_if_unknown
from vit_kernels.add_layer_norm_quantise import add_layer_norm_quantise, add_rms_norm_quantise
from vit_kernels.layer_norm_pixel_shuffle import layer_norm_pixel_shuffle
from vit_kernels.linear_gelu import linear_gelu
from vit_kernels.pixel_shuffle import pixel_shuffle
from vit_kernels.quantise_rows import quantise_rows
from vit_kernels.rotary_2d import rotary_2d
from vit_kernels.rotary_2d_qkv import rotary_2d_qkv_
from vit_kernels.scaled_linear import scaled_linear
from vit_kernels.varlen_attention import varlen_attention

__all__ = [
    "add_layer_norm_quantise",
    "add_rms_norm_quantise",
    "force_impl",
    "layer_norm_pixel_shuffle",
    "linear_gelu",
    "pixel_shuffle",
    "quantise_rows",
    "rotary_2d",
    "rotary_2d_qkv_",
    "scaled_linear",
    "varlen_attention",
]

warn_if_unknown()
