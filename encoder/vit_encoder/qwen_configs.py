"""What the sizes of the Qwen vision encoders have in common, and how they are read from Hugging Face configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from vit_encoder.configs import (
    HfConfig,
    as_mapping,
    check_head_dim,
    check_positive,
    is_integer,
    rope_theta,
    side,
    whole_config,
)

# Other names of a field in published configurations, or in transformers' attribute_map.
_ALIASES = {
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "in_channels": "in_chans",
    "patch_size": "spatial_patch_size",
}
_GIVEN_TWICE = ("patch_size", "temporal_patch_size")


@dataclass(frozen=True, kw_only=True)
class QwenVisionConfig:
    """Sizes that each of these encoders has, named as in the Hugging Face `vision_config`.

    Raises TypeError for a field of the wrong type and ValueError for sizes that do not fit together.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    rope_theta: float

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type in ("int", "float"):
                number = check_positive(field.name, getattr(self, field.name), whole=field.type == "int")
                object.__setattr__(self, field.name, number)
        check_head_dim("num_heads", self.hidden_size, self.num_heads)

    def _check_blocks(self, name: str) -> None:
        """The field is a sequence of indexes of blocks, and becomes a tuple of Python's integers."""
        indexes = getattr(self, name)
        if not isinstance(indexes, list | tuple) or not all(is_integer(index) for index in indexes):
            raise TypeError(f"{name} must be a sequence of integers, got {indexes!r}")
        if any(index < 0 for index in indexes):
            raise ValueError(f"{name} must not be negative, got {indexes!r}")
        object.__setattr__(self, name, tuple(int(index) for index in indexes))

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


def read_vision_config(
    config: HfConfig,
    names: Sequence[str],
    *,
    always: Mapping[str, object],
    defaults: Callable[[Any], Mapping[str, object]],
    activation: str,
) -> dict[str, Any]:
    """The fields of a vision encoder in the configuration of a whole model or of the encoder alone.

    Args:
        config: a transformers configuration object, a mapping, or the path of a config.json or of its folder.
        names: of the fields.
        always: what fields are where they are missing.
        defaults: what else they are, for a `model_type` (or None) that stands in the configuration: those of
            transformers' class, where transformers may have written only what differs from them; else nothing.
        activation: the only `hidden_act` that the encoder has.

    Raises:
        ValueError: listing every missing field; another activation, broken JSON, scaled rotary embeddings, or a default
            `out_hidden_size` that is not the text model's `hidden_size`.
        TypeError: anything else than a configuration.
        OSError: which says what to pass, for a path that cannot be read, such as a hub id.
    """
    whole = whole_config(config)
    section = as_mapping("vision_config", whole.get("vision_config", whole))
    model_type = section.get("model_type", whole.get("model_type"))
    filled = {**always, **(defaults(model_type) if _is_vision(whole, section) else {})}
    given = {name: _found(name, section, filled) for name in names}
    for name in _GIVEN_TWICE:
        given[name] = side(name, given[name])
    if (theta := rope_theta(section)) is not None:
        given["rope_theta"] = theta
    if missing := [name for name, value in given.items() if value is None]:
        raise ValueError(f"the vision configuration lacks {', '.join(missing)}; it has {list(section)}")
    if section is not whole and "out_hidden_size" not in section:
        _check_text_width(given["out_hidden_size"], whole)
    if (found := section.get("hidden_act", activation)) != activation:
        raise ValueError(f"hidden_act must be {activation}, got {found!r}")
    return given


def _is_vision(whole: Mapping[str, Any], section: Mapping[str, Any]) -> bool:
    """Whether the section is a vision encoder's, as far as its place tells.

    A whole model's configuration without a vision_config has sizes under the same names, which are the text model's.
    """
    return section is not whole or not ("vocab_size" in whole or "text_config" in whole)


def _found(name: str, section: Mapping[str, Any], defaults: Mapping[str, object]) -> Any:
    if name not in section and _ALIASES.get(name) in section:
        return section[_ALIASES[name]]
    return section.get(name, defaults.get(name))


def _check_text_width(out_hidden_size: int, whole: Mapping[str, Any]) -> None:
    text = as_mapping("text_config", whole.get("text_config") or whole)
    if (width := text.get("hidden_size", out_hidden_size)) != out_hidden_size:
        raise ValueError(
            f"the vision configuration lacks out_hidden_size: transformers' default, {out_hidden_size}, is not the "
            f"text model's hidden_size, {width}"
        )
