"""The encoders are right, or say what is wrong, whatever their owner did to their modules: sharded, offloaded, wrapped,
quantised, hooked, cut or compiled by themselves.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.utils.checkpoint import checkpoint
from vit_encoder import CompilationConfig, Llama4VisionConfig, Llama4VisionModel, whole_graph
from vit_encoder.initialise import initialise_
from vit_encoder.qwen2_5_vl import Qwen2_5_VLVisionConfig, Qwen2_5_VLVisionModel
from vit_encoder.qwen2_5_vl import reference_forward as qwen2_5_vl_reference
from vit_encoder.qwen2_5_vl import vision_metadata as qwen2_5_vl_metadata
from vit_encoder.qwen3_vl import Qwen3VLVisionConfig, Qwen3VLVisionModel
from vit_encoder.qwen3_vl import reference_forward as qwen3_vl_reference
from vit_encoder.qwen3_vl import vision_metadata as qwen3_vl_metadata

from tests.encoder.qwen2_5_vl_batches import patches, relative_error

pytestmark = pytest.mark.costly

GRID = torch.tensor([[1, 8, 12], [2, 4, 4]])
COMPILED = CompilationConfig(compile_mm_encoder=True, backend="aot_eager")


def llama4(**kwargs: Any) -> Llama4VisionModel:
    model = Llama4VisionModel(Llama4VisionConfig.tiny(), **kwargs)
    initialise_(model)
    return model.eval()


def qwen2_5_vl(**kwargs: Any) -> Qwen2_5_VLVisionModel:
    model = Qwen2_5_VLVisionModel(Qwen2_5_VLVisionConfig.tiny(), **kwargs)
    initialise_(model)
    return model.eval()


def qwen3_vl(**kwargs: Any) -> Qwen3VLVisionModel:
    model = Qwen3VLVisionModel(Qwen3VLVisionConfig.tiny(), **kwargs)
    initialise_(model)
    return model.eval()


def batch(model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Arguments of the encoder."""
    if isinstance(model, Llama4VisionModel):
        return ((torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(dtype),)
    return patches(config_of(model), GRID, dtype=dtype), GRID


def config_of(model: nn.Module) -> Any:
    """The tiny one of a Qwen encoder, which may be wrapped."""
    is_qwen3_vl = any(isinstance(module, Qwen3VLVisionModel) for module in model.modules())
    return Qwen3VLVisionConfig.tiny() if is_qwen3_vl else Qwen2_5_VLVisionConfig.tiny()


def layers_of(model: Any) -> nn.ModuleList:
    layers: nn.ModuleList = model.layers if isinstance(model, Llama4VisionModel) else model.encoder.layers
    return layers


def inner(model: Any) -> Any:
    """The decorated module."""
    return model if isinstance(model, Llama4VisionModel) else model.encoder


ENCODERS = pytest.mark.parametrize("make", [llama4, qwen2_5_vl, qwen3_vl])
Make = Callable[..., nn.Module]


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Sharded by layer


def shard(model: nn.Module, **kwargs: Any) -> None:
    for layer in layers_of(model):
        fully_shard(layer, **kwargs)
    fully_shard(model, **kwargs)


@pytest.mark.usefixtures("process_group")
@ENCODERS
def test_sharded_by_layer(make: Make) -> None:
    model = make()
    expected = model(*batch(model))
    expected.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    shard(model)
    actual = model(*batch(model))
    assert torch.equal(actual, expected)
    actual.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], msg=name)  # type: ignore[union-attr]


@pytest.mark.usefixtures("process_group", "fresh_dynamo")
# torch against itself, while it traces a layer of a sharded module.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@ENCODERS
def test_sharded_and_compiled(make: Make) -> None:
    model = make(compilation_config=CompilationConfig(compile_mm_encoder=True))
    shard(model)
    with pytest.raises(ValueError, match=r"sharded by FSDP, expected one that does not; call `layer\.compile"):
        model(*batch(model))
    model = make()
    expected = model(*batch(model))
    for layer in layers_of(model):
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    shard(model)
    torch.testing.assert_close(model(*batch(model)), expected)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("pixels", [torch.float32, torch.bfloat16])
