"""What vLLM calls in its front end, its engine core and its workers."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
from pathlib import Path

VARIABLE = "VIT_KERNELS_VLLM"
# What was said: the processes that this one starts inherit it, and do not repeat it.
SAID = "VIT_KERNELS_VLLM_SAID"
# 0.32 is tested. Of 0.33 the files of the classes that are swapped were compared: they are those of 0.32.
SUPPORTED_VERSIONS = ((0, 32), (0, 33))
# What each mode swaps, as the log says it.
MODES = {
    "off": "nothing",
    "attention": "the attention of every vision encoder",
    "kernels": "the attention of every vision encoder, and Llama 4's rotary embedding and pixel shuffle,",
    "encoder": "the vision encoder of Llama 4 and of Qwen2.5-VL",
}
# The module here that has each mode's class in the place of one of vLLM's.
MODELS = {
    "attention": {},
    "kernels": {"Llama4ForConditionalGeneration": "llama4_ops"},
    "encoder": {
        "Llama4ForConditionalGeneration": "llama4_encoder",
        "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl_encoder",
    },
}


def register() -> None:
    """Swap parts of vision encoders as the environment variable VIT_KERNELS_VLLM says; once more changes nothing.

    `off`, the default, leaves vLLM as it is. `attention` swaps the attention of every encoder that is built on vLLM's
    `MMEncoderAttention`, where ours takes it; nothing else of a model changes. `kernels` also swaps rotary embedding
    and pixel shuffle in vLLM's encoder of Llama 4. `encoder` swaps in our encoders for Llama 4's and Qwen2.5-VL's, on
    vLLM's parallel layers and under its compile decorator; other models stay as they are. A version of vLLM outside
    SUPPORTED_VERSIONS is left as it is, with a warning.

    Raises:
        ValueError: VIT_KERNELS_VLLM is none of these.
    """
    mode = os.environ.get(VARIABLE, "off")
    if mode not in MODES:
        raise ValueError(f"{VARIABLE}: got {mode!r}, expected {', '.join(MODES)}")
    if mode == "off":
        others = ", ".join(f"{VARIABLE}={other}" for other in MODES if other != "off")
        _say("info", f"vit_kernels is installed and off; one of {others} turns it on")
        return
    from vllm import ModelRegistry, envs
    from vllm.version import __version__, __version_tuple__

    if __version_tuple__[:2] not in SUPPORTED_VERSIONS:
        known = ", ".join(".".join(map(str, version)) for version in SUPPORTED_VERSIONS)
        _say("warning", f"{VARIABLE}={mode} is ignored: got vLLM {__version__}, expected {known}; vLLM runs unchanged")
        return
    for architecture, module in MODELS[mode].items():
        ModelRegistry.register_model(architecture, f"vit_encoder.integrations.vllm.{module}:{architecture}")
    # vLLM hashes these into the keys of its compile caches, which see no swapped op, and hands them to Ray's workers.
    envs.environment_variables[VARIABLE] = lambda: f"{mode}-{_sources_hash()}"
    _say("info", f"{VARIABLE}={mode}: {MODES[mode]} comes from vit_kernels")
    _swap_in(mode)


def _swap_in(mode: str) -> None:
    from vit_encoder.integrations.vllm import attention, loading

    loading.follow_loading(loading.need_no_gradients)
    if mode == "encoder":
        return
    loading.follow_loading(loading.tell_whose_attention)
    if (others := attention.swap_in()) is not None:
        _say("warning", f"{VARIABLE}={mode}: attention stays that of {others}, which another plugin put there before")


def _say(level: str, text: str) -> None:
    """One line in the log of the first process that gets to it."""
    said = os.environ.get(SAID, "").splitlines()
    if text in said:
        return
    os.environ[SAID] = "\n".join([*said, text])
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
