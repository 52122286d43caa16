"""rotary_2d against its reference and against what a rotation is: lengths kept, and only relative positions seen."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from vit_kernels import force_impl, rotary_2d
from vit_kernels.reference import rotary_2d_reference
from vit_kernels.testing import (
    NanPadded,
    assert_close_to_reference,
    corrected_interpreter,
    nan_filled_empty,
    nan_padded,
    seeded_tensor,
)
from vit_kernels.testing.strategies import dtypes, packed_qkv, seeds, strided_tensors

from tests.support import EVERY_FORM_AND_DTYPE, FORMS, IMPLEMENTATIONS, assert_same_bits, dtypes_of, launched_on, run

Pair = tuple[Tensor, Tensor]


@pytest.mark.quick
def test_example() -> None:
    """The Triton kernel on CPU tensors: 6 tokens at 3 positions, two heads of 16 channels."""
    q, k = (seeded_tensor((6, 2, 16), torch.bfloat16, seed=seed) for seed in (0, 1))  # [tokens, heads, head_dim]
    angles = torch.arange(3)[:, None] * torch.linspace(0.1, 1, 8)  # [positions, head_dim // 2]
    with corrected_interpreter(), force_impl("triton"):
        out = rotary_2d(q, k, angles.cos(), angles.sin())
    expected = rotary_2d_reference(q, k, angles.cos(), angles.sin())  # float64
    baseline = pytorch_rotation(q, angles.cos(), angles.sin(), True)  # PyTorch in the same precision
    assert_close_to_reference(out[0], expected[0], baseline)


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor
    padded: tuple[NanPadded, ...]


def tables(angles: Tensor) -> Pair:
    """fp32 cosines and sines inside NaN."""
    cos, sin = (nan_padded(x.float(), [(1, 1), (0, 0)]).tensor for x in (angles.cos(), angles.sin()))
    return cos, sin


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    """Up to 2 tiles of 20 tokens; q and k are views of one packed projection, or have unrelated layouts."""
    positions, tiles = draw(st.integers(1, 20)), draw(st.sampled_from([1, 2, 0]))
    heads, kv_heads = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    head_dim = draw(st.integers(1, 24).map(lambda half: 2 * half) | st.sampled_from([88, 128]))
    cos, sin = tables(6 * seeded_tensor((positions, head_dim // 2), torch.float64, draw(seeds())))
    tokens = tiles * positions
    if draw(st.booleans()):
        q, k, _, packed = draw(
            packed_qkv(tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
        )
        return Case(q, k, cos, sin, (packed,))
    padded = tuple(draw(strided_tensors((tokens, n, head_dim), dtype)) for n in (heads, kv_heads))
    return Case(padded[0].tensor, padded[1].tensor, cos, sin, padded)


def pytorch_rotation(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As transformers does: `modeling_llama4.py` by complex numbers, `modeling_qwen2_5_vl.py` by rotating halves."""
    compute = torch.promote_types(x.dtype, torch.float32)
    tiles = x.shape[0] // cos.shape[0]
    cos, sin = (table.to(compute).repeat(tiles, 1)[:, None] for table in (cos, sin))
    if interleaved:
        pairs = torch.complex(*x.to(compute).unflatten(-1, (-1, 2)).unbind(-1))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    cos, sin = (table.repeat(1, 1, 2) for table in (cos, sin))
    first, second = x.to(compute).chunk(2, dim=-1)
    return (x.to(compute) * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def flat(pair: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in pair])