@ENCODERS
def test_sharded_by_layer_with_mixed_precision(make: Make, pixels: torch.dtype) -> None:
    model = make().requires_grad_(False)
    expected = copy.deepcopy(model).bfloat16()(*batch(model, torch.bfloat16))
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    # The tables of the rotary embedding are no part of that: cast to bfloat16 they would turn too far.
    assert torch.equal(model(*batch(model, pixels)), expected)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@ENCODERS
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_wrapped_layer_by_layer_in_fsdp_1(make: Make, mixed: bool, use_orig_params: bool) -> None:
    model = make().requires_grad_(False)
    twin = copy.deepcopy(model).bfloat16() if mixed else model
    expected = twin(*batch(model, torch.bfloat16 if mixed else torch.float32))
    precision = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16) if mixed else None
    arguments: dict[str, Any] = {
        "mixed_precision": precision,
        "use_orig_params": use_orig_params,
        "device_id": torch.device("cpu"),
        "sharding_strategy": ShardingStrategy.NO_SHARD,
    }
    layers = layers_of(model)
    for i, layer in enumerate(layers):
        layers[i] = FullyShardedDataParallel(layer, **arguments)
    arguments_of_model = batch(model)
    wrapped = FullyShardedDataParallel(model, **arguments)
    assert torch.equal(wrapped(*arguments_of_model), expected)


# Offloaded


