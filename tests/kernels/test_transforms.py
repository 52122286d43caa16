"""Every op under what torch does to a call: saved-tensor hooks, forward-mode AD, torch.func, autocast, aliasing."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from vit_kernels import (
    force_impl,
    layer_norm_pixel_shuffle,
    linear_gelu,
    pixel_shuffle,
    rotary_2d,
    rotary_2d_qkv_,
    varlen_attention,
)
from vit_kernels.testing import corrected_interpreter, seeded_tensor

from tests.support import FORMS, IMPLEMENTATIONS

CU_SEQLENS = torch.tensor([0, 5, 12], dtype=torch.int32)
OPS = torch.ops.vit_kernels


def tensors(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(seeded_tensor(shape, torch.float32, seed) for seed, shape in enumerate(shapes))


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return varlen_attention(q, k, v, CU_SEQLENS, return_lse=True)


ATTENTION = tensors(*[(12, 2, 16)] * 3)
ROTARY = tensors((12, 2, 16), (12, 1, 16), (6, 8), (6, 8))
NORM = tensors((2, 16, 6), (6,), (6,))
LINEAR = tensors((7, 6), (5, 6), (5,))
Function = Callable[..., Any]
CASES: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "varlen_attention": (lambda q, k, v: varlen_attention(q, k, v, CU_SEQLENS), ATTENTION),
    "varlen_attention_with_lse": (attend_with_lse, ATTENTION),
    "rotary_2d": (rotary_2d, ROTARY),
    "pixel_shuffle": (lambda x: pixel_shuffle(x, 4, 4), NORM[:1]),
    "layer_norm_pixel_shuffle": (lambda x, weight, bias: layer_norm_pixel_shuffle(x, weight, bias, 4, 4), NORM),
    "linear_gelu": (linear_gelu, LINEAR),
}
every_case = pytest.mark.parametrize("name", CASES)
every_form = pytest.mark.parametrize("form", FORMS)
# torch's first dual number imports what still uses torch.jit.script.
makes_tangents = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@contextlib.contextmanager
def running(form: str, function: Function) -> Iterator[Function]:
    """`function` in one of FORMS."""
    with corrected_interpreter(), force_impl(form.split()[-1]):
        if form.startswith("compiled"):
            torch.compiler.reset()
            function = torch.compile(function, backend="aot_eager", fullgraph=True)
        yield function


def as_tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def loss(outputs: Any) -> Tensor:
    return torch.stack([x.float().square().sum() for x in as_tuple(outputs)]).sum()


def gradients(function: Function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    loss(function(*inputs)).backward()
    return tuple(x.grad for x in inputs if x.grad is not None)


def assert_all_close(actual: Any, expected: Any, rtol: float = 1e-5) -> None:
    for x, y in zip(as_tuple(actual), as_tuple(expected), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol)


@every_form
@every_case
def test_a_saved_tensor_is_read_once(name: str, form: str) -> None:
    function, inputs = CASES[name]
    with running(form, function) as op:
        expected = gradients(op, inputs)
        assert len(expected) == len(inputs)
        for reentrant in (False, True):
            checkpointed = functools.partial(checkpoint, op, use_reentrant=reentrant)
            assert_all_close(gradients(checkpointed, inputs), expected)

        def unpack(packed: list[Tensor]) -> Tensor:
            return packed.pop()

        for hooks in (
            torch.autograd.graph.saved_tensors_hooks(lambda x: [x], unpack),
            torch.autograd.graph.save_on_cpu(),
        ):
            with hooks:
                assert_all_close(gradients(op, inputs), expected)


def numeric_tangent(function: Function, inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    step = 1e-2
    above, below = (
        as_tuple(function(*(x + sign * step * t for x, t in zip(inputs, tangents, strict=True)))) for sign in (1, -1)
    )
    return tuple((a - b) / (2 * step) for a, b in zip(above, below, strict=True))


@makes_tangents
@every_implementation
@every_case
def test_forward_mode_is_right_or_refused_by_name(name: str, implementation: str) -> None:
    function, inputs = CASES[name]
    tangents = tuple(torch.ones_like(x) for x in inputs)
    first = "q" if "attention" in name or "rotary" in name else "x"

    def by_duals() -> Any:
        with forward_ad.dual_level():
            outputs = function(*map(forward_ad.make_dual, inputs, tangents))
            return tuple(forward_ad.unpack_dual(x).tangent for x in as_tuple(outputs))

    with running(implementation, function):
        for tangent in (lambda: torch.func.jvp(function, inputs, tangents)[1], by_duals):
            if implementation == "triton" or "attention" in name:
                with pytest.raises(NotImplementedError, match=rf"^{first}: got a tensor with a tangent, but {name}"):
                    tangent()
            else:
                assert_all_close(tangent(), numeric_tangent(function, inputs, tangents), rtol=5e-3)


def rotate_qkv(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotary_2d_qkv_(qkv.clone(), cos, sin)


QKV = tensors((12, 3, 16), (6, 8), (6, 8))
WRITING: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "qkv": (rotate_qkv, QKV),
    "q": (lambda q, k, v: varlen_attention(q, k, v, CU_SEQLENS, out=torch.zeros_like(q)), ATTENTION),
}


@makes_tangents
@every_implementation
@pytest.mark.parametrize("argument", WRITING)
def test_an_op_that_writes_refuses_every_derivative(argument: str, implementation: str) -> None:
    function, inputs = WRITING[argument]
    with running(implementation, function):
        with pytest.raises(NotImplementedError, match=rf"^{argument}: got a tensor with a tangent"):
            torch.func.jvp(function, inputs, inputs)
        with pytest.raises(ValueError, match=rf"^{argument}: got a tensor that requires grad"):
            torch.func.grad(lambda *x: function(*x).sum())(*inputs)


@makes_tangents
@every_implementation
def test_a_direct_call_refuses_a_tangent_of_any_argument(implementation: str) -> None:
    q, k, cos, sin = ROTARY
    with running(implementation, rotary_2d), forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=r"^sin: got a tensor with a tangent, but rotary_2d does not"):
            OPS.rotary_2d(q, k, cos, forward_ad.make_dual(sin, sin), True, implementation)
        assert OPS.rotary_2d(q, k, cos, sin, True, implementation)[0].shape == q.shape


@every_implementation
@every_case
def test_torch_func_sees_what_backward_sees(name: str, implementation: str) -> None:
    function, inputs = CASES[name]
    places = tuple(range(len(inputs)))
    batch = tuple(torch.stack([x, 2 * x, x + 1]) for x in inputs)
    members = [tuple(x[i] for x in batch) for i in range(3)]
    with running(implementation, function):

        def gradient(*x: Tensor) -> Any:
            return torch.func.grad(lambda *x: loss(function(*x)), argnums=places)(*x)

        expected = [gradients(function, member) for member in members]
        assert_all_close(gradient(*members[0]), expected[0])
        for batched, single in zip(torch.func.vmap(gradient)(*batch), zip(*expected, strict=True), strict=True):
            assert_all_close(batched, torch.stack(single), rtol=1e-4)
        outputs = [as_tuple(function(*member)) for member in members]
        for batched, single in zip(
            as_tuple(torch.func.vmap(function)(*batch)), zip(*outputs, strict=True), strict=True
        ):
            assert_all_close(batched, torch.stack(single))
        # Ordinary gradients through vmap, and a tensor that has no member of its own.
        shared = gradients(
            lambda first, *rest: torch.func.vmap(function, (0, *[None] * len(rest)))(first, *rest),
            (batch[0], *inputs[1:]),
        )
        assert_all_close(shared[0][0], expected[0][0])


@every_implementation
def test_vmap_of_an_op_that_writes(implementation: str) -> None:
    qkv, cos, sin = QKV
    batch = torch.stack([qkv, 2 * qkv])
    with running(implementation, rotate_qkv):
        assert_all_close(
            torch.func.vmap(rotate_qkv, (0, None, None))(batch, cos, sin)[1], rotate_qkv(2 * qkv, cos, sin)
        )
        with pytest.raises(ValueError, match=r"^qkv: got a tensor without the dimension that vmap maps"):
            torch.func.vmap(rotate_qkv, (None, 0, None))(qkv, torch.stack([cos, cos]), sin)


PRODUCTS = ("varlen_attention", "varlen_attention_with_lse", "linear_gelu")


@every_case
def test_autocast_has_one_rule(name: str) -> None:
    function, inputs = CASES[name]
    expected: Any = None
    for form in FORMS:
        with running(form, function) as op, torch.autocast("cpu", torch.bfloat16):
            outputs = as_tuple(op(*inputs))
            grads = gradients(op, inputs)
        assert outputs[0].dtype == (torch.bfloat16 if name in PRODUCTS else torch.float32)
        assert all(x.dtype == torch.float32 for x in (*outputs[1:], *grads))
        # The same roundings of the inputs, up to those of bfloat16 sums in another order.
        expected = expected or (outputs, grads)
        for x, y in zip((*outputs, *grads), (*expected[0], *expected[1]), strict=True):
            assert (x - y).abs().max() <= (2**-6 if name in PRODUCTS else 1e-5) * y.abs().max()
    if name in PRODUCTS:
        by_hand = as_tuple(function(*(x.bfloat16() for x in inputs)))
        for x, y in zip(expected[0], by_hand, strict=True):
            assert torch.equal(x, y)


@every_implementation
def test_autocast_of_direct_calls_and_of_out(implementation: str) -> None:
    q, k, v = ATTENTION
    with running(implementation, varlen_attention), torch.autocast("cpu", torch.bfloat16):
        options = (CU_SEQLENS, None, 0.25, implementation)
        assert OPS.varlen_attention(q, k.half(), v.bfloat16(), *options).dtype == torch.bfloat16
        assert OPS.linear_gelu(*LINEAR, implementation).dtype == torch.bfloat16
        assert OPS.layer_norm_pixel_shuffle(*NORM, 4, 4, 2, 1e-5, implementation).dtype == torch.float32
        with pytest.raises(TypeError, match=r"^out: got torch.float32, expected torch.bfloat16 as q has"):
            varlen_attention(q, k, v, CU_SEQLENS, out=torch.empty_like(q))
        out = torch.empty(q.shape, dtype=torch.bfloat16)
        assert torch.equal(varlen_attention(q, k, v, CU_SEQLENS, out=out), varlen_attention(q, k, v, CU_SEQLENS))
        if implementation == "eager":
            assert varlen_attention(q.double(), k.double(), v.double(), CU_SEQLENS).dtype == torch.float64
        assert rotate_qkv(*QKV).dtype == torch.float32
        # What a linear layer gives under autocast, beside parameters of a norm.
        assert layer_norm_pixel_shuffle(NORM[0].bfloat16(), NORM[1], NORM[2], 4, 4).dtype == torch.bfloat16


def negated(x: Tensor) -> Tensor:
    """`x`, of which the memory holds -x."""
    return torch._neg_view(-x)


@every_implementation
@every_case
def test_a_pending_negation_is_seen(name: str, implementation: str) -> None:
    function, inputs = CASES[name]
    with running(implementation, function):
        assert_all_close(function(*map(negated, inputs)), function(*inputs))
        qkv, cos, sin = QKV
        assert_all_close(rotary_2d_qkv_(qkv.clone(), negated(cos), sin), rotate_qkv(*QKV))
        with pytest.raises(ValueError, match=r"^qkv: got a tensor whose negation is pending"):
            rotary_2d_qkv_(negated(qkv), cos, sin)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@every_implementation
def test_memory_that_a_compiler_shared_is_not_read_after_it_was_written(implementation: str, backend: str) -> None:
    # Of more than one block of queries: a program then reads keys where another one has written.
    q, buffer, v = tensors(*[(80, 2, 16)] * 3)
    cu_seqlens = torch.tensor([0, 80], dtype=torch.int32)

    def copied_by_hand(q: Tensor, buffer: Tensor, v: Tensor) -> Tensor:
        k = buffer.clone()
        varlen_attention(q, k, v, cu_seqlens, out=buffer)
        return buffer * 1

    with running(implementation, copied_by_hand):
        expected = copied_by_hand(q, buffer.clone(), v)
        assert_all_close(torch.compile(copied_by_hand, backend=backend)(q, buffer.clone(), v), expected)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@every_implementation
def test_compiled_code_refuses_to_write_to_overlapping_elements(implementation: str, backend: str) -> None:
    qkv, cos, sin = QKV

    def rotate_expanded(x: Tensor) -> Tensor:
        return rotary_2d_qkv_(x.expand(12, 3, 16), cos, sin) * 1

    with running(implementation, rotate_expanded):
        for function in (rotate_expanded, torch.compile(rotate_expanded, backend=backend)):
            with pytest.raises(ValueError, match=r"^qkv: got strides \(0, 16, 1\), expected elements that do not ov"):
                function(qkv[:1].clone())


@every_implementation
def test_a_direct_call_reads_what_it_overwrites_first(implementation: str) -> None:
    q, k, v = (x.clone() for x in ATTENTION)
    with running(implementation, varlen_attention):
        expected = varlen_attention(q, k, v, CU_SEQLENS)
        # numpy's memory has another storage.
        out = torch.from_numpy(k.numpy())
        OPS.varlen_attention_out(q, k, v, CU_SEQLENS, None, 0.25, out, None, implementation)
        assert_all_close(out, expected)
        lse = out.view(-1)[:24].view(2, 12)
        with pytest.raises(ValueError, match=r"^out: shares memory with lse"):
            OPS.varlen_attention_out(q, k, v, CU_SEQLENS, None, 0.25, out, lse, implementation)


def test_a_kernel_is_not_launched_on_memory_it_would_misread() -> None:
    (q, k, v), (_, _, cos, sin) = ATTENTION, ROTARY
    apart = torch.cat([q, q], -1)[..., ::2]
    with corrected_interpreter():
        with pytest.raises(ValueError, match=r"^q: got strides .*, expected a contiguous last dimension"):
            OPS.varlen_attention(apart, k, v, CU_SEQLENS, None, 0.25, "triton")
        with pytest.raises(ValueError, match=r"^sin: got shape \(6, 4\), expected \[positions, head_dim // 2 = 8\]"):
            OPS.rotary_2d(q, k, cos, sin[:, :4].contiguous(), True, "triton")
        with pytest.raises(ValueError, match=r"^cos: got strides \(16, 1\), expected a contiguous tensor"):
            OPS.rotary_2d_qkv_(QKV[0].clone(), torch.cat([cos, cos], 1)[:, :8], sin, 1, True, "triton")
