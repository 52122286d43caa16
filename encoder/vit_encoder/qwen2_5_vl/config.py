"""The sizes of a Qwen2.5-VL vision encoder, and how they are read from a Hugging Face configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vit_encoder.configs import HfConfig
from vit_encoder.qwen_configs import QwenVisionConfig, read_vision_config

# Right for every Qwen2.5-VL: the published configurations have neither in_channels nor rope_theta.
_ALWAYS = {"in_channels": 3, "rope_theta": 10000.0}
# The defaults of transformers' class, in every version: up to 4.49 it wrote only what differs from them.
_DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": (7, 15, 23, 31),
}
_MODEL_TYPES = ("qwen2_5_vl", "qwen2_5_vl_vision")


@dataclass(frozen=True, kw_only=True)
class Qwen2_5_VLVisionConfig(QwenVisionConfig):  # noqa: N801 (transformers' name)
    """Sizes of the vision encoder, named as in the Hugging Face `vision_config`; the defaults are Qwen2.5-VL 7B's.

    Only fields that change the computation are here: RMSNorm's eps is always 1e-6, the MLP's activation SiLU and the
    patch merger's the erf GELU. Blocks attend within windows, those in `fullatt_block_indexes` within whole frames;
    indexes beyond the depth mean nothing.
    Source: transformers (5.23), `models/qwen2_5_vl/configuration_qwen2_5_vl.py`.

    Raises TypeError for a field of the wrong type and ValueError for sizes that do not fit together.
    """

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_blocks("fullatt_block_indexes")
        unit = self.patch_size * self.spatial_merge_size
        if self.window_size % unit:
            raise ValueError(
                f"window_size must be a multiple of patch_size * spatial_merge_size = {unit}, got {self.window_size}"
            )

    @classmethod
    def qwen2_5_vl_3b(cls) -> Qwen2_5_VLVisionConfig:
        """The encoder of Qwen2.5-VL 3B: 32 blocks, 16 heads of 80, features of width 2048."""
        return cls(out_hidden_size=2048)

    @classmethod
    def qwen2_5_vl_7b(cls) -> Qwen2_5_VLVisionConfig:
        """The encoder of Qwen2.5-VL 7B, which differs from 3B's in the width of its features, 3584."""
        return cls()

    @classmethod
    def qwen2_5_vl_32b(cls) -> Qwen2_5_VLVisionConfig:
        """The encoder of Qwen2.5-VL 32B: an MLP of 3456 instead of 3420, and features of width 5120."""
        return cls(intermediate_size=3456, out_hidden_size=5120)

    @classmethod
    def qwen2_5_vl_72b(cls) -> Qwen2_5_VLVisionConfig:
        """The encoder of Qwen2.5-VL 72B, which differs from 32B's in the width of its features, 8192."""
        return cls(intermediate_size=3456, out_hidden_size=8192)

    @classmethod
    def tiny(cls) -> Qwen2_5_VLVisionConfig:
        """Four blocks, two of them with full attention, that keep the awkward sizes: heads of 80, an MLP of 8n + 4."""
        return cls(
            depth=4,
            hidden_size=160,
            intermediate_size=212,
            num_heads=2,
            out_hidden_size=96,
            fullatt_block_indexes=(1, 3),
        )

    @classmethod
    def from_hf(cls, config: HfConfig) -> Qwen2_5_VLVisionConfig:
        """Reads a Hugging Face configuration: of the whole model (with a `vision_config`) or of the vision model alone.

        `config` is a transformers configuration object, a mapping, or the path of a config.json or of its folder.
        Unknown keys are ignored, and `patch_size` may be given twice, as [14, 14]. `in_channels` and `rope_theta` may
        be missing, as they are in the published configurations: 3 and 10000 are right for those. Where `model_type`
        says that it is Qwen2.5-VL's, any field may be: transformers up to 4.49 wrote only what differs from the
        defaults of its class, and these are filled in. A missing `out_hidden_size` must agree with the text model's
        `hidden_size`, where that is known.

        Raises ValueError listing every missing field, for an activation other than SiLU, for broken JSON, for scaled
        rotary embeddings and for sizes that do not fit together; TypeError for anything else than a configuration;
        OSError, which says what to pass, for a path that cannot be read, such as a hub id.
        """
        names = [field.name for field in fields(cls)]
        return cls(**read_vision_config(config, names, always=_ALWAYS, defaults=_defaults, activation="silu"))

    @property
    def window_units(self) -> int:
        """Merged features along each side of a whole window."""
        return self.window_size // (self.patch_size * self.spatial_merge_size)


def _defaults(model_type: Any) -> dict[str, object]:
    return _DEFAULTS if model_type in _MODEL_TYPES else {}
