"""What the ops on a grid of tokens share: the pixel shuffle and its inverse in PyTorch, and the checks of the grid."""

import torch
from torch import Tensor

from vit_kernels import _validation


def shuffle(x: Tensor, height: int, width: int, factor: int) -> Tensor:
    """[tiles, height * width, channels] -> [tiles, height * width // factor**2, channels * factor**2], always a copy.

    Where nothing moves, a reshape alone would return the input's memory.
    """
    neighbourhoods = x.unflatten(1, (height // factor, factor, width // factor, factor)).transpose(2, 3)
    moved = neighbourhoods.clone(memory_format=torch.contiguous_format)
    return moved.view(x.shape[0], height * width // factor**2, factor**2 * x.shape[2])


def unshuffle(x: Tensor, height: int, width: int, factor: int) -> Tensor:
    """The inverse of `shuffle`, always a copy."""
    channels = x.shape[2] // factor**2
    cells = x.unflatten(1, (height // factor, width // factor)).unflatten(3, (factor, factor, channels))
    moved = cells.transpose(2, 3).clone(memory_format=torch.contiguous_format)
    return moved.view(x.shape[0], height * width, channels)


def check_grid(x: Tensor, height: int, width: int, factor: int, impl: str) -> tuple[int, int, int]:
    """`x` is [tiles, height * width, channels] and the grid divides by factor; the grid in integers of Python."""
    _validation.check_operand("x", x, 3, "[tiles, height * width, channels]", impl)
    height, width, factor = (
        _validation.positive_integer(name, value)
        for name, value in (("height", height), ("width", width), ("factor", factor))
    )
    if height % factor or width % factor:
        raise ValueError(f"height, width: got {height} x {width}, expected multiples of factor {factor}")
    if x.shape[1] != height * width:
        raise ValueError(f"x: got {x.shape[1]} tokens a tile, expected height * width = {height * width}")
    return height, width, factor
