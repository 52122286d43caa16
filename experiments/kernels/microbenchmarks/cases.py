"""What is timed: each op on one problem, in every form that computes the same."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config
from vit_kernels import (
    force_impl,
    layer_norm_pixel_shuffle,
    linear_gelu,
    pixel_shuffle,
    rotary_2d,
    rotary_2d_qkv_,
    varlen_attention,
)
from vit_kernels.reference import (
    pixel_shuffle_reference,
    rotary_2d_qkv_reference,
    rotary_2d_reference,
    varlen_attention_reference,
)
from vit_kernels.testing import seeded_tensor

from experiments.common.problem import GRID, HEAD_DIM, HEADS, POSITIONS, TILES, WIDTH, sequences

Results = tuple[Tensor, ...]
Call = Callable[[], Results]

OURS = "triton"
PEERS = ("flash_attn", "vllm", "liger_kernel")
"""Packages that must be installed to take part, and that need a GPU."""


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        expected: the results in fp64.
        baseline: the contender that stands for PyTorch in the tolerance rule.
        nbytes: what must be read and written at least, once each.
        flops: useful ones of matrix products.
        calls: contender -> what prepares it and returns its call. A call may work in place, on a copy of its own: only
            the results of its first call are judged.
    """

    sizes: str
    expected: Results
    baseline: str
    nbytes: int
    flops: int
    calls: dict[str, Callable[[], Call]] = field(repr=False)


