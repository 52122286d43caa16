"""Llama 4 vision encoder."""
