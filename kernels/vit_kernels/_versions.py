"""Which versions the project is known to work with; under others it is tried, after one warning."""

import re
import sys
import warnings
from importlib import metadata

import torch

Version = tuple[int, int]

KNOWN: dict[str, tuple[Version, Version]] = {
    "Python": ((3, 11), (3, 13)),
    "torch": ((2, 11), (2, 15)),
    "triton": ((3, 6), (3, 9)),
}
"""The oldest and the newest minor versions."""


def warn_if_unknown() -> None:
    """Warn once, of all that lies outside of KNOWN."""
    versions = {"Python": sys.version, "torch": torch.__version__, "triton": _triton()}
    found = [text for name, version in versions.items() if (text := unknown(name, version))]
    if found:
        warnings.warn(f"vit_kernels is not tested with this version: {'; '.join(found)}", stacklevel=3)


def unknown(name: str, found: str) -> str:
    """What was found and expected; empty where it is known, or no version."""
    number = re.match(r"(\d+)\.(\d+)", found)
    oldest, newest = KNOWN[name]
    if number is None or oldest <= (int(number[1]), int(number[2])) <= newest:
        return ""
    return f"got {name} {found.split()[0]}, expected {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}"


def _triton() -> str:
    # Importing it takes longer than all else, and builds for ROCm have other names.
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""