def offload(module: nn.Module) -> None:
    """As accelerate does it: what a module holds itself lies on the meta device but while the module is called."""
    if not (own := dict([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])):
        return
    forward = module.forward

    def put_all(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            kind: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
            kind[name] = nn.Parameter(tensor, requires_grad=False) if kind is module._parameters else tensor

    def loaded(*args: Any, **kwargs: Any) -> Any:
        put_all(own)
        try:
            return forward(*args, **kwargs)
        finally:
            put_all(away)

    away = {name: tensor.detach().to("meta") for name, tensor in own.items()}
    put_all(away)
    module.forward = loaded


@ENCODERS
@torch.no_grad()
def test_offloaded(make: Make) -> None:
    model = make()
    arguments = batch(model)
    expected = model(*arguments)
    for module in model.modules():
        offload(module)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert torch.equal(model(*arguments), expected)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@ENCODERS
@torch.no_grad()
def test_a_layer_runs_on_its_own_parameters_alone(make: Make) -> None:
    """Offloaded by layer, with hooks: nothing of another layer is there while one runs."""
    model = make()
    arguments = batch(model)
    expected = model(*arguments)
    kept = [{name: p.detach() for name, p in layer.named_parameters()} for layer in layers_of(model)]

    def bring(index: int, layer: nn.Module) -> None:
        layer.load_state_dict(kept[index], assign=True)

    for index, layer in enumerate(layers_of(model)):
        layer.to("meta")
        layer.register_forward_pre_hook(lambda layer, _, index=index: bring(index, layer))
        layer.register_forward_hook(lambda layer, *_: layer.to("meta") and None)
    assert torch.equal(model(*arguments), expected)


# Checkpointed


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@ENCODERS
# Dynamo looks at the gradient of whatever comes into a graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
def test_layers_are_checkpointed_one_by_one(make: Make, compiled: bool, use_reentrant: bool) -> None:
    model = make().train()
    pixel_values, *rest = batch(model)
    twin, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    for layer in layers_of(model):
        forward = torch.compile(layer.forward, backend="aot_eager") if compiled else layer.forward
        layer.forward = partial(checkpoint, forward, use_reentrant=use_reentrant)
    for encoder in (model, twin, plain):
        pixels = pixel_values.to(next(encoder.parameters()).dtype)
        encoder(pixels, *rest).square().sum().backward()
    for (name, got), expected, exact in zip(
        model.named_parameters(), plain.parameters(), twin.parameters(), strict=True
    ):
        assert got.grad is not None, name
        assert expected.grad is not None, name
        assert exact.grad is not None, name
        assert relative_error(got.grad, exact.grad) <= 2 * relative_error(expected.grad, exact.grad), name


# Wrapped and quantised


class Wrapped(nn.Module):
    """As LoRA does it: in the place of a linear layer, with its weight to be seen, and something added."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 1


def wrap(layer: Any) -> None:
    layer.mlp.fc1 = Wrapped(layer.mlp.fc1)


def hook(layer: Any) -> None:
    layer.mlp.fc1.register_forward_hook(lambda module, args, out: out + 1)


def pre_hook(layer: Any) -> None:
    layer.mlp.fc1.register_forward_pre_hook(lambda module, args: args[0] + 1)


def own_forward(layer: Any) -> None:
    forward = layer.mlp.fc1.forward
    layer.mlp.fc1.forward = lambda x: forward(x) + 1


def parametrise(layer: Any) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(layer.mlp.fc1, "weight", Doubled())


def without_bias(layer: Any) -> None:
    layer.mlp.fc1.bias = None


def subclass(layer: Any) -> None:
    layer.mlp.fc1.weight = nn.Parameter(Halved(layer.mlp.fc1.weight.detach()), requires_grad=False)


class Halved(Tensor):
    """A weight with arithmetic of its own, as a quantised one has."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, *args: Any) -> Halved:
        made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)
        made.held = held
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], context: None, *sizes: Any) -> Halved:
        return cls(inner["held"])

    def __repr__(self) -> str:  # type: ignore[override]
        return "Halved()"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, bias = args
            return func(x, weight.held / 2, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        assert func is torch.ops.aten.detach.default, func
        return cls(args[0].held)


CHANGES = [wrap, hook, pre_hook, own_forward, parametrise, without_bias, subclass]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compiled_by", ["the user", "the scaffold"])
@ENCODERS
@torch.no_grad()
def test_hooks_inside_a_layer_see_every_call_of_a_compiled_encoder(make: Make, compiled_by: str) -> None:
    """A nested region cannot keep what a hook keeps of it: such a layer is none."""
    model = make(compilation_config=COMPILED if compiled_by == "the scaffold" else None)
    seen: list[Tensor] = []
    for layer in layers_of(model):
        layer.get_submodule("mlp").register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    call = torch.compile(model, backend="aot_eager") if compiled_by == "the user" else model
    expected = make()(*batch(model))
    for _ in range(2):
        torch.testing.assert_close(call(*batch(model)), expected)
    assert len(seen) == 2 * len(layers_of(model))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_fused_gelu_is_for_plain_linears(change: Callable[[Any], None]) -> None:
    model, plain = llama4(fuse_gelu=True), llama4()
    (pixel_values,) = batch(model)
    untouched = model(pixel_values)
    for layer in [*model.layers, *plain.layers]:
        change(layer)
    expected = plain(pixel_values)
    assert (expected - untouched).abs().max() > 1e-3
    assert torch.equal(model(pixel_values), expected)
    model.compilation_config = COMPILED
    torch.testing.assert_close(model(pixel_values), expected)


@pytest.mark.usefixtures("fresh_dynamo")
@ENCODERS
@torch.no_grad()
def test_weights_of_a_subclass_compile(make: Make) -> None:
    """As torchao's: every linear layer's weight, of which no code of ours may read the dtype or call an op of ours."""
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Halved(module.weight.detach()), requires_grad=False)
    arguments = batch(model)
    expected = model(*arguments)
    inner(model).compilation_config = COMPILED
    with whole_graph():
        torch.testing.assert_close(model(*arguments), expected)


