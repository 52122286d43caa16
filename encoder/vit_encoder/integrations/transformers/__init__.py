"""transformers models on our kernels: our attention in any of its vision encoders, our encoder in Llama 4.

Importing this imports no transformers; calling its functions does.
"""

from vit_encoder.integrations.transformers.attention import register_attention
from vit_encoder.integrations.transformers.llama4 import apply_to_llama4, revert_llama4

__all__ = ["apply_to_llama4", "register_attention", "revert_llama4"]
