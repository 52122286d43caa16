"""Tensors on a "cuda" device that holds no data, so that the CUDA path can be traced on a machine without a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

_DEVICE_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
extern "C" void install_device_guard() {
  static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
  auto& slot = c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)];
  if (slot.load() == nullptr) slot.store(&guard);
}
"""


@functools.cache
def install_device_guard() -> None:
    """Let this process handle fake tensors on "cuda": a CPU build of torch has no device guard for it.

    Compiles a few lines of C++ once a machine (Inductor's cache keeps them); nothing to do on a CUDA build.
    For a process of its own: afterwards torch believes that CUDA tensors exist, though none can be made.
    """
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()
        return
    from torch._inductor.codecache import CppCodeCache

    # Inductor's libraries are not linked against torch's: make the registry's symbol visible to them.
    ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"), mode=ctypes.RTLD_GLOBAL)
    CppCodeCache.load(_DEVICE_GUARD).install_device_guard()


@contextlib.contextmanager
def fake_cuda(dtype: torch.dtype = torch.float32) -> Iterator[FakeTensorMode]:
    """Tensors made in the block are fake ones, of `dtype` by default (a fake module cannot be cast), without gradients.

    Modules built in it under `torch.device("cuda")` can be traced by torch.compile with a backend that does not run
    anything, with `CompilationConfig(dynamic_shapes="backed_size_oblivious")`: fake tensors cannot be marked unbacked.
    """
    install_device_guard()
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode() as mode, torch.no_grad():
            yield mode
    finally:
        torch.set_default_dtype(previous)
