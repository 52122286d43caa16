"""Triton kernels for vision transformers, registered as custom ops."""
