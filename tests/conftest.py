"""What every test relies on: interpreted kernels, Hypothesis profiles, one thread, workers that do not meet, and
torchvision beside any torch.
"""

import os

from tests import workers

# Read when triton is imported, so before anything imports it. TRITON_INTERPRET=0 runs the tests marked `cuda`.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.update(workers.own_caches() | workers.search_path())

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from experiments.common.peers import allow_torchvision_beside_cpu_torch
from tests.gpu import REHEARSING

# Deterministic, so that a red run is red again; no deadline, because a first example compiles.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, print_blob=True, database=None)
settings.register_profile("quick", settings.get_profile("ci"), max_examples=3)
settings.register_profile("thorough", deadline=None, max_examples=200, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Under bare `pytest` too, what scripts/test.sh sets: small tensors are slower on two threads than on one.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)

allow_torchvision_beside_cpu_torch()


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Start a test that counts graphs or recompiles without what earlier tests compiled, and leave nothing behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The workers of `-n auto`, as scripts/test.sh asks for."""
    in_process = bool(config.getoption("trace") or config.getoption("capture") == "no")
    return workers.worker_count(
        cores=workers.cores(), memory=workers.memory(), files=config.args, in_process=in_process
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files marked `costly` first: a worker that begins one last would have the others wait."""
    items.sort(key=lambda item: item.get_closest_marker("costly") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests marked `cuda` where there is no such device, but in a rehearsal (tests/gpu.py)."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available() and not REHEARSING:
        pytest.skip("needs a CUDA or ROCm device")
