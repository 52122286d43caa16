"""The class decorator that compiles a module as one whole graph."""

from __future__ import annotations

import functools
import inspect
import itertools
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from vit_encoder.compilation.compiled_module import ISOLATES, CompiledModule
from vit_encoder.compilation.config import (
    MAX_INT,
    CompilationConfig,
    DynamicShapes,
    compilation_is_off,
    should_torch_compile_mm_encoder,
)
from vit_encoder.compilation.context import claim_tag
from vit_encoder.compilation.thread_state import ModelTag, surroundings, tracing
from vit_encoder.compilation.workarounds import regions_have_gradients

ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])
Dims = Mapping[str, int | Sequence[int]]

_OFF = compilation_is_off()


@dataclass(frozen=True, init=False)
class DynamicDims:
    """An annotation of forward's arguments: `x: Annotated[Tensor, DynamicDims(0)]` varies in dimension 0."""

    dims: tuple[int, ...]

    def __init__(self, *dims: int) -> None:
        object.__setattr__(self, "dims", dims)


@dataclass(frozen=True)
class _Settings:
    """What the decorator was told about a class."""

    dims: Mapping[str, tuple[int, ...]]
    unbacked: Mapping[str, tuple[int, ...]]
    enable_if: Callable[[CompilationConfig], bool]
    is_encoder: bool


def support_torch_compile(
    *,
    dynamic_arg_dims: Dims | None = None,
    mark_unbacked_dims: Dims | None = None,
    enable_if: Callable[[CompilationConfig], bool] = should_torch_compile_mm_encoder,
    is_encoder: bool = False,
) -> Callable[[ModuleClass], ModuleClass]:
    """Compile a module class's calls with `fullgraph=True`, one graph for every size of the dynamic dimensions.

    An instance compiles at its first call, if `enable_if` says so of the configuration in force: that of its attribute
    `compilation_config`, else of the forward context, else the default; and again only under another one. Another
    dtype, rank, device, grad mode or `force_impl`, and parameters of another shape, compile another graph. A module's
    method `validate_inputs`, if it has one, sees the arguments first: an exception raised inside a graph would reach
    the caller as a failure of Dynamo. Its method `prepare_compilation`, and that of a part, is
    called before each compilation. Under a TorchDispatchMode that sees every op (a flop counter), and while a hook on
    all modules of the process is registered (`register_module_forward_hook`), the call is eager.
    Subclasses inherit all this; `ignore_torch_compile` opts out.
    Source: vLLM's `compilation/decorators.py` and its pull request 30709.

    Args:
        dynamic_arg_dims: forward's argument names, and which of their dimensions vary from call to call, negative ones
            counted from the back; by default those annotated with `DynamicDims`. None may be passed for such an
            argument. The first dimension of the
            first such argument decides which compile range a call falls into.
        mark_unbacked_dims: dimensions that are traced unbacked whatever the configuration's `dynamic_shapes` say.
        enable_if: whether to compile under a configuration.
        is_encoder: no upper bound on the sizes, as for `set_model_tag`.

    Raises:
        ValueError: an argument that forward does not have, no dynamic dimension at all; at a call, a dynamic dimension
            that an argument does not have or of size 0, a size above all compile ranges, gradients with the backend
            "eager" or with `frozen_parameters`, a forward-mode tangent, or a torch.func transform around the call.
        TypeError: the decorated object is not an nn.Module class, or dimensions that are no ints; at a call, arguments
            that forward does not take, or something else than a dense tensor for one with dynamic dimensions.
    """

    def decorate(cls: ModuleClass) -> ModuleClass:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"support_torch_compile: got {cls!r}, expected a subclass of nn.Module")
        dims = _annotated_dims(cls) if dynamic_arg_dims is None else dynamic_arg_dims
        owner: Any = cls  # of attributes that its instances' calls read
        owner._compile_settings = _Settings(
            _checked_dims(cls, "dynamic_arg_dims", dims),
            _checked_dims(cls, "mark_unbacked_dims", mark_unbacked_dims or {}),
            enable_if,
            is_encoder,
        )
        owner.__init__ = _tagged(owner.__init__)
        owner.__call__ = _call
        return cls

    return decorate


