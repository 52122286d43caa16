"""The sizes of a Qwen2.5-VL vision encoder, and how they are read from a Hugging Face configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vit_encoder.configs import HfConfig, as_mapping, check_head_dim, check_positive, whole_config

# What transformers takes where the published configurations are silent: their `in_chans` is read by nobody.
_DEFAULTS = {"in_channels": 3, "rope_theta": 10000.0}


@dataclass(frozen=True, kw_only=True)
class Qwen2_5_VLVisionConfig:  # noqa: N801 (transformers' name)
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
        for field in fields(self):
            if field.name != "fullatt_block_indexes":
                check_positive(field.name, getattr(self, field.name), whole=field.type == "int")
        self._check_blocks()
        check_head_dim("num_heads", self.hidden_size, self.num_heads)
        unit = self.patch_size * self.spatial_merge_size
        if self.window_size % unit:
            raise ValueError(
                f"window_size must be a multiple of patch_size * spatial_merge_size = {unit}, got {self.window_size}"
            )

    def _check_blocks(self) -> None:
        indexes = self.fullatt_block_indexes
        if not isinstance(indexes, list | tuple) or not all(type(index) is int for index in indexes):
            raise TypeError(f"fullatt_block_indexes must be a sequence of integers, got {indexes!r}")
        if any(index < 0 for index in indexes):
            raise ValueError(f"fullatt_block_indexes must not be negative, got {indexes!r}")
        object.__setattr__(self, "fullatt_block_indexes", tuple(indexes))

    @classmethod
    def qwen2_5_vl_3b(cls) -> Qwen2_5_VLVisionConfig:
        """The encoder of Qwen2.5-VL 3B: 32 blocks, 16 heads of 80, features of width 2048."""
        return cls(out_hidden_size=2048)

    @classmethod
    def qwen2_5_vl_7b(cls) -> Qwen2_5_VLVisionConfig:
        """The encoder of Qwen2.5-VL 7B, which differs from 3B's in the width of its features, 3584."""
        return cls()

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
        Unknown keys are ignored. Of the fields only `in_channels` and `rope_theta` may be missing, as they are in the
        published configurations: transformers' defaults, 3 and 10000, are right for those.

        Raises ValueError listing every missing field, for an activation other than SiLU, for broken JSON and for sizes
        that do not fit together; TypeError for anything else than a configuration; OSError for a path that cannot be
        read.
        """
        whole = whole_config(config)
        section = as_mapping("vision_config", whole.get("vision_config", whole))
        rope = as_mapping("rope_parameters", section.get("rope_parameters") or {})
        given: dict[str, Any] = {
            field.name: section.get(field.name, _DEFAULTS.get(field.name)) for field in fields(cls)
        }
        given["rope_theta"] = rope.get("rope_theta", given["rope_theta"])
        if missing := [name for name, value in given.items() if value is None]:
            raise ValueError(f"the vision configuration lacks {', '.join(missing)}; it has {list(section)}")
        if (activation := section.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"hidden_act must be silu, got {activation!r}")
        return cls(**given)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch: of all channels and of `temporal_patch_size` frames."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that are merged into one feature: `spatial_merge_size` along each side."""
        return self.spatial_merge_size**2

    @property
    def window_units(self) -> int:
        """Merged features along each side of a whole window."""
        return self.window_size // (self.patch_size * self.spatial_merge_size)
