"""Qwen2.5-VL vision encoder."""

from vit_encoder.initialise import initialise_
from vit_encoder.qwen2_5_vl.config import Qwen2_5_VLVisionConfig
from vit_encoder.qwen2_5_vl.encode import encode_images
from vit_encoder.qwen2_5_vl.images import PatchedImage, PatchSettings, Qwen2_5_VLImageSettings, patch_image
from vit_encoder.qwen2_5_vl.metadata import VisionMetadata, vision_metadata
from vit_encoder.qwen2_5_vl.model import Qwen2_5_VLVisionModel
from vit_encoder.qwen2_5_vl.reference import reference_forward

__all__ = [
    "PatchSettings",
    "PatchedImage",
    "Qwen2_5_VLImageSettings",
    "Qwen2_5_VLVisionConfig",
    "Qwen2_5_VLVisionModel",
    "VisionMetadata",
    "encode_images",
    "initialise_",
    "patch_image",
    "reference_forward",
    "vision_metadata",
]
