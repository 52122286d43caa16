"""bf16 arithmetic and e4m3 casts for Triton's interpreter (written for triton 3.6 to 3.9).

The stock interpreter keeps a bf16 tensor as its raw 16-bit patterns and hands those to numpy as integers. Each hook
widens them to fp32, lets the stock method work, and rounds its result to bf16. Of e4m3 it rounds halves of subnormal
numbers and of the next power of two wrongly, takes NaN for a number, and has no fnuz form: casts and dots are
corrected.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

from vit_kernels.testing import _bfloat16 as bfloat16
from vit_kernels.testing import _float8 as float8

STEP = 16
"""Columns of fp16 that a matrix instruction multiplies."""

E4M3 = {tl.float8e4nv: float8.E4M3FN, tl.float8e4b8: float8.E4M3FNUZ}

Method = Callable[..., Any]
Hook = tuple[object, str, Method]


def arithmetic_hooks() -> Iterator[Hook]:
    """(class, attribute, replacement) of every corrected method."""
    for hook in (_ternary_op(), _fma(), _cast(), _fp_to_fp(), _dot(), get_bf16):
        yield InterpreterBuilder, hook.__name__, hook
    for name in ("unary_op", "binary_op"):
        yield InterpreterBuilder, name, _through_fp32(getattr(InterpreterBuilder, name))
    # min.f32 and max.f32 of a GPU return the operand that is not NaN; triton before 3.9 interprets them otherwise.
    yield InterpreterBuilder, "create_minnumf", lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    yield InterpreterBuilder, "create_maxnumf", lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    yield ReduceOps, "min_max", _reduced_in_fp32(_min_max())
    yield ReduceOps, "sum", _reduced_in_fp32(ReduceOps.sum)
    yield ScanOps, "cumsum", _reduced_in_fp32(ScanOps.cumsum)
    yield ScanOps, "cumprod", _reduced_in_fp32(ScanOps.cumprod)
    yield interpreter, "_patch_lang_core", _patch_lang_core()


def _is_bf16(operand: Any) -> bool:
    return isinstance(operand, TensorHandle) and operand.dtype.scalar == tl.bfloat16


def _widened(operand: Any) -> Any:
    return TensorHandle(bfloat16.widen(operand.data), tl.float32) if _is_bf16(operand) else operand


def _widened_number(operand: Any) -> Any:
    """Of bf16 or e4m3 the values in fp32."""
    format_ = E4M3.get(operand.dtype.scalar)
    return TensorHandle(float8.widen(operand.data, format_), tl.float32) if format_ else _widened(operand)


def _narrowed(handle: TensorHandle, dtype: tl.dtype = tl.bfloat16) -> TensorHandle:
    values = np.asarray(handle.data, dtype=np.float32)
    bits = float8.narrow(values, E4M3[dtype]) if dtype in E4M3 else bfloat16.narrow(values)
    return TensorHandle(bits, dtype)


def _through_fp32(stock: Method) -> Method:
    """The builder method with its bf16 operands widened and its fp32 result rounded back."""

    def method(self: InterpreterBuilder, *operands: Any) -> TensorHandle:
        if not any(map(_is_bf16, operands)):
            return stock(self, *operands)
        result = stock(self, *map(_widened, operands))
        return _narrowed(result) if result.data.dtype == np.float32 else result

    return method


def _ternary_op() -> Method:
    stock = InterpreterBuilder.ternary_op
    widened = _through_fp32(stock)

    def ternary_op(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle, op: Method) -> Any:
        selects_bit_patterns = op is np.where
        return (stock if selects_bit_patterns else widened)(self, x, y, z, op)

    return ternary_op


def _fma() -> Method:
    stock = InterpreterBuilder.create_fma

    def create_fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if not _is_bf16(x):
            return stock(self, x, y, z)
        return TensorHandle(bfloat16.multiply_add(x.data, y.data, z.data), tl.bfloat16)

    return create_fma


def _cast() -> Method:
    stock = InterpreterBuilder.cast_impl

    def cast_impl(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
        source = _widened(source)
        # fp64 and integers go through fp32, as in PyTorch and in Triton's compiled code.
        return _narrowed(source) if target.scalar == tl.bfloat16 else stock(self, source, target)

    return cast_impl


def _fp_to_fp() -> Method:
    stock = InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype, rounding: Any) -> Any:
        source = _widened_number(source)
        if target.scalar in E4M3 and rounding != ir.ROUNDING_MODE.RTZ:
            return _narrowed(source, target.scalar)
        if min(source.dtype.scalar.primitive_bitwidth, target.scalar.primitive_bitwidth) < 16:
            return stock(self, source, target, rounding)
        if rounding != ir.ROUNDING_MODE.RTZ:
            return self.cast_impl(source, target)
        if target.scalar != tl.bfloat16:
            return stock(self, source, target, rounding)
        return TensorHandle(bfloat16.narrow_towards_zero(source.data.astype(np.float32)), tl.bfloat16)

    return create_fp_to_fp


def _dot() -> Method:
    stock = InterpreterBuilder.create_dot

    def create_dot(
        self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *args: Any
    ) -> TensorHandle:
        a, b = _widened_number(a), _widened_number(b)
        if d.data.dtype != np.float32 or a.data.dtype not in (np.float16, np.float32):
            return stock(self, a, b, d, *args)
        return TensorHandle(_sum_in_steps(a.data, b.data, d.data), d.dtype.scalar)

    return create_dot


def _sum_in_steps(a: Any, b: Any, total: Any) -> Any:
    """a @ b + total as matrix instructions make it: STEP products at a time are added to a sum in fp32.

    The products and sums of a step are in fp64, so that an element depends on its row and column alone, and not, as
    in a BLAS, on where in which block it stands.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    for first in range(0, a.shape[-1], STEP):
        step = slice(first, first + STEP)
        total = (total + a[..., step] @ b[..., step, :]).astype(np.float32)
    return total