def assert_right(out: Pair, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    pytorch = [pytorch_rotation(x, cos, sin, interleaved) for x in (q, k)]
    expected = rotary_2d_reference(q, k, cos, sin, interleaved=interleaved)
    assert_close_to_reference(flat(out), flat(expected), flat(pytorch))


@pytest.mark.quick
@pytest.mark.parametrize(("form", "dtypes_of_form"), EVERY_FORM_AND_DTYPE)
@given(data=st.data(), interleaved=st.booleans())
def test_matches_the_reference(
    form: str, dtypes_of_form: st.SearchStrategy[torch.dtype], data: st.DataObject, interleaved: bool
) -> None:
    q, k, cos, sin, padded = data.draw(cases(data.draw(dtypes_of_form)))
    out = run(form, rotary_2d, q, k, cos, sin, interleaved=interleaved)
    assert_right(out, q, k, cos, sin, interleaved)
    for x, like in zip(out, (q, k), strict=True):
        assert x.shape == like.shape
        assert x.dtype == like.dtype
        assert x.is_contiguous()
    for storage in padded:
        storage.assert_padding_untouched()


def angles_2d(height: int, width: int, first_row: int, first_column: int, half: int) -> Tensor:
    """Angles of a grid of positions, row-major: the first half of the columns turns by x, the second by y."""
    x = first_column + torch.arange(width).repeat(height)
    y = first_row + torch.arange(height).repeat_interleave(width)
    frequencies = 100.0 ** -torch.linspace(0, 1, half // 2, dtype=torch.float64)
    return torch.cat([x[:, None] * frequencies, y[:, None] * frequencies], dim=-1)


def dots(q: Tensor, k: Tensor) -> Tensor:
    """[heads, tokens, tokens] in fp64."""
    return torch.einsum("qhd,khd->hqk", q.double(), k.double())


def as_complex(x: Tensor, interleaved: bool) -> Tensor:
    x = x.double().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    return torch.complex(*x.unbind(-1 if interleaved else -2))


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(
    data=st.data(),
    grid=st.tuples(st.integers(1, 4), st.integers(2, 5)),
    shift=st.tuples(st.integers(0, 50), st.integers(0, 50)),
    quarter=st.integers(4, 22),
    interleaved=st.booleans(),
    seed=seeds(),
)
def test_scores_depend_on_relative_positions_only(
    form: str,
    data: st.DataObject,
    grid: tuple[int, int],
    shift: tuple[int, int],
    quarter: int,
    interleaved: bool,
    seed: int,
) -> None:
    shape = (grid[0] * grid[1], 2, 4 * quarter)
    dtype = data.draw(dtypes_of(form))
    q, k = seeded_tensor(shape, dtype, seed), seeded_tensor(shape, dtype, seed + 1)
    cos, sin = tables(angles_2d(*grid, *shift, 2 * quarter))

    # RoFormer, equation 16: the score of tokens m and n takes the turn of m - n alone, which knows of no shift.
    angles = angles_2d(*grid, 0, 0, 2 * quarter)
    turns = torch.polar(torch.ones(()).double(), angles[:, None] - angles[None, :])
    pairs = (as_complex(q, interleaved), as_complex(k, interleaved))
    expected = torch.einsum("qhj,khj,qkj->hqk", pairs[0], pairs[1].conj(), turns).real

    pytorch = dots(*(pytorch_rotation(x, cos, sin, interleaved) for x in (q, k)))
    out = run(form, rotary_2d, q, k, cos, sin, interleaved=interleaved)
    assert_close_to_reference(dots(*out), expected, pytorch)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data(), interleaved=st.booleans())
def test_keeps_the_length_of_every_pair(form: str, data: st.DataObject, interleaved: bool) -> None:
    q, k, cos, sin, _ = data.draw(cases(data.draw(dtypes_of(form))))
    out = run(form, rotary_2d, q, k, cos, sin, interleaved=interleaved)
    pytorch = [pytorch_rotation(x, cos, sin, interleaved) for x in (q, k)]
    lengths = [flat([as_complex(x, interleaved).abs() for x in pair]) for pair in (out, (q, k), pytorch)]
    assert_close_to_reference(*lengths)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data(), interleaved=st.booleans())
