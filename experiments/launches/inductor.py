"""The CUDA code that Inductor generates for a graph, on a machine without a GPU: generated, never run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo.device_interface as device_interface
import torch.fx.experimental._config as fx_config
import torch.utils._triton
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from vit_encoder.testing import install_device_guard

from experiments.launches.launch import Launch, launches

# What Inductor asks of a device. Source: cudaGetDeviceProperties of an H100 SXM, as NVIDIA's data sheet and the
# "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide have it.
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * 2**30,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)

_CACHED_ANSWERS: tuple[Any, ...] = (torch.utils._triton.has_triton, DeviceProperties.create)


class NothingToRunError(Exception):
    """Raised where the generated code would run."""


@dataclass(frozen=True)
class Generated:
    """What Inductor generated for a graph.

    Attributes:
        code: the Python source of the wrapper, with the Triton kernels in it.
        launches: of one call.
        cudagraphs_refused: why Inductor itself would not capture it, or None.
    """

    code: str
    launches: list[Launch]
    cudagraphs_refused: str | None


def generate_cuda_code(function: Callable[..., Any], *args: Tensor, dynamic_tiles: bool = False) -> Generated:
    """Compile `function`, one whole graph, for an H100 up to the generated code, and stop there.

    Call it inside `fake_cuda()` in a process of its own, with a module and tensors on "cuda". Caches are off and
    nothing is benchmarked, so Inductor takes its default for every choice.

    Args:
        dynamic_tiles: the first dimension of each argument has a size that the graph does not know.
    """
    found: list[Generated] = []

    def stop(self: GraphLowering) -> Any:
        code, _ = self.codegen()
        found.append(Generated(code.value, launches(self, code.value), self.disable_cudagraphs_reason))
        return SimpleNamespace(call=never_run, __file__="")

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        with _pretended_h100(), mock.patch.object(GraphLowering, "compile_to_module", stop):
            compile_fx(graph, example_inputs)
        return never_run

    def never_run(*_: Any) -> Any:
        raise NothingToRunError

    torch._dynamo.reset()
    for arg in args if dynamic_tiles else ():
        torch._dynamo.mark_dynamic(arg, 0)
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=None if dynamic_tiles else False)
    with (
        contextlib.suppress(NothingToRunError),
        fx_config.patch(  # type: ignore[attr-defined]
            backed_size_oblivious=dynamic_tiles
        ),
    ):
        compiled(*args)
    (generated,) = found
    return generated


@contextlib.contextmanager
def _pretended_h100() -> Iterator[None]:
    """Answers for whatever Inductor asks of PyTorch and Triton about the device that is not present."""
    install_device_guard()

    def properties(*_: Any) -> SimpleNamespace:
        return H100

    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "device": lambda *_: contextlib.nullcontext(),
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_properties": properties,
        "get_device_capability": lambda *_: (H100.major, H100.minor),
        "synchronize": lambda *_: None,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
    }
    interface = {
        name: staticmethod(cuda[name])
        for name in ("current_device", "device_count", "get_device_properties", "synchronize")
    }
    stub = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0, is_active=lambda: True
    )
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name, value in interface.items():
            stack.enter_context(mock.patch.object(device_interface.CudaInterface, name, value))
        stack.enter_context(mock.patch.object(driver, "_active", stub))
        # Otherwise fake tensors, too, ask for the device that is now said to be there.
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(
            inductor_config.patch(
                {
                    "compile_threads": 1,
                    "force_disable_caches": True,
                    "shape_padding": False,
                    "joint_graph_constant_folding": False,
                    "triton.autotune_at_compile_time": False,
                }
            )
        )
        for answer in _CACHED_ANSWERS:
            answer.cache_clear()
        try:
            yield
        finally:
            for answer in _CACHED_ANSWERS:
                answer.cache_clear()
