"""An encoder of ours in the place of one of transformers', on the same weights."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_encoder.compilation import CompilationConfig

# (owner, name, module or parameter): what our encoder takes as it is.
Shared = Iterator[tuple[nn.Module, str, Any]]


class SharedForward:
    """A vision model's forward that calls our encoder; an object, so that a copy of the model gets one of its own.

    Args:
        vision: the model.
        make_encoder: makes our encoder of it, without weights but those of its own modules.
        shared: what of both is one.
    """

    def __init__(self, vision: Any, make_encoder: Callable[[Any], Any], shared: Callable[[Any, Any], Shared]) -> None:
        self.vision = vision
        self.shared = shared
        with torch.device("meta"):
            model = type(vision)(vision.config)
        self.expected = _bypassed(model, shared(make_encoder(model), model))
        self._check_modules()
        self.encoder = make_encoder(vision)
        self.packed = [module for module in self.encoder.modules() if isinstance(module, PackedLinear)]
        self.relink()

    @torch.compiler.disable(reason="a parameter's address is no part of a graph")
    def follow(self) -> None:
        """Take over what was moved, cast or replaced in the vision model since; a look at it all takes microseconds."""
        if (
            not all(entries.get(name) is thing for entries, name, thing in self.seen)
            or not all(module.__dict__.get("forward") is forward for module, forward in self.forwards)
            or self.addresses != [tensor.data_ptr() for tensor in self.packed_tensors]
        ):
            self.relink()

    # Tensors made in inference mode could take no part in training later.
    @torch.inference_mode(False)
    def relink(self) -> None:
        """Make the encoder of what the vision model holds now.

        Raises:
            TypeError: a module that our encoder does not call is not what transformers makes.
            ValueError: weights that are not loaded, on several devices, or shared between projections.
        """
        _check_weights(self.vision)
        self._check_modules()
        for owner, name, thing in self.shared(self.encoder, self.vision):
            if name in owner._parameters:
                # No assignment of an attribute: inside of `torch.func.functional_call` it is no Parameter.
                owner._parameters[name] = thing
            elif getattr(owner, name) is not thing:
                setattr(owner, name, thing)
        for module in self.packed:
            module.pack()
        if not all(module.is_packed(name) for module in self.packed for name in module._buffers):
            raise ValueError("model: got layers or projections that share weights, expected each to have its own")
        holders = [entries for module in self.vision.modules() for entries in (module._modules, module._parameters)]
        self.seen = [(entries, name, thing) for entries in holders for name, thing in entries.items()]
        self.forwards = [(module, vars(module).get("forward")) for module in self.vision.modules()]
        self.packed_tensors = [tensor for module in self.packed for tensor in module.tensors()]
        # The packed tensors are kept, so nothing else can come to lie there.
        self.addresses = [tensor.data_ptr() for tensor in self.packed_tensors]

    def _check_modules(self) -> None:
        held = dict(self.vision.named_modules(remove_duplicate=False))
        for name, expected in self.expected.items():
            got = _described(held[name]) if name in held else "nothing"
            if got != expected:
                raise TypeError(
                    f"model: got {got} as {name or 'itself'} of the vision model, expected {expected}: our encoder "
                    "takes its weights and does not call it; merge adapters into it first (peft: merge_and_unload), "
                    "do not quantise, wrap or remove it, or revert"
                )

    def refuse_extras(
        self, output_attentions: bool | None, output_hidden_states: bool | None, whole: tuple[type, ...]
    ) -> None:
        """Raise ValueError where the caller, or else the configuration, wants what our encoder does not keep.

        Not within the forward of the whole model, of one of these classes: what that hands down is meant for the text
        model.
        """
        for name, given in (("output_attentions", output_attentions), ("output_hidden_states", output_hidden_states)):
            wanted = getattr(self.vision.config, name, False) if given is None else given
            if wanted and not _is_within_forward(whole):
                raise ValueError(f"{name}: got {wanted}, expected False, or revert first: our encoder keeps none")


@torch.compiler.disable(reason="the stack is no part of a graph")
def _is_within_forward(whole: tuple[type, ...]) -> bool:
    # Nothing but the stack tells the whole model's forward from its caller's call of `get_image_features`.
    return any(
        frame.f_code.co_name in ("forward", "generate") and isinstance(frame.f_locals.get("self"), whole)
        for frame, _ in traceback.walk_stack(None)
    )


class CheckpointedLayer:
    """The forward of a layer of ours, checkpointed where transformers' own layer in its place would be.

    Args:
        layer: ours.
        theirs: transformers'.
        before: the module that has the norm before it, and its name there.
    """

    def __init__(self, layer: nn.Module, theirs: Any, before: tuple[nn.Module, str]) -> None:
        self.layer = layer
        self.theirs = theirs
        self.before = before

    def __call__(self, x: Tensor, normed: Tensor, *args: Any) -> Any:
        """As the layer's own forward."""
        theirs, forward = self.theirs, type(self.layer).forward
        if not (theirs.gradient_checkpointing and theirs.training and torch.is_grad_enabled()):
            return forward(self.layer, x, normed, *args)
        if not torch.compiler.is_compiling() and not x.requires_grad:
            # Reentrant checkpoints give parameters no gradients otherwise.
            x = x.detach().requires_grad_()
        # Of both the hidden states alone are kept, as in transformers.
        norm = getattr(*self.before)
        return theirs._gradient_checkpointing_func(lambda x: forward(self.layer, x, norm(x), *args), x)