def test_turning_back_gives_the_input(form: str, data: st.DataObject, interleaved: bool) -> None:
    q, k, cos, sin, _ = data.draw(cases(data.draw(dtypes_of(form))))
    turned = run(form, rotary_2d, q, k, cos, sin, interleaved=interleaved)
    back = run(form, rotary_2d, *turned, cos, -sin, interleaved=interleaved)
    there = [pytorch_rotation(x, cos, sin, interleaved) for x in (q, k)]
    pytorch = [pytorch_rotation(x, cos, -sin, interleaved) for x in there]
    assert_close_to_reference(flat(back), flat((q, k)).double(), flat(pytorch))


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data(), interleaved=st.booleans())
def test_a_row_of_angle_zero_leaves_its_token_as_it_is(form: str, data: st.DataObject, interleaved: bool) -> None:
    q, k, cos, sin, _ = data.draw(cases(data.draw(dtypes_of(form))))
    class_token = data.draw(st.integers(0, cos.shape[0] - 1))
    cos[class_token], sin[class_token] = 1, 0
    rows = slice(class_token, None, cos.shape[0])
    for x, rotated in zip((q, k), run(form, rotary_2d, q, k, cos, sin, interleaved=interleaved), strict=True):
        assert torch.equal(rotated[rows], x[rows])


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data())
def test_both_pairings_are_one_rotation_of_reordered_channels(form: str, data: st.DataObject) -> None:
    q, k, cos, sin, _ = data.draw(cases(data.draw(dtypes_of(form))))
    head_dim = q.shape[2]
    halves = torch.arange(head_dim).view(-1, 2).T.flatten()
    interleaved = run(form, rotary_2d, q, k, cos, sin)
    reordered = (x[..., halves].contiguous() for x in (q, k))
    for x, y in zip(run(form, rotary_2d, *reordered, cos, sin, interleaved=False), interleaved, strict=True):
        assert_same_bits(x, y[..., halves].contiguous())


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data(), interleaved=st.booleans())
def test_tiles_and_heads_are_independent(form: str, data: st.DataObject, interleaved: bool) -> None:
    q, k, cos, sin, _ = data.draw(cases(data.draw(dtypes_of(form))))
    together = run(form, rotary_2d, q, k, cos, sin, interleaved=interleaved)
    positions, tiles = cos.shape[0], q.shape[0] // cos.shape[0]
    tile, head = data.draw(st.integers(0, max(0, tiles - 1))), data.draw(st.integers(0, k.shape[1] - 1))
    rows, heads = slice(tile * positions, (tile + 1) * positions), slice(head, head + 1)
    alone = run(form, rotary_2d, q[rows], k[rows, heads], cos, sin, interleaved=interleaved)
    assert_same_bits(alone[0], together[0][rows])
    assert_same_bits(alone[1], together[1][rows, heads])


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@given(data=st.data(), interleaved=st.booleans())
def test_nan_stays_in_its_pair(form: str, data: st.DataObject, interleaved: bool) -> None:
    q, k, cos, sin, _ = data.draw(cases(data.draw(dtypes_of(form))).filter(lambda case: case.q.numel()))
    clean = run(form, rotary_2d, q, k, cos, sin, interleaved=interleaved)
    token, head, channel = (data.draw(st.integers(0, n - 1)) for n in q.shape)
    q[token, head, channel] = torch.nan
    out = run(form, rotary_2d, q, k, cos, sin, interleaved=interleaved)
    half = q.shape[2] // 2
    partner = channel ^ 1 if interleaved else (channel + half) % q.shape[2]
    assert out[0][token, head, [channel, partner]].isnan().all()
    out[0][token, head, [channel, partner]] = clean[0][token, head, [channel, partner]]
    assert_same_bits(out[0], clean[0])
    assert_same_bits(out[1], clean[1])


@given(qkv=packed_qkv(tokens=6, heads=2, kv_heads=1, head_dim=16, dtype=torch.bfloat16), interleaved=st.booleans())
def test_views_of_a_packed_projection_are_read_in_place(qkv: tuple[Tensor, ...], interleaved: bool) -> None:
    q, k = qkv[:2]
    cos, sin = tables(torch.ones(3, 8).double())
    pointers = launched_on(rotary_2d, q, k, cos, sin, interleaved=interleaved)
    assert {x.data_ptr() for x in (q, k, cos, sin)} <= pointers


