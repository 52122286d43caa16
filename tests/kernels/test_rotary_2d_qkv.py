"""rotary_2d_qkv_ turns queries and keys as rotary_2d does, where they lie, and touches nothing else."""

import re
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from vit_kernels import force_impl, rotary_2d, rotary_2d_qkv_
from vit_kernels.reference import rotary_2d_qkv_reference
from vit_kernels.testing import (
    NanPadded,
    assert_close_to_reference,
    corrected_interpreter,
    seeded_tensor,
)
from vit_kernels.testing.strategies import packed_qkv, seeds, strided_tensors

from tests.kernels.test_int64_offsets import spread
from tests.kernels.test_rotary_2d import pytorch_rotation, tables
from tests.support import EVERY_FORM_AND_DTYPE, FORMS, IMPLEMENTATIONS, assert_same_bits, dtypes_of, launched_on, run


@pytest.mark.quick
def test_example() -> None:
    """The Triton kernel on CPU tensors: a packed projection of 6 tokens, two heads each of q, k and v."""
    qkv = seeded_tensor((6, 3 * 2, 16), torch.bfloat16, seed=0)  # [tokens, 3 * heads, head_dim]
    angles = torch.arange(3)[:, None] * torch.linspace(0.1, 1, 8)  # [positions, head_dim // 2]
    q, k, v = qkv.clone().chunk(3, dim=1)
    with corrected_interpreter(), force_impl("triton"):
        rotary_2d_qkv_(qkv, angles.cos(), angles.sin())  # in place
        rotated = rotary_2d(q, k, angles.cos(), angles.sin())
    assert torch.equal(qkv, torch.cat([*rotated, v], dim=1))


