"""Qwen3-VL vision encoder, which Qwen3.5 and Qwen3-Omni have too."""

from vit_encoder.initialise import initialise_
from vit_encoder.qwen3_vl.config import Qwen3VLVisionConfig
from vit_encoder.qwen3_vl.encode import encode_images
from vit_encoder.qwen3_vl.images import Qwen3VLImageSettings, patch_image
from vit_encoder.qwen3_vl.metadata import VisionMetadata, vision_metadata
from vit_encoder.qwen3_vl.model import Qwen3VLVisionModel
from vit_encoder.qwen3_vl.reference import reference_forward
from vit_encoder.qwen_images import PatchedImage, PatchSettings

__all__ = [
    "PatchSettings",
    "PatchedImage",
    "Qwen3VLImageSettings",
    "Qwen3VLVisionConfig",
    "Qwen3VLVisionModel",
    "VisionMetadata",
    "encode_images",
    "initialise_",
    "patch_image",
    "reference_forward",
    "vision_metadata",
]
