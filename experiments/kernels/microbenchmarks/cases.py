"""What is timed: each op and its backward on one problem, in every form that computes the same."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel
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

from experiments.common.problem import GRID, HEAD_DIM, HEADS, TILES, WIDTH, WINDOW

Results = tuple[Tensor, ...]
Call = Callable[[], Results]
Form = Callable[..., Results | Tensor]

OURS = "triton"
PEERS = ("flash_attn", "vllm", "liger_kernel")
"""Packages that must be installed to take part, and that need a GPU."""

BACKENDS = ("sdpa flash", "sdpa cudnn", "torch varlen")
"""PyTorch's own attention, forced to one of its GPU kernels; not each takes every head_dim."""

HEAD_DIMS = (88, 80, 72, 64, 96, 128)


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
    """Where and how large: 16 tiles in bfloat16 on a GPU, 1 tile in float32 on a CPU; `small` for the interpreter."""

    device: torch.device
    small: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def tiles(self) -> int:
        """Of `positions` tokens."""
        return TILES if self.device.type == "cuda" else 1

    @property
    def grid(self) -> int:
        """Patches along the side of a tile."""
        return 2 if self.small else GRID

    @property
    def positions(self) -> int:
        """Tokens of a tile: 577, the class token included."""
        return self.grid**2 + 1

    @property
    def heads(self) -> int:
        """Of q, and as many of k and v."""
        return 2 if self.small else HEADS

    @property
    def width(self) -> int:
        """Channels of a token."""
        return 24 if self.small else WIDTH

    def tensor(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values."""
        return seeded_tensor(shape, dtype or self.dtype, seed).to(self.device)

    def sequences(self, head_dim: int) -> tuple[int, int]:
        """How many and how long: tiles of Llama 4, or for head_dim 80 Qwen2.5-VL's windows."""
        window = 6 if self.small else WINDOW
        return (9 * self.tiles, window) if head_dim == 80 else (self.tiles, self.positions)


@dataclass(frozen=True)
class Op:
    """An op on one problem, of which a case is its forward or its backward.

    Attributes:
        exact: the op in fp64, on inputs in fp64.
        forms: contender -> what prepares it and returns its function of the inputs.
        leaves: how many of the inputs are differentiated, from the first.
        nbytes, flops: of the forward, and of the backward, as in `Case`.
    """

    sizes: str
    inputs: Results
    exact: Form
    forms: dict[str, Callable[[], Form]]
    leaves: int
    nbytes: tuple[int, int]
    flops: tuple[int, int] = (0, 0)
    baseline: str = "eager"

    def forward(self) -> Case:
        """The case of its forward."""
        calls: dict[str, Callable[[], Call]] = {
            name: partial(_forward, make, self.inputs) for name, make in self.forms.items()
        }
        with torch.no_grad():
            expected = _results(self.exact(*(x.double() for x in self.inputs)))
        return Case(self.sizes, expected, self.baseline, self.nbytes[0], self.flops[0], calls)

    def backward(self) -> Case:
        """The case of its backward: the gradients of the leaves from those of the results."""
        exact = _backward(lambda: self.exact, [x.double() for x in self.inputs], self.leaves, self.inputs[0].dtype)
        calls: dict[str, Callable[[], Call]] = {
            # vLLM's has none.
            name: partial(_backward, make, self.inputs, self.leaves)
            for name, make in self.forms.items()
            if name != "vllm"
        }
        return Case(self.sizes, exact(), self.baseline, self.nbytes[1], self.flops[1], calls)


def case_builders(setting: Setting) -> dict[str, Callable[[], Case]]:
    """Name of a case -> what makes its tensors."""
    ops: dict[str, Callable[[], Op]] = {
        "pixel_shuffle": partial(_pixel_shuffle, setting),
        "layer_norm_pixel_shuffle": partial(_layer_norm_pixel_shuffle, setting),
        "linear_gelu": partial(_linear_gelu, setting),
        "rotary_2d": partial(_rotary_2d, setting),
    }
    for head_dim in HEAD_DIMS if setting.device.type == "cuda" else (88, 80):
        ops[f"varlen_attention-{head_dim}"] = partial(attention, setting, head_dim, *setting.sequences(head_dim))
    builders: dict[str, Callable[[], Case]] = {"rotary_2d_qkv_": partial(_rotary_2d_qkv, setting)}
    builders |= {name: lambda make=make: make().forward() for name, make in ops.items()}  # type: ignore[misc]
    for name, make in ops.items():
        op, _, head_dim_of = name.partition("-")
        backward = "-".join(filter(None, (f"{op}_backward", head_dim_of)))
        builders[backward] = lambda make=make: make().backward()  # type: ignore[misc]
    return builders


def contenders(name: str) -> tuple[str, ...]:
    """Who takes part in a case."""
    op = name.partition("-")[0]
    if op == "varlen_attention":
        return (OURS, "sdpa", *BACKENDS, "flash_attn", "vllm")
    if op == "varlen_attention_backward":
        return (OURS, "sdpa", *BACKENDS, "flash_attn")
    every = (OURS, "eager", "compiled eager")
    return {
        "rotary_2d": (*every, "flash_attn", "liger_kernel"),
        "rotary_2d_backward": (*every, "flash_attn", "liger_kernel"),
        "layer_norm_pixel_shuffle": (*every, "liger_kernel"),
        "layer_norm_pixel_shuffle_backward": (*every, "liger_kernel"),
    }.get(op, every)


def _results(results: Results | Tensor) -> Results:
    return results if isinstance(results, tuple) else (results,)


def _forward(make: Callable[[], Form], inputs: Results) -> Call:
    form = make()
    return lambda: _results(form(*inputs))


def _backward(
    make: Callable[[], Form], inputs: Results | list[Tensor], leaves: int, dtype: torch.dtype | None = None
) -> Call:
    """The call that differentiates; `dtype` is what the gradients of the results are rounded to first."""
    differentiated = [x.detach().requires_grad_() for x in inputs[:leaves]]
    # Compiled backward passes otherwise reuse the memory of what was saved, and run once only.
    with torch.enable_grad(), functorch_config.patch(donated_buffer=False):
        results = _results(make()(*differentiated, *inputs[leaves:]))
    gradients = [
        seeded_tensor(x.shape, dtype or x.dtype, seed=9 + place).to(x.device, x.dtype)
        for place, x in enumerate(results)
    ]
    return lambda: torch.autograd.grad(results, differentiated, gradients, retain_graph=True)


def _bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _eager(call: Callable[..., Any]) -> Callable[..., Any]:
    """The op's PyTorch implementation."""

    def run(*args: Any) -> Any:
        with force_impl("eager"):
            return call(*args)

    return run


def _compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(call, fullgraph=True, dynamic=False)


def _forms(op: Form) -> dict[str, Callable[[], Form]]:
    """Ours, eager and torch.compile'd eager."""
    eager = _eager(op)
    return {OURS: lambda: op, "eager": lambda: eager, "compiled eager": lambda: _compiled(eager)}


def _pixel_shuffle(setting: Setting) -> Op:
    x, grid = setting.tensor(setting.tiles, setting.positions, setting.width)[:, :-1], setting.grid
    return Op(
        sizes=f"{setting.tiles} x {grid} x {grid} x {setting.width}",
        inputs=(x,),
        exact=lambda x: pixel_shuffle_reference(x, grid, grid),
        forms=_forms(lambda x: pixel_shuffle(x, grid, grid)),
        leaves=1,
        nbytes=(2 * _bytes_of(x), 2 * _bytes_of(x)),
    )


def _layer_norm_pixel_shuffle(setting: Setting) -> Op:
    x, grid = setting.tensor(setting.tiles, setting.positions, setting.width)[:, :-1], setting.grid
    weight, bias = setting.tensor(setting.width, seed=1), setting.tensor(setting.width, seed=2)

    def liger() -> Form:
        layer_norm: Any = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
        return lambda x, weight, bias: pixel_shuffle(layer_norm.apply(x, weight, bias, 1e-5), grid, grid)

    def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return pixel_shuffle_reference(F.layer_norm(x, (setting.width,), weight, bias, 1e-5), grid, grid)

    forms = _forms(lambda x, weight, bias: layer_norm_pixel_shuffle(x, weight, bias, grid, grid))
    parameters = _bytes_of(weight, bias)
    return Op(
        sizes=f"{setting.tiles} x {grid} x {grid} x {setting.width}",
        inputs=(x, weight, bias),
        exact=exact,
        forms=forms | {"liger_kernel": liger},
        leaves=3,
        # x, the gradients of the result and of x; the weight, and two gradients.
        nbytes=(2 * _bytes_of(x) + parameters, 3 * _bytes_of(x) + _bytes_of(weight) + parameters),
    )


def _linear_gelu(setting: Setting) -> Op:
    tokens, width, features = setting.tiles * setting.positions, setting.width, 4 * setting.width
    x, bias = setting.tensor(tokens, width), setting.tensor(features, seed=2)
    weight = setting.tensor(features, width, seed=1) * width**-0.5
    products = 2 * tokens * width * features
    return Op(
        sizes=f"{tokens} x {width} x {features}",
        inputs=(x, weight, bias),
        # The reference of `vit_kernels.reference` holds every product of it.
        exact=lambda x, weight, bias: F.gelu(F.linear(x, weight, bias)),
        forms=_forms(linear_gelu),
        leaves=3,
        # The result, and its gradient, are 4 times as large as x.
        nbytes=(5 * _bytes_of(x) + _bytes_of(weight, bias), 6 * _bytes_of(x) + 2 * _bytes_of(weight, bias)),
        flops=(products, 2 * products),
    )


def _packed_qkv(setting: Setting) -> Tensor:
    return setting.tensor(setting.tiles * setting.positions, 3 * setting.heads, HEAD_DIM)


def _tables(setting: Setting) -> tuple[Tensor, Tensor]:
    angles = math.pi * setting.tensor(setting.positions, HEAD_DIM // 2, seed=1, dtype=torch.float32)
    return angles.cos(), angles.sin()


def _rotary_2d(setting: Setting) -> Op:
    q, k, _ = _packed_qkv(setting).split(setting.heads, dim=1)
    tables = cos, sin = _tables(setting)

    def liger() -> Form:
        rotate = importlib.import_module("liger_kernel.transformers.llama4_rope").liger_llama4_vision_rotary_pos_emb
        turn = torch.complex(cos, sin)

        def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Results:
            tiles = [x.unflatten(0, (-1, setting.positions)) for x in (q, k)]
            return tuple(x.flatten(0, 1) for x in rotate(*tiles, turn))

        return run

    def flash_attn() -> Form:
        rotate = importlib.import_module("flash_attn.layers.rotary").apply_rotary_emb
        # It takes its tables in the dtype of q only.
        cast = [table.to(q.dtype) for table in tables]

        def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Results:
            tiles = [x.unflatten(0, (-1, setting.positions)) for x in (q, k)]
            return tuple(rotate(x, *cast, interleaved=True).flatten(0, 1) for x in tiles)

        return run

    nbytes = 2 * _bytes_of(q, k) + _bytes_of(*tables)
    return Op(
        sizes=f"q and k of {setting.tiles} x {setting.positions} x {setting.heads} x {HEAD_DIM}",
        inputs=(q, k, *tables),
        exact=rotary_2d_reference,
        forms=_forms(rotary_2d) | {"liger_kernel": liger, "flash_attn": flash_attn},
        leaves=2,
        nbytes=(nbytes, nbytes),
    )


def _rotary_2d_qkv(setting: Setting) -> Case:
    qkv, tables, heads = _packed_qkv(setting), _tables(setting), setting.heads

    def in_plain_pytorch(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, _ = qkv.split(heads, dim=1)
        for x, turned in zip((q, k), rotary_2d(q, k, cos, sin), strict=True):
            x.copy_(turned)
        return qkv

    forms = {
        OURS: lambda: rotary_2d_qkv_,
        "eager": lambda: _eager(rotary_2d_qkv_),
        "compiled eager": lambda: _compiled(_eager(in_plain_pytorch)),
    }
    # Each preparation has a copy: otherwise a second one would turn what the first had turned.
    calls: dict[str, Callable[[], Call]] = {
        name: lambda make=make: _forward(make, (qkv.clone(), *tables))  # type: ignore[misc]
        for name, make in forms.items()
    }
    expected = rotary_2d_qkv_reference(qkv, *tables, kv_heads=heads)
    nbytes = 2 * _bytes_of(qkv[:, : 2 * heads]) + _bytes_of(*tables)
    sizes = f"{setting.tiles} x {setting.positions} x {3 * heads} x {HEAD_DIM}"
    return Case(sizes, (expected,), "eager", nbytes, 0, calls)


def attention(setting: Setting, head_dim: int, count: int, length: int) -> Op:
    """Attention within `count` sequences of `length` tokens, on views of a packed qkv.

    The eager implementation is no contender: it loops over sequences, with the boundaries on the host.
    """
    q, k, v = setting.tensor(count * length, 3, setting.heads, head_dim).unbind(1)
    cu_seqlens = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=setting.device)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batched = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*batched).transpose(1, 2).flatten(0, 1)

    def forced(backend: SDPBackend) -> Form:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(q, k, v)

        return run

    def varlen() -> Form:
        attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        # It takes no strides but contiguous ones in some versions; the copies are part of what a caller pays.
        return lambda q, k, v: attend(q, k, v, cu_seqlens, cu_seqlens, length, length)

    def flash(module: str) -> Form:
        """`flash_attn_varlen_func` of flash-attn, or of vLLM's fork of it."""
        attend = importlib.import_module(module).flash_attn_varlen_func
        lengths = {"max_seqlen_q": length, "max_seqlen_k": length}
        return partial(attend, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, **lengths)

    flops = 4 * count * length**2 * setting.heads * head_dim
    return Op(
        sizes=f"{count} x {length} x {setting.heads} x {head_dim}",
        inputs=(q, k, v),
        exact=partial(varlen_attention_reference, cu_seqlens=cu_seqlens),
        forms={
            OURS: lambda: partial(varlen_attention, cu_seqlens=cu_seqlens),
            "sdpa": lambda: sdpa,
            "sdpa flash": lambda: forced(SDPBackend.FLASH_ATTENTION),
            "sdpa cudnn": lambda: forced(SDPBackend.CUDNN_ATTENTION),
            "torch varlen": varlen,
            "flash_attn": partial(flash, "flash_attn"),
            "vllm": partial(flash, "vllm.vllm_flash_attn"),
        },
        leaves=3,
        # q, k, v, out and its gradient are read, with the log-sum-exps, and three gradients written.
        nbytes=(4 * _bytes_of(q), 8 * _bytes_of(q) + 4 * count * length * setting.heads),
        flops=(flops, 5 * flops // 2),
        baseline="sdpa",
    )
