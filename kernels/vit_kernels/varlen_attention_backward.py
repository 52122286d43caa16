"""Gradients of varlen_attention; `vit_kernels.varlen_attention` calls this op, users do not."""

import math
from typing import Any

import torch
from torch import Tensor

from vit_kernels import _dispatch, _sequences, _validation


def eager(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, recomputing the probabilities one sequence at a time; out and lse are not needed.

    Written out, since a kernel cannot differentiate: it may run below autograd.
    """
    grad_q, grad_k, grad_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows, rows_k in _sequences.rows(q, k, cu_seqlens, cu_seqlens_k):
        of_lse = None if grad_lse is None else grad_lse[:, rows]
        sequence = _attend_backward(grad[rows], of_lse, q[rows], k[rows_k], v[rows_k], scale)
        grad_q[rows], grad_k[rows_k], grad_v[rows_k] = sequence
    return grad_q, grad_k, grad_v


def _attend_backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    grad, q, k, v = (x.transpose(0, 1).to(compute_dtype) for x in (grad, q, k, v))  # [heads, tokens, head_dim]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.mT * _sequences.scale_of_scores(scale, compute_dtype)
    # Of scores of -inf alone the output is zero.
    p = torch.softmax(scores, dim=-1).masked_fill(scores.amax(-1, keepdim=True) == -math.inf, 0)
    grad_p = grad @ v.mT
    delta = (p * grad_p).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse[..., None]
    grad_scores = p * (grad_p - delta) * scale
    grad_k = (grad_scores.mT @ q).unflatten(0, (-1, group)).sum(1)
    grad_v = (p.mT @ grad).unflatten(0, (-1, group)).sum(1)
    return (grad_scores @ k).transpose(0, 1), grad_k.transpose(0, 1), grad_v.transpose(0, 1)


def fake(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes, dtypes and strides of the gradients."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _launch(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from vit_kernels._triton.varlen_attention_backward import launch

    _validation.check_cu_seqlens_where_possible(cu_seqlens, cu_seqlens_k, q, k)
    rows_of_keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    return launch(grad, grad_lse, q, k, v, out, lse, cu_seqlens, rows_of_keys, scale)


def _second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("varlen_attention: got a second derivative to compute, expected at most the first")


_dispatch.define(
    "varlen_attention_backward(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor cu_seqlens, Tensor? cu_seqlens_k, float scale, str? impl) -> (Tensor, Tensor, Tensor)",
    fake=fake,
    implementations={"eager": eager, "triton": _launch},
    backward=_second_derivative,
)
