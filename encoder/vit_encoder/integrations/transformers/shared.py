"""An encoder of ours in the place of one of transformers', on the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_encoder.compilation import CompilationConfig

# (owner, name, module or parameter): what our encoder takes as it is.
Shared = Iterator[tuple[nn.Module, str, Any]]


class SharedForward:
    """A vision model's forward that calls our encoder; an object, so that a copy of the model gets one of its own."""

    def __init__(self, vision: Any, encoder: Any, shared: Callable[[Any, Any], Shared]) -> None:
        self.vision = vision
        self.encoder = encoder
        self.shared = shared
        self.packed = [module for module in encoder.modules() if isinstance(module, PackedLinear)]
        self.relink()

    @torch.compiler.disable(reason="a parameter's address is no part of a graph")
    def follow(self) -> None:
        """Take over what was moved, cast or replaced in the vision model since; a look at it all takes microseconds."""
        if not all(entries.get(name) is thing for entries, name, thing in self.seen) or self.addresses != [
            tensor.data_ptr() for tensor in self.packed_tensors
        ]:
            self.relink()

    def relink(self) -> None:
        """Make the encoder of what the vision model holds now.

        Raises:
            TypeError: a projection is no plain Linear.
        """
        for owner, name, thing in self.shared(self.encoder, self.vision):
            if getattr(owner, name) is not thing:
                setattr(owner, name, thing)
        for module in self.packed:
            module.pack()
        holders = [entries for module in self.vision.modules() for entries in (module._modules, module._parameters)]
        self.seen = [(entries, name, thing) for entries in holders for name, thing in entries.items()]
        self.packed_tensors = [tensor for module in self.packed for tensor in module.tensors()]
        # The packed tensors are kept, so nothing else can come to lie there.
        self.addresses = [tensor.data_ptr() for tensor in self.packed_tensors]

    def refuse_extras(self, output_attentions: bool | None, output_hidden_states: bool | None) -> None:
        """Raise ValueError where the caller, or else the configuration, wants what our encoder does not keep."""
        for name, given in (("output_attentions", output_attentions), ("output_hidden_states", output_hidden_states)):
            if getattr(self.vision.config, name, False) if given is None else given:
                raise ValueError(f"{name}: got True, expected False, or revert first: our encoder keeps none")


class PackedLinear(nn.Module):
    """Linear layers with the same input as one, their weights and biases views of its own.

    Args:
        owner: the module of transformers that has them.
        names: what they are called there.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, owner: nn.Module, *names: str) -> None:
        super().__init__()
        self.owner = owner
        self.names = names

    def _parts(self) -> list[Any]:
        return [getattr(self.owner, name) for name in self.names]

    def tensors(self) -> list[Tensor]:
        """The parts' weights and biases."""
        return [tensor for part in self._parts() for tensor in (part.weight, part.bias)]

    def pack(self) -> None:
        """Make the parts' weights and biases rows of one tensor each, unless they are.

        Raises:
            TypeError: a part is no plain Linear.
        """
        for part in self._parts():
            if type(part) is not nn.Linear:
                raise TypeError(f"model: got a projection of type {type(part).__name__}, expected torch.nn.Linear")
        for name in ("weight", "bias"):
            self._pack(name, [getattr(part, name) for part in self._parts()])

    @torch.no_grad()
    def _pack(self, name: str, tensors: list[Tensor]) -> None:
        sizes = [len(tensor) for tensor in tensors]
        packed = self._buffers.get(name)
        if packed is not None and all(
            tensor.data_ptr() == rows.data_ptr() for tensor, rows in zip(tensors, packed.split(sizes), strict=True)
        ):
            return
        packed = torch.cat(tensors)
        self.register_buffer(name, packed, persistent=False)
        for tensor, rows in zip(tensors, packed.split(sizes), strict=True):
            tensor.data = rows

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., in_features] -> [..., sum of the parts' out_features]."""
        parts = self._parts()
        if torch.is_grad_enabled() and any(x.requires_grad for part in parts for x in (part.weight, part.bias)):
            # The packed tensors have no history that would lead gradients to the parts.
            weight = torch.cat([part.weight for part in parts])
            return F.linear(x, weight, torch.cat([part.bias for part in parts]))
        return F.linear(x, self.weight, self.bias)


def compilation_config(compile: bool | CompilationConfig) -> CompilationConfig:
    """The configuration that the argument `compile` stands for."""
    return compile if isinstance(compile, CompilationConfig) else CompilationConfig(compile_mm_encoder=compile)


def put(vision: Any, config: CompilationConfig, make_forward: Callable[[], SharedForward]) -> None:
    """Give a vision model our forward, compiled as `config` says; where it has it already, only the latter changes.

    Raises:
        ValueError: weights that are not loaded or on several devices.
    """
    forward = vision.__dict__.get("forward")
    if not isinstance(forward, SharedForward):
        _check_weights(vision)
        forward = make_forward()
        forward.encoder.train(vision.training)
        vision.forward = forward
    forward.encoder.compilation_config = config


def take_back(vision: Any) -> None:
    """Give a vision model its own forward again.

    Raises:
        ValueError: it has it.
    """
    if not isinstance(vision.__dict__.get("forward"), SharedForward):
        raise ValueError("model: got one that computes its own image features, expected one with our encoder applied")
    del vision.forward


def _check_weights(vision: nn.Module) -> None:
    devices = {parameter.device for parameter in vision.parameters()}
    # accelerate's hooks move weights in and out, or activations between devices.
    hooked = any(hasattr(module, "_hf_hook") for module in vision.modules())
    if hooked or len(devices) != 1 or torch.device("meta") in devices:
        raise ValueError(
            f"model: got a vision model on {', '.join(sorted(map(str, devices)))}"
            f"{' with hooks of accelerate' if hooked else ''}, expected loaded weights on one device"
        )
