"""What the three ops refuse: the error names the argument, says what came and what was expected."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vit_kernels import (
    force_impl,
    layer_norm_pixel_shuffle,
    linear_gelu,
    pixel_shuffle,
    rotary_2d,
    rotary_2d_qkv_,
    varlen_attention,
)

from tests.support import IMPLEMENTATIONS

X = torch.zeros(2, 24, 6)
Q = torch.zeros(12, 4, 16)
TABLE = torch.ones(6, 8)
CU_SEQLENS = torch.tensor([0, 5, 12], dtype=torch.int32)

NESTED = torch.nested.nested_tensor([torch.zeros(5, 4, 16), torch.zeros(7, 4, 16)], layout=torch.jagged)

Mistake = tuple[dict[str, Any], type[Exception], str]

PIXEL_SHUFFLE: dict[str, Mistake] = {
    "not a tensor": ({"x": [1.0]}, TypeError, "x: got list, expected a tensor [tiles, height * width, channels]"),
    "rank 2": ({"x": X[0]}, ValueError, "x: got shape (24, 6), expected [tiles, height * width, channels]"),
    "rank 0": ({"x": torch.tensor(1.0)}, ValueError, "x: got shape (), expected [tiles, height * width, channels]"),
    "integers": ({"x": X.int()}, TypeError, "x: got torch.int32 for implementation"),
    "complex": ({"x": X.to(torch.complex64)}, TypeError, "x: got torch.complex64 for implementation"),
    "channels apart": (
        {"x": X.repeat_interleave(2, 2)[..., ::2]},
        ValueError,
        "x: got strides (288, 12, 2), expected a contiguous last dimension",
    ),
    "height": ({"height": 3, "width": 8}, ValueError, "height, width: got 3 x 8, expected multiples of factor 2"),
    "width": ({"height": 8, "width": 3}, ValueError, "height, width: got 8 x 3, expected multiples of factor 2"),
    "factor": ({"factor": 5}, ValueError, "height, width: got 4 x 6, expected multiples of factor 5"),
    "factor 0": ({"factor": 0}, ValueError, "factor: got 0, expected a positive integer"),
    "negative": ({"height": -4, "width": -6}, ValueError, "height: got -4, expected a positive integer"),
    "float": ({"height": 4.0}, TypeError, "height: got 4.0, expected an integer"),
    "text": ({"width": "6"}, TypeError, "width: got '6', expected an integer"),
    "bool": ({"factor": True}, TypeError, "factor: got True, expected an integer"),
    "tensor": ({"height": torch.tensor(4)}, TypeError, "height: got Tensor, expected an integer"),
    "nested": ({"x": NESTED}, TypeError, "x: got a nested tensor, expected a dense tensor [tiles,"),
    "sparse": ({"x": X.to_sparse()}, TypeError, "x: got torch.sparse_coo, expected a dense tensor [tiles,"),
    "other grid": ({"height": 6}, ValueError, "x: got 24 tokens a tile, expected height * width = 36"),
    "class token": ({"x": torch.zeros(2, 25, 6)}, ValueError, "x: got 25 tokens a tile, expected height * width = 24"),
}

ROTARY_2D: dict[str, Mistake] = {
    "not a tensor": ({"q": None}, TypeError, "q: got NoneType, expected a tensor [tokens, heads, head_dim]"),
    "rank": ({"k": Q[None]}, ValueError, "k: got shape (1, 12, 4, 16), expected [tokens, heads, head_dim]"),
    "integers": ({"q": Q.long()}, TypeError, "q: got torch.int64 for implementation"),
    "other dtype": ({"k": Q.half()}, TypeError, "k: got torch.float16, expected torch.float32 as q has"),
    "other device": ({"k": Q.to("meta")}, ValueError, "k: got device meta, expected cpu as q has"),
    "other tokens": ({"k": Q[:6]}, ValueError, "k: expected as many tokens as q has, got k 6, q 12"),
    "other head_dim": ({"k": Q[..., :8]}, ValueError, "k: got head_dim 8, expected 16 as q has"),
    "odd head_dim": (
        {"q": Q[..., :7], "k": Q[..., :7]},
        ValueError,
        "q: got head_dim 7, expected a positive even number",
    ),
    "no channels": (
        {"q": Q[..., :0], "k": Q[..., :0], "cos": TABLE[:, :0], "sin": TABLE[:, :0]},
        ValueError,
        "q: got head_dim 0, expected a positive even number",
    ),
    "nested": ({"q": NESTED}, TypeError, "q: got a nested tensor, expected a dense tensor [tokens,"),
    "interleaved": ({"interleaved": "no"}, TypeError, "interleaved: got str, expected a bool"),
    "channels apart": ({"k": Q.mT}, ValueError, "k: got strides (64, 1, 16), expected a contiguous last dimension"),
    "tables of rank 3": ({"cos": TABLE[None]}, ValueError, "cos: got shape (1, 6, 8), expected [positions, head_dim"),
    "tables of a list": ({"sin": [1.0]}, TypeError, "sin: got list, expected a tensor [positions, head_dim // 2]"),
    "tables in fp64": ({"sin": TABLE.double()}, TypeError, "sin: got torch.float64, expected torch.float32"),
    "tables in bf16": ({"cos": TABLE.bfloat16()}, TypeError, "cos: got torch.bfloat16, expected torch.float32"),
    "tables elsewhere": ({"cos": TABLE.to("meta")}, ValueError, "cos: got device meta, expected cpu as q has"),
    "strided tables": (
        {"cos": torch.ones(8, 6).T},
        ValueError,
        "cos: got strides (1, 6), expected a contiguous tensor",
    ),
    "wide tables": (
        {"cos": torch.ones(6, 16), "sin": torch.ones(6, 16)},
        ValueError,
        "cos: got shape (6, 16), expected [positions, head_dim // 2 = 8]",
    ),
    "uneven tables": ({"sin": TABLE[:3]}, ValueError, "sin: got shape (3, 8), expected [positions, head_dim // 2 = 8]"),
    "no positions": ({"cos": TABLE[:0]}, ValueError, "cos: got shape (0, 8), expected [positions, head_dim // 2 = 8]"),
    "tokens": (
        {"q": Q[:11], "k": Q[:11]},
        ValueError,
        "q: expected a multiple of the positions of cos and sin as tokens, got tokens 11, positions 6",
    ),
}


def head_dim(n: int) -> dict[str, Tensor]:
    return {name: torch.zeros(12, 4, n) for name in "qkv"}


def int32(*boundaries: int) -> Tensor:
    return torch.tensor(boundaries, dtype=torch.int32)


VARLEN_ATTENTION: dict[str, Mistake] = {
    "not a tensor": ({"v": 1}, TypeError, "v: got int, expected a tensor [total_tokens, heads, head_dim]"),
    "q is not a tensor": ({"q": None}, TypeError, "q: got NoneType, expected a tensor [total_tokens, heads, head_dim]"),
    "rank": ({"q": Q[0]}, ValueError, "q: got shape (4, 16), expected [total_tokens, heads, head_dim]"),
    "rank 0": ({"q": Q[0, 0, 0]}, ValueError, "q: got shape (), expected [total_tokens, heads, head_dim]"),
    "integers": ({"q": Q.int()}, TypeError, "q: got torch.int32 for implementation"),
    "dtype of k": ({"k": Q.half()}, TypeError, "k: got torch.float16, expected torch.float32 as q has"),
    "dtype of v": ({"v": Q.bfloat16()}, TypeError, "v: got torch.bfloat16, expected torch.float32 as q has"),
    "device of v": ({"v": Q.to("meta")}, ValueError, "v: got device meta, expected cpu as q has"),
    "channels apart": ({"v": Q.mT}, ValueError, "v: got strides (64, 1, 16), expected a contiguous last dimension"),
    **{
        f"head_dim {n}": (head_dim(n), ValueError, f"q: got head_dim {n} for implementation ")
        for n in (0, 4, 20, 257, 264)
    },
    "head_dim of k": (
        {"k": Q[..., :8]},
        ValueError,
        "k: got shape (12, 4, 8), expected head_dim 16 and a divisor of 4",
    ),
    "heads of k": (
        {"k": Q[:, :3]},
        ValueError,
        "k: got shape (12, 3, 16), expected head_dim 16 and a divisor of 4 heads",
    ),
    "more heads in k": (
        {"q": Q[:, :2]},
        ValueError,
        "k: got shape (12, 4, 16), expected head_dim 16 and a divisor of 2",
    ),
    "no heads": (
        {"k": Q[:, :0]},
        ValueError,
        "k: got shape (12, 0, 16), expected head_dim 16 and a divisor of 4 heads",
    ),
    "heads of v": ({"v": Q[:, :2]}, ValueError, "v: got shape (12, 2, 16), expected that of k (12, 4, 16)"),
    "head_dim of v": ({"v": Q[..., :8]}, ValueError, "v: got shape (12, 4, 8), expected that of k (12, 4, 16)"),
    "tokens of v": ({"v": Q[:11]}, ValueError, "v: expected as many tokens as k has, got v 11, k 12"),
    "tokens of k": (
        {"k": Q[:11], "v": Q[:11]},
        ValueError,
        "k: expected as many tokens as q has, or cu_seqlens_k, got k 11, q 12",
    ),
    "scale 0": ({"scale": 0.0}, ValueError, "scale: got 0.0, expected a positive finite number"),
    "negative scale": ({"scale": -1}, ValueError, "scale: got -1, expected a positive finite number"),
    "scale nan": ({"scale": float("nan")}, ValueError, "scale: got nan, expected a positive finite number"),
    "scale inf": ({"scale": float("inf")}, ValueError, "scale: got inf, expected a positive finite number"),
    "scale of text": ({"scale": "1"}, TypeError, "scale: got str, expected a number"),
    "scale of a bool": ({"scale": True}, TypeError, "scale: got bool, expected a number"),
    "lse": ({"return_lse": "yes"}, TypeError, "return_lse: got str, expected a bool"),
    "nested": ({"k": NESTED}, TypeError, "k: got a nested tensor, expected a dense tensor [total_tokens,"),
    "scale of a tensor": ({"scale": torch.tensor(1.0)}, TypeError, "scale: got Tensor, expected a number"),
    "number of boundaries": (
        {"cu_seqlens_k": int32(0, 12)},
        ValueError,
        "cu_seqlens_k: expected as many boundaries as cu_seqlens has, got cu_seqlens_k 2, cu_seqlens 3",
    ),
    **{
        f"{name} {mistake}": ({name: boundaries}, error, f"{name}: {message}")
        for name in ("cu_seqlens", "cu_seqlens_k")
        for mistake, boundaries, error, message in (
            ("decreases", int32(0, 7, 6), ValueError, "decreases from 7 to 6 at index 2, expected sorted boundaries"),
            ("starts late", int32(1, 7, 12), ValueError, "starts at 1, expected 0"),
            ("ends late", int32(0, 7, 13), ValueError, "ends at 13, expected at most the 12 tokens given"),
            ("is int64", CU_SEQLENS.long(), TypeError, "got torch.int64, expected torch.int32"),
            ("is of floats", CU_SEQLENS.float(), TypeError, "got torch.float32, expected torch.int32"),
            ("has rank 2", CU_SEQLENS[None], ValueError, "got shape (1, 3), expected [sequences + 1]"),
            ("is empty", int32(), ValueError, "expected at least one boundary, got boundaries 0"),
            ("is a list", [0, 5, 12], TypeError, "got list, expected a tensor [sequences + 1]"),
            ("has gaps", int32(0, 0, 5, 5, 12)[::2], ValueError, "got strides (2,), expected a contiguous last dim"),
            ("is elsewhere", CU_SEQLENS.to("meta"), ValueError, "got device meta, expected cpu as q has"),
        )
    },
}

RIGHT: dict[Any, dict[str, Any]] = {
    pixel_shuffle: {"x": X, "height": 4, "width": 6},
    rotary_2d: {"q": Q, "k": Q, "cos": TABLE, "sin": TABLE},
    varlen_attention: {"q": Q, "k": Q, "v": Q, "cu_seqlens": CU_SEQLENS},
}
MISTAKES = {pixel_shuffle: PIXEL_SHUFFLE, rotary_2d: ROTARY_2D, varlen_attention: VARLEN_ATTENTION}
EVERY_MISTAKE = [
    pytest.param(op, *mistake, id=f"{op.__name__}-{name}")
    for op, mistakes in MISTAKES.items()
    for name, mistake in mistakes.items()
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("op", "wrong", "error", "message"), EVERY_MISTAKE)
def test_the_error_names_the_argument(
    op: Any, wrong: dict[str, Any], error: type[Exception], message: str, implementation: str
) -> None:
    with force_impl(implementation):
        op(**RIGHT[op])
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            op(**RIGHT[op] | wrong)


@pytest.mark.parametrize("op", RIGHT, ids=lambda op: op.__name__)
def test_float64_is_for_the_eager_body_only(op: Any) -> None:
    arguments = RIGHT[op] | {name: RIGHT[op][name].double() for name in "xqkv" if name in RIGHT[op]}
    op(**arguments)
    first = "x" if op is pixel_shuffle else "q"
    with (
        force_impl("triton"),
        pytest.raises(TypeError, match=rf"^{first}: got torch\.float64 for implementation 'triton'"),
    ):
        op(**arguments)


def raised_by(op: Any, arguments: dict[str, Any]) -> bool:
    try:
        op(**arguments)
    except Exception:
        return True
    return False


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("op", RIGHT, ids=lambda op: op.__name__)
def test_compiled_code_refuses_the_same(op: Any) -> None:
    accepted = []
    for name, (wrong, _, _) in MISTAKES[op].items():
        torch.compiler.reset()
        if not raised_by(torch.compile(op, backend="aot_eager", fullgraph=True), RIGHT[op] | wrong):
            accepted.append(name)
    assert not accepted


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_code_of_any_size_checks_sizes_when_it_runs() -> None:
    def rotate(q: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_2d(q, q, TABLE, TABLE)

    compiled = torch.compile(rotate, backend="aot_eager", fullgraph=True)
    for tokens, is_right in ((6, True), (18, True), (11, False), (12, True), (1, False)):
        q = torch.zeros(tokens, 4, 16)
        torch._dynamo.decorators.mark_unbacked(q, 0)
        assert raised_by(compiled, {"q": q}) != is_right


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.filterwarnings("ignore:Dynamo d")
def test_after_a_break_in_a_graph_the_interpreter_is_not_traced(implementation: str) -> None:
    """Numbers of numpy break the graph before the op, and Dynamo goes on with what the op calls."""
    grid: Any = np.int64(4), np.int64(6)
    with force_impl(implementation):
        compiled = torch.compile(lambda x: pixel_shuffle(x, *grid), backend="eager")
        assert torch.equal(compiled(X), pixel_shuffle(X, 4, 6))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_numbers_of_numpy_are_numbers(implementation: str) -> None:
    ones, qkv = torch.ones(6), torch.ones(12, 6, 16)
    with force_impl(implementation):
        grid: Any = np.int64(4), np.int32(6), np.int8(2)
        number: Any
        yes: Any = np.bool_(True)
        two: Any = np.int64(2)
        assert torch.equal(pixel_shuffle(X, *grid), pixel_shuffle(X, 4, 6, 2))
        for number in (np.float32(1), np.float64(1), np.int64(1), 1):
            actual = layer_norm_pixel_shuffle(X + 1, ones, ones, grid[0], 6, 2, number)
            assert torch.equal(actual, layer_norm_pixel_shuffle(X + 1, ones, ones, 4, 6, 2, 1.0))
        for number in (np.float16(0.5), np.float32(0.5)):
            out, _ = varlen_attention(Q + 1, Q, Q, CU_SEQLENS, scale=number, return_lse=yes)
            assert torch.equal(out, varlen_attention(Q + 1, Q, Q, CU_SEQLENS, scale=0.5))
        tables = TABLE, TABLE
        pairs = rotary_2d(Q + 1, Q, *tables, interleaved=yes)[0]
        assert torch.equal(pairs, rotary_2d(Q + 1, Q, *tables)[0])
        rotated = rotary_2d_qkv_(qkv.clone(), *tables, kv_heads=two)
        assert torch.equal(rotated, rotary_2d_qkv_(qkv.clone(), *tables))


def with_odd_stride(*shape: int) -> Tensor:
    """A last dimension of one element, whose stride nothing can depend on."""
    x = torch.randn(*shape, 1)
    return x.as_strided(x.shape, (*x.stride()[:-1], 7))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_stride_of_a_single_element_does_not_matter(implementation: str) -> None:
    x, one = with_odd_stride(2, 24), with_odd_stride()
    rows, weight = with_odd_stride(4), with_odd_stride(5)
    nothing = torch.zeros(3, dtype=torch.int32)[::3]
    with force_impl(implementation):
        assert torch.equal(pixel_shuffle(x, 4, 6), pixel_shuffle(x.clone(memory_format=torch.contiguous_format), 4, 6))
        assert torch.equal(layer_norm_pixel_shuffle(x, one, one, 4, 6).unique(), one)
        torch.testing.assert_close(
            linear_gelu(rows, weight, torch.zeros(5)), torch.nn.functional.gelu(rows * weight.mT), rtol=1e-5, atol=1e-6
        )
        assert not varlen_attention(Q, Q, Q, nothing).any()


def test_head_dim_8_is_for_the_eager_body_only() -> None:
    q, k, v = torch.randn(3, 12, 2, 8).unbind()
    expected = varlen_attention(q.double(), k.double(), v.double(), CU_SEQLENS)
    torch.testing.assert_close(varlen_attention(q, k, v, CU_SEQLENS).double(), expected, rtol=1e-5, atol=1e-5)
    with force_impl("triton"), pytest.raises(ValueError, match=r"^q: got head_dim 8 .*'triton'.* 8 in 16\.\.256"):
        varlen_attention(q, k, v, CU_SEQLENS)