def rotate_packed(qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Pair:
    q, k, _ = qkv.split([3, 2, 2], dim=1)
    return rotary_2d(q, k, cos, sin, interleaved=interleaved)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_inductor_makes_one_graph_for_any_number_of_tiles(form: str, interleaved: bool) -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(rotate_packed, backend=counter, fullgraph=True)
    cos, sin = tables(seeded_tensor((5, 12), torch.float64, 0))

    @given(tiles=st.integers(0, 9), seed=seeds())
    def every_batch_is_right(tiles: int, seed: int) -> None:
        qkv = seeded_tensor((5 * tiles, 7, 24), torch.bfloat16, seed)
        mark_unbacked(qkv, 0)
        with corrected_interpreter(), force_impl(form):
            out = compiled(qkv, cos, sin, interleaved)
        q, k, _ = qkv.split([3, 2, 2], dim=1)
        assert_right(out, q, k, cos, sin, interleaved)

    every_batch_is_right()
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_q_and_k_may_be_separate_graph_inputs_of_unknown_sizes(form: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rotary_2d, backend=counter, fullgraph=True)
    cos, sin = tables(seeded_tensor((3, 8), torch.float64, 0))
    for tiles in (1, 0, 2, 5):
        q, k = (seeded_tensor((3 * tiles, heads, 16), torch.float32, tiles) for heads in (2, 1))
        mark_unbacked(q, 0)
        mark_unbacked(k, 0)
        with corrected_interpreter(), force_impl(form):
            assert_right(compiled(q, k, cos, sin), q, k, cos, sin, True)
    assert counter.frame_count == 1


@pytest.mark.quick
@pytest.mark.parametrize("form", FORMS)
@given(data=st.data(), interleaved=st.booleans())
def test_the_backward_of_the_op_is_autograds(form: str, data: st.DataObject, interleaved: bool) -> None:
    q, k, cos, sin, _ = data.draw(cases(data.draw(dtypes())))
    inputs = [x.detach().requires_grad_() for x in (q, k)]
    padded = [data.draw(strided_tensors(x.shape, x.dtype)) for x in inputs]
    grads = [x.tensor for x in padded]

    def op(*inputs: Tensor) -> Pair:
        out: Pair = torch.ops.vit_kernels.rotary_2d.default(*inputs, cos, sin, interleaved, form.split()[-1])
        return out

    with corrected_interpreter(), nan_filled_empty():
        actual = torch.autograd.grad(run(form, op, *inputs), inputs, grads)
    # torch.complex's backward wants gradients of even strides.
    dense = [grad.clone(memory_format=torch.contiguous_format) for grad in grads]
    pytorch = torch.autograd.grad([pytorch_rotation(x, cos, sin, interleaved) for x in inputs], inputs, dense)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    rotated = [pytorch_rotation(x, cos, sin, interleaved) for x in exact]
    expected = torch.autograd.grad(rotated, exact, [grad.double() for grad in grads])
    assert_close_to_reference(flat(actual), flat(expected), flat(pytorch))
    for storage in padded:
        storage.assert_padding_untouched()


def test_the_backward_is_a_kernel_that_reads_the_gradients_and_tables_where_they_lie() -> None:
    q, k, _ = seeded_tensor((6, 5, 16), torch.bfloat16, 0).split([2, 1, 2], dim=1)
    cos, sin = tables(seeded_tensor((3, 8), torch.float64, 1))
    inputs = [x.detach().requires_grad_() for x in (q, k)]
    with corrected_interpreter(), force_impl("triton"):
        out = rotary_2d(inputs[0], inputs[1], cos, sin)
    with corrected_interpreter() as counts:
        pointers = launched_on(lambda: torch.autograd.grad(out, inputs, (q, k)))
    assert {x.data_ptr() for x in (q, k, cos, sin)} <= pointers
    assert len(pointers) == 6, "and two gradients that it writes"
    assert counts.bytes_stored == q.numel() * 2 + k.numel() * 2
    assert counts.bytes_loaded == counts.bytes_stored + 6 * 2 * 8 * 4


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_gradients_may_be_expanded_numbers(form: str) -> None:
    inputs = [seeded_tensor((6, heads, 16), torch.float32, heads).requires_grad_() for heads in (2, 1)]
    cos, sin = tables(seeded_tensor((3, 8), torch.float64, 0))
    with corrected_interpreter(), force_impl(form):
        q, k = rotary_2d(inputs[0], inputs[1], cos, sin)
        actual = torch.autograd.grad(q.sum() + 2 * k.sum(), inputs)
    turned_back = rotary_2d(torch.ones(6, 2, 16), torch.full((6, 1, 16), 2.0), cos, -sin)
    torch.testing.assert_close(actual, turned_back)


@given(data=st.data(), interleaved=st.booleans())
def test_gradcheck(data: st.DataObject, interleaved: bool) -> None:
    q, k = (seeded_tensor((6, heads, 8), torch.float64, data.draw(seeds())).requires_grad_() for heads in (2, 1))
    cos, sin = tables(seeded_tensor((3, 4), torch.float64, data.draw(seeds())))
    assert torch.autograd.gradcheck(lambda q, k: rotary_2d(q, k, cos, sin, interleaved=interleaved), (q, k))
    # The op too, whose backward is ours; its implementation runs the same PyTorch operators.
    op = torch.ops.vit_kernels.rotary_2d.default
    assert torch.autograd.gradcheck(lambda q, k: op(q, k, cos, sin, interleaved, "eager"), (q, k))
    assert torch.autograd.gradgradcheck(lambda q, k: op(q, k, cos, sin, interleaved, "eager"), (q, k))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["rotary_2d", "rotary_2d_backward"])
