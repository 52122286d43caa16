"""Attention within each of several packed sequences of different lengths."""

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_kernels import _dispatch, _flash_attn, _sequences, _transforms, _validation


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    out: Tensor | None = None,
) -> Tensor: ...
@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Non-causal softmax(q k^T * scale) v within each sequence of a packed batch.

    Sequence s owns the query rows cu_seqlens[s] to cu_seqlens[s + 1] and the same rows of k and v, or those that
    cu_seqlens_k names. Sequences may be empty; a query without keys, or outside every sequence, gives zeros, and so
    does one whose every score is -inf, as in PyTorch's attention; its gradients are zero. A score of NaN or +inf makes
    a row of NaN. This is one registered op on every device; nothing is read from the device on the host. A sequence's
    outputs are the same bits in every run and in every batch. q, k and v may require gradients, which are
    deterministic too. Under autocast q, k and v are cast to its dtype, float64 excepted, as torch's own attention casts
    them.

    Source: Vaswani et al. (arXiv 1706.03762), equation 1; Dao, FlashAttention-2 (arXiv 2307.08691), algorithms 1
    and 2; the packed layout is that of flash-attn's `flash_attn_varlen_func`.

    Args:
        q: [total_tokens, heads, head_dim], float32, float16, bfloat16 (eager: float64 too). Any strides with a
            contiguous last dimension (views of a packed qkv). head_dim is a multiple of 8 in 16..256 (eager: 8 too).
        k, v: [total_tokens_k, kv_heads, head_dim]; kv_heads divides heads.
        cu_seqlens: int32 [sequences + 1] on q's device: 0, then the running sum of the sequence lengths. Its
            contents are checked on CPUs, on accelerators only under VIT_KERNELS_DEBUG=1.
        cu_seqlens_k: int32 [sequences + 1], the boundaries in k and v where they differ.
        max_seqlen: a hint for callers that have it; no implementation needs it.
        scale: positive, up to 2**127; head_dim**-0.5 when None. Scores are float32: at magnitudes beyond 2**30 the
            kernels' exponentials may overflow to NaN on GPUs. The Triton gradients of q and k are differences that
            float32 rounds before they are multiplied by scale, as in FlashAttention: where one key outweighs all
            others, they are off by some 1e-7 of scale times the incoming gradient, where PyTorch's are 0.
        return_lse: also return the natural logarithm of the softmax's denominator.
        out: [total_tokens, heads, head_dim], dtype (under autocast, its dtype) and device of q, last dimension
            contiguous, not overlapping q, k or v: written instead of a new tensor, and returned. Not where gradients
            are needed.

    Returns:
        [total_tokens, heads, head_dim], contiguous unless it is `out`, dtype of q. With return_lse also the
        log-sum-exp [heads, total_tokens], float32 (float64 for float64 inputs), -inf for a query without keys or with
        scores of -inf alone, +inf or NaN where a score is.

    Raises:
        TypeError: a dtype that the implementation does not take, or that differs between q, k and v; a scale that is
            no number.
        ValueError: shapes, strides, devices, scale or boundaries that do not fit; `out` under gradients.
        NotImplementedError: the gradient is differentiated, or an argument has a tangent of forward-mode AD.
    """
    q, k, v = _transforms.cast_for_autocast(q, k, v)
    return_lse = _validation.boolean("return_lse", return_lse)
    needs_lse = return_lse or (out is None and _needs_gradients(q, k, v))
    impl = _dispatch.choose("varlen_attention", q, tuple(IMPLEMENTATIONS_WITH_LSE if needs_lse else IMPLEMENTATIONS))
    scale = _validate(q, k, v, cu_seqlens, cu_seqlens_k, scale, out, impl)
    ops, arguments = torch.ops.vit_kernels, (q, k, v, cu_seqlens, cu_seqlens_k, scale)
    if out is not None:
        lse = _empty_lse(q) if return_lse else None
        ops.varlen_attention_out.default(*arguments, out, lse, impl)
        return (out, lse) if lse is not None else out
    if needs_lse:
        out, lse = ops.varlen_attention_with_lse.default(*arguments, impl)
        return (out, lse) if return_lse else out
    return ops.varlen_attention.default(*arguments, impl)


def _needs_gradients(*inputs: Tensor) -> bool:
    # What is no tensor, the checks refuse by name.
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def _validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    scale: float | None,
    out: Tensor | None,
    impl: str,
) -> float:
    """Check every argument of the op but the contents of the boundaries, which a graph reads when it runs.

    Returns:
        The scale, as a float of Python.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _validation.check_operand(name, x, 3, "[total_tokens, heads, head_dim]", impl)
    _validation.check_like("k", k, "q", q)
    _validation.check_like("v", v, "q", q)
    _validate_heads(q, k, v, impl)
    _validate_boundaries(q, k, v, cu_seqlens, cu_seqlens_k)
    scale = q.shape[2] ** -0.5 if scale is None else _validation.positive_number("scale", scale, at_most=2.0**127)
    if out is not None:
        _transforms.refuse_gradients("varlen_attention", q=q, k=k, v=v, out=out)
        _validate_out(out, q, k, v)
    return scale


