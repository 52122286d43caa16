"""What a checkpoint says about preparing images: read from its processor's files, and checked."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vit_encoder.configs import (
    CONFIG_FILE,
    HfConfig,
    as_mapping,
    is_integer,
    local_path,
    read_json_object,
    what_it_is,
)

PROCESSOR_FILE = "processor_config.json"
IMAGE_FILE = "preprocessor_config.json"
VIDEO_FILE = "video_preprocessor_config.json"
_NULL_IS_DEFAULT = ("size", "min_pixels", "max_pixels")
# What no image preparation here can leave out, and what none can do.
_ALWAYS_DONE = ("do_resize", "do_rescale", "do_normalize")
_NEVER_DONE = ("do_center_crop", "do_pad", "cap_pixels_per_frame")


def check_positive_int(name: str, value: object) -> int:
    """The number as Python's own; raises TypeError for what is no integer, ValueError for one below 1."""
    if not is_integer(value):
        raise TypeError(f"{name}: expected an int, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {value}")
    return int(value)


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """A level of 0 to 255 becomes (level * rescale_factor - image_mean) / image_std, channel by channel.

    Raises TypeError for what is no number and ValueError for one that is not finite, or not positive where it divides.
    """

    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    rescale_factor: float = 1 / 255

    def __post_init__(self) -> None:
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str) or len(values) != 3:
                raise TypeError(f"{name}: expected three numbers, got {values!r}")
            checked = tuple(_number(name, value, positive=name == "image_std") for value in values)
            object.__setattr__(self, name, checked)
        object.__setattr__(self, "rescale_factor", _number("rescale_factor", self.rescale_factor, positive=True))


Settings = TypeVar("Settings", bound=Normalisation)


def _number(name: str, value: Any, *, positive: bool) -> float:
    expected = "a positive finite number" if positive else "a finite number"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {expected}, got {value!r} of type {type(value).__name__}")
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return float(value)


def changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The settings with those values changed that are not None."""
    return replace(settings, **{name: value for name, value in changes.items() if value is not None})


class Section(NamedTuple):
    """What one file, or one part of it, says of a processor; `source` says which, for error messages."""

    source: str
    values: Mapping[str, Any]


def processor_sections(source: HfConfig) -> tuple[Section | None, Section | None]:
    """What there is for images, and for videos, in the order in which transformers (5.23) looks for it.

    In a folder that is the `image_processor` of processor_config.json, then preprocessor_config.json; for videos the
    `video_processor` of the first, then video_preprocessor_config.json, then preprocessor_config.json.

    Args:
        source: the folder of a checkpoint, or its config.json; or the path of one of these files, a mapping or a
            processor: of images, which then counts for videos too, of videos, or of both.

    Raises:
        OSError: a path that cannot be read, or a folder that is no checkpoint's.
        TypeError: what is none of these.
        ValueError: a file that does not hold a JSON object.
    """
    if not isinstance(source, str | os.PathLike):
        return _sections(Section("the processor", as_mapping("processor", source)))
    path = local_path(source)
    path = path.parent if path.name == CONFIG_FILE else path
    if not path.is_dir():
        return _sections(Section(str(path), read_json_object(path)))
    files = {name: _read(path / name) for name in (PROCESSOR_FILE, IMAGE_FILE, VIDEO_FILE)}
    if not any(files.values()) and not (path / CONFIG_FILE).exists():
        raise FileNotFoundError(f"{path} holds neither {CONFIG_FILE} nor {IMAGE_FILE}{what_it_is(path)}")
    image, video = (_nested(files[PROCESSOR_FILE], key) for key in ("image_processor", "video_processor"))
    return image or files[IMAGE_FILE], video or files[VIDEO_FILE] or files[IMAGE_FILE]


def _read(path: Path) -> Section | None:
    # A link whose file is gone is there, too: its settings must not be replaced by defaults.
    return Section(str(path), read_json_object(path)) if os.path.lexists(path) else None


def _nested(whole: Section | None, key: str) -> Section | None:
    if whole is None or whole.values.get(key) is None:
        return None
    name = f"{whole.source}: {key}"
    return Section(name, as_mapping(name, whole.values[key]))


def _sections(whole: Section) -> tuple[Section | None, Section | None]:
    image, video = (_nested(whole, key) for key in ("image_processor", "video_processor"))
    if image or video:
        return image, video
    return (None if "video_processor_type" in whole.values else whole), whole


def given_settings(
    section: Section, *, types: Sequence[str], resample: int, names: Mapping[str, str]
) -> dict[str, Any]:
    """The values of a section under our names.

    Args:
        types: of the processors that work as ours does, where the section names one.
        resample: the only one that we have, PIL's number of it.
        names: ours to the section's.

    Raises:
        ValueError: a setting that we cannot follow, named with its source.
    """
    # Null turns off what is done and what is not alike.
    expected: dict[str, tuple[Any, ...]] = dict.fromkeys(_ALWAYS_DONE, (True,))
    expected |= dict.fromkeys(_NEVER_DONE, (False, None)) | {"resample": (resample,)}
    expected |= dict.fromkeys(("image_processor_type", "video_processor_type"), (*types, None))
    for key, value in section.values.items():
        if value not in expected.get(key, (value,)):
            raise ValueError(
                f"{section.source}: {key}: got {value!r}, expected {' or '.join(map(repr, expected[key]))}: nothing "
                "else is followed here; prepare the images yourself, or give settings of your own"
            )
    given = {name: section.values[key] for name, key in names.items() if key in section.values}
    return {name: value for name, value in given.items() if value is not None or name not in _NULL_IS_DEFAULT}


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Put what it is about before the message of an OSError, a TypeError or a ValueError."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        raise type(error)(f"{source}: {error}") from error