def ignore_torch_compile(cls: ModuleClass) -> ModuleClass:
    """Opt a subclass of a decorated class out: it is never compiled.

    Raises:
        TypeError: none of its bases is decorated.
    """
    owner: Any = cls
    settings = getattr(owner, "_compile_settings", None)
    if settings is None:
        raise TypeError(f"ignore_torch_compile: got {cls!r}, expected a subclass of a decorated class")
    owner._compile_settings = replace(settings, enable_if=lambda config: False)
    return cls


def _checked_dims(cls: type[nn.Module], name: str, dims: Dims) -> dict[str, tuple[int, ...]]:
    if not isinstance(dims, Mapping):
        raise TypeError(f"{name}: got {dims!r}, expected a mapping of arguments to dimensions")
    parameters = argument_names(cls)
    if unknown := sorted(map(str, dims.keys() - set(parameters))):
        raise ValueError(
            f"{name}: got {', '.join(unknown)}, expected arguments of {cls.__name__}.forward: {', '.join(parameters)}"
        )
    found = {argument: tuple(of) if isinstance(of, Sequence) else (of,) for argument, of in dims.items()}
    for argument, of in found.items():
        if not of or not all(type(dim) is int for dim in of):
            raise TypeError(f"{name}: got {dims[argument]!r} for {argument}, expected one or more ints")
    return found


def _annotated_dims(cls: type[nn.Module]) -> dict[str, tuple[int, ...]]:
    hints = typing.get_type_hints(cls.forward, include_extras=True)
    found = {name: mark.dims for name, hint in hints.items() for mark in _marks(hint)}
    if not found:
        raise ValueError(
            f"dynamic_arg_dims: got None, and no argument of {cls.__name__}.forward is annotated with DynamicDims; "
            "expected one of the two"
        )
    return found


def _marks(hint: Any) -> Iterator[DynamicDims]:
    if typing.get_origin(hint) is Annotated:
        yield from (mark for mark in hint.__metadata__ if isinstance(mark, DynamicDims))
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from _marks(part)


