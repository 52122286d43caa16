"""The kernels that the kernel report compiles, ours and those of installed peers, with an entry for each."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from experiments.common.problem import GRID, HEADS, POSITIONS, TILES

HEAD_DIMS = (64, 72, 80, 88, 96, 128)
DTYPES = ("bfloat16", "float16", "float32")

Configuration = dict[str, Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Problem:
    """Tiles of Llama 4's 577 tokens with `heads` heads of `head_dim`, which a kernel is compiled for or run on."""

    head_dim: int
    dtype: str
    tiles: int = TILES
    heads: int = HEADS
    positions: int = POSITIONS
    device: str = "meta"

    @property
    def tokens(self) -> int:
        """The tokens of all tiles."""
        return self.tiles * self.positions

    @property
    def width(self) -> int:
        """The channels of a token."""
        return self.heads * self.head_dim

    @property
    def itemsize(self) -> int:
        """The bytes of an element."""
        return getattr(torch, self.dtype).itemsize

    @property
    def tensor_bytes(self) -> int:
        """The bytes of one of q, k, v or the output: [tokens, heads, head_dim]."""
        return self.tokens * self.width * self.itemsize

    def tensor(self, *shape: int, dtype: str | None = None) -> Tensor:
        """Return zeros, since what is counted does not depend on the values."""
        return torch.zeros(shape, dtype=getattr(torch, dtype or self.dtype), device=self.device)

    def qkv(self) -> tuple[Tensor, ...]:
        """Return q, k and v [tokens, heads, head_dim] as views of a packed projection."""
        return self.tensor(self.tokens, 3, self.heads, self.head_dim).unbind(1)

    def cu_seqlens(self) -> Tensor:
        """Return where each tile begins, and the last one ends."""
        starts = torch.arange(0, self.tokens + 1, self.positions, dtype=torch.int32)
        return starts.to(self.device)

    def rotary_table(self) -> Tensor:
        """Return cos or sin, fp32 [positions, head_dim // 2]."""
        return self.tensor(self.positions, self.head_dim // 2, dtype="float32")

    @property
    def table_bytes(self) -> int:
        """The bytes of both rotary tables."""
        return 2 * self.positions * self.head_dim // 2 * 4


@dataclass(frozen=True)
class Kernel:
    """One kernel of the report.

    Attributes:
        name: in the report and on the command line.
        launcher: "module:function".
        arguments: those of the launcher; the configuration is None where the launcher alone chooses.
        compulsory_bytes: each input and output byte once.
        useful_flops: matrix FLOPs that the problem has.
        configurations: of a head_dim, dtype and target, the default first; None where the launcher alone chooses.
        silenced: kernels of the launcher's module that are not launched, so that one remains.
        rows: the constexpr with the keys, or queries, of one trip through the main loop.
        heads, positions: of the tile that it is interpreted with; what it does must be proportional to them, unless
            they are those of the whole problem.
        package: distribution that it is part of; "vit-kernels" is ours.
        factors: the dtype of the matrix products, where that is not the problem's.
        prepare: called before the launcher is imported.
    """

    name: str
    launcher: str
    arguments: Callable[[Problem, Any], Arguments]
    compulsory_bytes: Callable[[Problem], int]
    useful_flops: Callable[[Problem], int] = lambda problem: 0
    configurations: Callable[[int, str, str], list[Configuration]] | None = None
    silenced: tuple[str, ...] = ()
    rows: str | None = None
    heads: int = HEADS
    positions: int = POSITIONS
    package: str = "vit-kernels"
    factors: str | None = None
    prepare: Callable[[], None] = lambda: None

    def interpreted_problem(self, head_dim: int, dtype: str) -> Problem:
        """Return the problem that is interpreted: one tile, or less, on the CPU."""
        return Problem(head_dim, dtype, tiles=1, heads=self.heads, positions=self.positions, device="cpu")

    def load(self) -> tuple[ModuleType, Callable[..., Any]]:
        """Import the launcher, and return its module and the function."""
        self.prepare()
        module_name, _, function = self.launcher.partition(":")
        module = importlib.import_module(module_name)
        return module, getattr(module, function)

    def candidates(self, head_dim: int, dtype: str, target: str) -> list[Configuration | None]:
        """Return the configurations that it is compiled with for a target, the default first."""
        return [*self.configurations(head_dim, dtype, target)] if self.configurations else [None]


def _attention_flops(products: int) -> Callable[[Problem], int]:
    """Return the FLOPs of `products` matrix products of [577, 577, head_dim] for each tile and head."""
    return lambda problem: products * 2 * problem.positions**2 * problem.width * problem.tiles


def _tuned(kernel: str) -> Callable[[int, str, str], list[Configuration]]:
    def configurations(head_dim: int, dtype: str, target: str) -> list[Configuration]:
        from vit_kernels._triton.configurations import candidates

        return candidates(kernel, head_dim, getattr(torch, dtype), target)

    return configurations


def _attention(problem: Problem, configuration: Any) -> Arguments:
    lengths = problem.cu_seqlens()
    return (*problem.qkv(), lengths, lengths, problem.head_dim**-0.5), {"configuration": configuration}


def _gradients(problem: Problem, configuration: Any) -> Arguments:
    out, lengths = problem.tensor(problem.tokens, problem.heads, problem.head_dim), problem.cu_seqlens()
    lse = problem.tensor(problem.heads, problem.tokens, dtype="float32")
    tensors = (out, None, *problem.qkv(), out, lse, lengths, lengths)
    # The other kernels are silenced.
    return (*tensors, problem.head_dim**-0.5), {"configurations": configuration and (configuration, configuration)}


def _rotary(interleaved: bool, **more: bool) -> Callable[[Problem, Any], Arguments]:
    def arguments(problem: Problem, configuration: Any) -> Arguments:
        q, k, _ = problem.qkv()
        return (q, k, problem.rotary_table(), problem.rotary_table(), interleaved), more

    return arguments


def _rotary_bytes(problem: Problem) -> int:
    return 4 * problem.tensor_bytes + problem.table_bytes


def _shuffle(problem: Problem, configuration: Any) -> Arguments:
    return (problem.tensor(problem.tiles, POSITIONS, problem.width)[:, :-1], GRID, GRID, 2), {}


def _shuffle_back(problem: Problem, configuration: Any) -> Arguments:
    return (problem.tensor(problem.tiles, (GRID // 2) ** 2, 4 * problem.width), GRID, GRID, 2), {}


def _norm_and_shuffle(problem: Problem, configuration: Any) -> Arguments:
    (x, *sizes), _ = _shuffle(problem, configuration)
    weight = problem.tensor(problem.width)
    return (x, weight, weight, *sizes, 1e-5), {}


def _linear_gelu(problem: Problem, configuration: Any) -> Arguments:
    x, weight = problem.tensor(problem.tokens, problem.width), problem.tensor(4 * problem.width, problem.width)
    return (x, weight, problem.tensor(4 * problem.width)), {"configuration": configuration}


def _linear_gelu_bytes(problem: Problem) -> int:
    return 5 * problem.tensor_bytes + 4 * problem.width * (problem.width + 1) * problem.itemsize


def _linear_candidates(head_dim: int, dtype: str, target: str) -> list[Configuration]:
    from vit_kernels._triton.configurations import linear_candidates

    return linear_candidates(getattr(torch, dtype), target)


def _scaled_linear(dtype: str) -> Callable[[Problem, Any], Arguments]:
    """Of 8-bit factors; e4m3 stores e4m3 over a given scale, after a GELU, as fc1 does."""

    def arguments(problem: Problem, configuration: Any) -> Arguments:
        x, weight = (problem.tensor(rows, problem.width, dtype=dtype) for rows in (problem.tokens, 4 * problem.width))
        x_scale, weight_scale = (problem.tensor(len(t), dtype="float32") for t in (x, weight))
        out_scale = None if dtype == "int8" else x_scale
        out_dtype = getattr(torch, problem.dtype if dtype == "int8" else dtype)
        tensors = (x, weight, x_scale, weight_scale, problem.tensor(4 * problem.width), out_scale)
        return (*tensors, None if dtype == "int8" else "gelu", out_dtype), {"configuration": configuration}

    return arguments


def _scaled_linear_bytes(dtype: str) -> Callable[[Problem], int]:
    def compulsory(problem: Problem) -> int:
        values = problem.tokens * problem.width
        stored = 4 * values * (problem.itemsize if dtype == "int8" else 1)
        scales = 4 * (problem.tokens + 4 * problem.width)
        return values + stored + 4 * problem.width * (problem.width + problem.itemsize) + scales

    return compulsory


def _scaled_linear_candidates(dtype: str) -> Callable[[int, str, str], list[Configuration]]:
    def configurations(head_dim: int, out_dtype: str, target: str) -> list[Configuration]:
        from vit_kernels._triton.configurations import scaled_linear_candidates

        # The products are the same beside outputs of other dtypes; the width is that of Llama 4.
        if out_dtype != "bfloat16" or head_dim != 88:
            return []
        return scaled_linear_candidates(getattr(torch, dtype), target)

    return configurations


def _on_targets_with(dtype: str) -> Callable[[int, str, str], list[Configuration]]:
    """One row where the target multiplies 8-bit numbers of this dtype; the launcher chooses."""

    def configurations(head_dim: int, x_dtype: str, target: str) -> list[Configuration]:
        return [{}] if _scaled_linear_candidates(dtype)(head_dim, x_dtype, target) else []

    return configurations


def _add_norm_quantise(dtype: str) -> Callable[[Problem, Any], Arguments]:
    def arguments(problem: Problem, configuration: Any) -> Arguments:
        x, weight = problem.tensor(problem.tokens, problem.width), problem.tensor(problem.width)
        return (x, x, weight, weight, 1e-5, getattr(torch, dtype)), {}

    return arguments


def _add_norm_quantise_bytes(problem: Problem) -> int:
    """Two tensors are read, one is written, and a byte a value and a scale a token."""
    return 3 * problem.tensor_bytes + problem.tokens * (problem.width + 4) + 2 * problem.width * problem.itemsize


def _quantise_rows(dtype: str, activation: str) -> Callable[[Problem, Any], Arguments]:
    """Rows as wide as an intermediate activation, 4 * width."""

    def arguments(problem: Problem, configuration: Any) -> Arguments:
        features = 4 * problem.width * (1 + (activation == "gated_silu"))
        return (problem.tensor(problem.tokens, features), activation, getattr(torch, dtype)), {}

    return arguments


def _quantise_rows_bytes(activation: str) -> Callable[[Problem], int]:
    read = 4 * (1 + (activation == "gated_silu"))
    return lambda problem: read * problem.tensor_bytes + problem.tokens * (4 * problem.width + 4)


def _shuffle_bytes(problem: Problem) -> int:
    return 2 * problem.tensor_bytes * (POSITIONS - 1) // POSITIONS


def _lse_bytes(problem: Problem) -> int:
    return problem.tokens * problem.heads * 4


OURS: tuple[Kernel, ...] = (
    Kernel(
        name="varlen_attention",
        launcher="vit_kernels._triton.varlen_attention:launch",
        arguments=_attention,
        compulsory_bytes=lambda problem: 4 * problem.tensor_bytes,
        useful_flops=_attention_flops(2),
        configurations=_tuned("varlen_attention"),
        rows="BLOCK_N",
        heads=1,
    ),
    Kernel(
        name="varlen_attention grad_q",
        launcher="vit_kernels._triton.varlen_attention_backward:launch",
        arguments=_gradients,
        # q, k, v, out, its gradient and q's; the log-sum-exp and delta.
        compulsory_bytes=lambda problem: 6 * problem.tensor_bytes + 2 * _lse_bytes(problem),
        useful_flops=_attention_flops(3),
        configurations=_tuned("grad_q"),
        silenced=("exact_lse_kernel", "grad_kv_kernel"),
        rows="BLOCK_N",
        heads=1,
    ),
    Kernel(
        name="varlen_attention grad_kv",
        launcher="vit_kernels._triton.varlen_attention_backward:launch",
        arguments=_gradients,
        # q, k, v, the gradients of out, k and v; the log-sum-exp and delta.
        compulsory_bytes=lambda problem: 6 * problem.tensor_bytes + 2 * _lse_bytes(problem),
        useful_flops=_attention_flops(4),
        configurations=_tuned("grad_kv"),
        silenced=("exact_lse_kernel", "grad_q_kernel"),
        rows="BLOCK_M",
        heads=1,
    ),
    Kernel(
        name="rotary_2d",
        launcher="vit_kernels._triton.rotary_2d:launch",
        arguments=_rotary(True),
        compulsory_bytes=_rotary_bytes,
        positions=25,
    ),
    Kernel(
        name="rotary_2d in halves",
        launcher="vit_kernels._triton.rotary_2d:launch",
        arguments=_rotary(False),
        compulsory_bytes=_rotary_bytes,
        positions=25,
    ),
    Kernel(
        name="rotary_2d backward",
        launcher="vit_kernels._triton.rotary_2d:launch",
        arguments=_rotary(True, inverse=True),
        compulsory_bytes=_rotary_bytes,
        positions=25,
    ),
    Kernel(
        name="rotary_2d_qkv_",
        launcher="vit_kernels._triton.rotary_2d:launch_in_place",
        arguments=_rotary(True),
        compulsory_bytes=_rotary_bytes,
        positions=25,
    ),
    Kernel(
        name="rotary_2d_qkv_ in halves",
        launcher="vit_kernels._triton.rotary_2d:launch_in_place",
        arguments=_rotary(False),
        compulsory_bytes=_rotary_bytes,
        positions=25,
    ),
    Kernel(
        name="pixel_shuffle",
        launcher="vit_kernels._triton.pixel_shuffle:launch",
        arguments=_shuffle,
        compulsory_bytes=_shuffle_bytes,
    ),
    Kernel(
        name="pixel_shuffle backward",
        launcher="vit_kernels._triton.pixel_shuffle:launch_backward",
        arguments=_shuffle_back,
        compulsory_bytes=_shuffle_bytes,
    ),
    Kernel(
        name="layer_norm_pixel_shuffle",
        launcher="vit_kernels._triton.layer_norm_pixel_shuffle:launch",
        arguments=_norm_and_shuffle,
        compulsory_bytes=lambda problem: _shuffle_bytes(problem) + 2 * problem.width * problem.itemsize,
    ),
    Kernel(
        name="linear_gelu",
        launcher="vit_kernels._triton.linear_gelu:launch",
        arguments=_linear_gelu,
        compulsory_bytes=_linear_gelu_bytes,
        useful_flops=lambda problem: 8 * problem.tokens * problem.width**2,
        configurations=_linear_candidates,
        # Whole blocks of tokens and features, at a fortieth of the work of a tile.
        heads=8,
        positions=128,
    ),
)

_FORMATS = {"int8": "int8", "e4m3": "float8_e4m3fn", "e4m3fnuz": "float8_e4m3fnuz"}
OURS += tuple(
    Kernel(
        name=f"scaled_linear {name}",
        launcher="vit_kernels._triton.scaled_linear:launch",
        arguments=_scaled_linear(dtype),
        compulsory_bytes=_scaled_linear_bytes(dtype),
        useful_flops=lambda problem: 8 * problem.tokens * problem.width**2,
        configurations=_scaled_linear_candidates(dtype),
        heads=8,
        positions=128,
        factors="int8" if name == "int8" else "float8",
    )
    for name, dtype in _FORMATS.items()
)
OURS += tuple(
    Kernel(
        name=f"add_layer_norm_quantise {name}",
        launcher="vit_kernels._triton.add_layer_norm_quantise:launch",
        arguments=_add_norm_quantise(dtype),
        compulsory_bytes=_add_norm_quantise_bytes,
        configurations=_on_targets_with(dtype),
        positions=25,
    )
    for name, dtype in _FORMATS.items()
)
OURS += tuple(
    Kernel(
        name=f"quantise_rows {activation} {name}",
        launcher="vit_kernels._triton.quantise_rows:launch",
        arguments=_quantise_rows(dtype, activation),
        compulsory_bytes=_quantise_rows_bytes(activation),
        configurations=_on_targets_with(dtype),
        positions=25,
    )
    for name, dtype in _FORMATS.items()
    for activation in ("gelu", "gated_silu")
)


_VLLM_PREFILL = "vllm.v1.attention.ops.triton_prefill_attention"


def _as_on_a_gpu() -> None:
    """Let vLLM define its kernel where it finds no GPU, with the block size that it takes on one.

    It otherwise replaces Triton by a placeholder, and halves the blocks.
    """
    import triton

    vllm_triton: Any = importlib.import_module("vllm.triton_utils")
    vllm_triton.triton, vllm_triton.tl = triton, triton.language
    prefill: Any = importlib.import_module(_VLLM_PREFILL)
    prefill.get_block_size = lambda dtype: 32 if dtype == torch.float32 else 128


def _vllm_attention(problem: Problem, configuration: Any) -> Arguments:
    q, k, v = problem.qkv()
    lengths = problem.tensor(problem.tiles, dtype="int32")
    lengths += problem.positions if problem.device != "meta" else 0
    out = problem.tensor(*q.shape)
    return (q, k, v, out, problem.cu_seqlens()[:-1], lengths, problem.positions), {"is_causal": False}


def _liger_rope(problem: Problem, configuration: Any) -> Arguments:
    shape = problem.tiles, problem.heads, problem.positions, problem.head_dim
    # In its own layout, so that it copies nothing first.
    q, k = (problem.tensor(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2) for _ in range(2))
    table = problem.tensor(1, problem.positions, problem.head_dim)
    return (q, k, table, table), {}


def _liger_llama4_rope(problem: Problem, configuration: Any) -> Arguments:
    q, k = (problem.tensor(problem.tiles, problem.positions, problem.heads, problem.head_dim) for _ in range(2))
    return (q, k, problem.tensor(problem.positions, problem.head_dim // 2, 2, dtype="float32")), {}


def _liger_layer_norm(problem: Problem, configuration: Any) -> Arguments:
    x, weight = problem.tensor(problem.tokens, problem.width), problem.tensor(problem.width)
    return (x, weight, weight, 1e-5), {}


PEERS = (
    Kernel(
        name="vLLM prefill attention",
        launcher=f"{_VLLM_PREFILL}:context_attention_fwd",
        arguments=_vllm_attention,
        compulsory_bytes=lambda problem: 4 * problem.tensor_bytes,
        useful_flops=_attention_flops(2),
        rows="BLOCK_N",
        heads=1,
        package="vllm",
        prepare=_as_on_a_gpu,
    ),
    Kernel(
        name="Liger rope",
        launcher="liger_kernel.ops.rope:rope_forward",
        arguments=_liger_rope,
        # Its tables are in the dtype of q and k; it reads half of each row.
        compulsory_bytes=lambda problem: 4 * problem.tensor_bytes + problem.table_bytes * problem.itemsize // 4,
        positions=25,
        package="liger-kernel",
    ),
    Kernel(
        name="Liger llama4_rope",
        launcher="liger_kernel.ops.llama4_rope:llama4_rope_forward",
        arguments=_liger_llama4_rope,
        compulsory_bytes=_rotary_bytes,
        positions=25,
        package="liger-kernel",
    ),
    Kernel(
        name="Liger layer_norm",
        launcher="liger_kernel.ops.layer_norm:layer_norm_forward",
        arguments=_liger_layer_norm,
        compulsory_bytes=lambda problem: 2 * problem.tensor_bytes + 2 * problem.tokens * 4,
        positions=25,
        package="liger-kernel",
    ),
)
"""Not flash-attn: its attention comes compiled, for NVIDIA only, and no compiler here can make it again."""


def installed_peers() -> tuple[Kernel, ...]:
    """Return those of PEERS whose package can be imported."""
    return tuple(kernel for kernel in PEERS if importlib.util.find_spec(kernel.launcher.partition(".")[0]))


def version_of(package: str) -> str:
    """Return the version of the distribution, or of its build for CPUs."""
    for name in (package, f"{package}-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"
