"""Every op in every form on a real GPU: TRITON_INTERPRET=0 ./scripts/test.sh -m cuda.

All is judged on the device, against fp64, and allowed twice the error of the eager implementation, which is PyTorch.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
from vit_kernels.reference import (
    layer_norm_pixel_shuffle_reference,
    linear_gelu_reference,
    pixel_shuffle_reference,
    rotary_2d_qkv_reference,
    rotary_2d_reference,
    varlen_attention_lse_reference,
    varlen_attention_reference,
)
from vit_kernels.testing import assert_close_to_reference, nan_filled_empty, seeded_tensor

from tests.gpu import BACKEND, DEVICE, REHEARSING, launching
from tests.support import assert_same_bits

__all__ = ["launching"]

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("launching")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF = [torch.float16, torch.bfloat16]
HEAD_DIMS = [16, 64, 72, 80, 88, 96, 128, 200, 256]
# Empty sequences, a single token, a whole block, whole blocks and one more, part of one, and rows of no sequence.
LENGTHS = [0, 0, 1, 18, 18, 35, 52] if REHEARSING else [0, 0, 1, 65, 65, 642, 690]
LENGTHS_OF_KEYS = [0, 3, 3, 20, 37, 38, 50] if REHEARSING else [0, 70, 70, 71, 200, 777, 800]
TOKENS = LENGTHS[-1] + 10

Results = tuple[Tensor, ...]


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return seeded_tensor(shape, dtype, seed).to(DEVICE)


def boundaries(lengths: list[int] = LENGTHS) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def results_of(results: Tensor | Results) -> Results:
    return results if isinstance(results, tuple) else (results,)


def on_pytorch(op: Callable[[], Any]) -> Results:
    """What the eager implementation makes, of which twice the error is allowed."""
    with force_impl("eager"):
        return results_of(op())


def assert_right(actual: Any, expected: Any, pytorch: Results) -> None:
    for ours, exact, theirs in zip(results_of(actual), results_of(expected), pytorch, strict=True):
        assert_close_to_reference(ours, exact.double(), theirs)


def gradients(op: Callable[..., Any], inputs: Results, dtype: torch.dtype) -> Results:
    """Of a weighted sum of the results; the weights have values of `dtype`, also for results in fp64."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = results_of(op(*leaves))
    weights = [seeded_tensor(x.shape, dtype, 7 + i).to(x) for i, x in enumerate(results)]
    return torch.autograd.grad(results, leaves, weights)


def assert_gradients(op: Callable[..., Any], reference: Callable[..., Any], *inputs: Tensor) -> None:
    """Right, and the same bits in a second call."""
    dtype = inputs[0].dtype
    with nan_filled_empty():
        actual = gradients(op, inputs, dtype)
    expected = gradients(reference, tuple(x.double() for x in inputs), dtype)
    assert_right(actual, expected, on_pytorch(lambda: gradients(op, inputs, dtype)))
    for first, second in zip(actual, gradients(op, inputs, dtype), strict=True):
        assert_same_bits(second, first)


def qkv(head_dim: int, dtype: torch.dtype, heads: int = 2, kv_heads: int = 2) -> Results:
    """Views of one packed projection."""
    packed = tensor(TOKENS, heads + 2 * kv_heads, head_dim, dtype=dtype)
    return packed.split([heads, kv_heads, kv_heads], dim=1)


# Attention


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_varlen_attention(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(head_dim, dtype)
    attend = partial(varlen_attention, q, k, v, boundaries())
    with nan_filled_empty():
        out = attend()
    assert_right(out, varlen_attention_reference(q, k, v, boundaries()), on_pytorch(attend))
    assert not out[LENGTHS[-1] :].any()
    assert_same_bits(attend(), out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 72, 80, 88])
def test_varlen_attention_gives_a_sequence_the_same_bits_in_every_batch(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(head_dim, dtype)
    out = varlen_attention(q, k, v, boundaries())
    first, last = LENGTHS[4], LENGTHS[5]
    alone = varlen_attention(q[first:last], k[first:last], v[first:last], boundaries([0, last - first]))
    assert_same_bits(alone, out[first:last])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [80, 88, 256])
