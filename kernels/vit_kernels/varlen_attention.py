"""Attention within each of several packed sequences of different lengths."""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_kernels import _dispatch, _flash_attn, _validation


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Non-causal softmax(q k^T * scale) v within each sequence of a packed batch.

    Sequence s owns the query rows cu_seqlens[s] to cu_seqlens[s + 1] and the same rows of k and v, or those that
    cu_seqlens_k names. Sequences may be empty; a query without keys, or outside every sequence, gives zeros. This
    is one registered op on every device; nothing is read from the device on the host.

    Source: Vaswani et al. (arXiv 1706.03762), equation 1; Dao, FlashAttention-2 (arXiv 2307.08691), algorithm 1;
    the packed layout is that of flash-attn's `flash_attn_varlen_func`.

    Args:
        q: [total_tokens, heads, head_dim], float32, float16, bfloat16 (eager: float64 too). Any strides with a
            contiguous last dimension (views of a packed qkv). head_dim is a multiple of 8 in 16..256.
        k, v: [total_tokens_k, kv_heads, head_dim]; kv_heads divides heads.
        cu_seqlens: int32 [sequences + 1] on q's device: 0, then the running sum of the sequence lengths. Its
            contents are checked on CPUs, on accelerators only under VIT_KERNELS_DEBUG=1.
        cu_seqlens_k: int32 [sequences + 1], the boundaries in k and v where they differ.
        max_seqlen: a hint for callers that have it; no implementation needs it.
        scale: positive; head_dim**-0.5 when None.
        return_lse, out: reserved.

    Returns:
        [total_tokens, heads, head_dim], contiguous, dtype of q.

    Raises:
        TypeError: a dtype that the implementation does not take, or that differs between q, k and v; a scale that is
            no number.
        ValueError: shapes, strides, devices, scale or boundaries that do not fit.
        NotImplementedError: return_lse or out is given; or, later, the gradient is differentiated.
    """
    if return_lse or out is not None:
        raise NotImplementedError("return_lse, out: these names are reserved, expected the defaults False and None")
    impl = _dispatch.choose("varlen_attention", q, tuple(BODIES))
    _validate(q, k, v, cu_seqlens, cu_seqlens_k, scale, impl)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return torch.ops.vit_kernels.varlen_attention.default(q, k, v, cu_seqlens, cu_seqlens_k, scale, impl)


def eager(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, scale: float) -> Tensor:
    """The PyTorch body: one SDPA call a sequence. It reads the boundaries on the host."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for rows, rows_k in _sequences(q, k, cu_seqlens, cu_seqlens_k):
        out[rows] = _attend(q[rows], k[rows_k], v[rows_k], scale)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    grouped = q.shape[0] != k.shape[0]
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)


