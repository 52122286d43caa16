"""The variants of vLLM that are compared, and the environment in which each runs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from vit_encoder.configs import read_json_object
from vit_encoder.integrations.vllm.plugin import MODELS, MODES


@dataclass(frozen=True)
class Variant:
    """Whose vision encoder runs, and whether it is compiled.

    Args:
        mode: of the environment variable VIT_KERNELS_VLLM.
        compiled: vLLM's `compile_mm_encoder`.
    """

    mode: str
    compiled: bool

    @property
    def name(self) -> str:
        """As tables show it: "vLLM alone, compiled"."""
        whose = {
            "off": "vLLM alone",
            "attention": "our attention",
            "kernels": "our kernels",
            "encoder": "our encoder",
        }[self.mode]
        return f"{whose}, {'compiled' if self.compiled else 'not compiled'}"

    @property
    def key(self) -> str:
        """As files are named: "off-compiled"."""
        return f"{self.mode}-{'compiled' if self.compiled else 'eager'}"

    @property
    def compilation_config(self) -> dict[str, bool]:
        """What vLLM is given as its `compilation_config`."""
        return {"compile_mm_encoder": self.compiled}


VARIANTS = tuple(Variant(mode, compiled) for compiled in (False, True) for mode in MODES)


def variants_of(model: Path) -> list[Variant]:
    """vLLM alone, and the modes that have something for a checkpoint's model that the ones before them have not."""
    architectures = read_json_object(model / "config.json").get("architectures") or []
    special = [mode for mode, models in MODELS.items() if any(name in models for name in architectures)]
    modes = {"off", *special} if "kernels" in special else {"off", "attention", *special}
    return [variant for variant in VARIANTS if variant.mode in modes]


def environment(variant: Variant, cache: Path) -> dict[str, str]:
    """The environment variables of a process that runs vLLM: this one's, offline, and the variant's.

    Where vLLM is built for CPUs, its OpenMP library is loaded first and its threads are left to the scheduler.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    settings = {
        "VIT_KERNELS_VLLM": variant.mode,
        "VLLM_CACHE_ROOT": str(cache),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if (openmp := Path(sys.prefix) / "lib/libiomp5.so").exists():
        settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "LD_PRELOAD": str(openmp)}
        settings["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    return inherited | settings
