"""2D rotary embedding of the queries and keys of a packed projection, in place."""

import torch
from torch import Tensor

from vit_kernels import _dispatch, _rotary_tables, _transforms, _validation


def rotary_2d_qkv_(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, kv_heads: int | None = None, interleaved: bool = True
) -> Tensor:
    """Rotate the queries and keys of a packed qkv where they lie, as `rotary_2d` does; the values stay as they are.

    Two thirds of qkv are read and written once: attention reads q, k and v as views of it, and no copy is made. For
    inference: it has no gradient. One registered op on every device. Autocast changes nothing.

    The projection's bias is not added here: the matrix product adds it in its epilogue, which moves no bytes, whereas
    here the values would have to be read and written too, half as much again as the rotation alone (at 16 tiles of
    Llama 4 in bf16 26 MB of q, 26 of k and 26 of v each way: 156 MB instead of 104).

    Source: as `rotary_2d`.

    Args:
        qkv: [tokens, heads + 2 * kv_heads, head_dim]: the heads of the queries, then of the keys, then of the values;
            float32, float16, bfloat16 (eager: float64 too). Any strides with a contiguous last dimension and no
            overlap. Written to.
        cos, sin: [positions, head_dim // 2], float32. Token t takes row t % positions.
        kv_heads: heads of the keys, and of the values; a third of all when None.
        interleaved: pairs are (2j, 2j + 1) (Llama 4); otherwise (j, j + head_dim // 2) (Qwen2.5-VL).

    Returns:
        qkv itself.

    Raises:
        TypeError: a dtype that the implementation does not take, or kv_heads is no integer.
        ValueError: shapes, strides or devices that do not fit, tokens not a multiple of positions; or gradients are on
            and an argument requires them.
        NotImplementedError: an argument has a tangent of forward-mode AD.
    """
    impl = _dispatch.choose("rotary_2d_qkv_", qkv)
    interleaved = _validation.boolean("interleaved", interleaved)
    kv_heads = _validate(qkv, cos, sin, kv_heads, impl)
    torch.ops.vit_kernels.rotary_2d_qkv_.default(qkv, cos, sin, kv_heads, interleaved, impl)
    return qkv


def _validate(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int | None, impl: str) -> int:
    """Check every tensor and return kv_heads, as an integer of Python."""
    _validation.check_operand("qkv", qkv, 3, "[tokens, heads + 2 * kv_heads, head_dim]", impl)
    kv_heads = _a_third_of(qkv.shape[1]) if kv_heads is None else _validation.integer("kv_heads", kv_heads)
    if kv_heads < 1 or qkv.shape[1] <= 2 * kv_heads:
        raise ValueError(f"kv_heads: got {kv_heads}, expected a positive number below half of {qkv.shape[1]} heads")
    _rotary_tables.check_tables("qkv", qkv, cos, sin)
    for name, table in (("cos", cos), ("sin", sin)):
        _validation.check_separate_memory("qkv", qkv, name, table)
    _transforms.refuse_gradients("rotary_2d_qkv_", qkv=qkv, cos=cos, sin=sin)
    return kv_heads


def _a_third_of(heads: int) -> int:
    if heads % 3:
        raise ValueError(f"qkv: got {heads} heads, expected a multiple of 3, or kv_heads given")
    return heads // 3


def eager(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, interleaved: bool) -> None:
    """The eager implementation: one product of complex numbers.

    No compiler fuses it, and real ones take ten times as long.
    """
    compute_dtype = torch.promote_types(qkv.dtype, torch.float32)
    q_and_k = qkv[:, : qkv.shape[1] - kv_heads].unflatten(0, (-1, cos.shape[0]))  # [tiles, positions, heads, head_dim]
    pairs = q_and_k.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pairs = torch.complex(*pairs.to(compute_dtype).unbind(-1 if interleaved else -2))
    pairs *= torch.complex(cos.to(compute_dtype), sin.to(compute_dtype))[:, None]
    turned = torch.view_as_real(pairs)  # [..., head_dim // 2, 2]
    q_and_k.copy_((turned if interleaved else turned.mT).flatten(-2))


def _launch(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, interleaved: bool) -> None:
    from vit_kernels._triton.rotary_2d import launch_in_place

    _rotary_tables.check_tables("qkv", qkv, cos, sin)
    q, k, _ = qkv.split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    launch_in_place(q, k, cos, sin, interleaved)


_dispatch.define(
    "rotary_2d_qkv_(Tensor(a!) qkv, Tensor cos, Tensor sin, int kv_heads, bool interleaved, str? impl) -> ()",
    implementations={"eager": eager, "triton": _launch},
)