def _sequences(q: Tensor, k: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None) -> list[tuple[slice, slice]]:
    """Rows of q and of k of every sequence that has both."""
    bounds = _validation.check_cu_seqlens_contents("cu_seqlens", cu_seqlens, q.shape[0])
    bounds_k = bounds
    if cu_seqlens_k is not None:
        bounds_k = _validation.check_cu_seqlens_contents("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    rows = [slice(*pair) for pair in itertools.pairwise(bounds)]
    rows_k = [slice(*pair) for pair in itertools.pairwise(bounds_k)]
    return [(r, r_k) for r, r_k in zip(rows, rows_k, strict=True) if r.start < r.stop and r_k.start < r_k.stop]


def eager_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, recomputing the probabilities one sequence at a time.

    Written out, since a kernel cannot differentiate: it may run below autograd.
    """
    grad_q, grad_k, grad_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows, rows_k in _sequences(q, k, cu_seqlens, cu_seqlens_k):
        sequence = _attend_backward(grad[rows], q[rows], k[rows_k], v[rows_k], scale)
        grad_q[rows], grad_k[rows_k], grad_v[rows_k] = sequence
    return grad_q, grad_k, grad_v


def _attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    grad, q, k, v = (x.transpose(0, 1).to(compute_dtype) for x in (grad, q, k, v))  # [heads, tokens, head_dim]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    p = torch.softmax(q @ k.mT * scale, dim=-1)
    grad_p = grad @ v.mT
    grad_scores = p * (grad_p - (p * grad_p).sum(-1, keepdim=True)) * scale
    grad_k = (grad_scores.mT @ q).unflatten(0, (-1, group)).sum(1)
    grad_v = (p.mT @ grad).unflatten(0, (-1, group)).sum(1)
    return (grad_scores @ k).transpose(0, 1), grad_k.transpose(0, 1), grad_v.transpose(0, 1)


def fake(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, scale: float) -> Tensor:
    """Shape, dtype and strides of the output."""
    return q.new_empty(q.shape)


def _launch(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, scale: float) -> Tensor:
    from vit_kernels._triton.varlen_attention import launch

    _validation.check_cu_seqlens_where_possible(cu_seqlens, cu_seqlens_k, q, k)
    return launch(q, k, v, cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, scale)


def _validate(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, scale: float | None, impl: str
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _validation.check_tensor(name, x, 3, "[total_tokens, heads, head_dim]")
        _validation.check_dtype(name, x, impl)
        _validation.check_last_dim_contiguous(name, x)
    _validation.check_like("k", k, "q", q)
    _validation.check_like("v", v, "q", q)
    heads, head_dim = q.shape[1:]
    if head_dim % 8 or not 16 <= head_dim <= 256:
        raise ValueError(f"q: got head_dim {head_dim}, expected a multiple of 8 in 16..256")
    if k.shape[2] != head_dim or heads < 1 or k.shape[1] < 1 or heads % k.shape[1]:
        raise ValueError(f"k: got shape {tuple(k.shape)}, expected head_dim {head_dim} and a divisor of {heads} heads")
    if v.shape[1:] != k.shape[1:]:
        raise ValueError(f"v: got shape {tuple(v.shape)}, expected that of k {tuple(k.shape)}")
    _validation.check_sizes(v.shape[0] == k.shape[0], "v: expected as many tokens as k has", v=v.shape[0], k=k.shape[0])
    _validate_cu_seqlens("cu_seqlens", cu_seqlens, q)
    if cu_seqlens_k is None:
        _validation.check_sizes(
            k.shape[0] == q.shape[0],
            "k: expected as many tokens as q has, or cu_seqlens_k",
            k=k.shape[0],
            q=q.shape[0],
        )
    else:
        _validate_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q)
        _validation.check_sizes(
            cu_seqlens_k.shape[0] == cu_seqlens.shape[0],
            "cu_seqlens_k: expected as many boundaries as cu_seqlens has",
            cu_seqlens_k=cu_seqlens_k.shape[0],
            cu_seqlens=cu_seqlens.shape[0],
        )
    if not isinstance(scale, int | float | torch.SymFloat | None):
        raise TypeError(f"scale: got {type(scale).__name__}, expected a number")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale: got {scale}, expected a positive finite number")


def _validate_cu_seqlens(name: str, cu_seqlens: Tensor, q: Tensor) -> None:
    _validation.check_tensor(name, cu_seqlens, 1, "[sequences + 1]")
    _validation.check_same_device(name, cu_seqlens, "q", q)
    _validation.check_last_dim_contiguous(name, cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name}: got {cu_seqlens.dtype}, expected torch.int32")
    _validation.check_sizes(
        cu_seqlens.shape[0] >= 1, f"{name}: expected at least one boundary", boundaries=cu_seqlens.shape[0]
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, cu_seqlens, cu_seqlens_k, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, cu_seqlens_k)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.vit_kernels.varlen_attention_backward.default(grad, *ctx.saved_tensors, ctx.scale, ctx.impl)
    return *grads, None, None, None, None


def _backward_of_the_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("varlen_attention: got a second derivative to compute, expected at most the first")


def fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes, dtypes and strides of the gradients."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


BODIES = {"eager": eager, "triton": _launch}
if _flash_attn.INSTALLED:
    BODIES["flash_attn"] = _flash_attn.varlen_attention

_dispatch.define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_seqlens_k, float scale, str? impl)"
    " -> Tensor",
    fake=fake,
    bodies=BODIES,
    setup_context=_setup_context,
    backward=_backward,
)
_dispatch.define(
    "varlen_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_seqlens_k,"
    " float scale, str? impl) -> (Tensor, Tensor, Tensor)",
    fake=fake_backward,
    bodies={"eager": eager_backward},
    backward=_backward_of_the_backward,
)
