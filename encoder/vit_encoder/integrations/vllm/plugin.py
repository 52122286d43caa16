"""What vLLM calls in its front end, its engine core and its workers."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
from pathlib import Path

VARIABLE = "VIT_KERNELS_VLLM"
MODES = ("off", "kernels", "encoder")
# What was said last: the processes that this one starts inherit it, and do not repeat it.
SAID = "VIT_KERNELS_VLLM_SAID"
# 0.32 is tested. Of 0.33 the files of the classes that are swapped were compared: they are those of 0.32.
SUPPORTED_VERSIONS = ((0, 32), (0, 33))
ARCHITECTURES = {
    "kernels": ("Llama4ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
    "encoder": ("Llama4ForConditionalGeneration",),
}


def register() -> None:
    """Swap the vision part of models as the environment variable VIT_KERNELS_VLLM says; once more changes nothing.

    `off`, the default, leaves vLLM as it is. `kernels` swaps attention, rotary embedding and pixel shuffle inside
    vLLM's own encoder of Llama 4, and attention inside that of Qwen2.5-VL. `encoder` swaps in our encoder for Llama
    4's, on vLLM's parallel layers and under its compile decorator. Nothing of vLLM is imported but its registry until
    such a model is loaded, and other models stay as they are. A version of vLLM outside SUPPORTED_VERSIONS is left as
    it is, with a warning.

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
    for architecture in ARCHITECTURES[mode]:
        ModelRegistry.register_model(architecture, f"vit_encoder.integrations.vllm.{mode}:{architecture}")
    # vLLM hashes these into the keys of its compile caches, which see no swapped op, and hands them to Ray's workers.
    envs.environment_variables[VARIABLE] = lambda: f"{mode}-{_sources_hash()}"
    _say("info", f"{VARIABLE}={mode}: the vision part of {', '.join(ARCHITECTURES[mode])} comes from vit_kernels")


def _say(level: str, text: str) -> None:
    """One line in the log of the first process that gets here."""
    if os.environ.get(SAID) == text:
        return
    os.environ[SAID] = text
    from vllm.logger import init_logger

    logger = init_logger("vllm.plugins.vit_kernels")
    if logger.hasHandlers():
        getattr(logger, level)("%s", text)
    # vLLM's front end loads its plugins before it sets up its log, and an INFO line is lost there.
    elif level != "info" or os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper() in ("DEBUG", "INFO"):
        print(f"{level.upper()} {text}", file=sys.stderr)


@functools.cache
def _sources_hash() -> str:
    """A hash of both packages: a compiled graph calls ops whose implementations it does not hold."""
    digest = hashlib.sha256()
    for package in ("vit_kernels", "vit_encoder"):
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(path.read_bytes())
    return digest.hexdigest()