class Case(NamedTuple):
    qkv: Tensor
    kv_heads: int
    cos: Tensor
    sin: Tensor
    padded: NanPadded


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    """Up to 2 tiles of 20 tokens: rows of a projection, or any other layout."""
    positions, tiles = draw(st.integers(1, 20)), draw(st.sampled_from([1, 2, 0]))
    heads, kv_heads = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    head_dim = draw(st.integers(1, 24).map(lambda half: 2 * half) | st.sampled_from([88, 128]))
    cos, sin = tables(6 * seeded_tensor((positions, head_dim // 2), torch.float64, draw(seeds())))
    tokens = tiles * positions
    if draw(st.booleans()):
        layout = packed_qkv(tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
        packed = draw(layout).packed
        return Case(packed.tensor.unflatten(-1, (-1, head_dim)), kv_heads, cos, sin, packed)
    padded = draw(strided_tensors((tokens, heads + 2 * kv_heads, head_dim), dtype))
    return Case(padded.tensor, kv_heads, cos, sin, padded)


@pytest.mark.quick
@pytest.mark.parametrize(("form", "dtypes_of_form"), EVERY_FORM_AND_DTYPE)
@given(data=st.data(), interleaved=st.booleans())
def test_matches_the_reference(
    form: str, dtypes_of_form: st.SearchStrategy[torch.dtype], data: st.DataObject, interleaved: bool
) -> None:
    qkv, kv_heads, cos, sin, padded = data.draw(cases(data.draw(dtypes_of_form)))
    before, turned = qkv.clone(), qkv.shape[1] - kv_heads
    out = run(form, rotary_2d_qkv_, qkv, cos, sin, kv_heads=kv_heads, interleaved=interleaved)
    assert out is qkv
    expected = rotary_2d_qkv_reference(before, cos, sin, kv_heads=kv_heads, interleaved=interleaved)
    pytorch = pytorch_rotation(before[:, :turned], cos, sin, interleaved)
    assert_close_to_reference(qkv[:, :turned], expected[:, :turned], pytorch)
    assert_same_bits(qkv[:, turned:], before[:, turned:])
    padded.assert_padding_untouched()


@given(data=st.data(), interleaved=st.booleans())
def test_the_kernel_gives_the_bits_of_rotary_2d(data: st.DataObject, interleaved: bool) -> None:
    qkv, kv_heads, cos, sin, _ = data.draw(cases(data.draw(dtypes_of("triton"))))
    q, k, v = qkv.clone().split([qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    run("triton", rotary_2d_qkv_, qkv, cos, sin, kv_heads=kv_heads, interleaved=interleaved)
    assert_same_bits(qkv, torch.cat([*run("triton", rotary_2d, q, k, cos, sin, interleaved=interleaved), v], dim=1))


@pytest.mark.parametrize("form", FORMS)
def test_a_third_of_the_heads_are_the_values_unless_said(form: str) -> None:
    cos, sin = tables(seeded_tensor((3, 4), torch.float64, 0))
    qkv, same = (seeded_tensor((6, 9, 8), torch.float32, 1) for _ in range(2))
    assert_same_bits(run(form, rotary_2d_qkv_, qkv, cos, sin), run(form, rotary_2d_qkv_, same, cos, sin, kv_heads=3))


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@given(
    tiles=st.integers(1, 3),
    positions=st.integers(1, 9),
    heads=st.integers(1, 20),
    half=st.integers(1, 24),
    data=st.data(),
)
def test_two_thirds_are_read_and_written_once(
    interleaved: bool, tiles: int, positions: int, heads: int, half: int, data: st.DataObject
) -> None:
    qkv = seeded_tensor((tiles * positions, 3 * heads, 2 * half), torch.bfloat16, data.draw(seeds()))
    cos, sin = tables(seeded_tensor((positions, half), torch.float64, data.draw(seeds())))
    pointers = launched_on(rotary_2d_qkv_, qkv, cos, sin, interleaved=interleaved)
    assert pointers == {x.data_ptr() for x in (qkv, qkv[:, heads:], cos, sin)}, "nothing is allocated"
    with corrected_interpreter() as counts, force_impl("triton"):
        rotary_2d_qkv_(qkv, cos, sin, interleaved=interleaved)
    a_row_of_each_table_a_token = 2 * 4 * half * qkv.shape[0]
    assert counts.bytes_loaded == qkv.nbytes * 2 // 3 + a_row_of_each_table_a_token
    assert counts.bytes_stored == qkv.nbytes * 2 // 3


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("form", IMPLEMENTATIONS)
def test_inductor_turns_a_projection_in_place_for_any_number_of_tiles(form: str) -> None:
    weight = seeded_tensor((3 * 2 * 8, 16), torch.float32, 0)
    cos, sin = tables(seeded_tensor((5, 4), torch.float64, 1))

    def project(x: Tensor) -> tuple[Tensor, ...]:
        return rotary_2d_qkv_((x @ weight.mT).unflatten(-1, (-1, 8)), cos, sin).chunk(3, dim=1)

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(project, backend=counter, fullgraph=True)
    with corrected_interpreter(), force_impl(form), torch.no_grad():
        for tiles in (1, 17, 2, 33):
            x = seeded_tensor((5 * tiles, 16), torch.float32, tiles)
            mark_unbacked(x, 0)
            if tiles == 1:
                out, (code,) = run_and_get_code(compiled, x)
            else:
                out = compiled(x)
            torch.testing.assert_close(out, project(x))
    assert "cpp_fused" not in code
    calls = re.findall(r"^ +((?:extern_kernels|torch\.ops)[\w.]+)\(", code, re.MULTILINE)
    assert calls == ["extern_kernels.mm", "torch.ops.vit_kernels.rotary_2d_qkv_.default"]
    assert counter.frame_count == 1


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl: str, interleaved: bool) -> None:
    qkv = seeded_tensor((6, 7, 24), torch.float32, 0)[:, :4, :16]
    cos, sin = tables(seeded_tensor((3, 8), torch.float64, 0))
    with corrected_interpreter():
        torch.library.opcheck(torch.ops.vit_kernels.rotary_2d_qkv_.default, (qkv, cos, sin, 1, interleaved, impl))


def test_tokens_and_heads_past_2_to_the_31_elements() -> None:
    qkv = seeded_tensor((4, 6, 24), torch.float16, 0)
    cos, sin = tables(seeded_tensor((2, 12), torch.float64, 1))
    expected = run("triton", rotary_2d_qkv_, qkv.clone(), cos, sin, kv_heads=1)
    far_tokens, far_heads = spread(qkv), spread(qkv.transpose(0, 1).contiguous()).transpose(0, 1)
    for far in (far_tokens, far_heads):
        with corrected_interpreter(), force_impl("triton"):
            assert torch.equal(rotary_2d_qkv_(far, cos, sin, kv_heads=1), expected)


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["qkv", "cos", "sin"])
def test_gradients_are_refused(form: str, name: str) -> None:
    tensors: dict[str, Any] = {"qkv": torch.ones(2, 3, 4), "cos": torch.ones(2, 2), "sin": torch.ones(2, 2)}
    tensors[name].requires_grad_()
    with force_impl(form):
        with pytest.raises(ValueError, match=rf"^{name}: got a tensor that requires grad, .* rotary_2d_qkv_ writes"):
            rotary_2d_qkv_(**tensors)
        with torch.no_grad():
            rotary_2d_qkv_(**tensors)


QKV = torch.zeros(12, 9, 16)
TABLE = torch.ones(6, 8)

MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not a tensor": ({"qkv": [1.0]}, TypeError, "qkv: got list, expected a tensor [tokens, heads + 2 * kv_heads, head"),
    "rank 2": ({"qkv": QKV[0]}, ValueError, "qkv: got shape (9, 16), expected [tokens, heads + 2 * kv_heads, head_dim"),
    "integers": ({"qkv": QKV.int()}, TypeError, "qkv: got torch.int32 for implementation"),
    "transposed": ({"qkv": QKV.mT.contiguous().mT}, ValueError, "qkv: got strides (144, 1, 9), expected a contiguous"),
    "expanded": ({"qkv": QKV[:1].expand(12, 9, 16)}, ValueError, "qkv: got strides (0, 16, 1), expected elements that"),
    "no third": ({"qkv": QKV[:, :8]}, ValueError, "qkv: got 8 heads, expected a multiple of 3, or kv_heads given"),
    "no values": ({"kv_heads": 0}, ValueError, "kv_heads: got 0, expected a positive number below half of 9 heads"),
    "no queries": ({"qkv": QKV[:, :8], "kv_heads": 4}, ValueError, "kv_heads: got 4, expected a positive number below"),
    "a fraction": ({"kv_heads": 1.5}, TypeError, "kv_heads: got 1.5, expected an integer"),
    "odd head_dim": ({"qkv": QKV[..., :15]}, ValueError, "qkv: got head_dim 15, expected a positive even number"),
    "narrow cos": (
        {"cos": TABLE[:, :7].clone()},
        ValueError,
        "cos: got shape (6, 7), expected [positions, head_dim //",
    ),
    "short sin": ({"sin": TABLE[:3]}, ValueError, "sin: got shape (3, 8), expected [positions, head_dim // 2 = 8]"),
    "double cos": ({"cos": TABLE.double()}, TypeError, "cos: got torch.float64, expected torch.float32"),
    "cos elsewhere": ({"cos": TABLE.to("meta")}, ValueError, "cos: got device meta, expected cpu as qkv has"),
    "strided sin": ({"sin": torch.ones(8, 6).mT}, ValueError, "sin: got strides (1, 6), expected a contiguous tensor"),
    "7 tokens": ({"qkv": QKV[:7]}, ValueError, "qkv: expected a multiple of the positions of cos and sin as tokens, "),
    "tables in qkv": (
        {"cos": QKV.view(-1, 8)[:6]},
        ValueError,
        "qkv: shares memory with cos, expected a tensor of its",
    ),
}


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize(("wrong", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_the_error_names_the_argument(wrong: dict[str, Any], error: type[Exception], message: str, form: str) -> None:
    right: dict[str, Any] = {"qkv": QKV, "cos": TABLE, "sin": TABLE}
    with force_impl(form):
        rotary_2d_qkv_(**right)
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            rotary_2d_qkv_(**right | wrong)
