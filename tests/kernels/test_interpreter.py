"""corrected_interpreter(): bf16 bit for bit against torch, every access checked, nothing left behind."""

# Triton kernels are not typed Python.
# mypy: allow-untyped-defs

import os
import subprocess
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from vit_kernels import _dispatch
from vit_kernels.testing import OutOfBounds, corrected_interpreter

LANES = 32
ALL_BITS = np.arange(1 << 16, dtype=np.uint16)

# Zeros, the ends of the subnormals and normals, infinities, NaNs, 1 and its neighbour, and their negatives.
SPECIAL_BITS = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x3F81, 0x4049, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0]
SPECIAL_BITS += [bits | 0x8000 for bits in SPECIAL_BITS]

SOME_BITS = np.array(SPECIAL_BITS, dtype=np.uint16)

bf16_bits = arrays(np.uint16, LANES, elements=st.sampled_from(SPECIAL_BITS) | st.integers(0, 0xFFFF))


def bf16(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(bits, dtype=np.uint16)).view(torch.bfloat16)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, but one NaN is as good as another."""
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    number = ~expected.isnan()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    torch.testing.assert_close(actual[number].view(integer), expected[number].view(integer), rtol=0, atol=0)


@triton.jit
def binary_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane)
    y = tl.load(y_ptr + lane)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "div":
        out = x / y
    elif OP == "fmod":
        out = x % y
    elif OP == "fmax":
        out = tl.maximum(x, y)
    elif OP == "fmin":
        out = tl.minimum(x, y)
    elif OP == "maximum":
        out = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "lt":
        out = x < y
    elif OP == "le":
        out = x <= y
    elif OP == "gt":
        out = x > y
    elif OP == "ge":
        out = x >= y
    elif OP == "eq":
        out = x == y
    elif OP == "ne":
        out = x != y
    else:
        out = tl.where(x < y, x, y)
    tl.store(out_ptr + lane, out)


def run_binary(op: str, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    out = torch.empty(x.numel(), dtype=dtype)
    binary_kernel[(1,)](x, y, out, OP=op, BLOCK=x.numel())
    return out


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div"])
@given(x=bf16_bits, y=bf16_bits)
def test_arithmetic_is_torchs(op: str, x: np.ndarray, y: np.ndarray) -> None:
    with corrected_interpreter():
        assert_same_bits(run_binary(op, bf16(x), bf16(y)), getattr(torch, op)(bf16(x), bf16(y)))


@given(x=bf16_bits, y=bf16_bits)
def test_remainder_is_exact(x: np.ndarray, y: np.ndarray) -> None:
    # torch.fmod in bf16 is NaN when the quotient overflows; that of fp64 is exact and fits bf16.
    with np.errstate(invalid="ignore"):
        exact = torch.from_numpy(np.fmod(bf16(x).double().numpy(), bf16(y).double().numpy()))
    with corrected_interpreter():
        assert_same_bits(run_binary("fmod", bf16(x), bf16(y)).double(), exact)


@given(x=bf16_bits, y=bf16_bits)
def test_minimum_and_maximum_treat_nan_as_a_gpu_does(x: np.ndarray, y: np.ndarray) -> None:
    a, b = bf16(x), bf16(y)
    with corrected_interpreter():
        fmax, fmin, maximum = (run_binary(op, a, b) for op in ("fmax", "fmin", "maximum"))
    for actual, torchs in ((fmax, torch.maximum), (fmin, torch.minimum)):
        of_numbers = torch.where(a.isnan(), b, torch.where(b.isnan(), a, torchs(a, b)))
        # Of two zeros either is the larger.
        assert_same_bits(actual + 0.0, of_numbers + 0.0)
    assert_same_bits(maximum + 0.0, torch.maximum(a, b) + 0.0)


@pytest.mark.parametrize("op", ["lt", "le", "gt", "ge", "eq", "ne"])
@given(x=bf16_bits, y=bf16_bits)
def test_comparisons_are_torchs(op: str, x: np.ndarray, y: np.ndarray) -> None:
    y[: LANES // 4] = x[: LANES // 4]
    with corrected_interpreter():
        as_int = run_binary(op, bf16(x), bf16(y), torch.int8)
        as_bf16 = run_binary(op, bf16(x), bf16(y))
    expected = getattr(torch, op)(bf16(x), bf16(y))
    assert torch.equal(as_int.bool(), expected)
    assert_same_bits(as_bf16, expected.to(torch.bfloat16))


@given(x=bf16_bits, y=bf16_bits)
def test_select_is_torchs(x: np.ndarray, y: np.ndarray) -> None:
    with corrected_interpreter():
        actual = run_binary("select", bf16(x), bf16(y))
    chosen = torch.where(bf16(x) < bf16(y), bf16(x), bf16(y))
    assert torch.equal(actual.view(torch.int16), chosen.view(torch.int16))


@triton.jit
def unary_kernel(x_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane)
    if OP == "neg":
        out = -x
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "exp2":
        out = tl.exp2(x.to(tl.float32)).to(tl.bfloat16)
    elif OP == "times_scalar":
        out = x * 0.3
    elif OP == "truncate":
        out = x.to(tl.bfloat16, fp_downcast_rounding="rtz")
    else:
        out = x.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + lane, out)


def run_unary(op: str, x: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    out = torch.empty(x.numel(), dtype=dtype)
    unary_kernel[(1,)](x, out, OP=op, BLOCK=x.numel())
    return out


def test_unary_operations_are_torchs_on_every_bf16() -> None:
    x = bf16(ALL_BITS)
    with corrected_interpreter():
        negative, absolute, exp2 = (run_unary(op, x) for op in ("neg", "abs", "exp2"))
        scaled = run_unary("times_scalar", x)
    # Triton before 3.9 negates by subtracting from zero.
    assert_same_bits(negative + 0.0, -x + 0.0)
    assert_same_bits(absolute, x.abs())
    assert_same_bits(scaled, x * torch.tensor(0.3, dtype=torch.bfloat16))
    # numpy's and torch's exp2 differ by an ulp of fp32, which can tip a rounding.
    torch.testing.assert_close(exp2, torch.exp2(x), rtol=2**-7, atol=0, equal_nan=True)


def test_unary_methods_of_the_builder_work_on_bf16() -> None:
    # triton 3.9 negates by one; before that, the language gives them no bf16.
    with corrected_interpreter(), np.errstate(invalid="ignore"):
        floor = interpreter.interpreter_builder.create_floor(interpreter.TensorHandle(SOME_BITS, tl.bfloat16))
    assert floor.dtype == tl.bfloat16
    assert_same_bits(bf16(floor.data), bf16(SOME_BITS).floor())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_casts_of_every_bf16_to_floats_are_torchs(dtype: torch.dtype) -> None:
    x = bf16(ALL_BITS)
    with corrected_interpreter():
        assert_same_bits(run_unary("cast", x, dtype), x.to(dtype))


@given(st.lists(st.integers(-(2**30), 2**30), min_size=LANES, max_size=LANES))
def test_casts_with_integers_are_torchs(values: list[int]) -> None:
    integers = torch.tensor(values, dtype=torch.int32)
    with corrected_interpreter():
        rounded = run_unary("cast", integers)
        assert_same_bits(rounded, integers.to(torch.bfloat16))
        assert torch.equal(run_unary("cast", rounded, torch.int32), rounded.to(torch.int32))


# The bits below a bf16: none, just under, on and just over the tie, all.
fp32_bits = st.builds(
    lambda high, low: high << 16 | low,
    st.sampled_from(SPECIAL_BITS) | st.integers(0, 0xFFFF),
    st.sampled_from([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF]) | st.integers(0, 0xFFFF),
)


@given(arrays(np.uint32, LANES, elements=fp32_bits))
def test_casts_from_fp32_round_as_torchs(bits: np.ndarray) -> None:
    x = torch.from_numpy(bits).view(torch.float32)
    with corrected_interpreter():
        assert_same_bits(run_unary("cast", x), x.to(torch.bfloat16))
        truncated = run_unary("truncate", x)
    assert_same_bits(truncated, torch.where(x.isnan(), torch.nan, bf16((bits >> 16).astype(np.uint16))))


@given(arrays(np.uint16, LANES, elements=st.integers(0, 0xFFFF)))
def test_casts_from_fp16_and_fp64_are_torchs(bits: np.ndarray) -> None:
    half = torch.from_numpy(bits).view(torch.float16)
    with corrected_interpreter():
        assert_same_bits(run_unary("cast", half), half.to(torch.bfloat16))
        assert_same_bits(run_unary("cast", half.double() / 3), (half.double() / 3).to(torch.bfloat16))


@triton.jit
def fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(out_ptr + lane, tl.fma(tl.load(x_ptr + lane), tl.load(y_ptr + lane), tl.load(z_ptr + lane)))


def nearest_bf16(value: Fraction) -> float:
    """Round to nearest, ties to even, in exact arithmetic."""
    if value == 0:
        return 0.0
    exponent = max(abs(value).numerator.bit_length() - abs(value).denominator.bit_length(), -127)
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > -126 and abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, -126) - 7)
    rounded = round(value / unit) * unit
    return float(rounded) if abs(rounded) < Fraction(2) ** 128 else float("inf") * (1 if value > 0 else -1)


finite_bits = st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7F80 != 0x7F80)


@given(st.lists(st.tuples(finite_bits, finite_bits, finite_bits), min_size=LANES, max_size=LANES))
# 1.5 * 1.0078125 is a tie, decided by an addend of -2**-30 (lost in fp32) or -2**-80 (lost in fp64).
@example([(0x3FC0, 0x3F81, 0xB080), (0x3FC0, 0x3F81, 0x9780)] * (LANES // 2))
@example([(0x3F81, 0x3C00, 0x3F80), (0x3FC0, 0x3B80, 0x3F80), (0x0081, 0x3F40, 0x0001), (0xFF7F, 0x7F7F, 0)] * 8)
def test_fma_rounds_once(operands: list[tuple[int, int, int]]) -> None:
    x, y, z = (bf16(np.array(column)) for column in zip(*operands, strict=True))
    out = torch.empty(LANES, dtype=torch.bfloat16)
    with corrected_interpreter():
        fma_kernel[(1,)](x, y, z, out, BLOCK=LANES)
    exact = (Fraction(a) * Fraction(b) + Fraction(c) for a, b, c in zip(*(t.tolist() for t in (x, y, z)), strict=True))
    expected = torch.tensor([nearest_bf16(value) for value in exact], dtype=torch.float64)
    assert torch.equal(out.double(), expected)


@triton.jit
def multiply(a, b):
    return a * b


@triton.jit
def reduction_kernel(x_ptr, out_ptr, OP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    # tl.cumsum and tl.max themselves widen bf16 in some versions.
    x = tl.load(x_ptr + row[:, None] * COLUMNS + column[None, :])
    if OP == "cumsum":
        out = tl.associative_scan(x, 1, tl.standard._sum_combine)
        tl.store(out_ptr + row[:, None] * COLUMNS + column[None, :], out)
    elif OP == "cumprod":
        out = tl.associative_scan(x, 1, tl.standard._prod_combine)
        tl.store(out_ptr + row[:, None] * COLUMNS + column[None, :], out)
    elif OP == "sum":
        tl.store(out_ptr + row, tl.sum(x, axis=1))
    elif OP == "max":
        tl.store(out_ptr + row, tl.reduce(x, 1, tl.standard._elementwise_max))
    elif OP == "argmax":
        tl.store(out_ptr + row, tl.argmax(x, axis=1))
    else:
        tl.store(out_ptr + row, tl.reduce(x, 1, multiply))


def run_reduction(op: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    with corrected_interpreter():
        reduction_kernel[(1,)](x, out, OP=op, ROWS=x.shape[0], COLUMNS=x.shape[1])
    return out


@given(arrays(np.int16, (4, 16), elements=st.integers(-256, 256)))
def test_sums_and_products_round_once(values: np.ndarray) -> None:
    # Integers of at most 8 bits are exact in bf16, and their sums and short products in fp32.
    x = torch.from_numpy(values).to(torch.bfloat16)
    assert_same_bits(run_reduction("sum", x, x.new_empty(4)), x.float().sum(1).to(torch.bfloat16))
    assert_same_bits(run_reduction("cumsum", x, torch.empty_like(x)), x.float().cumsum(1).to(torch.bfloat16))
    pairs = x.view(32, 2)
    assert_same_bits(run_reduction("cumprod", pairs, torch.empty_like(pairs)), pairs.float().cumprod(1).to(x.dtype))


@given(arrays(np.uint16, (4, 16), elements=finite_bits | st.just(0x7FC0)))
def test_maxima_ignore_nan_as_a_gpu_does(bits: np.ndarray) -> None:
    x = bf16(bits)
    expected = torch.where(x.isnan(), -torch.inf, x).amax(1)
    expected[x.isnan().all(1)] = torch.nan
    assert torch.equal(run_reduction("max", x, x.new_empty(4)).nan_to_num(7.0), expected.nan_to_num(7.0))


@given(arrays(np.uint16, (4, 16), elements=finite_bits))
def test_other_reductions_of_bf16(bits: np.ndarray) -> None:
    x = bf16(bits)
    assert torch.equal(run_reduction("argmax", x, torch.empty(4, dtype=torch.int32)).long(), x.double().argmax(1))
    product = x[:, 0]
    for column in range(1, 16):
        product = product * x[:, column]
    assert_same_bits(run_reduction("multiply", x, x.new_empty(4)), product)


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    c = tl.load(c_ptr + m[:, None] * N + n[None, :])
    tl.store(c_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, c, input_precision="ieee"))


def run_dot(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    out = c.clone()
    dot_kernel[(1,)](a, b, out, M=a.shape[0], N=b.shape[1], K=a.shape[1])
    return out


sizes = st.sampled_from([16, 32, 64])


@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    m=sizes,
    n=sizes,
    k=sizes,
    seed=st.integers(0, 2**32 - 1),
)
def test_dot_is_within_its_error_bound(dtype: torch.dtype, m: int, n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(m, k, generator=generator).to(dtype)
    b = torch.randn(k, n, generator=generator).to(dtype)
    c = torch.randn(m, n, generator=generator)
    with corrected_interpreter() as counts:
        actual = run_dot(a, b, c)
    # k products and one addend, summed in any order (N. Higham, Accuracy and Stability of Numerical Algorithms, 3.1).
    gamma = (k + 1) * 2**-24 / (1 - (k + 1) * 2**-24)
    bound = gamma * (a.double().abs() @ b.double().abs() + c.double().abs())
    assert ((actual.double() - (a.double() @ b.double() + c.double())).abs() <= bound).all()
    assert counts.dot_flops == 2 * m * n * k


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_element_of_a_dot_depends_on_its_row_and_column_alone(dtype: torch.dtype) -> None:
    """A kernel that computes a product again, in blocks of other sizes or transposed, gets the same bits."""
    a, b = (torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(2))
    zeros = torch.zeros(64, 64)
    with corrected_interpreter():
        whole = run_dot(a, b.T.contiguous(), zeros)
        assert torch.equal(run_dot(b, a.T.contiguous(), zeros).T, whole)
        assert torch.equal(run_dot(a[16:32], b[:32].T.contiguous(), zeros[:16, :32].contiguous()), whole[16:32, :32])


def test_the_stock_interpreter_is_wrong() -> None:
    """When this fails, Triton has learnt bf16: see which corrections can go."""
    x = torch.linspace(-2, 2, LANES).to(torch.bfloat16)
    with np.errstate(all="ignore"):
        assert not torch.equal(run_binary("add", x, x), x + x)
        assert not torch.equal(run_binary("lt", x, x.flip(0), torch.int8).bool(), x < x.flip(0))
        tie_up = torch.full((LANES,), 1 + 2**-7 + 2**-8)
        assert not torch.equal(run_unary("cast", tie_up), tie_up.to(torch.bfloat16))
        a, c = x.repeat(16, 1), torch.zeros(16, 16)
        assert (run_dot(a, a.T.contiguous(), c) - (a.float() @ a.T.float())).abs().max() > 1e3


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, x_first, out_first, columns, x_row, out_row, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = lane // columns, lane % columns
    x = tl.load(x_ptr + x_first + row.to(tl.int64) * x_row + column, mask=lane < n)
    tl.store(out_ptr + out_first + row.to(tl.int64) * out_row + column, x, mask=lane < n)


def run_copy(x: torch.Tensor, out: torch.Tensor, n: int, x_first: int = 0, out_first: int = 0) -> None:
    arguments = (n, x_first, out_first, x.shape[1], x.stride(0), out.stride(0))
    copy_kernel[(max(1, -(-n // LANES)),)](x, out, *arguments, BLOCK=LANES)


@triton.jit
def sum_kernel(length_ptr, x_ptr, out_ptr):
    total = 0.0
    for index in range(tl.load(length_ptr)):
        total += tl.load(x_ptr + index)
    tl.store(out_ptr, total)


def test_a_loop_takes_its_bound_from_memory() -> None:
    """triton 3.6 by itself cannot with numpy 2.4."""
    length, out = torch.tensor([3], dtype=torch.int32), torch.empty(1)
    with corrected_interpreter():
        sum_kernel[(1,)](length, torch.arange(5.0), out)
    assert out.item() == 3


def test_a_launch_on_no_elements_passes() -> None:
    with corrected_interpreter() as counts:
        run_copy(torch.empty(0, 3), torch.empty(0, 3), 0)
    assert (counts.bytes_loaded, counts.bytes_stored) == (0, 0)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    gap=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    beyond=st.integers(0, 5),
)
def test_every_element_of_a_strided_view_is_inside_and_nothing_else(
    rows: int, columns: int, gap: int, dtype: torch.dtype, beyond: int
) -> None:
    storage = torch.arange((rows + 2) * (columns + gap)).to(dtype).view(rows + 2, columns + gap)
    x = storage[1 : rows + 1, :columns]
    out = torch.empty(rows + 2, columns, dtype=dtype)
    n = rows * columns
    with corrected_interpreter() as counts:
        run_copy(x, out, n)
        assert torch.equal(out[:rows], x)
        assert counts.bytes_loaded == counts.bytes_stored == n * dtype.itemsize
        if beyond:
            with pytest.raises(OutOfBounds, match=r"^load of \d-byte elements by program .* 'x_ptr'"):
                run_copy(x, out, n, x_first=(columns + gap) * (rows - 1) + beyond if rows > 1 else beyond)


ROWS, COLUMNS, GAP = 3, 5, 3


@pytest.mark.parametrize(
    ("n", "first", "message"),
    [
        (16, 0, r"program \(0, 0, 0\): 1 of 16 .* 16 bytes \(4 elements\) past the end of argument '{name}'"),
        (5, 1, r"1 of 5 .* in a gap between the elements of argument '{name}' \(shape \(3, 5\), strides \(8, 1\)"),
        (5, -1, r"1 of 5 .* 4 bytes \(1 elements\) before the start of argument '{name}'"),
        (1, ROWS * 8 - GAP, r"1 of 1 .* 4 bytes \(1 elements\) past the end of argument '{name}'"),
        (1, 2**40, r"1 of 1 .* past the end of argument"),
        (1, -(2**40), r"1 of 1 .* before the start of argument"),
    ],
    ids=["one_past", "gap", "before", "tail", "far_past", "far_before"],
)
@pytest.mark.parametrize("kind", ["load", "store"])
def test_an_access_out_of_bounds_is_named(kind: str, n: int, first: int, message: str) -> None:
    # Far apart, so that what one access misses is not in the other tensor.
    arena = torch.zeros(4096)
    strided = arena.as_strided((ROWS, COLUMNS), (COLUMNS + GAP, 1), 1024)
    dense = arena[3000:3500].view(-1, COLUMNS)
    name, tensors, offsets = {
        "load": ("x_ptr", (strided, dense), (first, 0)),
        "store": ("out_ptr", (dense, strided), (0, first)),
    }[kind]
    expected = f"^{kind} of 4-byte elements by .*{message.format(name=name)}"
    with corrected_interpreter(), pytest.raises(OutOfBounds, match=expected):
        run_copy(*tensors, n, *offsets)


@triton.jit
def descriptor_kernel(x_ptr, out_ptr, rows, columns, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [rows, columns], [columns, 1], [BLOCK, BLOCK])
    out = tl.make_tensor_descriptor(out_ptr, [rows, columns], [columns, 1], [BLOCK, BLOCK])
    out.store([0, 0], x.load([0, 0]))


def test_descriptors_are_checked() -> None:
    x, out = torch.randn(5, 8), torch.zeros(5, 8)
    with corrected_interpreter() as counts:
        descriptor_kernel[(1,)](x, out, 5, 8, BLOCK=16)
        assert torch.equal(x, out)
        assert counts.bytes_loaded == x.nbytes
        with pytest.raises(OutOfBounds, match="8 of 48 active lanes"):
            descriptor_kernel[(1,)](x, out, 6, 8, BLOCK=16)


@triton.jit
def atomic_kernel(x_ptr, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.atomic_add(x_ptr + lane, 1, mask=lane < n)
    tl.atomic_cas(x_ptr + n - 1, 1, 5)


def test_atomics_are_checked() -> None:
    x = torch.zeros(5, dtype=torch.int32)
    with corrected_interpreter():
        atomic_kernel[(1,)](x, 5, BLOCK=8)
        assert x.tolist() == [1, 1, 1, 1, 5]
        with pytest.raises(OutOfBounds, match=r"^atomic .* 1 of 6"):
            atomic_kernel[(1,)](x, 6, BLOCK=8)
        with pytest.raises(OutOfBounds, match=r"^atomic .* 1 of 1 .* before"):
            atomic_kernel[(1,)](x, 0, BLOCK=8)


def test_counts_nest() -> None:
    x = torch.randn(LANES).to(torch.bfloat16)
    with corrected_interpreter() as outer:
        run_unary("exp2", x)
        with corrected_interpreter() as inner:
            run_unary("exp2", x)
            run_unary("abs", x)
        assert inner.exp2 == LANES
        assert inner.bytes_loaded == 2 * x.nbytes
    assert outer.exp2 == 2 * LANES
    assert outer.bytes_stored == 3 * x.nbytes


def patched_state() -> list[dict[str, object]]:
    owners = (interpreter.InterpreterBuilder, interpreter.ReduceOps, interpreter.ScanOps, interpreter.GridExecutor)
    return [dict(vars(owner)) for owner in (*owners, interpreter, tl, tl.core, tl.tensor, tl.math)]


def test_patches_are_undone() -> None:
    before = patched_state()
    x = torch.randn(4, 16)
    with corrected_interpreter():
        with corrected_interpreter():
            assert _dispatch.interpreter_is_corrected
        assert _dispatch.interpreter_is_corrected
        run_reduction("max", x, x.new_empty(4))
        with pytest.raises(OutOfBounds):
            run_reduction("max", x, x.new_empty(3))
    assert not _dispatch.interpreter_is_corrected
    with pytest.raises(KeyError), corrected_interpreter():
        raise KeyError
    assert not _dispatch.interpreter_is_corrected
    # Not the pristine state: a launch without correction, as in other tests, leaves triton.language patched.
    assert patched_state() == before


@triton.jit
def failing_kernel(x_ptr):
    tl.device_assert(tl.load(x_ptr) == 0)
    tl.static_assert(False, "told to fail")


def test_other_errors_of_a_kernel_stay_themselves() -> None:
    with corrected_interpreter(), pytest.raises(InterpreterError, match="told to fail"):
        failing_kernel[(1,)](torch.zeros(1))


@triton.jit
def overflowing_kernel(out_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    infinite = tl.exp2(lane.to(tl.float32) + 200.0)
    tl.store(out_ptr + lane, infinite - infinite + tl.max(infinite - infinite))


def test_overflow_and_nan_warn_of_nothing() -> None:
    out = torch.zeros(LANES)
    with corrected_interpreter():
        overflowing_kernel[(1,)](out, BLOCK=LANES)
    assert out.isnan().all()


def raised_in_a_thread(function: object) -> BaseException | None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            function()  # type: ignore[operator]
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return caught[0] if caught else None


def test_another_thread_is_refused() -> None:
    x = torch.randn(LANES)
    with corrected_interpreter():
        for function in (corrected_interpreter().__enter__, lambda: run_unary("abs", x, torch.float32)):
            assert "another thread" in str(raised_in_a_thread(function))


@pytest.mark.parametrize(
    "preparation", ["", "import triton, os; os.environ['TRITON_INTERPRET'] = '1'"], ids=["unset", "too_late"]
)
def test_without_the_interpreter_the_error_says_what_to_do(preparation: str) -> None:
    code = f"{preparation}\nfrom vit_kernels.testing import corrected_interpreter\ncorrected_interpreter().__enter__()"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "RuntimeError: corrected_interpreter(): Triton is not in interpreter mode. TRITON_INTERPRET=1" in (
        process.stderr
    )
