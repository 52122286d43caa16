"""Which block sizes kernels are compiled with: the ones kept for each target, and the tuned one."""

import functools
import json
import os
import re
import warnings
from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

Configuration = dict[str, Any]
"""Constexpr arguments of a kernel, with num_warps and num_stages."""


class Row(NamedTuple):
    """Block sizes of a kernel that are kept for some dtypes, head_dims and targets, the default first."""

    kernel: str
    dtypes: tuple[torch.dtype, ...]
    head_dims: Container[int]
    targets: tuple[str, ...]
    blocks: tuple[tuple[int, ...], ...]


_NAMES = {
    4: ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
    5: ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"),
}
"""Of block sizes, by how many they are."""

_HALF, _FLOAT32 = (torch.float16, torch.bfloat16), (torch.float32,)
_INT8, _E4M3 = (torch.int8,), (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
_NVIDIA, _AMD = ("sm_80", "sm_90", "sm_100"), ("gfx9",)
_ENDING_IN_16 = (24, 40, 48, 72, 80)
"""What `split_head_dim` gives a second block of 16 columns: a larger tile's threads would load 8 bytes each of it."""
_TO_128, _ALL = range(129), range(257)

# Kept is what compiles, for every head_dim of its row, without spills and with 16-byte loads of q, k and v in the
# main loop; the order is a guess until a GPU has timed it. (64, 64) with 3 stages is the middle of what NVIDIA's GPUs
# hold twice. On AMD a matrix instruction covers 32 rows a wave: more waves than BLOCK_M / 32 would repeat work. Of the
# product in linear_gelu more than 64 accumulators a thread spill on NVIDIA, and (256, 128) leaves the tensor memory of
# sm_100 unused.
#
# The first row that matches is taken.
_KEPT = (
    Row("varlen_attention", _FLOAT32, _TO_128, _NVIDIA, ((16, 32, 4, 2), (16, 16, 4, 2), (16, 64, 4, 2))),
    Row("varlen_attention", _FLOAT32, _TO_128, _AMD, ((32, 32, 4, 2), (16, 32, 4, 2), (32, 16, 4, 2))),
    Row("varlen_attention", _FLOAT32, _ALL, _NVIDIA + _AMD, ((16, 16, 8, 2),)),
    Row("varlen_attention", _HALF, _ENDING_IN_16, ("sm_80",), ((64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2))),
    Row(
        "varlen_attention", _HALF, _ENDING_IN_16, ("sm_90", "sm_100"),
        ((64, 64, 4, 3), (64, 64, 4, 2), (128, 128, 8, 2), (64, 128, 4, 2)),
    ),
    Row(
        "varlen_attention", _HALF, _ENDING_IN_16, _AMD,
        ((64, 64, 2, 2), (64, 64, 2, 1), (32, 64, 1, 1), (128, 128, 4, 1)),
    ),
    Row("varlen_attention", _HALF, _TO_128, ("sm_80",), ((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3))),
    Row(
        "varlen_attention", _HALF, _TO_128, ("sm_90", "sm_100"),
        ((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2)),
    ),
    Row(
        "varlen_attention", _HALF, _TO_128, _AMD,
        ((64, 64, 2, 1), (64, 64, 2, 2), (128, 64, 4, 1), (128, 64, 4, 2)),
    ),
    Row("varlen_attention", _HALF, _ALL, ("sm_80",), ((64, 32, 8, 2), (32, 32, 4, 2))),
    Row("varlen_attention", _HALF, _ALL, ("sm_90", "sm_100"), ((64, 32, 4, 2), (64, 32, 8, 2), (128, 32, 8, 2))),
    Row("varlen_attention", _HALF, _ALL, _AMD, ((64, 32, 2, 1), (128, 32, 4, 1))),
    Row("grad_q", _HALF, _TO_128, _NVIDIA, ((64, 32, 4, 2), (16, 64, 4, 2))),
    Row("grad_q", _HALF, _TO_128, _AMD, ((64, 32, 2, 1), (32, 32, 1, 1))),
    Row("grad_q", _HALF + _FLOAT32, _ALL, _NVIDIA + _AMD, ((16, 16, 4, 2),)),
    Row("grad_kv", _HALF, _TO_128, ("sm_80",), ((32, 32, 4, 2),)),
    Row("grad_kv", _HALF, _TO_128, ("sm_90", "sm_100"), ((32, 64, 4, 2), (32, 32, 4, 2))),
    Row("grad_kv", _HALF, _TO_128, _AMD, ((32, 64, 2, 1), (32, 32, 1, 1))),
    Row("grad_kv", _HALF + _FLOAT32, _ALL, _NVIDIA + _AMD, ((32, 16, 4, 2),)),
    Row(
        "linear_gelu", _HALF, _ALL, _NVIDIA,
        ((128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (64, 128, 64, 4, 3), (128, 64, 64, 4, 3)),
    ),
    Row("linear_gelu", _HALF, _ALL, _AMD, ((128, 128, 64, 8, 2), (128, 128, 32, 4, 2), (128, 128, 64, 4, 1))),
    Row("linear_gelu", _FLOAT32, _ALL, _NVIDIA, ((64, 64, 16, 4, 2), (64, 64, 32, 4, 2), (32, 64, 32, 4, 2))),
    Row("linear_gelu", _FLOAT32, _ALL, _AMD, ((64, 64, 32, 4, 2), (64, 64, 16, 4, 2), (128, 64, 32, 8, 2))),
    Row("scaled_linear", _INT8, _ALL, ("sm_80",), ((128, 128, 64, 8, 4), (64, 128, 128, 4, 3))),
    Row("scaled_linear", _INT8, _ALL, ("sm_90", "sm_100"), ((64, 128, 128, 4, 3), (128, 128, 64, 8, 4))),
    Row("scaled_linear", _E4M3, _ALL, ("sm_80", "sm_90"), ((64, 128, 128, 4, 3), (128, 128, 128, 8, 3))),
    Row("scaled_linear", _E4M3, _ALL, ("sm_100",), ((128, 128, 128, 8, 3), (64, 128, 128, 4, 3))),
    Row("scaled_linear", _INT8 + _E4M3, _ALL, _AMD, ((128, 128, 128, 8, 2), (128, 128, 64, 4, 2))),
)  # fmt: skip

# By 16 to 32 bytes at head_dim 88 and 96, by the compiler of one version of Triton.
_SPILLED = {("3.9.", "sm_100"): (128, 64, 8, 3)}


def split_head_dim(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Two block widths that cover head_dim: the largest power of two in it, and one for the rest.

    The second is at least 16 columns, a matrix instruction's width, and 32 of float32: 16 would spill by the kilobyte.
    """
    block_0 = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - block_0
    return block_0, max(32 if dtype == torch.float32 else 16, triton.next_power_of_2(rest)) if rest else 0


def linear_candidates(dtype: torch.dtype, target: str) -> list[Configuration]:
    """As `candidates`, for linear_gelu, which has no heads."""
    # 8 blocks of tokens in a row read the same block of the weight, while the cache has it.
    shared: Configuration = {"GROUP_M": 8, "INPUT_PRECISION": _input_precision(dtype, target)}
    if _family(target) == "gfx9":
        # Triton 3.6's compiler would take 272 registers where 205 do, too many for a second block of 4 waves.
        shared["waves_per_eu"] = 2
    return [shared | blocks for blocks in _blocks("linear_gelu", 0, dtype, target)]


def scaled_linear_candidates(dtype: torch.dtype, target: str) -> list[Configuration]:
    """As `candidates`, for scaled_linear; none where the target has no matrix instruction for the dtype.

    Triton would take OCP's e4m3 on gfx942, and multiply it in float16. The interpreter takes the rows of sm_80.
    """
    if target != "interpreter":
        is_fnuz = target == "gfx942"
        if dtype in _E4M3 and ((dtype == torch.float8_e4m3fnuz) != is_fnuz or _family(target) == "sm_80"):
            return []
    return [{"GROUP_M": 8} | blocks for blocks in _blocks("scaled_linear", 0, dtype, target)]


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
        # The fewest keys, or queries, that tl.dot takes: the least is padded.
        "BLOCK_TAIL": 16,
        "INPUT_PRECISION": _input_precision(dtype, target),
    }
    if kernel == "varlen_attention":
        # A program of 16 rows for a short last block of queries. More than 16 keys at a time would cost registers,
        # and with them occupancy, where the columns end in a block of 16.
        columns |= {"BLOCK_LAST": 16, "BLOCK_N_LAST": 32 if block_1 != 16 and head_dim <= 128 else 16}
    return [columns | blocks for blocks in _blocks(kernel, head_dim, dtype, target)]


def _blocks(kernel: str, head_dim: int, dtype: torch.dtype, target: str) -> list[Configuration]:
    family = _family(target)
    row = next(
        row
        for row in _KEPT
        if row.kernel == kernel and dtype in row.dtypes and head_dim in row.head_dims and family in row.targets
    )
    spilled = _SPILLED.get((triton.__version__[:4], family))
    return [dict(zip(_NAMES[len(blocks)], blocks, strict=True)) for blocks in row.blocks if blocks != spilled]


def _family(target: str) -> str:
    """The target whose rows a GPU uses that has none of its own: by its matrix instructions and shared memory."""
    if target.startswith("gfx"):
        return "gfx9"
    return {"sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100"}.get(target, "sm_80")


def default_linear(dtype: torch.dtype) -> Configuration:
    """The configuration of linear_gelu on the current device."""
    target = "interpreter" if triton.knobs.runtime.interpret else current_target()
    return linear_candidates(dtype, target)[0]


def current_target() -> str:
    """The current device as `candidates` names it."""
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
    name = current_target()
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