def _validate_heads(q: Tensor, k: Tensor, v: Tensor, impl: str) -> None:
    heads, head_dim = q.shape[1:]
    smallest = 8 if impl == "eager" else 16
    if head_dim % 8 or not smallest <= head_dim <= 256:
        raise ValueError(
            f"q: got head_dim {head_dim} for implementation {impl!r}, expected a multiple of 8 in {smallest}..256"
        )
    if k.shape[2] != head_dim or heads < 1 or k.shape[1] < 1 or heads % k.shape[1]:
        raise ValueError(f"k: got shape {tuple(k.shape)}, expected head_dim {head_dim} and a divisor of {heads} heads")
    if v.shape[1:] != k.shape[1:]:
        raise ValueError(f"v: got shape {tuple(v.shape)}, expected that of k {tuple(k.shape)}")


def _validate_boundaries(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None) -> None:
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


def _validate_cu_seqlens(name: str, cu_seqlens: Tensor, q: Tensor) -> None:
    _validation.check_tensor(name, cu_seqlens, 1, "[sequences + 1]")
    _validation.check_same_device(name, cu_seqlens, "q", q)
    _validation.check_last_dim_contiguous(name, cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name}: got {cu_seqlens.dtype}, expected torch.int32")
    _validation.check_sizes(
        cu_seqlens.shape[0] >= 1, f"{name}: expected at least one boundary", boundaries=cu_seqlens.shape[0]
    )