@ENCODERS
@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_dynamically_quantised_linears(make: Make) -> None:
    model = make()
    arguments = batch(model)
    expected = model(*arguments)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    actual = quantised(*arguments)
    assert not torch.equal(actual, expected)
    # Sharp attention amplifies the rounding of activations to 8 bits.
    assert (actual - expected).norm() < 0.5 * expected.norm()
    with pytest.raises(TypeError, match=r"pixel_values: got torch\.float64, expected torch\.float32"):
        quantised(arguments[0].double(), *arguments[1:])


@pytest.mark.usefixtures("fresh_dynamo")
@ENCODERS
@torch.no_grad()
def test_linears_quantised_by_torchao_compile(make: Make) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = make()
    arguments = batch(model)
    expected = model(*arguments)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    quantised = model(*arguments)
    assert 0 < (quantised - expected).norm() < 0.1 * expected.norm()
    inner(model).compilation_config = COMPILED
    with whole_graph():
        torch.testing.assert_close(model(*arguments), quantised)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pixels", [torch.float32, torch.bfloat16, torch.float16])
@ENCODERS
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_under_autocast_pixels_have_any_floating_dtype(make: Make, weights: torch.dtype, pixels: torch.dtype) -> None:
    model = make()
    arguments = batch(model)
    expected = model(*arguments)
    model.to(weights)
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(arguments[0].to(pixels), *arguments[1:])
        with pytest.raises(TypeError, match=r"pixel_values: got torch\.int64"):
            model(arguments[0].long(), *arguments[1:])
    assert (actual - expected).norm() < 0.1 * expected.norm()


# Hooked and cut


@ENCODERS
@torch.no_grad()
def test_hooks_see_hidden_states(make: Make) -> None:
    """Of each layer those that an encoder of so many layers ends with, before its last norm."""
    model = make()
    arguments = batch(model)
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in layers_of(model):
        layer.register_forward_hook(lambda module, args, out: seen.append(out))
    model(*arguments)
    for count, (x, normed) in enumerate(seen, 1):
        layer = layers_of(model)[count - 1]
        assert torch.equal(layer.norm_out(x), normed)  # type: ignore[operator]
    assert len(seen) == len(layers_of(model))


@ENCODERS
@torch.no_grad()
def test_a_hook_keeps_the_projection_unrotated(make: Make) -> None:
    model = make()
    arguments = batch(model)
    expected = model(*arguments)
    seen: list[tuple[Tensor, Tensor]] = []
    layer: Any = layers_of(model)[0]
    qkv = layer.attention.qkv
    qkv.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    assert torch.equal(model(*arguments), expected)
    ((x, out),) = seen
    assert torch.equal(nn.functional.linear(x, qkv.weight, qkv.bias), out)


@ENCODERS
@torch.no_grad()
def test_layers_that_were_taken_out_are_missed(make: Make) -> None:
    model = make()
    arguments = batch(model)
    encoder = inner(model)
    every = encoder.layers
    for left in (every[:1], every[1:], nn.ModuleList([*every[1:], every[0]])):
        encoder.layers = left
        for compilation_config in (None, COMPILED):
            encoder.compilation_config = compilation_config
            with pytest.raises(ValueError, match=r"layers: got \[.*keep_layers"):
                model(*arguments)
        encoder.compilation_config = None
        torch._dynamo.reset()
        with pytest.raises((ValueError, torch._dynamo.exc.TorchDynamoException), match="keep_layers"):
            torch.compile(encoder, backend="eager", fullgraph=True)(*inner_arguments(model, arguments))


