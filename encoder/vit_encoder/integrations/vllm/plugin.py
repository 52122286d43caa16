"""What vLLM calls in its front end, its engine core and its workers."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from pathlib import Path

VARIABLE = "VIT_KERNELS_VLLM"
MODES = ("off", "kernels", "encoder")
SUPPORTED_VERSIONS = ((0, 32),)
ARCHITECTURE = "Llama4ForConditionalGeneration"


def register() -> None:
    """Swap Llama 4's vision part as the environment variable VIT_KERNELS_VLLM says; once more changes nothing.

    `off`, the default, leaves vLLM as it is. `kernels` swaps attention, rotary embedding and pixel shuffle inside
    vLLM's own encoder. `encoder` swaps in our encoder, on vLLM's parallel layers and under its compile decorator.
    Nothing of vLLM is imported but its registry until a Llama 4 is loaded, and other models stay as they are. A version
    of vLLM outside SUPPORTED_VERSIONS is left as it is, with a warning.

    Raises:
        ValueError: VIT_KERNELS_VLLM is none of these.
    """
    mode = os.environ.get(VARIABLE, "off")
    if mode not in MODES:
        raise ValueError(f"{VARIABLE}: got {mode!r}, expected {', '.join(MODES)}")
    if mode == "off":
        _say("info", f"vit_kernels is installed and off; {VARIABLE}=kernels or {VARIABLE}=encoder turns it on")
        return
    from vllm import ModelRegistry, envs
    from vllm.version import __version__, __version_tuple__

    if __version_tuple__[:2] not in SUPPORTED_VERSIONS:
        known = ", ".join(".".join(map(str, version)) for version in SUPPORTED_VERSIONS)
        _say("warning", f"{VARIABLE}={mode} is ignored: got vLLM {__version__}, expected {known}; vLLM runs unchanged")
        return
    ModelRegistry.register_model(ARCHITECTURE, f"vit_encoder.integrations.vllm.{mode}:{ARCHITECTURE}")
    # vLLM hashes these into the keys of its compile caches, which see no swapped op, and hands them to Ray's workers.
    envs.environment_variables[VARIABLE] = lambda: f"{mode}-{_sources_hash()}"
    _say("info", f"{VARIABLE}={mode}: the vision part of {ARCHITECTURE} comes from vit_kernels")


@functools.cache
def _say(level: str, text: str) -> None:
    from vllm.logger import init_logger

    getattr(init_logger("vllm.plugins.vit_kernels"), level)("%s", text)


@functools.cache
def _sources_hash() -> str:
    """Of both packages: a compiled graph calls ops whose bodies it does not hold."""
    digest = hashlib.sha256()
    for package in ("vit_kernels", "vit_encoder"):
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(path.read_bytes())
    return digest.hexdigest()
