"""Images and video frames to patches: resize, normalisation and patch order of Qwen2.5-VL, on the CPU."""

from __future__ import annotations

from vit_encoder.qwen_images import PatchedImage, PatchSettings, Qwen2_5_VLImageSettings, patch_image, resized

__all__ = ["PatchSettings", "PatchedImage", "Qwen2_5_VLImageSettings", "patch_image", "resized"]
