"""What the tests that need a GPU share. With VIT_KERNELS_REHEARSAL=1 the CPU and Triton's interpreter stand in for it,
on small shapes: so that what is to run on a GPU has run somewhere before.
"""

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch
from vit_kernels import force_impl
from vit_kernels.testing import corrected_interpreter

REHEARSING = os.environ.get("VIT_KERNELS_REHEARSAL") == "1" and not torch.cuda.is_available()
DEVICE = torch.device("cpu" if REHEARSING else "cuda")
BACKEND = "aot_eager" if REHEARSING else "inductor"


@pytest.fixture
def launching() -> Iterator[None]:
    """Ops launch their kernels, as they do of themselves on a GPU."""
    with contextlib.ExitStack() as stack:
        if REHEARSING:
            stack.enter_context(corrected_interpreter())
            stack.enter_context(force_impl("triton"))
        yield
