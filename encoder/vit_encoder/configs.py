"""What every encoder's sizes need: reading a Hugging Face configuration, and checks that name what is wrong."""

from __future__ import annotations

import json
import numbers
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeGuard, runtime_checkable

CONFIG_FILE = "config.json"
_LFS_POINTER = b"version https://git-lfs"
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_MOST_NAMES = 8


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
    path = local_path(path)
    return read_json_object(path / CONFIG_FILE if path.is_dir() else path)


def local_path(path: str | os.PathLike[str]) -> Path:
    """The path with `~` expanded; raises FileNotFoundError, saying what to pass, where there is nothing."""
    local = Path(os.path.expanduser(path))
    if not os.path.lexists(local):
        raise FileNotFoundError(f"{local} is not a file or folder{what_it_is(local)}")
    return local


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object; raises FileNotFoundError or ValueError, naming the file."""
    check_file(path)
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} holds tensors, expected JSON; pass the folder that it is in")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def check_file(path: Path) -> None:
    """Raise FileNotFoundError for what is no regular file, saying what it is, and ValueError for a git-lfs pointer."""
    # Asked first, because opening a named pipe would wait for a writer for ever.
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file{what_it_is(path)}")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(
                f"{path} is a git-lfs pointer, not the file that it stands for: run `git lfs pull` in its folder, or "
                "download the file"
            )


def what_it_is(path: Path) -> str:
    """What to say, after a colon, of a path that is no file or no folder of a checkpoint: what is there, what to do."""
    if path.is_symlink() and not path.exists():
        return (
            f": it is a symbolic link to {os.readlink(path)}, which does not exist; its file is gone from the hub "
            "cache or was never downloaded: download it again"
        )
    if path.is_file():
        return ": it is a file; pass the folder that it is in"
    if path.is_dir():
        return _what_a_folder_holds(path)
    if path.parent.is_dir() and path.parent != Path():
        return _what_a_folder_holds(path.parent)
    hub_id = str(path) if _HUB_ID.fullmatch(str(path)) else "ORGANISATION/NAME"
    return (
        ": nothing is downloaded, pass the local folder of a checkpoint. What has an id on the Hugging Face hub is "
        f"downloaded to one by `hf download {hub_id} --local-dir FOLDER`"
    )


def _what_a_folder_holds(folder: Path) -> str:
    cached = sorted(folder.glob("models--*")) if folder.name != "snapshots" else []
    if cached:
        return f": {folder} is a hub cache; pass the folder of a snapshot in it, such as {cached[0]}/snapshots/REVISION"
    snapshots = folder if folder.name == "snapshots" else folder / "snapshots"
    if snapshots.is_dir():
        found = ", ".join(str(snapshot) for snapshot in sorted(snapshots.iterdir())) or "none is there: download it"
        return f": {folder} is the root of a model in a hub cache; pass the folder of a snapshot: {found}"
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:_MOST_NAMES]) + (f" and {len(names) - _MOST_NAMES} more" if names[_MOST_NAMES:] else "")
    return f": {folder} holds {shown}" if names else f": {folder} is empty"


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


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an integer, numpy's included, and no truth value."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_positive(name: str, value: Any, *, whole: bool) -> int | float:
    """The number as Python's own.

    Raises TypeError for what is no number (`whole`: no integer) and ValueError for one that is not positive or finite.
    """
    expected = "a positive integer" if whole else "a positive finite number"
    if not is_integer(value) and (whole or isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be {expected}, got {value!r} ({type(value).__name__})")
    number = int(value) if is_integer(value) else float(value)
    if not 0 < number <= sys.float_info.max:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return number


def side(name: str, value: object) -> object:
    """A side that may be given twice, as height and width; raises ValueError where the two differ."""
    if isinstance(value, list | tuple) and len(value) == 2:
        if value[0] != value[1]:
            raise ValueError(f"{name} must be one number or the same one twice, got {value!r}")
        return value[0]
    return value


def rope_theta(section: Mapping[str, Any]) -> object:
    """The value as transformers finds it: in `rope_parameters`, which wins, or beside the other fields; else None.

    Raises TypeError and ValueError for rotary embeddings that are scaled, which no vision encoder here has.
    """
    for name in ("rope_parameters", "rope_scaling"):
        rope = as_mapping(name, section.get(name) or {})
        if (kind := rope.get("rope_type", rope.get("type", "default"))) not in ("default", "axial"):
            raise ValueError(f"{name} must be of rope_type default or axial, got {kind!r}")
    return as_mapping("rope_parameters", section.get("rope_parameters") or {}).get(
        "rope_theta", section.get("rope_theta")
    )


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
