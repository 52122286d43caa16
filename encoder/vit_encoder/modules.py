"""What an encoder may take for granted of its modules, which their owner may have hooked, wrapped, quantised or cut."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from vit_encoder.compilation import compiles_regions
from vit_encoder.compilation.thread_state import tracing

# Names, as importing the latter two loads much of torch: they stand for a plain parameter while it is traced.
_PLAIN = ("Parameter", "Tensor", "FakeTensor", "FunctionalTensor")


def can_nest_regions(layer: Any) -> bool:
    """Whether a layer may be a nested region of the graph being traced.

    Not where gradients would be wrong around it, as `compiles_regions` knows; not in `torch.compile(dynamic=True)`,
    which makes an input of every float, such as a norm's eps: torch 2.13 cannot trace one inside a region; and not
    where `has_plain_parts` or `has_aliased_parts` forbids it. These are noted before a decorated module's compilation:
    looked at while Dynamo traces, each part becomes a guard, 330 us of a call with 34 layers. What the notes are about
    is guarded where the layer itself is traced, and a new compilation notes it anew.
    """
    if not torch.compiler.is_compiling() or not torch._dynamo.config.assume_static_by_default:
        return False
    if tracing.prepared:
        plain: bool = layer.plain_parts and not (torch.is_grad_enabled() and layer.aliased_parts)
        return plain and compiles_regions()
    return compiles_regions() and has_plain_parts(layer) and not (has_aliased_parts(layer) and torch.is_grad_enabled())


def has_plain_parts(layer: nn.Module) -> bool:
    """Whether nothing in a layer keeps torch from calling it as a region.

    That is a weight which wraps others (quantised or sharded); a module with a hook or a forward of its own, which may
    keep what it sees, or swap weights; and a module of a class of others (an adapter, a parametrisation), for which
    torch 2.13 would reuse the region of a layer that has none. The layer's own forward is around its region.
    """
    known = ("vit_encoder.", "torch.nn.modules.", "transformers.", "vllm.")
    if not all(type(module).__module__.startswith(known) for module in layer.modules()):
        return False
    if any(has_hooks(module) or ("forward" in vars(module) and module is not layer) for module in layer.modules()):
        return False
    return not any(hasattr(type(parameter), "__tensor_flatten__") for parameter in layer.parameters())


def has_aliased_parts(layer: nn.Module) -> bool:
    """Whether parameters are views of one tensor: with gradients no two inputs of a region may be."""
    return any(getattr(module, "has_aliased_parameters", False) for module in layer.modules())


def prepare_layers(layers: nn.ModuleList) -> None:
    """Note of each layer what `can_nest_regions` asks."""
    for layer in layers:
        layer.plain_parts = has_plain_parts(layer)  # type: ignore[assignment]
        layer.aliased_parts = has_aliased_parts(layer)  # type: ignore[assignment]


def guarded_layer_by_layer(results: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The results of a layer as its nested region returns them.

    Where all of them are tensors, torch 2.13 traces a region once, and reuses it for the other layers without a guard
    on anything in them but their parameters. With a result that is none, it traces and guards every layer.
    """
    return (*results, None)


def has_hooks(module: nn.Module) -> bool:
    """Whether something else than the module sees what it takes and gives."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(map(len, hooks)) or _has_any_global_hook()


def _is_plain(tensor: Tensor | None) -> bool:
    return type(tensor).__name__ in _PLAIN


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling the module is `F.linear` on its weight and bias, and nothing else.

    It is not where the module is another one (quantised, or with an adapter), has a hook or a forward of its own, no
    bias, or a weight of a class with arithmetic of its own (quantised or sharded).
    """
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and not has_hooks(module)
        and _is_plain(module.weight)
        and _is_plain(module.bias)
    )


def check_dtype_and_device(pixel_values: Tensor, parameter: Any) -> None:
    """The pixels have the encoder's dtype and device, those of a parameter that belongs to no linear layer.

    A quantised layer has no weight, or one of integers. Under autocast pixels of any floating dtype do. A parameter
    on the meta device is offloaded and comes when its module is called.

    Raises:
        TypeError: another dtype.
        ValueError: another device.
    """
    if not isinstance(parameter, Tensor):
        return
    if pixel_values.dtype != parameter.dtype and not (_autocasts(pixel_values) and pixel_values.is_floating_point()):
        raise TypeError(f"pixel_values: got {pixel_values.dtype}, expected {parameter.dtype} as the encoder has")
    if pixel_values.device != parameter.device and parameter.device.type != "meta":
        raise ValueError(f"pixel_values: got device {pixel_values.device}, expected {parameter.device}")


def _autocasts(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def check_order(layers: nn.ModuleList, count: int) -> None:
    """The layers are those that the encoder was made of, in their order: each ends with the norm before the next.

    Raises:
        ValueError: they are not.
    """
    # A wrapper need not show what it wraps. A loop, as every call comes here.
    in_order = len(layers) == count
    for index, layer in enumerate(layers):
        in_order = in_order and getattr(layer, "index", index) == index
    if not in_order:
        indices = [getattr(layer, "index", index) for index, layer in enumerate(layers)]
        raise ValueError(
            f"layers: got {indices} of the encoder's {count}, expected all of them in their order, as each ends with "
            "the norm before the next; keep_layers(count) keeps the first"
        )


def first_layers(layers: nn.ModuleList, count: int) -> nn.ModuleList:
    """The first of an encoder's layers, the last of them with the norm at the end of the encoder.

    Raises:
        ValueError: not from 1 to all of them.
    """
    if not 1 <= operator.index(count) <= len(layers):
        raise ValueError(f"count: got {count}, expected 1 to the encoder's {len(layers)} layers")
    kept = nn.ModuleList(list(layers)[:count])
    kept[-1].norm_out = layers[-1].norm_out
    return kept