@dataclass(frozen=True)
class Setting:
    """Where and how large: 16 tiles in bfloat16 on a GPU, 1 tile in float32 on a CPU."""

    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def tiles(self) -> int:
        """Of 577 tokens."""
        return TILES if self.device.type == "cuda" else 1

    def tensor(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values."""
        return seeded_tensor(shape, dtype or self.dtype, seed).to(self.device)


def case_builders(setting: Setting) -> dict[str, Callable[[], Case]]:
    """Name of a case -> what makes its tensors."""
    head_dims = (88, 80, 64, 72, 96, 128) if setting.device.type == "cuda" else (88, 80)
    builders: dict[str, Callable[[], Case]] = {
        "pixel_shuffle": partial(_pixel_shuffle, setting),
        "layer_norm_pixel_shuffle": partial(_layer_norm_pixel_shuffle, setting),
        "linear_gelu": partial(_linear_gelu, setting),
        "rotary_2d": partial(_rotary_2d, setting),
        "rotary_2d_qkv_": partial(_rotary_2d_qkv, setting),
    }
    for head_dim in head_dims:
        builders[f"varlen_attention-{head_dim}"] = partial(_attention, setting, head_dim)
    for head_dim in head_dims:
        builders[f"varlen_attention_backward-{head_dim}"] = partial(_attention_backward, setting, head_dim)
    return builders


def contenders(name: str) -> tuple[str, ...]:
    """Who takes part in a case."""
    every = (OURS, "eager", "compiled eager")
    if name.startswith("varlen_attention_backward"):
        return (*every, "sdpa", "flash_attn")
    if name.startswith("varlen_attention"):
        return (*every, "sdpa", "flash_attn", "vllm")
    return {
        "rotary_2d": (*every, "flash_attn", "liger_kernel"),
        "layer_norm_pixel_shuffle": (*every, "liger_kernel"),
    }.get(name, every)


def _bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _ready(call: Callable[..., Results | Tensor], *args: Any) -> Callable[[], Call]:
    """A contender that needs no preparation."""

    def run() -> Results:
        results = call(*args)
        return results if isinstance(results, tuple) else (results,)

    return lambda: run


def _eager(call: Callable[..., Any]) -> Callable[..., Any]:
    """The op's PyTorch implementation."""

    def run(*args: Any) -> Any:
        with force_impl("eager"):
            return call(*args)

    return run


def _compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(call, fullgraph=True, dynamic=False)


def _forms(op: Callable[..., Any], *args: Any) -> dict[str, Callable[[], Call]]:
    """Ours, eager and torch.compile'd eager."""
    eager = _eager(op)
    return {OURS: _ready(op, *args), "eager": _ready(eager, *args), "compiled eager": _ready(_compiled(eager), *args)}


def _pixel_shuffle(setting: Setting) -> Case:
    x = setting.tensor(setting.tiles, POSITIONS, WIDTH)[:, :-1]
    calls = _forms(lambda x: pixel_shuffle(x, GRID, GRID), x)
    expected = pixel_shuffle_reference(x, GRID, GRID).double()
    return Case(f"{setting.tiles} x {GRID} x {GRID} x {WIDTH}", (expected,), "eager", 2 * _bytes_of(x), 0, calls)


def _layer_norm_pixel_shuffle(setting: Setting) -> Case:
    x = setting.tensor(setting.tiles, POSITIONS, WIDTH)[:, :-1]
    weight, bias = setting.tensor(WIDTH, seed=1), setting.tensor(WIDTH, seed=2)
    calls = _forms(lambda x, weight, bias: layer_norm_pixel_shuffle(x, weight, bias, GRID, GRID), x, weight, bias)

    def liger() -> Call:
        layer_norm: Any = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
        return lambda: (pixel_shuffle(layer_norm.apply(x, weight, bias, 1e-5), GRID, GRID),)

    normal = F.layer_norm(x.double(), (WIDTH,), weight.double(), bias.double(), 1e-5)
    expected = pixel_shuffle_reference(normal, GRID, GRID)
    nbytes = 2 * _bytes_of(x) + _bytes_of(weight, bias)
    sizes = f"{setting.tiles} x {GRID} x {GRID} x {WIDTH}"
    return Case(sizes, (expected,), "eager", nbytes, 0, calls | {"liger_kernel": liger})


def _linear_gelu(setting: Setting) -> Case:
    tokens, features = setting.tiles * POSITIONS, 4 * WIDTH
    x, bias = setting.tensor(tokens, WIDTH), setting.tensor(features, seed=2)
    weight = setting.tensor(features, WIDTH, seed=1) * WIDTH**-0.5
    # The reference of `vit_kernels.reference` holds every product of it.
    expected = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    nbytes = _bytes_of(x, weight, bias) + 4 * _bytes_of(x)
    sizes = f"{tokens} x {WIDTH} x {features}"
    calls = _forms(linear_gelu, x, weight, bias)
    return Case(sizes, (expected,), "eager", nbytes, 2 * tokens * WIDTH * features, calls)


def _packed_qkv(setting: Setting, head_dim: int = HEAD_DIM) -> Tensor:
    return setting.tensor(setting.tiles * POSITIONS, 3 * HEADS, head_dim)


def _tables(setting: Setting, head_dim: int = HEAD_DIM) -> tuple[Tensor, Tensor]:
    angles = math.pi * setting.tensor(POSITIONS, head_dim // 2, seed=1, dtype=torch.float32)
    return angles.cos(), angles.sin()


def _rotary_2d(setting: Setting) -> Case:
    q, k, _ = _packed_qkv(setting).split(HEADS, dim=1)
    tables = cos, sin = _tables(setting)

    def liger() -> Call:
        rotate = importlib.import_module("liger_kernel.transformers.llama4_rope").liger_llama4_vision_rotary_pos_emb
        tiles = [x.unflatten(0, (-1, POSITIONS)) for x in (q, k)]
        turn = torch.complex(cos, sin)
        return lambda: tuple(x.flatten(0, 1) for x in rotate(*tiles, turn))

    def flash_attn() -> Call:
        rotate = importlib.import_module("flash_attn.layers.rotary").apply_rotary_emb
        tiles = [x.unflatten(0, (-1, POSITIONS)) for x in (q, k)]
        # It takes its tables in the dtype of q only.
        cast = [table.to(q.dtype) for table in tables]
        return lambda: tuple(rotate(x, *cast, interleaved=True).flatten(0, 1) for x in tiles)

    calls = _forms(rotary_2d, q, k, *tables) | {"liger_kernel": liger, "flash_attn": flash_attn}
    expected = rotary_2d_reference(q, k, *tables)
    nbytes = 2 * _bytes_of(q, k) + _bytes_of(*tables)
    return Case(f"q and k of {setting.tiles} x {POSITIONS} x {HEADS} x {HEAD_DIM}", expected, "eager", nbytes, 0, calls)


def _rotary_2d_qkv(setting: Setting) -> Case:
    qkv, tables = _packed_qkv(setting), _tables(setting)

    def in_plain_pytorch(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, _ = qkv.split(HEADS, dim=1)
        for x, turned in zip((q, k), rotary_2d(q, k, cos, sin), strict=True):
            x.copy_(turned)
        return qkv

    calls = {
        OURS: _ready(rotary_2d_qkv_, qkv.clone(), *tables),
        "eager": _ready(_eager(rotary_2d_qkv_), qkv.clone(), *tables),
        "compiled eager": _ready(_compiled(_eager(in_plain_pytorch)), qkv.clone(), *tables),
    }
    expected = rotary_2d_qkv_reference(qkv, *tables, kv_heads=HEADS)
    nbytes = 2 * _bytes_of(qkv[:, : 2 * HEADS]) + _bytes_of(*tables)
    return Case(f"{setting.tiles} x {POSITIONS} x {3 * HEADS} x {HEAD_DIM}", (expected,), "eager", nbytes, 0, calls)


@dataclass(frozen=True)
class _Sequences:
    """Equal sequences: tiles of Llama 4, or for head_dim 80 Qwen2.5-VL's windows."""

    count: int
    length: int
    sizes: str
    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor

    @property
    def flops(self) -> int:
        """Of the two products of the forward pass."""
        return 4 * self.count * self.length**2 * HEADS * self.q.shape[2]

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One batched call."""
        batched = (x.unflatten(0, (self.count, self.length)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*batched).transpose(1, 2).flatten(0, 1)

    def forms(self) -> dict[str, Callable[..., Tensor]]:
        """Contender -> its attention of q, k and v."""
        ours = partial(varlen_attention, cu_seqlens=self.cu_seqlens)
        return {OURS: ours, "eager": _eager(ours), "compiled eager": _compiled(self.sdpa), "sdpa": self.sdpa}

    def flash(self, module: str) -> Callable[..., Tensor]:
        """`flash_attn_varlen_func` of flash-attn, or of vLLM's fork of it."""
        attend = importlib.import_module(module).flash_attn_varlen_func
        return partial(
            attend,
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_k=self.cu_seqlens,
            max_seqlen_q=self.length,
            max_seqlen_k=self.length,
        )


def _sequences(setting: Setting, head_dim: int) -> _Sequences:
    count, length = sequences(head_dim, setting.tiles)
    q, k, v = setting.tensor(count * length, 3, HEADS, head_dim).unbind(1)
    cu_seqlens = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=setting.device)
    return _Sequences(count, length, f"{count} x {length} x {HEADS} x {head_dim}", q, k, v, cu_seqlens)


def _attention(setting: Setting, head_dim: int) -> Case:
    s = _sequences(setting, head_dim)
    qkv = s.q, s.k, s.v
    calls = {name: _ready(form, *qkv) for name, form in s.forms().items()}
    calls["flash_attn"] = lambda: _ready(s.flash("flash_attn"), *qkv)()
    calls["vllm"] = lambda: _ready(s.flash("vllm.vllm_flash_attn"), *qkv)()
    expected = varlen_attention_reference(*qkv, s.cu_seqlens)
    return Case(s.sizes, (expected,), "sdpa", 4 * _bytes_of(s.q), s.flops, calls)


def _attention_backward(setting: Setting, head_dim: int) -> Case:
    s = _sequences(setting, head_dim)
    grad = setting.tensor(*s.q.shape, seed=1)

    def differentiate(attention: Callable[..., Tensor], inputs: Iterable[Tensor]) -> Call:
        leaves = [x.detach().requires_grad_() for x in inputs]
        # Compiled backward passes otherwise reuse the memory of what was saved, and run once only.
        with torch.enable_grad(), functorch_config.patch(donated_buffer=False):
            out = attention(*leaves)
        gradient = grad.to(out.dtype)
        return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)

    qkv = s.q, s.k, s.v
    calls: dict[str, Callable[[], Call]] = {name: partial(differentiate, form, qkv) for name, form in s.forms().items()}
    calls["flash_attn"] = lambda: differentiate(s.flash("flash_attn"), qkv)
    exact = differentiate(partial(varlen_attention_reference, cu_seqlens=s.cu_seqlens), [x.double() for x in qkv])()
    # q, k, v, out and its gradient are read, with the log-sum-exps, and three gradients written.
    nbytes = 8 * _bytes_of(s.q) + 4 * s.q.shape[0] * HEADS
    return Case(s.sizes, exact, "sdpa", nbytes, 5 * s.flops // 2, calls)
