"""A vLLM plugin: our attention in every vision encoder, or our encoders for those of Llama 4 and Qwen2.5-VL.

Importing this imports no vLLM; `register`, the entry point of the group `vllm.general_plugins`, does.
"""

from vit_encoder.integrations.vllm.plugin import register

__all__ = ["register"]