def get_bf16(self: InterpreterBuilder, value: float) -> TensorHandle:
    """A constant, which the interpreters before 3.9 lack."""
    return _narrowed(self.get_fp32(value))


def _min_max() -> Method:
    stock = ReduceOps.min_max
    # The same results without numpy's warning about slices that are all NaN.
    quiet = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}

    def min_max(self: ReduceOps, values: Any, val_reduce_op: Method, idx_reduce_op: Method | None = None) -> Any:
        return stock(self, values, quiet.get(val_reduce_op, val_reduce_op), idx_reduce_op)

    return min_max


def _reduced_in_fp32(stock: Method) -> Method:
    """A reduction or scan of a bf16 tensor made in fp32, its values (not its indices) rounded back."""

    def narrowed(result: tl.tensor) -> tl.tensor:
        if result.dtype != tl.float32:
            return result
        type_ = result.type.with_element_ty(tl.bfloat16) if result.type.is_block() else tl.bfloat16
        return tl.core.tensor(_narrowed(result.handle), type_)

    def method(self: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        values = values[0] if isinstance(values, tuple) else values
        if values.dtype != tl.bfloat16:
            return stock(self, values, *args, **kwargs)
        fp32 = tl.core.tensor(_widened(values.handle), values.type.with_element_ty(tl.float32))
        result = stock(self, fp32, *args, **kwargs)
        return type(result)(map(narrowed, result)) if isinstance(result, tuple | list) else narrowed(result)

    return method


def _patch_lang_core() -> Method:
    stock = interpreter._patch_lang_core

    def patch_lang_core(language: Any, scope: Any) -> None:
        stock(language, scope)
        to_ir = language.dtype.to_ir
        # The stock one lacks the fnuz form.
        known = lambda self, builder: self if self == tl.float8e4b8 else to_ir(self, builder)  # noqa: E731
        scope.set_attr(language.dtype, "to_ir", known)

    return patch_lang_core