def test_varlen_attention_with_lse(head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(head_dim, dtype)
    attend = partial(varlen_attention, q, k, v, boundaries(), return_lse=True)
    with nan_filled_empty():
        out, lse = attend()
    expected = varlen_attention_lse_reference(q, k, boundaries())
    assert_right((out, lse), (varlen_attention_reference(q, k, v, boundaries()), expected), on_pytorch(attend))
    assert_same_bits(attend()[1], lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_varlen_attention_with_grouped_heads(kv_heads: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(88, dtype, heads=4, kv_heads=kv_heads)
    attend = partial(varlen_attention, cu_seqlens=boundaries())
    reference = partial(varlen_attention_reference, cu_seqlens=boundaries())
    assert_right(attend(q, k, v), reference(q, k, v), on_pytorch(lambda: attend(q, k, v)))
    assert_gradients(attend, reference, q, k, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_varlen_attention_with_keys_of_their_own(dtype: torch.dtype) -> None:
    q, _, _ = qkv(80, dtype)
    k, v = (tensor(LENGTHS_OF_KEYS[-1], 2, 80, dtype=dtype, seed=seed) for seed in (3, 4))
    lengths, lengths_of_keys = boundaries(), boundaries(LENGTHS_OF_KEYS)
    attend = partial(varlen_attention, cu_seqlens=lengths, cu_seqlens_k=lengths_of_keys, scale=0.3)
    reference = partial(varlen_attention_reference, cu_seqlens=lengths, cu_seqlens_k=lengths_of_keys, scale=0.3)
    assert_right(attend(q, k, v), reference(q, k, v), on_pytorch(lambda: attend(q, k, v)))
    assert_gradients(attend, reference, q, k, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_varlen_attention_writes_to_out(dtype: torch.dtype) -> None:
    q, k, v = qkv(88, dtype)
    memory = torch.full((TOKENS, 4, 88), torch.nan, dtype=dtype, device=DEVICE)
    out, lse = varlen_attention(q, k, v, boundaries(), out=memory[:, 1:3], return_lse=True)
    assert out.data_ptr() == memory[:, 1:3].data_ptr()
    expected, expected_lse = varlen_attention(q, k, v, boundaries(), return_lse=True)
    assert_same_bits(out, expected)
    assert_same_bits(lse, expected_lse)
    assert memory[:, [0, 3]].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_gradients_of_varlen_attention(head_dim: int, dtype: torch.dtype) -> None:
    attend = partial(varlen_attention, cu_seqlens=boundaries())
    assert_gradients(attend, partial(varlen_attention_reference, cu_seqlens=boundaries()), *qkv(head_dim, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_varlen_attention_and_its_lse(dtype: torch.dtype) -> None:
    # Without rows of no sequence, whose log-sum-exp is -inf.
    lengths, (q, k, v) = boundaries(), (x[: LENGTHS[-1]] for x in qkv(88, dtype))

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Results:
        lse = varlen_attention_lse_reference(q, k, lengths)
        return varlen_attention_reference(q, k, v, lengths), lse

    attend = partial(varlen_attention, cu_seqlens=lengths, return_lse=True)
    assert_gradients(attend, reference, q, k, v)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head_dim", [64, 72, 80, 88])
def test_varlen_attention_of_flash_attn(head_dim: int, dtype: torch.dtype) -> None:
    if REHEARSING or importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    q, k, v = qkv(head_dim, dtype)
    attend = partial(varlen_attention, q, k, v, boundaries())
    with force_impl("flash_attn"):
        out = attend()
    assert_right(out, varlen_attention_reference(q, k, v, boundaries()), on_pytorch(attend))


# The other ops


def tables(rows: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angles = tensor(rows, head_dim // 2, seed=1)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("head_dim", [80, 88])
def test_rotary_2d(head_dim: int, interleaved: bool, dtype: torch.dtype) -> None:
    q, k, _ = tensor(154, 3, 5, head_dim, dtype=dtype).unbind(1)
    cos, sin = tables(77, head_dim)
    rotate = partial(rotary_2d, cos=cos, sin=sin, interleaved=interleaved)
    reference = partial(rotary_2d_reference, cos=cos, sin=sin, interleaved=interleaved)
    with nan_filled_empty():
        actual = rotate(q, k)
    assert_right(actual, reference(q, k), on_pytorch(lambda: rotate(q, k)))
    assert_gradients(rotate, reference, q, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("kv_heads", [5, 2])
def test_rotary_2d_qkv(kv_heads: int, interleaved: bool, dtype: torch.dtype) -> None:
    qkv, (cos, sin) = tensor(154, 5 + 2 * kv_heads, 88, dtype=dtype), tables(77, 88)

    def rotated() -> Tensor:
        return rotary_2d_qkv_(qkv.clone(), cos, sin, kv_heads=kv_heads, interleaved=interleaved)

    expected = rotary_2d_qkv_reference(qkv, cos, sin, kv_heads=kv_heads, interleaved=interleaved)
    actual = rotated()
    assert_right(actual, expected, on_pytorch(rotated))
    assert_same_bits(actual[:, -kv_heads:], qkv[:, -kv_heads:])
    assert_same_bits(rotated(), actual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pixel_shuffle(dtype: torch.dtype) -> None:
    x = tensor(3, 25, 1408, dtype=dtype)[:, :-1]
    with nan_filled_empty():
        assert torch.equal(pixel_shuffle(x, 4, 6), pixel_shuffle_reference(x, 4, 6))
    assert_gradients(lambda x: pixel_shuffle(x, 4, 6), lambda x: pixel_shuffle_reference(x, 4, 6), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", [torch.float32, None])
def test_layer_norm_pixel_shuffle(parameters: torch.dtype | None, dtype: torch.dtype) -> None:
    x = tensor(3, 25, 1408, dtype=dtype)[:, :-1]
    weight, bias = (tensor(1408, dtype=parameters or dtype, seed=seed) for seed in (1, 2))

    def shuffle(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm_pixel_shuffle(x, weight, bias, 4, 6)

    def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm_pixel_shuffle_reference(x, weight, bias, 4, 6)

    with nan_filled_empty():
        actual = shuffle(x, weight, bias)
    assert_right(actual, reference(x, weight, bias), on_pytorch(lambda: shuffle(x, weight, bias)))
    assert_gradients(shuffle, reference, x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(17, 40, 72), (300, 176, 264)])
def test_linear_gelu(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, width, features = sizes
    x, bias = tensor(tokens, width, dtype=dtype), tensor(features, dtype=dtype, seed=2)
    weight = tensor(features, width, dtype=dtype, seed=1) * width**-0.5
    with nan_filled_empty():
        actual = linear_gelu(x, weight, bias)
    expected = linear_gelu_reference(x, weight, bias)
    assert_right(actual, expected, on_pytorch(lambda: linear_gelu(x, weight, bias)))
    assert_gradients(linear_gelu, linear_gelu_reference, x, weight, bias)


# What every op shares


class Example(NamedTuple):
    """Arguments of an op: the differentiable ones, and those after them, which are made once: a graph that is captured
    cannot make them.
    """

    op: Callable[..., Any]
    leaves: Results
    rest: Results = ()

    def run(self, *leaves: Tensor) -> Results:
        return results_of(self.op(*leaves, *self.rest))


def _norm_and_shuffle(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm_pixel_shuffle(x, weight, bias, 4, 6)


def _tensors(dtype: torch.dtype, *shapes: tuple[int, ...]) -> Results:
    return tuple(tensor(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes))


EXAMPLES: dict[str, Callable[[torch.dtype], Example]] = {
    "varlen_attention": lambda dtype: Example(varlen_attention, qkv(88, dtype), (boundaries(),)),
    "varlen_attention with lse": lambda dtype: Example(
        partial(varlen_attention, return_lse=True), qkv(88, dtype), (boundaries(),)
    ),
    "rotary_2d": lambda dtype: Example(rotary_2d, _tensors(dtype, (16, 2, 88), (16, 2, 88)), tables(8, 88)),
    "rotary_2d_qkv_": lambda dtype: Example(
        lambda qkv, cos, sin: rotary_2d_qkv_(qkv.clone(), cos, sin), _tensors(dtype, (16, 6, 88)), tables(8, 88)
    ),
    "pixel_shuffle": lambda dtype: Example(lambda x: pixel_shuffle(x, 4, 6), _tensors(dtype, (2, 24, 40))),
    "layer_norm_pixel_shuffle": lambda dtype: Example(_norm_and_shuffle, _tensors(dtype, (2, 24, 40), (40,), (40,))),
    "linear_gelu": lambda dtype: Example(linear_gelu, _tensors(dtype, (30, 40), (56, 40), (56,))),
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_compiled_op_gives_the_same_bits(name: str) -> None:
    example = EXAMPLES[name](torch.bfloat16)
    compiled = example._replace(op=torch.compile(example.op, backend=BACKEND, fullgraph=True, dynamic=False))
    for actual, expected in zip(compiled.run(*example.leaves), example.run(*example.leaves), strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "rotary_2d_qkv_"])
def test_a_compiled_ops_gradients_are_right(name: str) -> None:
    # Not the same bits: what is PyTorch's in a backward, the compiler fuses.
    example = EXAMPLES[name](torch.bfloat16)
    compiled = example._replace(op=torch.compile(example.op, backend=BACKEND, fullgraph=True, dynamic=False))
    actual = gradients(compiled.run, example.leaves, torch.bfloat16)
    with force_impl("eager"):
        exact = gradients(example.run, tuple(x.double() for x in example.leaves), torch.bfloat16)
        pytorch = gradients(example.run, example.leaves, torch.bfloat16)
    assert_right(actual, exact, pytorch)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_eager_implementation_of_an_op_compiles_too(name: str) -> None:
    example = EXAMPLES[name](torch.bfloat16)
    with force_impl("eager"):
        compiled = torch.compile(example.op, backend=BACKEND, fullgraph=True, dynamic=False)
        # Inductor keeps in float32 what the implementation rounds in between: it may only be nearer to fp64.
        exact = example.run(*(x.double() for x in example.leaves))
        pytorch = example.run(*example.leaves)
        assert_right(example._replace(op=compiled).run(*example.leaves), exact, pytorch)


@pytest.mark.parametrize("name", ["varlen_attention", "linear_gelu"])
def test_autocast_casts_the_inputs(name: str) -> None:
    example = EXAMPLES[name](torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        (actual,) = example.run(*example.leaves)
    assert_same_bits(actual, example.run(*(x.bfloat16() for x in example.leaves))[0])


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_op_is_captured_as_a_cuda_graph(name: str) -> None:
    if REHEARSING:
        pytest.skip("CUDA graphs have no stand-in")
    example = EXAMPLES[name](torch.bfloat16)
    with torch.no_grad():
        expected = [x.clone() for x in example.run(*example.leaves)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            example.run(*example.leaves)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                captured = example.run(*example.leaves)
        torch.cuda.current_stream().wait_stream(stream)
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
    for actual, exact in zip(captured, expected, strict=True):
        assert_same_bits(actual, exact)


def test_varlen_attention_beyond_2_to_the_31_elements() -> None:
    if REHEARSING:
        pytest.skip("takes 6 GB")
    sequences = 2**31 // (577 * 3 * 16 * 88) + 1
    packed = torch.randn(577 * sequences, 3, 16, 88, dtype=torch.bfloat16, device=DEVICE)
    assert packed.numel() > 2**31
    q, k, v = packed.unbind(1)
    out = varlen_attention(q, k, v, boundaries(list(range(0, 577 * sequences + 1, 577))))
    alone = varlen_attention(q[-577:], k[-577:], v[-577:], boundaries([0, 577]))
    assert_same_bits(out[-577:], alone)


@pytest.mark.parametrize("dtype", HALF)
def test_pixel_shuffle_beyond_2_to_the_31_elements(dtype: torch.dtype) -> None:
    if REHEARSING:
        pytest.skip("takes 9 GB")
    tiles = 2**31 // (24 * 1408) + 2
    x = torch.zeros(tiles, 24, 1408, dtype=dtype, device=DEVICE)
    x[-1] = tensor(24, 1408, dtype=dtype)
    assert torch.equal(pixel_shuffle(x, 4, 6)[-1:], pixel_shuffle_reference(x[-1:], 4, 6))
