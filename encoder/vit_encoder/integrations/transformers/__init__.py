"""transformers models on our kernels: our attention in any vision encoder, our encoders in Llama 4, Qwen2.5-VL and
Qwen3-VL.

Importing this imports no transformers; calling its functions does.
"""

from vit_encoder.integrations.transformers.attention import register_attention, use_packed_attention
from vit_encoder.integrations.transformers.llama4 import apply_to_llama4, revert_llama4
from vit_encoder.integrations.transformers.qwen2_5_vl import apply_to_qwen2_5_vl, revert_qwen2_5_vl
from vit_encoder.integrations.transformers.qwen3_vl import apply_to_qwen3_vl, revert_qwen3_vl

__all__ = [
    "apply_to_llama4",
    "apply_to_qwen2_5_vl",
    "apply_to_qwen3_vl",
    "register_attention",
    "revert_llama4",
    "revert_qwen2_5_vl",
    "revert_qwen3_vl",
    "use_packed_attention",
]
