"""NaN where nothing may be read, and where everything must be written."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import torch

# A quiet NaN in bf16 and fp16, and repeated in fp32 and fp64; not the one that arithmetic makes.
_NAN_BITS = 0x7FFD
_NAN_BITS_OF_8 = {torch.float8_e4m3fn: 0x7F, torch.float8_e4m3fnuz: -0x80}


@contextlib.contextmanager
def nan_filled_empty() -> Iterator[None]:
    """Fill what `torch.empty`, `empty_like`, `empty_strided`, `new_empty` and `new_empty_strided` return with NaN.

    An output element that a kernel does not write then shows. Covers calls from Python that look the function up in
    torch, as launchers do, also inside custom ops and compiled graphs that call them; not memory that C++ or
    Inductor allocates. Tensors of int8 are filled with -128, which no quantisation to +-127 gives; other integers stay
    as they are. The functions of the whole process are replaced: launch from one thread.
    """
    with contextlib.ExitStack() as stack:
        for owner, names in (
            (torch, ("empty", "empty_like", "empty_strided")),
            (torch.Tensor, ("new_empty", "new_empty_strided")),
        ):
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, _nan_filled(getattr(owner, name))))
        yield


def _nan_filled(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def nan_filled(*args: object, **kwargs: object) -> torch.Tensor:
        result = allocate(*args, **kwargs)
        if result.dtype.is_floating_point:
            with torch.no_grad():
                result.fill_(torch.nan)
        elif result.dtype == torch.int8:
            result.fill_(-128)
        return result

    return nan_filled


@dataclass(frozen=True)
class NanPadded:
    """A tensor that lies inside a larger poisoned storage.

    Attributes:
        tensor: the view to hand to a kernel.
        storage: flat; NaN (in integer dtypes the least value) wherever `tensor` has no element.
    """

    tensor: torch.Tensor
    storage: torch.Tensor

    def assert_padding_untouched(self) -> None:
        """Assert, bit by bit, that nothing wrote between or around the elements of the tensor.

        Raises:
            AssertionError: something did; the message says how many elements, and where the first lies.
        """
        poisoned = _poisoned(self.storage.numel(), self.storage)
        in_padding = _as_integers(self.storage) != _as_integers(poisoned)
        torch.as_strided(in_padding, self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()).fill_(False)
        if in_padding.any():
            first = int(in_padding.int().argmax())
            raise AssertionError(
                f"{int(in_padding.sum())} elements of the padding were written; the first is "
                f"{first - self.tensor.storage_offset()} elements from the start of the tensor (shape "
                f"{tuple(self.tensor.shape)}, strides {self.tensor.stride()}), now {self.storage[first].item()}"
            )


def nan_padded(tensor: torch.Tensor, padding: Sequence[tuple[int, int]]) -> NanPadded:
    """Copy a tensor into a poisoned storage.

    Args:
        tensor: any shape, a floating dtype of at least 16 bits, an e4m3 or an integer dtype.
        padding: (before, after) in elements, for each dimension. Padding of the last dimension gives rows with gaps,
            and the last dimension stays contiguous.

    Raises:
        ValueError: `padding` has not one pair of numbers >= 0 for each dimension.
        TypeError: the dtype is boolean, complex or another one below 16 bits of floating point.
    """
    if len(padding) != tensor.dim() or any(amount < 0 for pair in padding for amount in pair):
        raise ValueError(
            f"padding: got {padding}, expected a pair of numbers >= 0 for each of {tensor.dim()} dimensions"
        )
    shape = [before + size + after for size, (before, after) in zip(tensor.shape, padding, strict=True)]
    storage = _poisoned(torch.Size(shape).numel(), tensor)
    view = storage.view(shape)
    for dim, (before, _) in enumerate(padding):
        view = view.narrow(dim, before, tensor.shape[dim])
    view.copy_(tensor.detach())
    return NanPadded(view, storage)


def _poisoned(elements: int, like: torch.Tensor) -> torch.Tensor:
    storage = torch.empty(elements, dtype=like.dtype, device=like.device)
    if like.dtype.is_floating_point and like.element_size() > 1:
        storage.view(torch.int16).fill_(_NAN_BITS)
    elif like.dtype in _NAN_BITS_OF_8:
        storage.view(torch.int8).fill_(_NAN_BITS_OF_8[like.dtype])
    elif like.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        storage.fill_(torch.iinfo(like.dtype).min)
    else:
        raise TypeError(f"tensor: got {like.dtype}, expected an integer dtype, e4m3 or a wider floating one")
    return storage


def _as_integers(storage: torch.Tensor) -> torch.Tensor:
    return storage.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[storage.element_size()])