class PackedLinear(nn.Module):
    """Linear layers with the same input as one, their weights and biases views of its own.

    Args:
        owner: the module of transformers that has them.
        names: what they are called there.
    """

    weight: Tensor
    bias: Tensor
    has_aliased_parameters = True

    def __init__(self, owner: nn.Module, *names: str) -> None:
        super().__init__()
        self.owner = owner
        self.names = names

    def _tensors(self, name: str) -> list[Tensor]:
        return [getattr(getattr(self.owner, part), name) for part in self.names]

    def tensors(self) -> list[Tensor]:
        """The parts' weights and biases, where they are packed."""
        return [tensor for name in self._buffers for tensor in self._tensors(name)]

    @torch.no_grad()
    def pack(self) -> None:
        """Make the parts' weights and biases rows of one tensor each, unless they are.

        What stands there inside of `torch.func.functional_call` is not ours to move, and stays as it is.
        """
        for name in ("weight", "bias"):
            tensors = self._tensors(name)
            if not all(isinstance(tensor, nn.Parameter) for tensor in tensors):
                self._buffers.pop(name, None)
            elif not self.is_packed(name):
                packed = torch.cat(tensors)
                for tensor, rows in zip(tensors, packed.split([len(tensor) for tensor in tensors]), strict=True):
                    tensor.data = rows
                self.register_buffer(name, packed, persistent=False)

    def is_packed(self, name: str) -> bool:
        """Whether the parts' weights or biases lie in one tensor."""
        packed = self._buffers.get(name)
        if packed is None:
            return False
        # Addresses are counted: views of the packed tensor would be something else inside of `torch.func.grad`.
        address = packed.data_ptr()
        for tensor in self._tensors(name):
            if tensor.data_ptr() != address:
                return False
            address += tensor.numel() * packed.element_size()
        return True

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., in_features] -> [..., sum of the parts' out_features]."""
        weights, biases = self._tensors("weight"), self._tensors("bias")
        differentiated = torch.is_grad_enabled() and any(part.requires_grad for part in (*weights, *biases))
        # The packed tensors have no history that would lead gradients to the parts.
        if differentiated or len(self._buffers) < 2:
            return F.linear(x, torch.cat(weights), torch.cat(biases))
        return F.linear(x, self.weight, self.bias)


def compilation_config(compile: bool | CompilationConfig) -> CompilationConfig:
    """The configuration that the argument `compile` stands for."""
    return compile if isinstance(compile, CompilationConfig) else CompilationConfig(compile_mm_encoder=compile)


@torch.inference_mode(False)
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


def _bypassed(model: nn.Module, shared: Shared) -> dict[str, str]:
    """What a model of transformers has of each module that our encoder does not call: only its weights count then."""
    called = {inner for _, _, thing in shared if isinstance(thing, nn.Module) for inner in thing.modules()}
    return {name: _described(module) for name, module in model.named_modules() if module not in called}


def _described(module: nn.Module) -> str:
    """A module's class, its weights' shapes and what they are if no plain tensors, the layers of a list, and whether it
    has a forward of its own.
    """
    weights = {
        name: None if x is None else tuple(x.shape) if type(x) in (Tensor, nn.Parameter) else type(x).__name__
        for name, x in module._parameters.items()
    }
    layers = f" of {len(module)}" if isinstance(module, nn.ModuleList) else ""
    forward = vars(module).get("forward")
    own = "" if forward is None or isinstance(forward, SharedForward) else " with a forward of its own"
    return f"{type(module).__module__}.{type(module).__qualname__}{layers}{own}{weights or ''}"


def _check_weights(vision: nn.Module) -> None:
    devices = {parameter.device for parameter in vision.parameters()}
    # accelerate's hooks move weights in and out, or activations between devices.
    hooked = any(hasattr(module, "_hf_hook") for module in vision.modules())
    if hooked or len(devices) != 1 or torch.device("meta") in devices:
        raise ValueError(
            f"model: got a vision model on {', '.join(sorted(map(str, devices)))}"
            f"{' with hooks of accelerate' if hooked else ''}, expected loaded weights on one device"
        )
