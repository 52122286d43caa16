"""The sizes of a Qwen3-VL vision encoder, and how they are read from a Hugging Face configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vit_encoder.configs import HfConfig, as_mapping, whole_config
from vit_encoder.qwen_configs import QwenVisionConfig, read_vision_config

# Right for each of them: the published configurations have no rope_theta.
_ALWAYS = {"in_channels": 3, "rope_theta": 10000.0}
# The defaults of transformers' classes, which writes only what differs from them where it is asked to.
_DEFAULTS = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
}
_DEEPSTACK = (8, 16, 24)
_WITH_DEEPSTACK = (
    "qwen3_vl",
    "qwen3_vl_vision",
    "qwen3_vl_moe",
    "qwen3_vl_moe_vision",
    "qwen3_omni_moe",
    "qwen3_omni_moe_thinker",
    "qwen3_omni_moe_vision_encoder",
)
_WITHOUT_DEEPSTACK = ("qwen3_5", "qwen3_5_vision", "qwen3_5_moe", "qwen3_5_moe_vision")
_NARROW: dict[str, Any] = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": (5, 11, 17),
}


@dataclass(frozen=True, kw_only=True)
class Qwen3VLVisionConfig(QwenVisionConfig):
    """Sizes of the vision encoder, named as in the Hugging Face `vision_config`; the defaults are Qwen3-VL 8B's.

    Only fields that change the computation are here: a layer norm's eps is always 1e-6, the MLP's activation the tanh
    GELU and the mergers' the erf GELU. The hidden states after each block in `deepstack_visual_indexes` become
    features too; indexes beyond the depth mean nothing. `num_position_embeddings` is a square.
    Source: transformers (5.23), `models/qwen3_vl/configuration_qwen3_vl.py`.

    Raises TypeError for a field of the wrong type and ValueError for sizes that do not fit together.
    """

    depth: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    out_hidden_size: int = 4096
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = _DEEPSTACK
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_blocks("deepstack_visual_indexes")
        indexes = self.deepstack_visual_indexes
        if indexes != tuple(sorted(set(indexes))):
            raise ValueError(f"deepstack_visual_indexes must increase, got {indexes}")
        if self.position_side**2 != self.num_position_embeddings:
            raise ValueError(f"num_position_embeddings must be a square, got {self.num_position_embeddings}")

    @classmethod
    def qwen3_vl_2b(cls) -> Qwen3VLVisionConfig:
        """The encoder of Qwen3-VL 2B: 24 blocks, 16 heads of 64, features of width 2048."""
        return cls(**_NARROW, out_hidden_size=2048)

    @classmethod
    def qwen3_vl_4b(cls) -> Qwen3VLVisionConfig:
        """The encoder of Qwen3-VL 4B, which differs from 2B's in the width of its features, 2560."""
        return cls(**_NARROW, out_hidden_size=2560)

    @classmethod
    def qwen3_vl_8b(cls) -> Qwen3VLVisionConfig:
        """The encoder of Qwen3-VL 8B and 235B-A22B: 27 blocks, 16 heads of 72, features of width 4096."""
        return cls()

    @classmethod
    def qwen3_vl_30b_a3b(cls) -> Qwen3VLVisionConfig:
        """The encoder of Qwen3-VL and Qwen3-Omni 30B-A3B, which differs from 8B's in the features' width, 2048."""
        return cls(out_hidden_size=2048)

    @classmethod
    def qwen3_vl_32b(cls) -> Qwen3VLVisionConfig:
        """The encoder of Qwen3-VL 32B, which differs from 8B's in the width of its features, 5120."""
        return cls(out_hidden_size=5120)

    @classmethod
    def qwen3_5_0_8b(cls) -> Qwen3VLVisionConfig:
        """The encoder of Qwen3.5 0.8B: 12 blocks, 12 heads of 64, no deepstack, features of width 1024."""
        sizes = {"depth": 12, "hidden_size": 768, "num_heads": 12, "intermediate_size": 3072}
        return cls(**sizes, deepstack_visual_indexes=(), out_hidden_size=1024)

    @classmethod
    def qwen3_5_27b(cls) -> Qwen3VLVisionConfig:
        """The encoder of Qwen3.5 27B: that of Qwen3-VL 32B without deepstack."""
        return cls(deepstack_visual_indexes=(), out_hidden_size=5120)

    @classmethod
    def qwen3_5_35b_a3b(cls) -> Qwen3VLVisionConfig:
        """The encoder of Qwen3.5 35B-A3B, which differs from 27B's in the width of its features, 2048."""
        return cls(deepstack_visual_indexes=(), out_hidden_size=2048)

    @classmethod
    def qwen3_5_397b_a17b(cls) -> Qwen3VLVisionConfig:
        """The encoder of Qwen3.5 397B-A17B, which differs from 27B's in the width of its features, 4096."""
        return cls(deepstack_visual_indexes=(), out_hidden_size=4096)

    @classmethod
    def tiny(cls) -> Qwen3VLVisionConfig:
        """Three blocks that keep the awkward sizes: heads of 72, an MLP of 8n + 4, a table of 7 x 7, two deepstacks."""
        return cls(
            depth=3,
            hidden_size=144,
            intermediate_size=212,
            num_heads=2,
            out_hidden_size=96,
            num_position_embeddings=49,
            deepstack_visual_indexes=(0, 1),
        )

    @classmethod
    def from_hf(cls, config: HfConfig) -> Qwen3VLVisionConfig:
        """Reads a Hugging Face configuration: of the whole model (with a `vision_config`) or of the vision model alone.

        Qwen3-VL's, Qwen3.5's (which has no deepstack) and Qwen3-Omni's, of which the thinker has the vision model.

        `config` is a transformers configuration object, a mapping, or the path of a config.json or of its folder.
        Unknown keys are ignored, and `patch_size` and `temporal_patch_size` may be given twice, as [16, 16].
        `in_channels` and `rope_theta` may be missing: 3 and 10000 are right for those. Where `model_type` says that it
        is one of these models', any field may be, and is what transformers' class has. A missing `out_hidden_size` must
        agree with the text model's `hidden_size`, where that is known.

        Raises ValueError listing every missing field, for an activation other than the tanh GELU, for broken JSON, for
        scaled rotary embeddings and for sizes that do not fit together; TypeError for anything else than a
        configuration; OSError, which says what to pass, for a path that cannot be read, such as a hub id.
        """
        names = [field.name for field in fields(cls)]
        return cls(
            **read_vision_config(
                _with_vision(config), names, always=_ALWAYS, defaults=_defaults, activation="gelu_pytorch_tanh"
            )
        )

    @property
    def position_side(self) -> int:
        """Rows and columns of the table of position embeddings."""
        return math.isqrt(self.num_position_embeddings)

    @property
    def deepstack_layers(self) -> tuple[int, ...]:
        """The blocks after which hidden states become features: those of `deepstack_visual_indexes` that exist."""
        return tuple(index for index in self.deepstack_visual_indexes if index < self.depth)

    @property
    def feature_width(self) -> int:
        """Channels of a feature: those for the text model's input, then those for each deepstack layer."""
        return (1 + len(self.deepstack_layers)) * self.out_hidden_size


def is_omni(config: HfConfig) -> bool:
    """Whether a configuration is Qwen3-Omni's, or its thinker's or vision encoder's, whose parameters have other names.

    Raises: as `Qwen3VLVisionConfig.from_hf`.
    """
    whole = whole_config(config)
    return "thinker_config" in whole or "omni" in str(_with_vision(whole).get("model_type"))


def _with_vision(config: HfConfig) -> Mapping[str, Any]:
    """The configuration of the model that has the vision model: the thinker of an Omni."""
    whole = whole_config(config)
    return as_mapping("thinker_config", whole.get("thinker_config", whole))


def _defaults(model_type: Any) -> dict[str, object]:
    if model_type in _WITH_DEEPSTACK:
        return _DEFAULTS | {"deepstack_visual_indexes": _DEEPSTACK}
    return _DEFAULTS | {"deepstack_visual_indexes": ()} if model_type in _WITHOUT_DEEPSTACK else {}
