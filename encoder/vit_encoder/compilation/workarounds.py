"""What torch gets wrong or does over and over while it compiles, mended for the length of a compilation.

All of it reaches into private parts of torch 2.13; a version that lacks them compiles as it would have.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._subclasses import fake_impls, fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

compilation_lock = threading.RLock()


@contextlib.contextmanager
def workarounds() -> Iterator[None]:
    """All of them; around a backend's compilation."""
    with size_oblivious_views(), regions_inferred_once(), first_instruction_set():
        yield


@contextlib.contextmanager
def size_oblivious_views() -> Iterator[None]:
    """Under backed_size_oblivious Inductor 2.13 still guards on a strided view's size (`65*s > 65`), which costs a
    second graph for size 1: its `View.create` asks for the oblivious form for unbacked sizes only.
    """
    compute_stride = getattr(fake_impls, "_compute_stride", None)
    if compute_stride is None or not torch.fx.experimental._config.backed_size_oblivious:
        yield
        return

    def oblivious(old_shape: Any, old_stride: Any, new_shape: Any, size_oblivious: bool = False) -> Any:
        return compute_stride(old_shape, old_stride, new_shape, size_oblivious=True)

    with mock.patch.object(fake_impls, "_compute_stride", oblivious):
        yield


@contextlib.contextmanager
def regions_inferred_once() -> Iterator[None]:
    """The shapes that a nested region returns are remembered for unbacked sizes too.

    FakeTensorMode remembers what an op made of which sizes, but nothing of a region whose results have an unbacked
    size, as the region may have made it. So 34 equal layers are run op by op, five times over. Here it is remembered
    where every size of the results came in with the arguments, which `_validate_output_for_cache_entry` checks.
    """
    parts = ("_make_cache_entry", "_validate_output_for_cache_entry", "_get_output_info_for_cache_entry")
    entry = getattr(fake_tensor, "_DispatchCacheValidEntry", None)
    if entry is None or not all(hasattr(FakeTensorMode, part) for part in parts):
        yield
        return
    make = FakeTensorMode._make_cache_entry

    def remember(mode: Any, state: Any, key: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if func is not invoke_subgraph or not _is_tuple_of_fakes(output):
            return make(mode, state, key, func, args, kwargs, output)
        for x in output:
            mode._validate_output_for_cache_entry(state, key, func, args, kwargs, x)
        infos = [mode._get_output_info_for_cache_entry(state, key, func, args, kwargs, x) for x in output]
        return entry(output_infos=tuple(infos), is_output_tuple=True)

    with mock.patch.object(FakeTensorMode, "_make_cache_entry", remember):
        yield


def _is_tuple_of_fakes(output: Any) -> bool:
    return isinstance(output, tuple) and all(isinstance(x, FakeTensor) for x in output)


@contextlib.contextmanager
def first_instruction_set() -> Iterator[None]:
    """Inductor uses the first of the processor's vector instruction sets that its compiler can build for, after it has
    compiled and loaded probes for all of them, in each new cache directory. Here it stops at the first.
    """
    from torch._inductor import config, cpu_vec_isa  # loads triton

    every = cpu_vec_isa.valid_vec_isa_list
    if not hasattr(every, "__wrapped__"):
        yield
        return

    @functools.cache
    def first() -> Any:
        for candidate in cpu_vec_isa.supported_vec_isa_list:
            with mock.patch.object(cpu_vec_isa, "supported_vec_isa_list", [candidate]):
                if found := every.__wrapped__():
                    return found
        return []

    def enough() -> Any:
        chosen_by_user = config.cpp.simdlen is not None or "ATEN_CPU_CAPABILITY" in os.environ
        return every() if chosen_by_user else first()

    with mock.patch.object(cpu_vec_isa, "valid_vec_isa_list", enough):
        yield
