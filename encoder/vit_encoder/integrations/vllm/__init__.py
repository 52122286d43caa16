"""A vLLM plugin: Llama 4's vision part with our kernels, or with our encoder.

Importing this imports no vLLM; `register`, the entry point of the group `vllm.general_plugins`, does.
"""

from vit_encoder.integrations.vllm.plugin import register

__all__ = ["register"]
