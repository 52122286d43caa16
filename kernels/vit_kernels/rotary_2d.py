"""2D rotary embedding of queries and keys from given cos/sin tables."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vit_kernels import _dispatch, _rotary_tables, _validation


def rotary_2d(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = True) -> tuple[Tensor, Tensor]:
    """Rotate channel pairs of q and k by the angles of each token's position.

    Pair (a, b) becomes (a * cos - b * sin, a * sin + b * cos), computed in float32 and rounded once. What makes it
    2D is the table: half of its columns carry angles of x, half of y. The eager implementation is inlined, so
    that a compiler fuses it. All four tensors may require gradients. Autocast changes nothing.

    Source: Su et al., RoFormer (arXiv 2104.09864), section 3.2; the pairings are those of transformers'
    `modeling_llama4.py` (interleaved) and `modeling_qwen2_5_vl.py` (halves).

    Args:
        q, k: [tokens, heads, head_dim], float32, float16, bfloat16 (eager: float64 too); the numbers of heads may
            differ. Any strides with a contiguous last dimension (views of a packed qkv).
        cos, sin: [positions, head_dim // 2], float32. Token t takes row t % positions.
        interleaved: pairs are (2j, 2j + 1) (Llama 4); otherwise (j, j + head_dim // 2) (Qwen2.5-VL).

    Returns:
        New contiguous q and k.

    Raises:
        TypeError: a dtype that the implementation does not take, or that differs between q and k.
        ValueError: shapes, strides or devices that do not fit, tokens not a multiple of positions.
        NotImplementedError: the Triton implementation is given a tangent of forward-mode AD.
    """
    impl = _dispatch.choose("rotary_2d", q)
    _validate(q, k, cos, sin, impl)
    interleaved = _validation.boolean("interleaved", interleaved)
    if impl == "eager":
        return eager(q, k, cos, sin, interleaved)
    return torch.ops.vit_kernels.rotary_2d.default(q, k, cos, sin, interleaved, impl)


def _validate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, impl: str) -> None:
    for name, x in (("q", q), ("k", k)):
        _validation.check_operand(name, x, 3, "[tokens, heads, head_dim]", impl)
    _validation.check_like("k", k, "q", q)
    _validation.check_sizes(k.shape[0] == q.shape[0], "k: expected as many tokens as q has", k=k.shape[0], q=q.shape[0])
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k: got head_dim {k.shape[2]}, expected {q.shape[2]} as q has")
    _rotary_tables.check_tables("q", q, cos, sin)


def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The eager implementation: both rotations in PyTorch."""
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    a, b = _pairs(x, cos, interleaved)
    cos, sin = cos[:, None].to(a.dtype), sin[:, None].to(a.dtype)
    rotated = (a * cos - b * sin, a * sin + b * cos)
    out = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return out.flatten(0, 1).to(x.dtype)


def eager_backward(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """A rotation's transpose turns back."""
    return eager(grad_q, grad_k, cos, -sin, interleaved)


def fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Shapes, dtypes and strides of the outputs."""
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    from vit_kernels._triton.rotary_2d import launch

    _rotary_tables.check_tables("q", q, cos, sin)
    return launch(q, k, cos, sin, interleaved)


def _launch_backward(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    from vit_kernels._triton.rotary_2d import launch

    _rotary_tables.check_tables("grad_q", grad_q, cos, sin)
    return launch(grad_q, grad_k, cos, sin, interleaved, inverse=True)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, cos, sin, ctx.interleaved, ctx.impl = inputs
    # Only gradients of the tables need q and k.
    learned = cos.requires_grad or sin.requires_grad
    ctx.save_for_backward(cos, sin, *((q, k) if learned else ()))


def _backward_through(name: str, inverse: bool) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward that calls the op `name` on the gradients; `inverse` is whether the forward turned back."""

    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, *inputs = ctx.saved_tensors
        # The kernel reads the last dimension as one run; autograd's gradients may be expanded.
        grads = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in (grad_q, grad_k)]
        op = getattr(torch.ops.vit_kernels, name).default
        turned = op(*grads, cos, sin, ctx.interleaved, ctx.impl)
        if not inputs:
            return *turned, None, None, None, None
        of_q, of_k = (_table_gradients(g, x, cos, ctx.interleaved) for g, x in zip(grads, inputs, strict=True))
        grad_cos, grad_sin = (a + b for a, b in zip(of_q, of_k, strict=True))
        return *turned, grad_cos, -grad_sin if inverse else grad_sin, None, None

    return backward


def _table_gradients(grad: Tensor, x: Tensor, cos: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gradients of cos and sin from that of `x` turned: sums over the tiles and the heads."""
    grad_a, grad_b = _pairs(grad, cos, interleaved)
    a, b = _pairs(x, cos, interleaved)
    return (grad_a * a + grad_b * b).sum((0, 2)), (grad_b * a - grad_a * b).sum((0, 2))


def _pairs(x: Tensor, cos: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Both members of the pairs of `x`, [tiles, positions, heads, head_dim // 2] each, in the computation's dtype."""
    tiles = x.unflatten(0, (-1, cos.shape[0])).to(torch.promote_types(x.dtype, torch.float32))
    a, b = (tiles[..., 0::2], tiles[..., 1::2]) if interleaved else tiles.chunk(2, dim=-1)
    return a, b


_dispatch.define(
    "rotary_2d(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, str? impl) -> (Tensor, Tensor)",
    fake=fake,
    implementations={"eager": eager, "triton": _launch},
    setup_context=_setup_context,
    backward=_backward_through("rotary_2d_backward", inverse=False),
)
_dispatch.define(
    "rotary_2d_backward(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin, bool interleaved, str? impl)"
    " -> (Tensor, Tensor)",
    fake=fake,
    implementations={"eager": eager_backward, "triton": _launch_backward},
    setup_context=_setup_context,
    backward=_backward_through("rotary_2d", inverse=True),
)
