"""Tools for proving kernels, for this project's tests and for yours.

- `corrected_interpreter`: run Triton kernels on a CPU, right in bf16, with every access checked and work counted.
- `assert_close_to_reference`: the tolerance rule.
- `nan_filled_empty`, `nan_padded`: poison what must be written and what must not be read.
- `seeded_tensor`: random values without the global generator.
- `vit_kernels.testing.strategies` (needs hypothesis): shapes, layouts, sequences, dtypes and seeds.
"""

from vit_kernels.testing._bounds import OutOfBounds
from vit_kernels.testing.counts import OperationCounts
from vit_kernels.testing.interpreter import corrected_interpreter
from vit_kernels.testing.poison import NanPadded, nan_filled_empty, nan_padded
from vit_kernels.testing.seeded import seeded_tensor
from vit_kernels.testing.tolerance import assert_close_to_reference

__all__ = [
    "NanPadded",
    "OperationCounts",
    "OutOfBounds",
    "assert_close_to_reference",
    "corrected_interpreter",
    "nan_filled_empty",
    "nan_padded",
    "seeded_tensor",
]