def _tagged(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def tagged(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.__dict__.setdefault("_model_tag", claim_tag(type(self)))
        # Dynamo cannot look at a signature.
        self.__dict__.setdefault("_forward_arguments", tuple(argument_names(type(self))))
        init(self, *args, **kwargs)

    return tagged


@functools.cache
def _default_config() -> CompilationConfig:
    # Not at import: checking it loads all of Dynamo.
    return CompilationConfig()


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


@functools.cache
def _places(cls: Any) -> dict[str, int]:
    """Where forward takes its positional arguments."""
    parameters = list(_signature(cls.forward).parameters.values())[1:]
    return {
        parameter.name: place
        for place, parameter in enumerate(parameters)
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }


def argument_names(cls: type[nn.Module]) -> list[str]:
    """What forward takes, in its order."""
    return list(_signature(cls.forward).parameters)[1:]


@functools.cache
def _arity(cls: Any) -> tuple[int, int]:
    """How few and how many positional arguments forward takes without others."""
    parameters = list(_signature(cls.forward).parameters.values())[1:]
    return sum(parameter.default is parameter.empty for parameter in parameters), len(_places(cls))


@functools.cache
def _validated(cls: Any) -> tuple[str, ...]:
    """The arguments that `validate_inputs` wants to see."""
    return tuple(_signature(cls.validate_inputs).parameters)[1:] if hasattr(cls, "validate_inputs") else ()


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return self._wrapped_call_impl(*_completed(self._forward_arguments, args, kwargs), **kwargs)
    settings, context = self._compile_settings, surroundings.context
    config = getattr(self, "compilation_config", None) or (context and context.config) or _default_config()
    metadata = context.attention_metadata if context is not None else None
    # Binding every call would take a tenth of it. Without isolation Dynamo sees how an argument is passed.
    fewest, most = _arity(self.__class__)
    if kwargs or metadata or not ISOLATES or not fewest <= len(args) <= most:
        args, kwargs = _bound(self, args, kwargs, metadata or {})
    if _OFF or not settings.enable_if(config) or _is_watched():
        return self._wrapped_call_impl(*args, **kwargs)
    return _run(self, settings, config, list(args), kwargs)


def _is_watched() -> bool:
    """Whether a hook wants to see every module, which Dynamo does not guard, or a dispatch mode every op, as a counter
    of flops does: under that Dynamo compiles nothing.
    """
    if _has_any_global_hook():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    modes = _get_current_dispatch_mode_stack()
    return any(not (mode.is_infra_mode() or mode.ignore_compile_internals()) for mode in modes)


def _completed(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call that a graph around it traces; what the context has of the missing ones joins `kwargs`.

    The graph then reads and guards these tensors: another batch may compile again.
    """
    context = surroundings.context
    for name, tensor in context.attention_metadata.items() if context is not None else ():
        place = names.index(name) if name in names else len(args)
        if place < len(args):
            args = args if args[place] is not None else (*args[:place], tensor, *args[place + 1 :])
        elif name in names and kwargs.get(name) is None:
            kwargs[name] = tensor
    return args


def _bound(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], metadata: Mapping[str, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with as many of them positional as can be, and those of the context that are missing."""
    bound = _signature(type(module).forward).bind(module, *args, **kwargs)
    for name, tensor in metadata.items():
        if name in bound.signature.parameters and bound.arguments.get(name) is None:
            bound.arguments[name] = tensor
    bound.apply_defaults()
    return bound.args[1:], bound.kwargs


def _run(module: Any, settings: _Settings, config: CompilationConfig, args: list[Any], kwargs: dict[str, Any]) -> Any:
    places = _places(module.__class__)

    def given(name: str) -> Any:
        place = places.get(name, len(args))
        return args[place] if place < len(args) else kwargs.get(name)

    aliases: list[Tensor] = []

    def aliased(tensor: Tensor) -> Tensor:
        """The tensor's alias, put in all of its places: Dynamo guards which arguments are one tensor."""
        if any(tensor is alias for alias in aliases):
            return tensor
        aliases.append(alias := _alias(tensor))
        args[:] = [alias if x is tensor else x for x in args]
        kwargs.update({name: alias for name, x in kwargs.items() if x is tensor})
        return alias

    _check_transforms(module, args, kwargs)
    if validated := _validated(module.__class__):
        module.validate_inputs(*map(given, validated))
    gradients = torch.is_grad_enabled()
    if gradients:
        _check_gradients(module, config, [*args, *kwargs.values()])
    compiled = _compiled_module(module, settings, config)
    # torch 2.13 otherwise takes the strides of what it saves for the backward as fixed.
    oblivious = config.dynamic_shapes == "backed_size_oblivious"
    shapes: DynamicShapes = "unbacked" if gradients and oblivious else config.dynamic_shapes
    index = None
    for name, dims in settings.dims.items():
        if (tensor := given(name)) is not None:
            dims = dims_of(name, tensor, dims)
            alias = aliased(tensor)
            if index is None:
                index = compiled.index_of(tensor.shape[dims[0]])
                _mark(alias, dims[:1], shapes, compiled.ranges[index])
                dims = dims[1:]
            _mark(alias, dims, shapes)
    for name, dims in settings.unbacked.items():
        if (tensor := given(name)) is not None:
            _mark(aliased(tensor), dims_of(name, tensor, dims), "unbacked")
    outer = tracing.has_regions, tracing.prepared
    tracing.has_regions, tracing.prepared = gradients and _has_regions(config), True
    try:
        return compiled(index or 0, module, *args, **kwargs)
    finally:
        tracing.has_regions, tracing.prepared = outer


def _compiled_module(module: Any, settings: _Settings, config: CompilationConfig) -> CompiledModule:
    # Deep copies and unpickled modules find None here, shallow copies their original's.
    compiled: CompiledModule | None = module.__dict__.get("_compiled_module")
    if compiled is None or not compiled.serves(module, config):
        tag = module.__dict__.get("_model_tag") or ModelTag(type(module).__qualname__, False)
        compiled = CompiledModule(module, config, replace(tag, is_encoder=tag.is_encoder or settings.is_encoder))
        module.__dict__["_compiled_module"] = compiled
    return compiled


def _check_transforms(module: nn.Module, args: list[Any], kwargs: dict[str, Any]) -> None:
    """Refuse what a graph would drop (tangents) or cannot be made for (torch.func around it)."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ValueError(
            "torch.func: got a compiled module called by a transform, expected torch.compile around the transform, or "
            "a configuration that does not compile the module"
        )
    if forward_ad._current_level < 0:
        return
    given = itertools.chain(zip(argument_names(type(module)), args, strict=False), kwargs.items())
    # The weights of replicas are plain attributes.
    own = (item for part in module.modules() for item in (part._parameters | part._buffers | vars(part)).items())
    for name, x in itertools.chain(given, own):
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise ValueError(f"{name}: got a tensor with a tangent, expected none: a graph would drop it")


def _check_gradients(module: nn.Module, config: CompilationConfig, args: list[Any]) -> None:
    if config.backend == "eager":
        # It differentiates a nested region through memory that it never filled.
        raise ValueError("backend: got 'eager' with gradients, expected torch.no_grad() or the backend 'aot_eager'")
    if config.frozen_parameters:
        inputs = (x for x in args if isinstance(x, Tensor))
        if any(x.requires_grad for x in itertools.chain(inputs, module.parameters())):
            raise ValueError(
                "frozen_parameters: got True with gradients, expected torch.no_grad(), or no parameter and no argument "
                "that requires a gradient"
            )


def _has_regions(config: CompilationConfig) -> bool:
    """Whether nested regions keep their gradients right; who knows how a callable compiles."""
    return config.backend in ("inductor", "aot_eager") and regions_have_gradients()


def dims_of(name: str, tensor: Tensor, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Dynamic dimensions of an argument, counted from the front.

    Raises:
        TypeError: it is no dense tensor.
        ValueError: it does not have these dimensions, or one has size 0.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"{name}: got a tensor that is nested or of layout {tensor.layout}, expected a dense one")
    rank = tensor.dim()
    for dim in dims:
        if not -rank <= dim < rank:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected one with the dynamic dimension {dim}")
        if tensor.shape[dim] == 0:
            raise ValueError(f"{name}: got size 0 in dimension {dim} of {tuple(tensor.shape)}, expected at least 1")
    return _from_the_front(dims, rank)


@functools.cache
def _from_the_front(dims: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys(dim % rank for dim in dims))


def _alias(tensor: Tensor) -> Tensor:
    # Marks are attributes of the tensor object: they go on an alias, not on the caller's tensor. A detached one has no
    # base that Dynamo would trace too.
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach()


def _mark(alias: Tensor, dims: tuple[int, ...], shapes: DynamicShapes, between: tuple[int, int] = (1, MAX_INT)) -> None:
    if not dims:
        return
    low, high = between
    if low == high:
        torch._dynamo.mark_static(alias, dims[0])
        return
    mark = torch._dynamo.decorators.mark_unbacked if shapes == "unbacked" else torch._dynamo.mark_dynamic
    if between == (1, MAX_INT) or not _takes_bounds(mark):
        for dim in dims:
            mark(alias, dim)
    else:
        mark(alias, dims[0], min=low, max=None if high == MAX_INT else high)


@functools.cache
def _takes_bounds(mark: Callable[..., None]) -> bool:
    """Whether the sizes can be bounded; `mark_unbacked` of torch 2.11 cannot: its graph holds beyond the range too."""
    return "min" in _signature(mark).parameters
