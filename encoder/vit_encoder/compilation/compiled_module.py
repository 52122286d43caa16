"""The compiled forms of one module instance, one callable for each range of sizes."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx.experimental._config as fx_config
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vit_encoder.compilation.cache import artifacts
from vit_encoder.compilation.config import CompilationConfig, dump
from vit_encoder.compilation.counter import compilation_counter
from vit_encoder.compilation.thread_state import ModelTag, tracing
from vit_encoder.compilation.workarounds import TORCH, compilation_lock, gradients_around_regions, workarounds

# Otherwise all instances of a class share one limit of graphs, and one instance's graph counts as another's
# recompilation. Where torch cannot do it (2.11), each gets code of its own: `_own_call`.
ISOLATES = "isolate_recompiles" in inspect.signature(torch.compile).parameters

# An encoder whose layers are unfrozen one after the other has a graph for each: Dynamo's own limit is 8.
_OF_AN_INSTANCE: dict[str, Any] = {
    name: value
    for name, value in (("isolate_recompiles", True), ("recompile_limit", 64))
    if name in inspect.signature(torch.compile).parameters
}

_dumps = itertools.count()


class CompiledModule:
    """The compiled calls of a module under `config`; a copied or unpickled module gets a new one.

    Dynamo's guards decide which graph runs, and a graph reads the parameters that the module has at the call. The
    replicas that DataParallel makes for one call share their module's.
    """

    def __init__(self, module: nn.Module, config: CompilationConfig, tag: ModelTag) -> None:
        compilation_counter.models_seen += 1
        self.module = weakref.ref(module)
        self.config = config
        self.tag = tag
        self.ranges = config.ranges(tag.is_encoder)
        self.calls: dict[int, Callable[..., Any]] = {}
        self.compiled: set[tuple[int, bool, bool]] = set()
        # Under `frozen_parameters` the modules inside of it, and the classes that these had when it was compiled.
        self.parts: list[nn.Module] = []
        self.classes: list[type] = []
        self.one_at_a_time = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())

    def serves(self, module: nn.Module, config: CompilationConfig) -> bool:
        """Whether it was made for this module and configuration."""
        same = self.module() is module or (getattr(module, "_is_replica", False) and not config.frozen_parameters)
        return same and (self.config is config or self.config == config)

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

    def __call__(self, index: int, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the graph that fits, or make it: one thread at a time, and for the others to find it then."""
        key = (index, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        known = key in self.compiled
        if [*map(type, self.parts)] != self.classes:
            self._show_classes()
        # Dynamo would split the graph of a module that DistributedDataParallel is calling.
        if known and DistributedDataParallel._get_active_ddp_module() is None:
            try:
                return self.calls[index](module, *args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException:
                # `_MustCompile`, or tracing failed without what comes first below; nothing has run yet.
                known = False
        # While another thread compiles, in whichever module, guards fail that hold otherwise.
        alone = contextlib.nullcontext() if known else compilation_lock()
        with alone, self.one_at_a_time, _compiling(self.config):
            _refuse_sharded(module)
            for part in module.modules():
                if prepare := getattr(part, "prepare_compilation", None):
                    prepare()
            if index not in self.calls:
                self.calls[index] = self._compile()
            out = self.calls[index](module, *args, **kwargs)
            self.compiled.add(key)
            if self.config.frozen_parameters:
                self.parts = [*module.modules()][1:]
                self.classes = [*map(type, self.parts)]
        return out

    def _show_classes(self) -> None:
        """Make Dynamo look at the modules that got another class, which does not change the tag of their `__dict__`."""
        for part, known in zip(self.parts, self.classes, strict=True):
            if type(part) is not known:
                vars(part)["_class_changed"] = True
                del vars(part)["_class_changed"]
        self.classes = [*map(type, self.parts)]

    def _compile(self) -> Callable[..., Any]:
        options: dict[str, Any] = {"guard_filter_fn": _keep_others} if self.config.frozen_parameters else {}
        backend = _Backend(self.config, self.tag.name)
        call = nn.Module._call_impl if ISOLATES else _own_call()
        return torch.compile(call, backend=backend, fullgraph=True, options=options, **_OF_AN_INSTANCE)


def _own_call() -> Callable[..., Any]:
    """`_call_impl` in a code object that no graph was made of yet: Dynamo keeps its graphs by code object."""

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    return types.FunctionType(call.__code__.replace(), globals(), call.__name__)


def _refuse_sharded(module: nn.Module) -> None:
    """Dynamo cannot trace the hooks by which FSDP gathers parameters.

    Raises:
        ValueError: the module, or one in it, is sharded.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # loading it takes a second
    for name, part in module.named_modules() if fsdp is not None else ():
        if isinstance(part, fsdp.FSDPModule | fsdp.FullyShardedDataParallel):
            raise ValueError(
                f"compilation_config: got one that compiles the whole module, whose {name or 'own class'!r} is sharded "
                "by FSDP, expected one that does not; call `layer.compile(fullgraph=True, dynamic=True)` on each layer "
                "before it is sharded"
            )


class _MustCompile(Exception):  # noqa: N818 (it never reaches a caller)
    """No graph fits, in a call that was not made for compiling."""


@contextlib.contextmanager
def _compiling(config: CompilationConfig) -> Iterator[None]:
    """What Dynamo is told while it traces; telling it takes too long for every call."""
    # Of itself Dynamo ignores hooks that a module gets after its graph was made.
    options: dict[str, Any] = {"optimize_ddp": False, "specialize_float": True, "skip_nnmodule_hook_guards": False}
    # Guards inside of modules whose `__dict__` is what it was are not evaluated. Tensors count as what never changes,
    # which holds where parameters are frozen only.
    options["use_recursive_dict_tags_for_guards"] = config.frozen_parameters
    if TORCH in ("2.11", "2.12"):
        # Otherwise these do not look at a parameter again whose dtype or `requires_grad` changed in place.
        options["skip_tensor_guards_with_matching_dict_tags"] = False
    # Else references to the parameters stay, and those of a tensor subclass cannot be moved.
    if isinstance(config.backend, str):
        options["invalidate_compile_context_weakrefs"] = True
    dynamo = torch._dynamo.config.patch(
        {name: on for name, on in options.items() if hasattr(torch._dynamo.config, name)}
    )
    oblivious = config.dynamic_shapes == "backed_size_oblivious" and not torch.is_grad_enabled()
    outer, tracing.may_compile = tracing.may_compile, True
    try:
        with dynamo, fx_config.patch(backed_size_oblivious=oblivious):  # type: ignore[attr-defined]
            yield
    finally:
        tracing.may_compile = outer


def _keep_others(entries: list[Any]) -> list[bool]:
    """Which of Dynamo's guards stay: all but those on the parameters of the module."""
    return [
        not (isinstance(entry.value, nn.Parameter) and "._parameters[" in entry.orig_guard.originating_source.name)
        for entry in entries
    ]


class _Backend:
    """Counts, caches and dumps around the real backend."""

    def __init__(self, config: CompilationConfig, tag: str) -> None:
        self.config = config
        self.tag = tag
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any], **options: Any) -> Callable[..., Any]:
        if not tracing.may_compile:
            raise _MustCompile
        compilation_counter.graphs_seen += 1
        compilation_counter.recompiles += self.graphs > 0
        self.graphs += 1
        if self.config.debug_dump_path is not None:
            text = f"{self.config.as_text()}\n\n{graph.print_readable(print_output=False)}"
            dump(self.config.debug_dump_path, f"{self.tag}/graph-{next(_dumps)}.txt", text)
        return self._compile(graph, example_inputs, options)

    def _compile(
        self, graph: torch.fx.GraphModule, example_inputs: list[Any], options: dict[str, Any]
    ) -> Callable[..., Any]:
        backend = torch._dynamo.lookup_backend(self.config.backend)
        if self.config.backend != "inductor":
            compilation_counter.backend_compilations += 1
            # Else torch refuses a second backward, which eager calls and Inductor under the workarounds have.
            again = gradients_around_regions() if torch.is_grad_enabled() else contextlib.nullcontext()
            with again:
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


def _cache_hits() -> int:
    from torch._dynamo.utils import counters  # loads triton

    return max(counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"])