def inner_arguments(model: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Those of the decorated module."""
    if isinstance(model, Llama4VisionModel):
        return arguments
    return arguments[0], *METADATA[type(model)](arguments[1], config_of(model), "cpu")


METADATA: dict[type, Callable[..., tuple[Tensor, ...]]] = {
    Qwen2_5_VLVisionModel: qwen2_5_vl_metadata,
    Qwen3VLVisionModel: qwen3_vl_metadata,
}
REFERENCES = {Qwen2_5_VLVisionModel: qwen2_5_vl_reference, Qwen3VLVisionModel: qwen3_vl_reference}
QWENS = pytest.mark.parametrize("make", [qwen2_5_vl, qwen3_vl])


@ENCODERS
@torch.no_grad()
def test_the_first_layers_are_the_encoder_of_so_many(make: Make) -> None:
    model = make()
    arguments = batch(model)
    encoder = inner(model)
    whole = copy.deepcopy(model)
    with pytest.raises(ValueError, match="count: got 0, expected 1 to the encoder's"):
        encoder.keep_layers(0)
    with pytest.raises(ValueError, match="count: got 99"):
        encoder.keep_layers(99)
    encoder.keep_layers(1)
    depth = "num_hidden_layers" if make is llama4 else "depth"
    made = type(model)(dataclasses.replace(inner(whole).config, **{depth: 1}))
    weights = {name: p for name, p in whole.state_dict().items() if "layers." not in name or "layers.0." in name}
    last = {name: p for name, p in whole.state_dict().items() if f"layers.{len(layers_of(whole)) - 1}.norm_out" in name}
    weights |= {name.replace(f"layers.{len(layers_of(whole)) - 1}.", "layers.0."): p for name, p in last.items()}
    made.load_state_dict({name: p for name, p in weights.items() if name in made.state_dict()})
    assert torch.equal(model(*arguments), made.eval()(*arguments))


@ENCODERS
@torch.no_grad()
def test_copied_pickled_and_loaded(make: Make) -> None:
    model = make()
    arguments = batch(model)
    expected = model(*arguments)
    assert torch.equal(copy.deepcopy(model)(*arguments), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(*arguments), expected)
    other = type(model)(inner(model).config)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(*arguments), expected)


@ENCODERS
def test_the_eps_of_a_norm_is_a_constant(make: Make) -> None:
    norm: Any = layers_of(make())[0].norm_out
    norm.eps = norm.eps
    assert f"eps={norm.eps}" in repr(norm)
    with pytest.raises(ValueError, match=r"eps: got 0\.1, expected 1e-"):
        norm.eps = 0.1


# Compiled by the user


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dynamic", [None, True, False])
@torch.no_grad()
def test_all_encoders_in_the_user_s_own_torch_compile(dynamic: bool | None) -> None:
    """One after the other, as the second finds what differs from the first, such as a norm's eps, varying."""
    for make in (llama4, qwen2_5_vl, qwen3_vl):
        model = make()
        arguments = inner_arguments(model, batch(model))
        expected = inner(model)(*arguments)
        compiled = torch.compile(inner(model), backend="aot_eager", dynamic=dynamic, fullgraph=True)
        torch.testing.assert_close(compiled(*arguments), expected)
        torch.testing.assert_close(compiled(*(x.clone() for x in arguments)), expected)


# Default device and dtype


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS: list[Callable[[], contextlib.AbstractContextManager[Any]]] = [
    lambda: torch.device("meta"),
    *(lambda dtype=dtype: default_dtype(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)),
]


@pytest.mark.parametrize("default", DEFAULTS, ids=["meta", "float64", "float16", "bfloat16"])
@ENCODERS
@torch.no_grad()
def test_a_default_device_or_dtype_changes_no_call(
    make: Make, default: Callable[[], contextlib.AbstractContextManager[Any]]
) -> None:
    model = make()
    arguments = batch(model)
    expected = model(*arguments)
    with default():
        actual = model(*arguments)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("default", DEFAULTS, ids=["meta", "float64", "float16", "bfloat16"])
@QWENS
def test_a_default_device_or_dtype_changes_no_metadata_and_no_reference(
    make: Make, default: Callable[[], contextlib.AbstractContextManager[Any]]
) -> None:
    model: Any = make()
    arguments = batch(model)
    config, vision_metadata, reference_forward = model.config, METADATA[type(model)], REFERENCES[type(model)]
    expected, reference = vision_metadata(GRID, config, "cpu"), reference_forward(model, *arguments)
    with default():
        actual = vision_metadata(GRID, config, "cpu")
        assert torch.equal(reference_forward(model, *arguments), reference)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@ENCODERS
def test_a_default_dtype_is_that_of_a_new_encoder_but_not_of_its_tables(make: Make, dtype: torch.dtype) -> None:
    with default_dtype(dtype):
        model = make()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    expected = dict(make().named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    assert model(*batch(model, dtype)).dtype == dtype


@QWENS
def test_metadata_without_a_device_lie_on_the_default_one(make: Make) -> None:
    model: Any = make()
    with torch.device("meta"):
        assert {tensor.device.type for tensor in METADATA[type(model)](GRID, model.config)} == {"meta"}
    assert {tensor.device.type for tensor in METADATA[type(model)](GRID, model.config)} == {"cpu"}


def doubled(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: torch.utils._pytree.tree_map(lambda x: 2 * x, forward(*args))


class Adapted(nn.Module):
    """An adapter around any module, whose weight still shows."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.weight = base.weight

    def forward(self, x: Tensor) -> Tensor:
        return doubled(self.base)(x)


def own_class(module: nn.Module) -> None:
    base = type(module)
    module.__class__ = type(base.__name__, (base,), {"forward": lambda self, x: 2 * base.forward(self, x)})


# What an owner may do to a layer; each changes what the encoder computes.
IN_ONE_LAYER: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda layer: layer.norm_2.register_forward_hook(lambda module, args, out: 2 * out),
    "a pre-hook": lambda layer: layer.norm_2.register_forward_pre_hook(lambda module, args: args[0] * args[0]),
    "a hook of the layer": lambda layer: layer.register_forward_hook(lambda module, args, out: (out[0], 2 * out[1])),
    "a forward of a part": lambda layer: setattr(layer.norm_2, "forward", doubled(layer.norm_2.forward)),
    "a forward of attention": lambda layer: setattr(layer.attention, "forward", doubled(layer.attention.forward)),
    "a forward of the layer": lambda layer: setattr(layer, "forward", doubled(layer.forward)),
    "a class": lambda layer: own_class(layer.norm_2),
    "an attribute": lambda layer: setattr(layer.attention, "interleaved", not layer.attention.interleaved),
    "another module": lambda layer: setattr(layer, "norm_2", nn.Identity()),
    "an adapter": lambda layer: setattr(layer, "norm_2", Adapted(layer.norm_2)),
    "another parameter": lambda layer: setattr(layer.norm_2, "weight", nn.Parameter(layer.norm_2.weight + 1)),
    "no bias": lambda layer: setattr(layer.attention.qkv, "bias", None),
    "a parametrisation": lambda layer: nn.utils.parametrize.register_parametrization(
        layer.norm_2, "weight", nn.Softplus()
    ),
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("change", IN_ONE_LAYER)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("calls_before", [0, 3])
@ENCODERS
@torch.no_grad()
def test_a_change_in_one_layer_is_seen(make: Make, calls_before: int, frozen: bool, change: str) -> None:
    """torch 2.13 reuses a region without a guard on the layers that it is reused for."""
    # Dynamo's part alone, which is where a change is seen or not.
    config = CompilationConfig(
        compile_mm_encoder=True, frozen_parameters=frozen, backend=lambda graph, example_inputs: graph.forward
    )
    model, plain = make(compilation_config=config), make()
    arguments = batch(model)
    before = plain(*arguments)
    for _ in range(calls_before):
        torch.testing.assert_close(model(*arguments), before)
    for encoder in (model, plain):
        IN_ONE_LAYER[change](layers_of(encoder)[1])
    expected = plain(*arguments)
    assert not torch.allclose(before, expected, rtol=1e-2)
    torch.testing.assert_close(model(*arguments), expected)
