"""The public testing tools: tolerance rule, poison, seeded tensors, strategies."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import find, given
from hypothesis import strategies as st
from vit_kernels.testing import (
    NanPadded,
    assert_close_to_reference,
    nan_filled_empty,
    nan_padded,
    seeded_tensor,
    strategies,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
E4M3 = [torch.float8_e4m3fn, torch.float8_e4m3fnuz]


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


# --- tolerance


@given(dtype=strategies.dtypes(), seed=strategies.seeds(), scale=st.integers(-20, 10))
def test_a_correctly_rounded_result_is_close_whatever_pytorch_makes(dtype: torch.dtype, seed: int, scale: int) -> None:
    expected = seeded_tensor((4, 5), torch.float64, seed) * 2.0**scale
    rounded = expected.to(dtype)
    assert_close_to_reference(rounded, expected, rounded)
    assert_close_to_reference(rounded, rounded.double(), rounded)
    assert_close_to_reference(rounded, expected, torch.zeros_like(rounded))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_on_one_element_is_twice_pytorchs_maximum_plus_a_rounding(dtype: torch.dtype) -> None:
    ulp = torch.finfo(dtype).eps
    expected = torch.ones(6, 7, dtype=torch.float64)
    pytorch = expected.to(dtype)
    pytorch[0] += 4 * ulp
    # RMS stays small: PyTorch errs in 7 elements, the result in one.
    actual = expected.to(dtype)
    actual[2, 3] += 8 * ulp
    assert_close_to_reference(actual, expected, pytorch)
    actual[2, 3] += ulp
    with pytest.raises(AssertionError, match=r"maximum error .* is 2\.25 x PyTorch's .* at \(2, 3\): got 1\.\d+, exp"):
        assert_close_to_reference(actual, expected, pytorch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rms_bound_sees_many_small_errors(dtype: torch.dtype) -> None:
    ulp = torch.finfo(dtype).eps
    expected = torch.ones(100, dtype=torch.float64)
    pytorch = expected.to(dtype)
    pytorch[:25] += 2 * ulp  # RMS 1 ulp
    two_ulps = expected.to(dtype) + 2 * ulp
    assert_close_to_reference(two_ulps, expected, pytorch)
    with pytest.raises(AssertionError, match=r"RMS error .* is 3 x PyTorch's"):
        assert_close_to_reference(two_ulps + ulp, expected, pytorch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rounding_is_allowed_when_pytorch_is_exact(dtype: torch.dtype) -> None:
    expected = torch.tensor([1024.0], dtype=torch.float64)
    exact = expected.to(dtype)
    # Below a power of two the neighbour is one unit roundoff away, above it two.
    assert_close_to_reference(exact * (1 - unit_roundoff(dtype)), expected, exact)
    with pytest.raises(AssertionError, match=r"maximum error .* is inf x PyTorch's 0"):
        assert_close_to_reference(exact * (1 + 2 * unit_roundoff(dtype)), expected, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rounding_among_subnormals_is_half_their_spacing(dtype: torch.dtype) -> None:
    spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    expected = torch.tensor([2.5 * spacing], dtype=torch.float64)
    pytorch = torch.tensor([2 * spacing]).to(dtype)
    assert_close_to_reference(torch.tensor([4 * spacing]).to(dtype), expected, pytorch)
    with pytest.raises(AssertionError, match=r"maximum error .* is 5 x"):
        assert_close_to_reference(torch.tensor([5 * spacing]).to(dtype), expected, pytorch)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ([1.0, torch.nan], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, torch.nan]),
        ([1.0, torch.inf], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, -torch.inf]),
        ([1.0, torch.inf], [1.0, -torch.inf]),
        ([1.0, torch.nan], [1.0, torch.inf]),
    ],
)
def test_nan_and_infinity_must_stand_in_the_same_places(actual: list[float], expected: list[float]) -> None:
    wide = torch.tensor(expected, dtype=torch.float64)
    with pytest.raises(
        AssertionError, match=r"1 of 2 elements differ in being NaN or infinite; the first is at \(1,\)"
    ):
        assert_close_to_reference(torch.tensor(actual), wide, torch.tensor(actual))
    assert_close_to_reference(wide.float(), wide, wide.float())


def test_an_overflow_of_pytorch_excuses_nothing() -> None:
    expected = torch.tensor([1.0, 2.0], dtype=torch.float64)
    pytorch = torch.tensor([1.0, torch.inf])
    assert_close_to_reference(torch.tensor([1.0, 2.0]), expected, pytorch)
    with pytest.raises(AssertionError, match=r"maximum error 0\.5 "):
        assert_close_to_reference(torch.tensor([1.5, 2.0]), expected, pytorch)


@pytest.mark.parametrize("shape", [(0, 3), (), (1,)])
def test_tolerance_takes_empty_and_scalar_tensors(shape: tuple[int, ...]) -> None:
    ones = torch.ones(shape)
    assert_close_to_reference(ones, ones.double(), ones)
    if ones.numel():
        with pytest.raises(AssertionError, match=r"at \((0,)?\)"):
            assert_close_to_reference(ones + 1, ones.double(), ones)


@pytest.mark.parametrize(
    ("position", "wrong", "error", "message"),
    [
        (0, torch.ones(2, dtype=torch.int32), TypeError, "actual: got torch.int32, expected a floating dtype"),
        (1, torch.ones(2), TypeError, "expected_fp64: got torch.float32, expected torch.float64"),
        (1, torch.ones(1).double(), ValueError, r"expected_fp64: got shape \(1,\), expected \(2,\)"),
        (2, torch.ones(2).half(), TypeError, "pytorch_same_precision: got torch.float16, expected torch.float32"),
        (2, torch.ones(2, 1), ValueError, r"pytorch_same_precision: got shape \(2, 1\), expected \(2,\)"),
    ],
)
def test_tolerance_refuses_other_arguments(
    position: int, wrong: torch.Tensor, error: type[Exception], message: str
) -> None:
    arguments = [torch.ones(2), torch.ones(2).double(), torch.ones(2)]
    arguments[position] = wrong
    with pytest.raises(error, match=message):
        assert_close_to_reference(*arguments)


# --- poison


ALLOCATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "empty": lambda like: torch.empty(2, 3, dtype=like.dtype),
    "empty_like": lambda like: torch.empty_like(like),
    "empty_strided": lambda like: torch.empty_strided((2, 3), (4, 1), dtype=like.dtype),
    "new_empty": lambda like: like.new_empty(2, 3),
    "new_empty_strided": lambda like: like.new_empty_strided((2, 3), (4, 1)),
}


@pytest.mark.parametrize("allocate", ALLOCATIONS.values(), ids=ALLOCATIONS.keys())
def test_empty_is_nan_inside_the_context_only(allocate: Callable[[torch.Tensor], torch.Tensor]) -> None:
    originals = [torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty]
    with nan_filled_empty():
        for dtype in (*DTYPES, *E4M3):
            assert allocate(torch.ones(2, 3, dtype=dtype)).float().isnan().all()
        assert (allocate(torch.ones(2, 3, dtype=torch.int8)) == -128).all()
        assert allocate(torch.ones(2, 3, dtype=torch.int32)).shape == (2, 3)
    assert [torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty] == originals


def test_empty_is_nan_inside_a_custom_op_and_for_leaves() -> None:
    @torch.library.custom_op("test_testing::unwritten", mutates_args=())
    def unwritten(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    with nan_filled_empty():
        assert unwritten(torch.ones(3)).isnan().all()
        assert torch.empty(3, requires_grad=True).is_leaf


all_dtypes = strategies.dtypes() | st.sampled_from([torch.float64, torch.int8, torch.int32, torch.int64, *E4M3])
paddings = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=2)


def small_tensor(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(rows * columns).to(dtype).view(rows, columns)


@given(rows=st.integers(0, 4), columns=st.integers(0, 4), dtype=all_dtypes, padding=paddings)
def test_padding_surrounds_the_values(
    rows: int, columns: int, dtype: torch.dtype, padding: list[tuple[int, int]]
) -> None:
    padded = nan_padded(small_tensor(rows, columns, dtype), padding)
    assert torch.equal(padded.tensor, small_tensor(rows, columns, dtype))
    assert padded.tensor.stride(1) == 1
    (above, below), (left, right) = padding
    assert padded.storage.numel() == (above + rows + below) * (left + columns + right)
    if dtype.is_floating_point:
        assert int(padded.storage.float().isnan().sum()) == padded.storage.numel() - rows * columns
    padded.tensor.fill_(7)
    padded.assert_padding_untouched()


@given(dtype=all_dtypes, padding=paddings, data=st.data())
def test_every_write_to_the_padding_is_found(
    dtype: torch.dtype, padding: list[tuple[int, int]], data: st.DataObject
) -> None:
    padded = nan_padded(small_tensor(3, 4, dtype), padding)
    width = 4 + sum(padding[1])
    first = padding[0][0] * width + padding[1][0]
    inside = {first + row * width + column for row in range(3) for column in range(4)}
    outside = [position for position in range(padded.storage.numel()) if position not in inside]
    if outside:
        position = data.draw(st.sampled_from(outside))
        padded.storage[position] = 0 if dtype.itemsize == 1 or not dtype.is_floating_point else torch.nan
        with pytest.raises(
            AssertionError, match=rf"^1 elements .* first is {position - first} elements from the start"
        ):
            padded.assert_padding_untouched()


@pytest.mark.parametrize("padding", [[], [(0, 0)], [(0, 0), (-1, 0)]])
def test_other_paddings_are_refused(padding: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=r"padding: got .*, expected a pair of numbers >= 0 for each of 2 dimensions"):
        nan_padded(torch.ones(2, 3), padding)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64, torch.float8_e5m2])
def test_dtypes_without_a_poison_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=str(dtype)):
        nan_padded(torch.ones(2).to(dtype), [(1, 1)])


# --- seeded tensors and strategies


@given(seed=strategies.seeds(), dtype=strategies.dtypes())
def test_a_seed_determines_a_tensor_and_leaves_the_global_generator(seed: int, dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    x = seeded_tensor((3, 4), dtype, seed)
    assert x.dtype == dtype
    assert x.shape == (3, 4)
    assert torch.equal(x, seeded_tensor((3, 4), dtype, seed))
    assert not torch.equal(x, seeded_tensor((3, 4), dtype, seed ^ 1))
    assert torch.equal(torch.get_rng_state(), before)


@given(strategies.head_dims())
def test_head_dims_are_multiples_of_8(head_dim: int) -> None:
    assert 16 <= head_dim <= 256
    assert head_dim % 8 == 0


@given(strategies.packed_sequences(max_sequences=3, max_total=90, max_tail=7))
def test_packed_sequences_are_valid(packed: strategies.PackedSequences) -> None:
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens[0] == 0
    assert (packed.cu_seqlens.diff() >= 0).all()
    assert 1 <= packed.cu_seqlens.numel() <= 4
    assert packed.cu_seqlens[-1] <= 90
    assert 0 <= packed.total_tokens - int(packed.cu_seqlens[-1]) <= 7


@pytest.mark.parametrize(
    "holds",
    [
        lambda packed: (packed.cu_seqlens.diff() == 0).any(),
        lambda packed: (packed.cu_seqlens.diff() == 1).any(),
        lambda packed: (packed.cu_seqlens.diff() == 64).any() and (packed.cu_seqlens.diff() == 17).any(),
        lambda packed: packed.cu_seqlens.numel() == 1,
        lambda packed: packed.total_tokens > packed.cu_seqlens[-1] > 0,
        lambda packed: packed.total_tokens == packed.cu_seqlens[-1] > 0,
    ],
    ids=["empty_sequence", "one_token", "block_and_neighbour", "no_sequence", "tail", "no_tail"],
)
def test_packed_sequences_reach_the_corners(holds: Callable[[strategies.PackedSequences], bool]) -> None:
    find(strategies.packed_sequences(), lambda packed: bool(holds(packed)))


@given(padded=strategies.strided_tensors((2, 3, 4, 8), torch.bfloat16))
def test_strided_tensors_keep_shape_dtype_and_a_contiguous_last_dimension(padded: NanPadded) -> None:
    assert padded.tensor.shape == (2, 3, 4, 8)
    assert padded.tensor.dtype == torch.bfloat16
    assert padded.tensor.stride(-1) == 1
    assert padded.tensor.isfinite().all()
    assert int(padded.storage.float().isnan().sum()) == padded.storage.numel() - padded.tensor.numel()
    padded.tensor.zero_()
    padded.assert_padding_untouched()


@pytest.mark.parametrize(
    "holds",
    [
        lambda x: x.is_contiguous(),
        lambda x: x.stride(0) < x.stride(1),
        lambda x: x.stride(1) > 8 and x.stride(0) > 4 * x.stride(1),
        lambda x: x.storage_offset() > 0,
    ],
    ids=["contiguous", "transposed", "gaps", "offset"],
)
def test_strided_tensors_reach_every_layout(holds: Callable[[torch.Tensor], bool]) -> None:
    find(strategies.strided_tensors((3, 4, 8), torch.float32), lambda padded: holds(padded.tensor))


@given(
    data=st.data(), tokens=st.integers(0, 5), kv_heads=st.sampled_from([None, 1, 2]), head_dim=strategies.head_dims()
)
def test_packed_qkv_are_views_of_one_row(data: st.DataObject, tokens: int, kv_heads: int | None, head_dim: int) -> None:
    qkv = data.draw(
        strategies.packed_qkv(tokens=tokens, heads=4, kv_heads=kv_heads, head_dim=head_dim, dtype=torch.float16)
    )
    assert qkv.q.shape == (tokens, 4, head_dim)
    assert qkv.k.shape == qkv.v.shape == (tokens, kv_heads or 4, head_dim)
    assert len({x.stride() for x in (qkv.q, qkv.k, qkv.v)}) == 1
    assert {x.untyped_storage().data_ptr() for x in qkv[:3]} == {qkv.packed.storage.untyped_storage().data_ptr()}
    assert torch.equal(torch.cat(qkv[:3], dim=1).flatten(1), qkv.packed.tensor)


def test_packed_qkv_reaches_rows_with_gaps() -> None:
    strategy = strategies.packed_qkv(tokens=2, heads=3, head_dim=16, dtype=torch.float32)
    assert find(strategy, lambda qkv: qkv.q.stride(0) > 3 * 3 * 16).packed.tensor.stride(1) == 1
    find(strategy, lambda qkv: qkv.q.stride(0) == 3 * 3 * 16)


def test_without_hypothesis_only_the_strategies_fail() -> None:
    code = "import sys; sys.modules['hypothesis'] = None\nimport vit_kernels.testing\nprint('imported')\n"
    code += "import vit_kernels.testing.strategies"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.stdout == "imported\n"
    assert "ImportError: vit_kernels.testing.strategies needs the package hypothesis: pip install" in process.stderr
