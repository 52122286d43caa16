"""Llama 4 vision encoder."""

from vit_encoder.initialise import initialise_
from vit_encoder.llama4.config import Llama4VisionConfig
from vit_encoder.llama4.encode import encode_images
from vit_encoder.llama4.images import Llama4ImageSettings, TiledImage, tile_image
from vit_encoder.llama4.model import Llama4MultiModalProjector, Llama4VisionModel
from vit_encoder.llama4.reference import reference_forward

__all__ = [
    "Llama4ImageSettings",
    "Llama4MultiModalProjector",
    "Llama4VisionConfig",
    "Llama4VisionModel",
    "TiledImage",
    "encode_images",
    "initialise_",
    "reference_forward",
    "tile_image",
]
