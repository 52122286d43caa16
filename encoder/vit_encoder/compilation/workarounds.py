"""What torch gets wrong or does over and over while it compiles, mended for the length of a compilation.

All of it reaches into private parts of torch: each workaround is for the versions on which its fault was seen, and only
where those parts are as they were there. Where they are not, torch compiles as it would have, after one warning.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch._functorch.config

TORCH = ".".join(torch.__version__.split(".")[:2])
SEEN = ("2.11", "2.12", "2.13", "2.14", "2.15")
"""The versions that have all three faults. On 2.12 nothing was run: it has them as 2.11 and 2.13 do."""


@contextlib.contextmanager
def compilation_lock() -> Iterator[None]:
    """The reentrant lock that Dynamo compiles under: no other thread compiles with what is patched in the block."""
    from torch._dynamo.convert_frame import compile_lock  # loads Dynamo

    with compile_lock:
        yield


@contextlib.contextmanager
def workarounds() -> Iterator[None]:
    """Apply all workarounds, around a backend's compilation."""
    with compilation_lock(), regions_inferred_once(), first_instruction_set(), gradients_around_regions():
        yield


@functools.cache
def _applies(parts: Callable[[], Mapping[Any, str]]) -> bool:
    """Whether this torch is one of SEEN, and the `parts` take the arguments that they took there."""
    if TORCH not in SEEN:
        return False
    try:
        changed = [part for part, known in parts().items() if ", ".join(inspect.signature(part).parameters) != known]
    except (AttributeError, ImportError) as error:
        changed = [error]
    if changed:
        warnings.warn(f"torch {torch.__version__}: got another {changed[0]!r}; compiling without it", stacklevel=2)
    return not changed


def _inference() -> Mapping[Any, str]:
    from torch._subclasses import fake_tensor

    mode, arguments = fake_tensor.FakeTensorMode, "self, state, key, func, args, kwargs, output"
    return {
        fake_tensor._DispatchCacheValidEntry: "output_infos, is_output_tuple",
        mode._make_cache_entry: arguments,
        mode._validate_output_for_cache_entry: arguments,
        mode._get_output_info_for_cache_entry: arguments,
    }


@contextlib.contextmanager
def regions_inferred_once() -> Iterator[None]:
    """The shapes that a nested region returns are remembered for unbacked sizes too.

    FakeTensorMode remembers what an op made of which sizes, but nothing of a region whose results have an unbacked
    size, as the region may have made it. So 34 equal layers are run op by op, five times over. Here it is remembered
    where every size of the results came in with the arguments, which `_validate_output_for_cache_entry` checks.
    """
    if not _applies(_inference):
        yield
        return
    from torch._subclasses import fake_tensor

    make, entry = fake_tensor.FakeTensorMode._make_cache_entry, fake_tensor._DispatchCacheValidEntry
    region = torch.ops.higher_order.invoke_subgraph

    def remember(mode: Any, state: Any, key: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
        of_fakes = isinstance(output, tuple) and all(isinstance(x, fake_tensor.FakeTensor) for x in output)
        if func is not region or not of_fakes:
            return make(mode, state, key, func, args, kwargs, output)
        for x in output:
            mode._validate_output_for_cache_entry(state, key, func, args, kwargs, x)
        infos = [mode._get_output_info_for_cache_entry(state, key, func, args, kwargs, x) for x in output]
        return entry(output_infos=tuple(infos), is_output_tuple=True)

    with mock.patch.object(fake_tensor.FakeTensorMode, "_make_cache_entry", remember):
        yield


def _probing() -> Mapping[Any, str]:
    from torch._inductor import cpu_vec_isa  # loads triton

    return {cpu_vec_isa.valid_vec_isa_list.__wrapped__: ""}


@contextlib.contextmanager
def first_instruction_set() -> Iterator[None]:
    """Inductor uses the first of the processor's vector instruction sets that its compiler can build for, after it has
    compiled and loaded probes for all of them, in each new cache directory. Here it stops at the first.
    """
    if not _applies(_probing):
        yield
        return
    from torch._inductor import config, cpu_vec_isa

    every = cpu_vec_isa.valid_vec_isa_list

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


def _gradients() -> Mapping[Any, str]:
    from torch._functorch._aot_autograd import graph_compile
    from torch._inductor import ir

    return {
        graph_compile.collect_bw_donated_buffer_idxs: "fw_module, bw_module, fw_metadata",
        ir.InvokeSubgraph.create: "subgraph, operands",
    }


def regions_have_gradients() -> bool:
    """Whether gradients around nested regions are right under `gradients_around_regions`, for all that was seen."""
    return _applies(_gradients)


@contextlib.contextmanager
def gradients_around_regions() -> Iterator[None]:
    """Memory that a region's backward still reads is not used for something else.

    AOTAutograd tells Inductor which saved tensors nobody else needs, by their places among the backward's arguments,
    and a region's backward takes these for places among its own arguments (until torch 2.15). Here no tensor is given
    away, so that a backward may be run twice, as an eager one.

    A region's forward returns what it saves, among it its arguments and one tensor twice, and Inductor takes each
    result for memory of its own, free after its last use. Here no argument or result of a region's call is used again.

    Both happen while the backward is lowered, which must then be within the block, and neither is part of the key that
    Inductor's cache knows a graph by.
    """
    if not regions_have_gradients():
        yield
        return
    from torch._functorch._aot_autograd import graph_compile
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    create = ir.InvokeSubgraph.create

    def keeping(subgraph: Any, *operands: Any) -> Any:
        results: list[Any] = create(subgraph, *operands)
        tensors: list[Any] = [result for result in results if isinstance(result, ir.MultiOutput)]
        arguments = tensors[0].inputs[0].inputs if tensors else []
        kept = [x for x in (*tensors, *arguments) if not isinstance(x, ir.ShapeAsConstantBuffer)]
        V.graph.never_reuse_buffers.update(x.get_name() for x in kept)
        return results

    tag = f"{torch.compiler.config.cache_key_tag} regions keep their memory"
    with (
        mock.patch.object(graph_compile, "collect_bw_donated_buffer_idxs", return_value=[]),
        mock.patch.object(ir.InvokeSubgraph, "create", keeping),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        torch.compiler.config.patch(cache_key_tag=tag),  # type: ignore[attr-defined]
    ):
        yield
