"""`patch_image` as the inner step of transformers' `Qwen2VLImageProcessor`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from vit_encoder import Qwen2_5_VLVisionConfig
from vit_encoder.qwen2_5_vl import patch_image

# What patch_image always does.
_FIXED = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": OPENAI_CLIP_MEAN,
    "image_std": OPENAI_CLIP_STD,
    "temporal_patch_size": 2,
}


def preprocess(self: Any, images: list[Tensor], *, size: Any, return_tensors: Any, **settings: Any) -> BatchFeature:
    """As `Qwen2VLImageProcessor._preprocess`: uint8 images, [channels, height, width] each, to patches.

    Raises:
        ValueError: a setting that patch_image does not have, or what it refuses.
    """
    for name, expected in _FIXED.items():
        got = settings[name]
        if (list(got) if isinstance(got, tuple | list) else got) != expected:
            raise ValueError(f"{name}: got {got!r}, expected {expected!r}: patch_image has no other")
    config = Qwen2_5_VLVisionConfig(patch_size=settings["patch_size"], spatial_merge_size=settings["merge_size"])
    bounds = {"min_pixels": size.shortest_edge, "max_pixels": size.longest_edge}
    patched = [patch_image(image, config, **bounds) for image in images]
    data = {
        "pixel_values": torch.cat([image.pixel_values for image in patched]),
        "image_grid_thw": torch.cat([image.grid_thw for image in patched]),
    }
    return BatchFeature(data=data, tensor_type=return_tensors)