def _validate_out(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    _validation.check_tensor("out", out, 3, "[total_tokens, heads, head_dim]")
    _validation.check_like("out", out, "q", q)
    _validation.check_last_dim_contiguous("out", out)
    if out.shape[1:] != q.shape[1:]:
        raise ValueError(f"out: got shape {tuple(out.shape)}, expected that of q {tuple(q.shape)}")
    _validation.check_sizes(
        out.shape[0] == q.shape[0], "out: expected as many tokens as q has", out=out.shape[0], q=q.shape[0]
    )
    for name, x in (("q", q), ("k", k), ("v", v)):
        _validation.check_separate_memory("out", out, name, x)


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """The eager implementation: one SDPA call a run of sequences of equal lengths, with the boundaries on the host.

    SDPA keeps its log-sum-exps to itself: where they are asked for, they take a second product.
    """
    rows = _sequences.rows(q, k, cu_seqlens, cu_seqlens_k)
    scale = _sequences.scale_of_scores(scale, q.dtype)
    out.zero_()
    # Only there does SDPA compute each sequence of a batch as it would alone, bit by bit: it packs the operands of half
    # precisions as their number makes worthwhile, and leaves grouped heads to products of whole batches.
    together = q.dtype.itemsize >= 4 and q.shape[1] == k.shape[1]
    for run, run_k, sequences in _runs(rows) if together else ((*pair, 1) for pair in rows):
        out[run] = _attend(q[run], k[run_k], v[run_k], sequences, scale)
    if lse is not None:
        lse.fill_(-math.inf)
        for run, run_k in rows:
            lse[:, run] = _log_sum_exp(q[run], k[run_k], scale, lse.dtype)


def _log_sum_exp(q: Tensor, k: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The log-sum-exps of one sequence, [heads, tokens]."""
    queries, keys = (x.transpose(0, 1).to(dtype) for x in (q, k))
    return (queries @ keys.repeat_interleave(q.shape[1] // k.shape[1], 0).mT * scale).logsumexp(-1)


def _runs(rows: list[tuple[slice, slice]]) -> list[tuple[slice, slice, int]]:
    """Neighbours of equal lengths, joined, and how many they are."""

    def key(place: int) -> tuple[int, ...]:
        # Starts that are whole lengths apart have nothing between them.
        return tuple(x for r in rows[place] for x in (r.stop - r.start, r.start - place * (r.stop - r.start)))

    runs = []
    for _, group in itertools.groupby(range(len(rows)), key):
        first, *rest = group
        last = rest[-1] if rest else first
        (a, a_k), (b, b_k) = rows[first], rows[last]
        runs.append((slice(a.start, b.stop), slice(a_k.start, b_k.stop), last - first + 1))
    return runs


def _attend(q: Tensor, k: Tensor, v: Tensor, sequences: int, scale: float) -> Tensor:
    special = None
    if q.device.type == "cpu" and not (q.isfinite().all() and k.isfinite().all()):
        parts = zip(q.chunk(sequences), k.chunk(sequences), v.chunk(sequences), strict=True)
        special = torch.cat([_attend_with_special_values(*part, scale) for part in parts])
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    out = out.transpose(1, 2).flatten(0, 1)
    # Finite rows keep the bits that they have without the others.
    return out if special is None else torch.where(special.isfinite(), out, special)


def _attend_with_special_values(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One sequence, written out: on CPUs SDPA makes zeros of some rows whose scores are NaN or +inf."""
    wide, group = torch.promote_types(q.dtype, torch.float32), q.shape[1] // k.shape[1]
    queries, keys, values = (x.transpose(0, 1).to(wide) for x in (q, k, v))
    scores = queries @ keys.repeat_interleave(group, 0).mT * scale
    p = torch.softmax(scores, dim=-1).masked_fill(scores.amax(-1, keepdim=True) == -math.inf, 0)
    return (p @ values.repeat_interleave(group, 0)).transpose(0, 1).to(q.dtype)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    from vit_kernels._triton.varlen_attention import launch

    _validation.check_cu_seqlens_where_possible(cu_seqlens, cu_seqlens_k, q, k)
    rows_of_keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    launch(q, k, v, cu_seqlens, rows_of_keys, scale, out=out, lse=lse)


def fake(q: Tensor, *rest: Any) -> Tensor:
    """Shape, dtype and strides of the output."""
    return q.new_empty(q.shape)


def fake_with_lse(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Shapes, dtypes and strides of the outputs."""
    return q.new_empty(q.shape), _empty_lse(q)


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))


def _to_new_memory(write: Callable[..., None], fake: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation that returns new tensors: those of `fake`, into which `write` has written."""

    def implementation(*arguments: Any) -> Any:
        results = fake(*arguments)
        out, lse = results if isinstance(results, tuple) else (results, None)
        write(*arguments, out, lse)
        return results

    return implementation


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, cu_seqlens, cu_seqlens_k, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, cu_seqlens_k)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, *boundaries = ctx.saved_tensors
    options = (*boundaries, ctx.scale, ctx.impl)
    saved = torch.ops.vit_kernels.varlen_attention_with_lse.default(q, k, v, *options)
    grads = torch.ops.vit_kernels.varlen_attention_backward.default(grad.contiguous(), None, q, k, v, *saved, *options)
    return *grads, None, None, None, None


def _setup_context_with_lse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, cu_seqlens_k, ctx.scale, ctx.impl = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, cu_seqlens_k)


def _backward_with_lse(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    # Read once: checkpointing frees a saved tensor when it is read.
    saved = ctx.saved_tensors
    grads = torch.ops.vit_kernels.varlen_attention_backward.default(
        torch.zeros_like(saved[3]) if grad is None else grad.contiguous(),
        None if grad_lse is None else grad_lse.contiguous(),
        *saved,
        ctx.scale,
        ctx.impl,
    )
    return *grads, None, None, None, None


WRITING = {"eager": eager, "triton": _launch}
IMPLEMENTATIONS = {name: _to_new_memory(write, fake) for name, write in WRITING.items()}
if _flash_attn.INSTALLED:
    IMPLEMENTATIONS["flash_attn"] = _flash_attn.varlen_attention
IMPLEMENTATIONS_WITH_LSE = {name: _to_new_memory(write, fake_with_lse) for name, write in WRITING.items()}

_dispatch.define(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_seqlens_k, float scale, str? impl)"
    " -> Tensor",
    implementations=IMPLEMENTATIONS,
    fake=fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("q", "k", "v"),
)
_dispatch.define(
    "varlen_attention_with_lse(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_seqlens_k, float scale,"
    " str? impl) -> (Tensor, Tensor)",
    implementations=IMPLEMENTATIONS_WITH_LSE,
    fake=fake_with_lse,
    setup_context=_setup_context_with_lse,
    backward=_backward_with_lse,
    autocast=("q", "k", "v"),
)
_dispatch.define(
    "varlen_attention_out(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? cu_seqlens_k, float scale,"
    " Tensor(a!) out, Tensor(b!)? lse, str? impl) -> ()",
    implementations=WRITING,
    autocast=("q", "k", "v"),
)
