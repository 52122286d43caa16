"""The compiled forms of one module instance: one callable for each range of sizes, and the checks it runs behind."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import TensorGuards

from vit_encoder.compilation.artifacts import artifacts
from vit_encoder.compilation.config import CompilationConfig, dump
from vit_encoder.compilation.context import ModelTag
from vit_encoder.compilation.counter import compilation_counter
from vit_encoder.compilation.workarounds import workarounds

# Otherwise all instances of a class share one limit of graphs (recompile_limit, 8), and one instance's graph counts as
# another's recompilation. New in torch 2.13 or shortly before.
_ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)

_CODE = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)

_graphs = itertools.count()
_dumps = itertools.count()


class StaleGraphError(Exception):
    """A parameter or buffer is no longer what its graph was made for."""


class CompiledModule:
    """The compiled calls of `module` under `config`; a copied or unpickled module gets a new one.

    Dynamo guards each parameter separately, which takes most of a call (34 layers: 123 us with guards, 26 us without).
    Here the tensors that the graph is about to read are compared with those of the last call, all at once; where
    one is another object, or any module was moved or cast, one `TensorGuards` checks the same of all of them (type,
    dtype, device, shape, strides, requires_grad). `parameter.data = ...` by hand is seen by neither.

    The other guards stay Dynamo's, but those on code, 10 us of a call (that a global function or class is still the
    same one. A function that is patched between two calls is not seen.
    """

    def __init__(self, module: nn.Module, config: CompilationConfig, tag: ModelTag) -> None:
        compilation_counter.models_seen += 1
        self.module = module
        self.config = config
        self.tag = tag
        self.ranges = config.ranges(tag.is_encoder)
        self.calls: dict[int, Callable[..., Any]] = {}
        self.seen: dict[int, tuple[Tensor, ...]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())

    def index_of(self, size: int) -> int:
        """Which range a size falls into.

        Raises:
            ValueError: it is above all ranges of a component that is not an encoder.
        """
        for index, (_, high) in enumerate(self.ranges):
            if size <= high:
                return index
        raise ValueError(
            f"compile_ranges_endpoints: got size {size} for {self.tag.name!r}, which is not an encoder, expected at "
            f"most {self.ranges[-1][1]}"
        )

    def __call__(self, index: int, *args: Any, **kwargs: Any) -> Any:
        if index not in self.calls:
            self.calls[index] = self._compile()
        try:
            return self.calls[index](*args, **kwargs)
        except StaleGraphError:
            compilation_counter.recompiles += 1
            self.calls[index] = self._compile()
            return self.calls[index](*args, **kwargs)

    def _compile(self) -> Callable[..., Any]:
        backend = _Backend(self.config, self.tag.name, weakref.ref(self))
        options: dict[str, Any] = {"guard_filter_fn": backend.keep}
        call = self.module._call_impl
        return torch.compile(call, backend=backend, fullgraph=True, options=options, **_ISOLATED)


class _Backend:
    """Counts, caches and dumps around the real backend, and the check of the parameters."""

    def __init__(self, config: CompilationConfig, tag: str, owner: weakref.ref[CompiledModule]) -> None:
        self.config = config
        self.tag = tag
        self.owner = owner
        self.graphs = 0
        self.checked: set[str] = set()

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any], **options: Any) -> Callable[..., Any]:
        compilation_counter.graphs_seen += 1
        compilation_counter.recompiles += self.graphs > 0
        self.graphs += 1
        if self.config.debug_dump_path is not None:
            text = f"{self.config.as_text()}\n\n{graph.print_readable(print_output=False)}"
            dump(self.config.debug_dump_path, f"{self.tag}/graph-{next(_dumps)}.txt", text)
        sources = [getattr(node, "_dynamo_source", None) for node in graph.graph.find_nodes(op="placeholder")]
        names = [source.name if source is not None else "" for source in sources]
        indices = [index for index, name in enumerate(names) if "._parameters[" in name or "._buffers[" in name]
        self.checked.update(names[index] for index in indices)
        return _checking(self._compile(graph, example_inputs, options), indices, self.owner, next(_graphs))

    def keep(self, entries: list[Any]) -> list[bool]:
        """Which of Dynamo's guards stay: all but those on tensors that are checked here, and on what never changes."""
        names = [entry.orig_guard.originating_source.name for entry in entries]
        return [
            name not in self.checked and not _is_code(entry, name) and not _is_part_of_module(entry, name)
            for entry, name in zip(entries, names, strict=True)
        ]

    def _compile(
        self, graph: torch.fx.GraphModule, example_inputs: list[Any], options: dict[str, Any]
    ) -> Callable[..., Any]:
        backend = torch._dynamo.lookup_backend(self.config.backend)
        if self.config.backend != "inductor":
            compilation_counter.backend_compilations += 1
            return backend(graph, example_inputs, **options)
        if inductor_options := self.config.options():
            options = {"config_patches": inductor_options}
        hits = _cache_hits()
        with artifacts(graph, self.config, self.tag), workarounds():
            compiled = backend(graph, example_inputs, **options)
        hit = _cache_hits() > hits
        compilation_counter.cache_hits += hit
        compilation_counter.backend_compilations += not hit
        return compiled


