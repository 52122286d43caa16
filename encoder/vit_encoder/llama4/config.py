"""The sizes of a Llama 4 vision encoder, and how they are read from a Hugging Face configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from vit_encoder.configs import (
    HfConfig,
    as_mapping,
    check_head_dim,
    check_positive,
    read_config,
    rope_theta,
    side,
    whole_config,
)

__all__ = ["Llama4VisionConfig", "read_config", "text_hidden_size"]


@dataclass(frozen=True, kw_only=True)
class Llama4VisionConfig:
    """Sizes of the vision encoder, named as in the Hugging Face `vision_config`; the defaults are Llama 4 Scout's.

    Only fields that change the computation are here. transformers (5.23, `models/llama4/modeling_llama4.py`) ignores
    `norm_eps` (every LayerNorm takes PyTorch's 1e-5), `hidden_act` (the erf GELU, hard-coded) and
    `multi_modal_projector_bias` (never a bias), and dropout is for training: they are not carried.
    Several fields are tied to each other there, and are checked here:
    `intermediate_size` is both the width of the blocks' MLP and the input width of the adapter's fc1, which takes
    the shuffled patches; fc1 gives `projector_input_dim` and fc2 takes `projector_output_dim`; the multi-modal
    projector takes `vision_output_dim`, the adapter gives `projector_output_dim`.

    Raises TypeError for a field of the wrong type and ValueError for sizes that do not fit together.
    """

    hidden_size: int = 1408
    num_hidden_layers: int = 34
    num_attention_heads: int = 16
    intermediate_size: int = 5632
    image_size: int = 336
    patch_size: int = 14
    num_channels: int = 3
    pixel_shuffle_ratio: float = 0.5
    projector_input_dim: int = 4096
    projector_output_dim: int = 4096
    vision_output_dim: int = 4096
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        for field in fields(self):
            number = check_positive(field.name, getattr(self, field.name), whole=field.type == "int")
            object.__setattr__(self, field.name, number)
        self._check_grid()
        check_head_dim("num_attention_heads", self.hidden_size, self.num_attention_heads)
        self._check_adapter()

    def _check_grid(self) -> None:
        inverse = 1 / self.pixel_shuffle_ratio
        if math.isinf(inverse) or not math.isclose(inverse, round(inverse)):
            raise ValueError(f"pixel_shuffle_ratio must be 1 / a whole number, got {self.pixel_shuffle_ratio}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, got image_size {self.image_size} "
                f"and patch_size {self.patch_size}"
            )
        if self.grid % self.shuffle_factor:
            raise ValueError(
                f"image_size / patch_size must be a multiple of 1 / pixel_shuffle_ratio = {self.shuffle_factor}, got "
                f"{self.image_size} / {self.patch_size} = {self.grid}"
            )

    def _check_adapter(self) -> None:
        shuffled = self.hidden_size * self.shuffle_factor**2
        if self.intermediate_size != shuffled:
            raise ValueError(
                "intermediate_size must be hidden_size / pixel_shuffle_ratio**2, the width of a shuffled patch: "
                f"expected {shuffled}, got {self.intermediate_size}"
            )
        for name in ("projector_input_dim", "vision_output_dim"):
            if getattr(self, name) != self.projector_output_dim:
                raise ValueError(
                    f"{name} must equal projector_output_dim, got {name} {getattr(self, name)} "
                    f"and projector_output_dim {self.projector_output_dim}"
                )

    @classmethod
    def scout(cls) -> Llama4VisionConfig:
        """The encoder of Llama 4 Scout: 34 layers, 16 heads of 88, 577 tokens a tile of 336 pixels."""
        return cls()

    @classmethod
    def maverick(cls) -> Llama4VisionConfig:
        """The encoder of Llama 4 Maverick, which has Scout's sizes."""
        return cls.scout()

    @classmethod
    def tiny(cls) -> Llama4VisionConfig:
        """Two layers that keep Scout's awkward sizes: heads of 88, 65 = 64 + 1 tokens a tile, no power-of-two width."""
        return cls(
            hidden_size=176,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=704,
            image_size=112,
            projector_input_dim=120,
            projector_output_dim=120,
            vision_output_dim=120,
        )

    @classmethod
    def from_hf(cls, config: HfConfig) -> Llama4VisionConfig:
        """Reads a Hugging Face configuration: of the whole model (with a `vision_config`) or of the vision model alone.

        `config` is a transformers configuration object, a mapping, or the path of a config.json or of its folder.
        Unknown keys are ignored. `rope_theta` may stand in `rope_parameters`, which wins as it does in transformers,
        or beside the other fields, and `image_size` and `patch_size` may be given twice, as [336, 336]. Nothing is
        filled in: the defaults of transformers' class are not Llama 4's, and every version that knows Llama 4 writes
        all fields.

        Raises ValueError listing every missing field, for broken JSON, for scaled rotary embeddings and for sizes that
        do not fit together; TypeError for anything else than a configuration; OSError, which says what to pass, for a
        path that cannot be read, such as a hub id.
        """
        whole = whole_config(config)
        section = as_mapping("vision_config", whole.get("vision_config", whole))
        given: dict[str, Any] = {field.name: section.get(field.name) for field in fields(cls)}
        given |= {name: side(name, given[name]) for name in ("image_size", "patch_size")}
        given["rope_theta"] = rope_theta(section)
        if missing := [name for name, value in given.items() if value is None]:
            raise ValueError(f"the vision configuration lacks {', '.join(missing)}; it has {list(section)}")
        return cls(**given)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def grid(self) -> int:
        """Patches along each side of a tile."""
        return self.image_size // self.patch_size

    @property
    def patches_per_tile(self) -> int:
        """Patches of one tile, the class token not counted."""
        return self.grid**2

    @property
    def tokens_per_tile(self) -> int:
        """Tokens of one tile inside the blocks: its patches and the class token."""
        return self.patches_per_tile + 1

    @property
    def output_tokens_per_tile(self) -> int:
        """Tokens of one tile after the pixel shuffle."""
        return (self.grid // self.shuffle_factor) ** 2

    @property
    def patch_dim(self) -> int:
        """Numbers in one unfolded patch."""
        return self.num_channels * self.patch_size**2

    @property
    def shuffle_factor(self) -> int:
        """Patches along each side of the square that the pixel shuffle merges into one token."""
        return round(1 / self.pixel_shuffle_ratio)


def text_hidden_size(config: HfConfig) -> int:
    """Width of the language model of a whole Llama 4 configuration: what the multi-modal projector puts out.

    Takes what `Llama4VisionConfig.from_hf` takes and raises as it does; a vision configuration alone has no such width.
    """
    whole = whole_config(config)
    width = as_mapping("text_config", whole.get("text_config") or {}).get("hidden_size")
    if width is None:
        raise ValueError(
            "the configuration lacks text_config.hidden_size, the multi-modal projector's output width; "
            f"it has {list(whole)}"
        )
    return int(check_positive("text_config.hidden_size", width, whole=True))
