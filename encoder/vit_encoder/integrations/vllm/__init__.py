"""A vLLM plugin: the vision part of Llama 4 and Qwen2.5-VL with our kernels, or Llama 4's with our encoder.

Importing this imports no vLLM; `register`, the entry point of the group `vllm.general_plugins`, does.
"""

from vit_encoder.integrations.vllm.plugin import register

__all__ = ["register"]
