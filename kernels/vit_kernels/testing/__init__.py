"""Tools for proving kernels, for this project's tests and for yours.

- `corrected_interpreter`: run Triton kernels on a CPU, right in bf16, with every access checked.
"""

from vit_kernels.testing._bounds import OutOfBounds
from vit_kernels.testing.counts import OperationCounts
from vit_kernels.testing.interpreter import corrected_interpreter

__all__ = ["OperationCounts", "OutOfBounds", "corrected_interpreter"]