def test_opcheck(name: str, impl: str, interleaved: bool, requires_grad: bool) -> None:
    qkv = seeded_tensor((6, 5, 16), torch.float32, 0)
    q, k = (x.detach().requires_grad_(requires_grad) for x in qkv.split([2, 1, 2], dim=1)[:2])
    cos, sin = tables(seeded_tensor((3, 8), torch.float64, 0))
    op = getattr(torch.ops.vit_kernels, name).default
    with corrected_interpreter():
        torch.library.opcheck(op, (q, k, cos, sin, interleaved, impl))


def table_gradients(form: str, inputs: list[Tensor], interleaved: bool) -> list[Tensor]:
    """First derivatives of all inputs, and second ones of their sum of squares."""
    with corrected_interpreter(), force_impl(form):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = rotary_2d(*leaves, interleaved=interleaved)
        total = (outputs[0] ** 3).sum() + 2 * (outputs[1] ** 3).sum()
        first = torch.autograd.grad(total, leaves, create_graph=True)
        second = torch.autograd.grad(torch.stack([x.square().sum() for x in first]).sum(), leaves)
    return [*(x.detach() for x in first), *second]


@pytest.mark.parametrize("interleaved", [True, False])
@given(tiles=st.integers(1, 3), heads=st.integers(1, 3), seed=seeds())
def test_learned_tables_get_the_same_gradients_from_both_bodies(
    interleaved: bool, tiles: int, heads: int, seed: int
) -> None:
    shapes = (4 * tiles, heads, 12), (4 * tiles, 1, 12), (4, 6), (4, 6)
    inputs = [seeded_tensor(shape, torch.float32, seed + i) for i, shape in enumerate(shapes)]
    for actual, expected in zip(
        *(table_gradients(form, inputs, interleaved) for form in ("triton", "eager")), strict=True
    ):
        # Both sum the same float32 products, in another order.
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max() + 1))


@pytest.mark.parametrize("interleaved", [True, False])
def test_gradcheck_of_the_tables(interleaved: bool) -> None:
    shapes = (6, 2, 4), (6, 1, 4), (3, 2), (3, 2)
    inputs = [seeded_tensor(shape, torch.float64, i).requires_grad_() for i, shape in enumerate(shapes)]
    for op in (torch.ops.vit_kernels.rotary_2d.default, torch.ops.vit_kernels.rotary_2d_backward.default):
        assert torch.autograd.gradcheck(lambda *x, op=op: op(*x, interleaved, "eager"), inputs)
        assert torch.autograd.gradgradcheck(lambda *x, op=op: op(*x, interleaved, "eager"), inputs)


@pytest.mark.parametrize(("learned", "kept"), [(False, 2), (True, 4)])
def test_tables_that_need_no_gradient_keep_no_queries(learned: bool, kept: int) -> None:
    q, k, cos, sin = (seeded_tensor(shape, torch.float32, 0) for shape in ((6, 2, 4), (6, 1, 4), (3, 2), (3, 2)))
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with corrected_interpreter(), force_impl("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        rotary_2d(q.requires_grad_(), k, cos.requires_grad_(learned), sin)
    assert len(saved) == kept
