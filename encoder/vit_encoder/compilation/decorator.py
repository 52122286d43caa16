"""The class decorator that compiles a module as one whole graph."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor, nn

from vit_encoder.compilation.config import CompilationConfig, DynamicShapes, should_torch_compile_mm_encoder
from vit_encoder.compilation.counter import compilation_counter

ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])

# Otherwise all instances of a class share one limit of graphs (recompile_limit, 8), and one instance's graph counts as
# another's recompilation. New in torch 2.13 or shortly before.
_ISOLATED = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}


def support_torch_compile(
    *,
    dynamic_arg_dims: Mapping[str, int | Sequence[int]],
    enable_if: Callable[[CompilationConfig], bool] = should_torch_compile_mm_encoder,
) -> Callable[[ModuleClass], ModuleClass]:
    """Compile a module class's calls with `fullgraph=True`, one graph for every size of the dynamic dimensions.

    An instance compiles at its first call, if `enable_if` says so of its attribute `compilation_config`, and again
    only if that attribute is replaced. All of Dynamo's guards stay: another dtype, rank, device, grad mode or
    `force_impl` compiles another graph. A module's method `validate_inputs`, if it has one, sees the arguments
    first: an exception raised inside a graph would reach the caller as a failure of Dynamo.
    Source: vLLM's `compilation/decorators.py` and its pull request 30709.

    Args:
        dynamic_arg_dims: forward's argument names, and which of their dimensions vary from call to call. None may
            be passed for such an argument.
        enable_if: whether to compile under a configuration.

    Raises:
        ValueError: an argument that forward does not have; at a call, a dynamic dimension of size 0, or gradients with
            the backend "eager".
        TypeError: the decorated object is not an nn.Module class; at a call, arguments that forward does not take.
    """

    def decorate(cls: ModuleClass) -> ModuleClass:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"support_torch_compile: got {cls!r}, expected a subclass of nn.Module")
        parameters = list(inspect.signature(cls.forward).parameters)[1:]
        if unknown := sorted(set(dynamic_arg_dims) - set(parameters)):
            raise ValueError(
                f"dynamic_arg_dims: got {', '.join(unknown)}, expected arguments of {cls.__name__}.forward: "
                f"{', '.join(parameters)}"
            )
        dims = {name: (dim,) if isinstance(dim, int) else tuple(dim) for name, dim in dynamic_arg_dims.items()}

        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            config: CompilationConfig | None = getattr(self, "compilation_config", None)
            if config is None or not enable_if(config) or torch.compiler.is_compiling():
                # A user's own module.compile() stays in force.
                compiled_here = hasattr(self, "_compiled_for")
                return (self._call_impl if compiled_here else self._wrapped_call_impl)(*args, **kwargs)
            bound = _signature(type(self).forward).bind(self, *args, **kwargs)
            if hasattr(self, "validate_inputs"):
                known = _signature(type(self).validate_inputs).parameters  # type: ignore[attr-defined]
                type(self).validate_inputs(  # type: ignore[attr-defined]
                    **{name: value for name, value in bound.arguments.items() if name in known}
                )
            _compile_once(self, config)
            shapes = _dynamic_shapes(config)
            for name, indices in dims.items():
                if (tensor := bound.arguments.get(name)) is not None:
                    bound.arguments[name] = _mark(name, tensor, indices, shapes)
            with _tracing(shapes):
                return self._wrapped_call_impl(*bound.args[1:], **bound.kwargs)

        cls.__call__ = call  # type: ignore[method-assign]
        return cls

    return decorate


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _compile_once(module: nn.Module, config: CompilationConfig) -> None:
    # A copied module keeps its attributes but not its compiled call.
    if module._compiled_call_impl is not None and getattr(module, "_compiled_for", None) == config:
        return
    backend = torch._dynamo.lookup_backend(config.backend)

    def counting_backend(graph: torch.fx.GraphModule, example_inputs: list[Any], **options: Any) -> Any:
        compilation_counter.graphs_seen += 1
        return backend(graph, example_inputs, **options)

    compilation_counter.models_seen += 1
    module.compile(backend=counting_backend, fullgraph=True, **_ISOLATED)
    module._compiled_for = config  # type: ignore[assignment]


def _dynamic_shapes(config: CompilationConfig) -> DynamicShapes:
    if torch.is_grad_enabled() and config.backend == "eager":
        # It differentiates a nested region through memory that it never filled.
        raise ValueError("backend: got 'eager' with gradients, expected torch.no_grad() or the backend 'aot_eager'")
    # torch 2.13's Inductor gives wrong gradients around a nested region with an unbacked size.
    if config.dynamic_shapes == "unbacked" and torch.is_grad_enabled():
        return "backed_size_oblivious"
    return config.dynamic_shapes


def _mark(name: str, tensor: Tensor, dims: tuple[int, ...], shapes: DynamicShapes) -> Tensor:
    for dim in dims:
        if tensor.shape[dim] == 0:
            raise ValueError(f"{name}: got size 0 in dimension {dim} of {tuple(tensor.shape)}, expected at least 1")
    # Marks are attributes of the tensor object: they go on an alias, not on the caller's tensor.
    alias = tensor.view_as(tensor)
    if shapes == "unbacked":
        torch._dynamo.decorators.mark_unbacked(alias, dims)
    else:
        torch._dynamo.mark_dynamic(alias, dims)
    return alias


def _tracing(shapes: DynamicShapes) -> contextlib.AbstractContextManager[Any]:
    if shapes == "backed_size_oblivious":
        return fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return contextlib.nullcontext()
