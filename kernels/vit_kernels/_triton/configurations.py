"""Which block sizes the attention kernels are compiled with: the ones kept for each target, and the tuned one."""

import functools
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import triton

Configuration = dict[str, Any]
"""Constexpr arguments of a kernel, with num_warps and num_stages."""

Blocks = tuple[int, int, int, int]
"""BLOCK_M, BLOCK_N, num_warps, num_stages."""

# Kept is what compiles, for every head_dim of its row, without spills and with 16-byte loads of q, k and v in the
# main loop; the order is a guess until a GPU has timed it. (64, 64) with 3 stages is the middle of what NVIDIA's
# GPUs hold twice. On AMD a matrix instruction covers 32 rows a wave: more waves than BLOCK_M / 32 would repeat work.
_WIDE_COLUMNS: dict[str, list[Blocks]] = {
    "sm_80": [(64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3)],
    "sm_90": [(64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2)],
    "sm_100": [(64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2)],
    "gfx9": [(64, 64, 2, 1), (64, 64, 2, 2), (128, 64, 4, 1), (128, 64, 4, 2)],
}
# Columns that end in a block of 16 (head_dim 72, 80): the threads of a larger block would load 8 bytes each of it.
_16_COLUMNS: dict[str, list[Blocks]] = {
    "sm_80": [(64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2)],
    "sm_90": [(64, 64, 4, 3), (64, 64, 4, 2), (128, 128, 8, 2), (64, 128, 4, 2)],
    "sm_100": [(64, 64, 4, 3), (64, 64, 4, 2), (128, 128, 8, 2), (64, 128, 4, 2)],
    "gfx9": [(64, 64, 2, 2), (64, 64, 2, 1), (32, 64, 1, 1), (128, 128, 4, 1)],
}
# By 16 to 32 bytes at head_dim 88 and 96, by the compiler of one version of Triton.
_SPILLED: dict[tuple[str, str], Blocks] = {("3.9.", "sm_100"): (128, 64, 8, 3)}
_BEYOND_128_COLUMNS: dict[str, list[Blocks]] = {
    "sm_80": [(64, 32, 8, 2), (32, 32, 4, 2)],
    "sm_90": [(64, 32, 4, 2), (64, 32, 8, 2), (128, 32, 8, 2)],
    "sm_100": [(64, 32, 4, 2), (64, 32, 8, 2), (128, 32, 8, 2)],
    "gfx9": [(64, 32, 2, 1), (128, 32, 4, 1)],
}
_FLOAT32: dict[str, list[Blocks]] = {
    "cuda": [(16, 32, 4, 2), (16, 16, 4, 2), (16, 64, 4, 2)],
    "gfx9": [(32, 32, 4, 2), (16, 32, 4, 2), (32, 16, 4, 2)],
}
_FLOAT32_BEYOND_128_COLUMNS: list[Blocks] = [(16, 16, 8, 2)]

_GRAD_Q: dict[str, list[Blocks]] = {
    "cuda": [(64, 32, 4, 2), (16, 64, 4, 2)],
    "gfx9": [(64, 32, 2, 1), (32, 32, 1, 1)],
}
_GRAD_KV: dict[str, list[Blocks]] = {
    "sm_80": [(32, 32, 4, 2)],
    "cuda": [(32, 64, 4, 2), (32, 32, 4, 2)],
    "gfx9": [(32, 64, 2, 1), (32, 32, 1, 1)],
}

# BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages of linear_gelu. More than 64 accumulators a thread spill on NVIDIA,
# and (256, 128) leaves the tensor memory of sm_100 unused.
_LINEAR: dict[str, list[tuple[int, int, int, int, int]]] = {
    "cuda": [(128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (64, 128, 64, 4, 3), (128, 64, 64, 4, 3)],
    "gfx9": [(128, 128, 64, 8, 2), (128, 128, 32, 4, 2), (128, 128, 64, 4, 1)],
}
_LINEAR_FLOAT32: dict[str, list[tuple[int, int, int, int, int]]] = {
    "cuda": [(64, 64, 16, 4, 2), (64, 64, 32, 4, 2), (32, 64, 32, 4, 2)],
    "gfx9": [(64, 64, 32, 4, 2), (64, 64, 16, 4, 2), (128, 64, 32, 8, 2)],
}


def split_head_dim(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Two block widths that cover head_dim: the largest power of two in it, and one for the rest.

    The second is at least 16 columns, a matrix instruction's width, and 32 of float32: 16 would spill by the kilobyte.
    """
    block_0 = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - block_0
    return block_0, max(32 if dtype == torch.float32 else 16, triton.next_power_of_2(rest)) if rest else 0


def linear_candidates(dtype: torch.dtype, target: str) -> list[Configuration]:
    """As `candidates`, for linear_gelu, which has no heads."""
    backend = "gfx9" if _family(target) == "gfx9" else "cuda"
    rows = (_LINEAR_FLOAT32 if dtype == torch.float32 else _LINEAR)[backend]
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    shared: Configuration = {"GROUP_M": 8, "INPUT_PRECISION": _input_precision(dtype, target)}
    if backend == "gfx9":
        # Triton 3.6's compiler would take 272 registers where 205 do, too many for a second block of 4 waves.
        shared["waves_per_eu"] = 2
    return [shared | dict(zip(names, row, strict=True)) for row in rows]


def _input_precision(dtype: torch.dtype, target: str) -> str:
    """float32 as three products of tf32 on NVIDIA's tensor cores, never one; AMD's multiply it as it is."""
    return "tf32x3" if dtype == torch.float32 and target.startswith("sm") else "ieee"


def candidates(kernel: str, head_dim: int, dtype: torch.dtype, target: str) -> list[Configuration]:
    """The configurations of a kernel that are kept for `target`; the first is the default.

    Args:
        kernel: "varlen_attention", "grad_q" or "grad_kv".
        head_dim: of the queries.
        dtype: of the queries.
        target: "sm_90", "gfx942" and their like, or "interpreter".
    """
    block_0, block_1 = split_head_dim(head_dim, dtype)
    columns: Configuration = {
        "BLOCK_D0": block_0,
        "BLOCK_D1": block_1,
        "BLOCK_TAIL": 16,
        "INPUT_PRECISION": _input_precision(dtype, target),
    }
    if kernel == "varlen_attention":
        # A program of 16 rows for a short last block of queries. More than 16 keys at a time would cost registers,
        # and with them occupancy, where the columns end in a block of 16.
        columns |= {"BLOCK_LAST": 16, "BLOCK_N_LAST": 32 if block_1 != 16 and head_dim <= 128 else 16}
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return [columns | dict(zip(names, blocks, strict=True)) for blocks in _blocks(kernel, head_dim, dtype, target)]


def _blocks(kernel: str, head_dim: int, dtype: torch.dtype, target: str) -> list[Blocks]:
    family = _family(target)
    backend = "gfx9" if family == "gfx9" else "cuda"
    if kernel == "grad_q":
        return [(16, 16, 4, 2)] if dtype == torch.float32 or head_dim > 128 else _GRAD_Q[backend]
    if kernel == "grad_kv":
        return [(32, 16, 4, 2)] if dtype == torch.float32 or head_dim > 128 else _GRAD_KV.get(family, _GRAD_KV[backend])
    if dtype == torch.float32:
        return _FLOAT32_BEYOND_128_COLUMNS if head_dim > 128 else _FLOAT32[backend]
    if head_dim > 128:
        return _BEYOND_128_COLUMNS[family]
    kept = (_16_COLUMNS if split_head_dim(head_dim, dtype)[1] == 16 else _WIDE_COLUMNS)[family]
    spilled = _SPILLED.get((triton.__version__[:4], family))
    return [blocks for blocks in kept if blocks != spilled]


def _family(target: str) -> str:
    """The target whose rows a GPU uses that has none of its own: by its matrix instructions and shared memory."""
    if target.startswith("gfx"):
        return "gfx9"
    return {"sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100"}.get(target, "sm_80")


def default_linear(dtype: torch.dtype) -> Configuration:
    """The configuration of linear_gelu on the current device."""
    target = "interpreter" if triton.knobs.runtime.interpret else _current_target()
    return linear_candidates(dtype, target)[0]


def norm_options(dtype: torch.dtype) -> Configuration:
    """Options that layer_norm_pixel_shuffle is launched with on the current device."""
    if not triton.__version__.startswith("3.6.") or dtype == torch.float32 or triton.knobs.runtime.interpret:
        return {}
    # That compiler takes up to 100 registers where 96 spill nothing and leave room for a fifth block.
    return {"maxnreg": 96} if _current_target().startswith("sm") else {}


def _current_target() -> str:
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).partition(":")[0]


def preferred(kernel: str, head_dim: int, dtype: torch.dtype) -> Configuration:
    """The configuration to launch on the current device: the tuned one where there is one, else the default.

    It depends on nothing else, so that a result does not depend on the batch or on what ran before.
    """
    if triton.knobs.runtime.interpret:
        return candidates(kernel, head_dim, dtype, "interpreter")[0]
    active = triton.runtime.driver.active
    return _preferred(kernel, head_dim, dtype, active, active.get_current_device())


@functools.cache
def _preferred(kernel: str, head_dim: int, dtype: torch.dtype, active: Any, device: int) -> Configuration:
    name = _current_target()
    kept = candidates(kernel, head_dim, dtype, name)
    wanted = _tuned(name, device).get(kernel, {}).get(f"{head_dim} {str(dtype).removeprefix('torch.')}")
    if wanted is None:
        return kept[0]
    matching = [configuration for configuration in kept if wanted.items() <= configuration.items()]
    if not matching:
        warnings.warn(f"{kernel}: the tuned configuration {wanted} is none of those kept, tune again", stacklevel=2)
    return (matching or kept)[0]


def tuned_file(device_name: str) -> Path:
    """Where the tuned configurations of a device are kept: in VIT_KERNELS_TUNED, else beside the kernels.

    JSON: {"target": "sm_90", "configurations": {kernel: {"88 bfloat16": {"BLOCK_M": 64, ...}}}, ...}.
    """
    folder = os.environ.get("VIT_KERNELS_TUNED") or Path(__file__).parent / "tuned"
    return Path(folder).expanduser() / f"{re.sub(r'[^A-Za-z0-9]+', '_', device_name)}.json"


def _tuned(target: str, device: int) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    path = tuned_file(torch.cuda.get_device_name(device))
    if not path.exists():
        return {}
    try:
        tuned = json.loads(path.read_text(encoding="utf-8"))
        return tuned["configurations"] if tuned["target"] == target else {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected tuned configurations as experiments.kernels.tune writes them: {error}"
        ) from error