def _is_code(entry: Any, name: str) -> bool:
    """Whether a guard is on a module, function or class that forward finds among the globals, not in its arguments."""
    return isinstance(entry.value, _CODE) and "L[" not in name


def _is_part_of_module(entry: Any, name: str) -> bool:
    """Whether a guard is on the type of the dictionaries that every nn.Module has."""
    return entry.guard_type == "TYPE_MATCH" and name.endswith(("._modules", "._parameters", "._buffers"))


def _cache_hits() -> int:
    from torch._dynamo.utils import counters  # loads triton

    return max(counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"])


class _Moves:
    """How often this process has moved or cast a module, which changes its parameters in place."""

    count = 0


@functools.cache
def _count_moves() -> None:
    apply = nn.Module._apply

    @functools.wraps(apply)
    def counting(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        try:
            return apply(self, *args, **kwargs)
        finally:
            _Moves.count += 1

    nn.Module._apply = counting  # type: ignore[method-assign]


def _checking(
    compiled: Callable[..., Any], indices: list[int], owner: weakref.ref[CompiledModule], number: int
) -> Callable[..., Any]:
    """`compiled`, behind a check that the tensors at `indices` are what they were at the first call.

    The very objects of the last call need no second look, unless a module was moved or cast since.
    """
    if not indices:
        return compiled
    _count_moves()
    pick = operator.itemgetter(*indices) if len(indices) > 1 else operator.itemgetter(slice(indices[0], indices[0] + 1))
    check: Callable[..., bool] | None = None
    small: list[int] = []
    moves = -1

    def call(*args: Any) -> Any:
        nonlocal check, small, moves
        tensors: tuple[Tensor, ...] = pick(args)
        # Their owner keeps them: this closure outlives it in Dynamo's cache.
        module = owner()
        if module is None or moves != _Moves.count or not _are(tensors, module.seen.get(number, ()), small):
            moves = _Moves.count
            if check is None:
                check, small = _tensor_guards(tensors), [i for i, x in enumerate(tensors) if x.numel() < 2]
            if not check(*tensors):
                raise StaleGraphError
            if module is not None:
                module.seen[number] = tensors
        return compiled(*args)

    return call


def _are(tensors: tuple[Tensor, ...], seen: tuple[Tensor, ...], small: list[int]) -> bool:
    """Whether these are the same objects: tuples compare identity first, in C.

    Where it differs they compare values, of which only those of a `small` tensor's one element have a truth.
    """
    try:
        return tensors == seen and all(tensors[index] is seen[index] for index in small)
    except Exception:
        return False


def _tensor_guards(tensors: tuple[Tensor, ...]) -> Callable[..., bool]:
    sizes: list[Any] = [list(x.shape) for x in tensors]
    strides: list[Any] = [list(x.stride()) for x in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
