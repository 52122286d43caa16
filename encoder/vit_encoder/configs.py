"""What every encoder's sizes need: reading a Hugging Face configuration, and checks that name what is wrong."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

CONFIG_FILE = "config.json"


@runtime_checkable
class SupportsToDict(Protocol):
    """What this module needs of a transformers configuration object."""

    def to_dict(self) -> dict[str, Any]:
        """The configuration as nested plain dictionaries."""
        ...


HfConfig: TypeAlias = Mapping[str, Any] | SupportsToDict | str | os.PathLike[str]


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a config.json, given its path or its folder's, as plain dictionaries.

    Raises FileNotFoundError where there is no such file and ValueError where it does not hold a JSON object.
    """
    path = Path(path)
    return read_json_object(path / CONFIG_FILE if path.is_dir() else path)


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object; raises FileNotFoundError or ValueError, naming the file."""
    # Asked first, because opening a named pipe would wait for a writer for ever.
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def whole_config(config: HfConfig) -> Mapping[str, Any]:
    """The configuration that an object, a mapping or a path stands for; raises as `read_config` and `as_mapping`."""
    return as_mapping("config", read_config(config) if isinstance(config, str | os.PathLike) else config)


def as_mapping(name: str, config: object) -> Mapping[str, Any]:
    """`config` as a mapping; raises TypeError, naming it, for what is neither one nor a configuration object."""
    # A path is no answer here: a configuration must not make us read another file.
    if isinstance(config, SupportsToDict) and not isinstance(config, type):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise TypeError(f"{name} must be a configuration object or a mapping, got {type(config).__name__}")
    return config


def check_positive(name: str, value: object, *, whole: bool) -> None:
    """Raise TypeError for what is no number (`whole`: no integer), ValueError for one that is not positive."""
    expected = "a positive integer" if whole else "a positive finite number"
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise TypeError(f"{name} must be {expected}, got {value!r} ({type(value).__name__})")
    if not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def check_head_dim(heads_name: str, hidden_size: int, heads: int) -> None:
    """Raise ValueError for a width that does not divide into heads that attention takes (its kernel from 16 on)."""
    if hidden_size % heads:
        raise ValueError(
            f"hidden_size must be a multiple of {heads_name}, got hidden_size {hidden_size} and {heads_name} {heads}"
        )
    head_dim = hidden_size // heads
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise ValueError(
            f"hidden_size / {heads_name} must be a multiple of 8 in 8..256 (attention's range, its kernel's from 16), "
            f"got {hidden_size} / {heads} = {head_dim}"
        )
