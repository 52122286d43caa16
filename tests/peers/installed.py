"""The versions of what a suite ran with."""

import importlib.metadata
import platform

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "vllm")


def versions() -> dict[str, str]:
    """Python's version, and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
