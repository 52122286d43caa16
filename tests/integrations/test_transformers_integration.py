"""Our encoder inside transformers' Llama 4."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from vit_encoder import CompilationConfig, compilation_counter
from vit_encoder.integrations.transformers import apply_to_llama4, revert_llama4
from vit_kernels.testing import assert_close_to_reference

from tests.support import checkpoint_layers, saved_bytes

IMAGE_TOKEN = 60
TOKENS_PER_TILE = 4
BROKEN_UPSTREAM = ("5.0.", "5.1.", "5.24.0")


def llama4(seed: int = 0) -> Any:
    from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4TextConfig, Llama4VisionConfig

    vision = Llama4VisionConfig(
        hidden_size=176, num_attention_heads=2, num_hidden_layers=2, intermediate_size=704, image_size=56,
        patch_size=14, projector_input_dim=64, projector_output_dim=64, vision_output_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    text = Llama4TextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_local_experts=2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, attention_chunk_size=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    config = Llama4Config(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, pad_token_id=0)
    model = Llama4ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                gain = 3.0 if "q_proj" in name or "k_proj" in name else 1.0
                parameter.normal_(0, gain * parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.normal_("norm" in name and name.endswith("weight"), 0.1, generator=generator)
    return model.eval()


@pytest.fixture
def model() -> Any:
    return llama4()


def tiles(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(count)).to(dtype)


def prompt(count: int) -> dict[str, Any]:
    """What the whole model takes for a question about `count` tiles."""
    ids = torch.tensor([[1, 7, *[IMAGE_TOKEN] * TOKENS_PER_TILE * count, 9, 11]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": tiles(count)}


def generated(model: Any, count: int) -> tuple[list[int], Tensor]:
    """Twelve greedy tokens for `count` tiles, and the scores of each."""
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    out = model.generate(**prompt(count), return_dict_in_generate=True, output_scores=True, **options)
    return out.sequences[0, prompt(count)["input_ids"].shape[1] :].tolist(), torch.cat(out.scores)


def features(vision: nn.Module, count: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        return vision(tiles(count, dtype)).last_hidden_state


def storage_bytes(model: nn.Module) -> int:
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in model.parameters()}
    return sum(storages.values())


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_same_tokens_are_generated(model: Any, compiled: bool) -> None:
    import transformers

    if transformers.__version__.startswith(BROKEN_UPSTREAM):
        pytest.skip(f"transformers {transformers.__version__} cannot give images to Llama 4 itself")
    expected = [generated(model, count) for count in (1, 3)]
    assert expected[0][0] != expected[1][0]
    apply_to_llama4(model, compile=compiled)
    with compilation_counter.expect(graphs_seen=int(compiled)):
        actual = [generated(model, count) for count in (1, 3)]
    for (tokens, scores), (their_tokens, their_scores) in zip(actual, expected, strict=True):
        assert tokens == their_tokens
        torch.testing.assert_close(scores, their_scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bare", [False, True], ids=["whole model", "vision model"])
def test_the_features_are_the_same_until_reverted(model: Any, bare: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, target = features(model.vision_model), model.vision_model if bare else model
    apply_to_llama4(target)
    apply_to_llama4(target)
    monkeypatch.setattr(type(model.vision_model.model), "forward", None)
    torch.testing.assert_close(features(model.vision_model), expected)
    monkeypatch.undo()
    revert_llama4(target)
    assert "forward" not in vars(model.vision_model)
    assert torch.equal(features(model.vision_model), expected)
    with pytest.raises(ValueError, match="expected one with our encoder applied"):
        revert_llama4(target)


def test_heads_of_eight_channels_run() -> None:
    from transformers import Llama4VisionConfig
    from transformers.models.llama4 import Llama4VisionModel

    config = Llama4VisionConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=128, image_size=56,
        patch_size=14, projector_input_dim=64, projector_output_dim=64, vision_output_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    vision = Llama4VisionModel(config).eval()
    expected = features(vision)
    apply_to_llama4(vision)
    torch.testing.assert_close(features(vision), expected)


def test_both_ways_to_return_are_kept(model: Any) -> None:
    apply_to_llama4(model)
    with torch.no_grad():
        (features,) = model.vision_model(tiles(1), return_dict=False)
        assert torch.equal(model.vision_model(tiles(1)).pooler_output, features)


def test_weights_are_held_once_and_saved_under_the_same_names(model: Any, tmp_path: Path) -> None:
    before = {name: x.clone() for name, x in model.state_dict().items()}
    held = storage_bytes(model)
    model.save_pretrained(tmp_path / "before")
    apply_to_llama4(model)
    features(model.vision_model)
    assert storage_bytes(model) == held
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    model.save_pretrained(tmp_path / "after")
    saved = load_file(tmp_path / "after/model.safetensors")
    expected = load_file(tmp_path / "before/model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_the_encoder_reads_the_models_own_weights(model: Any) -> None:
    encoder = apply_and_get_encoder(model)
    attention = model.vision_model.model.layers[0].self_attn
    qkv = encoder.layers[0].attention.qkv
    for part, rows in zip((attention.q_proj, attention.k_proj, attention.v_proj), qkv.weight.split(176), strict=True):
        assert part.weight.data_ptr() == rows.data_ptr()
        assert torch.equal(part.weight, rows)
    assert encoder.layers[0].mlp.fc1 is model.vision_model.model.layers[0].mlp.fc1


def apply_and_get_encoder(model: Any) -> Any:
    apply_to_llama4(model)
    return model.vision_model.forward.encoder


def test_weights_that_change_are_followed(model: Any) -> None:
    other = llama4(seed=1)
    expected = features(other.vision_model)
    apply_to_llama4(model)
    assert not torch.allclose(features(model.vision_model), expected)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(features(model.vision_model), expected)
    # Every parameter becomes another object.
    model.load_state_dict(llama4(seed=2).state_dict(), assign=True)
    torch.testing.assert_close(features(model.vision_model), features(llama4(seed=2).vision_model))


def test_a_projection_of_other_values_in_other_memory_is_followed(model: Any) -> None:
    apply_to_llama4(model)
    expected = llama4()
    for vision in (model.vision_model, expected.vision_model):
        projection = vision.model.layers[1].self_attn.k_proj
        projection.weight = nn.Parameter(projection.weight.detach() * 2)
        projection.bias.data = projection.bias.data + 1
    torch.testing.assert_close(features(model.vision_model), features(expected.vision_model))


def test_a_cast_model_is_as_exact_as_theirs(model: Any) -> None:
    theirs = llama4()
    for parameter in theirs.vision_model.parameters():
        # Their rotary table is complex: a cast of the module would drop its imaginary part.
        parameter.data = parameter.data.bfloat16()
    exact = copy.deepcopy(theirs)
    for parameter in exact.vision_model.parameters():
        parameter.data = parameter.data.double()
    apply_to_llama4(model)
    model.vision_model.model.to(torch.bfloat16)
    for parameter in model.vision_model.parameters():
        parameter.data = parameter.data.bfloat16()
    pixel_values = tiles(3, torch.bfloat16)
    with torch.no_grad():
        ours = model.vision_model(pixel_values).last_hidden_state
        peer = theirs.vision_model(pixel_values).last_hidden_state
        expected = exact.vision_model(pixel_values.double()).last_hidden_state
    assert_close_to_reference(ours, expected, peer)


def test_a_copy_has_weights_of_its_own(model: Any) -> None:
    apply_to_llama4(model)
    expected = features(model.vision_model)
    twin = copy.deepcopy(model)
    assert torch.equal(features(twin.vision_model), expected)
    twin.load_state_dict(llama4(seed=1).state_dict())
    assert torch.equal(features(model.vision_model), expected)
    torch.testing.assert_close(features(twin.vision_model), features(llama4(seed=1).vision_model))


def test_gradients_reach_the_models_own_parameters(model: Any) -> None:
    theirs = llama4().vision_model
    theirs(tiles(2)).last_hidden_state.square().sum().backward()
    apply_to_llama4(model)
    model.vision_model(tiles(2)).last_hidden_state.square().sum().backward()
    for (name, ours), expected in zip(model.vision_model.named_parameters(), theirs.parameters(), strict=True):
        assert ours.grad is not None, name
        torch.testing.assert_close(ours.grad, expected.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compile_takes_a_configuration_and_can_be_changed(model: Any) -> None:
    with compilation_counter.expect(graphs_seen=1, recompiles=0):
        apply_to_llama4(model, compile=CompilationConfig(compile_mm_encoder=True, backend="aot_eager"))
        expected = features(model.vision_model)
        # Inference tensors would be seen as another kind of call.
        features(model.vision_model, 1)
        apply_to_llama4(model, compile=False)
        torch.testing.assert_close(features(model.vision_model), expected)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_layer_is_traced_once_for_all(model: Any) -> None:
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    apply_to_llama4(model, compile=CompilationConfig(compile_mm_encoder=True, backend=backend))
    features(model.vision_model)
    assert targets.count("invoke_subgraph") == len(model.vision_model.model.layers)


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_what_our_encoder_does_not_keep_is_refused(model: Any, option: str) -> None:
    apply_to_llama4(model)
    with pytest.raises(ValueError, match=f"{option}: got True.*revert first"):
        model.vision_model(tiles(1), **{option: True})
    model.vision_model.set_attn_implementation("eager")
    setattr(model.vision_model.config, option, True)
    with pytest.raises(ValueError, match=f"{option}: got True"):
        model.vision_model(tiles(1))


@pytest.mark.parametrize("bare", [False, True], ids=["whole model", "vision model"])
def test_what_is_asked_of_the_whole_model_is_the_text_models(model: Any, bare: bool) -> None:
    import transformers

    if transformers.__version__.startswith(BROKEN_UPSTREAM):
        pytest.skip(f"transformers {transformers.__version__} cannot give images to Llama 4 itself")
    model.set_attn_implementation({"text_config": "eager"})
    apply_to_llama4(model.vision_model if bare else model)
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        out = model(**prompt(2), **asked)
    assert (len(out.hidden_states), len(out.attentions)) == (3, 2)
    out = model.generate(**prompt(2), **asked, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    assert (len(out.hidden_states), len(out.attentions)) == (2, 2)
    # Whatever the vision model's configuration says, nobody could see its hidden states.
    model.vision_model.config.output_hidden_states = True
    model(**prompt(2))
    with pytest.raises(ValueError, match="output_hidden_states: got True"):
        # Versions before 5.20 or so want to be told.
        model.get_image_features(pixel_values=tiles(2), vision_feature_select_strategy="default")


def gradients(vision: Any) -> list[Tensor]:
    vision.zero_grad()
    vision(tiles(2)).last_hidden_state.square().sum().backward()
    return [parameter.grad.clone() for parameter in vision.model.parameters()]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_checkpointed_layers_have_the_same_gradients(model: Any, compiled: bool, reentrant: bool) -> None:
    vision = model.vision_model.train().requires_grad_(False)
    # Reentrant checkpoints take an input without gradient for none of the layer's weights having one.
    vision.model.requires_grad_(True)
    expected = gradients(vision)
    apply_to_llama4(model, compile=CompilationConfig(compile_mm_encoder=compiled, backend="aot_eager"))
    checkpoint_layers(model, use_reentrant=reentrant)
    with compilation_counter.expect(graphs_seen=int(compiled)):
        actual = gradients(vision)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


def bytes_of_a_layer(before: bool, checkpointed: bool, mode: str) -> int:
    """What one layer more keeps for backward."""
    kept = []
    for layers in (1, 2):
        model = llama4()
        vision = model.vision_model.train(mode == "train")
        vision.model.layers = vision.model.layers[:layers]
        vision.config.num_hidden_layers = layers
        if before and checkpointed:
            checkpoint_layers(model, use_reentrant=False)
        apply_to_llama4(model)
        if not before and checkpointed:
            checkpoint_layers(model, use_reentrant=False)
        kept.append(saved_bytes(vision, tiles(3)))
    return kept[1] - kept[0]


def test_a_checkpointed_layer_keeps_its_input_alone() -> None:
    hidden_states = 3 * 17 * 176 * 4
    assert bytes_of_a_layer(before=False, checkpointed=True, mode="train") == hidden_states
    assert bytes_of_a_layer(before=True, checkpointed=True, mode="train") == hidden_states
    plain = bytes_of_a_layer(before=True, checkpointed=False, mode="train")
    assert plain > 10 * hidden_states
    assert bytes_of_a_layer(before=False, checkpointed=True, mode="eval") == plain


def test_checkpointing_ends_when_it_is_disabled(model: Any) -> None:
    apply_to_llama4(model.train())
    plain = saved_bytes(model.vision_model, tiles(3))
    checkpoint_layers(model, use_reentrant=False)
    assert saved_bytes(model.vision_model, tiles(3)) < plain / 4
    model._set_gradient_checkpointing(enable=False)
    assert saved_bytes(model.vision_model, tiles(3)) == plain


def test_dropout_in_training_is_refused(model: Any) -> None:
    apply_to_llama4(model)
    model.train()
    features(model.vision_model)
    model.vision_model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="training mode and dropout"):
        features(model.vision_model)


def test_other_models_are_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="got Linear, expected Llama4ForConditionalGeneration"):
        apply_to_llama4(nn.Linear(2, 2))
    with torch.device("meta"):
        unloaded = copy.deepcopy(model).to("meta")
    with pytest.raises(ValueError, match="on meta, expected loaded weights on one device"):
        apply_to_llama4(unloaded)


class Linear(nn.Module):
    """As peft's, which has this name too: the layer that it adapts within, whose weight it shows."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def adapted(model: Any, layer: int, name: str) -> Any:
    adapted_layer = model.vision_model.model.layers[layer]
    owner = adapted_layer.mlp if name.startswith("fc") else adapted_layer.self_attn
    torch.manual_seed(0)
    setattr(owner, name, Linear(getattr(owner, name)))
    return model


def test_an_adapter_on_a_projection_is_refused_also_when_it_comes_later(model: Any) -> None:
    told = r"got .*test_transformers_integration.Linear as model.layers.1.self_attn.q_proj of the vision model"
    with pytest.raises(TypeError, match=told + r", expected torch.nn.modules.linear.Linear.*merge_and_unload"):
        apply_to_llama4(adapted(llama4(), 1, "q_proj"))
    apply_to_llama4(model)
    adapted(model, 1, "q_proj")
    with pytest.raises(TypeError, match=told):
        model.vision_model(tiles(1))


@pytest.mark.parametrize("name", ["o_proj", "fc1", "fc2"])
def test_an_adapter_elsewhere_is_called(model: Any, name: str) -> None:
    expected = features(adapted(model, 1, name).vision_model)
    apply_to_llama4(model)
    torch.testing.assert_close(features(model.vision_model), expected)
    assert not torch.allclose(expected, features(llama4().vision_model))


def weight_norm(vision: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(vision.model.layers[0].self_attn.v_proj)


def prune(vision: Any) -> None:
    vision.model.layers = vision.model.layers[:1]


def drop_a_bias(vision: Any) -> None:
    vision.model.layers[0].self_attn.k_proj = nn.Linear(176, 176, bias=False)


class Quantised(Tensor):
    """A weight with arithmetic of its own, as torchao's."""


def quantise(vision: Any) -> None:
    projection = vision.model.layers[0].self_attn.k_proj
    projection.weight = nn.Parameter(projection.weight.detach().as_subclass(Quantised))


def another_activation(vision: Any) -> None:
    vision.model.layers[1].mlp.activation_fn = nn.SiLU()


def another_forward(vision: Any) -> None:
    forward = vision.model.layers[1].forward
    vision.model.layers[1].forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


@pytest.mark.parametrize("change", [weight_norm, prune, drop_a_bias, quantise, another_activation, another_forward])
@pytest.mark.parametrize("later", [False, True], ids=["before", "later"])
def test_what_is_bypassed_must_be_what_transformers_makes(model: Any, change: Any, later: bool) -> None:
    if later:
        apply_to_llama4(model)
    change(model.vision_model)
    with pytest.raises(TypeError, match=r"model: got .* as model.layers.* of the vision model, expected "):
        model.vision_model(tiles(1)) if later else apply_to_llama4(model)


def test_shared_weights_are_refused(model: Any) -> None:
    layers = model.vision_model.model.layers
    layers[0].self_attn.k_proj = layers[0].self_attn.q_proj
    with pytest.raises(ValueError, match="share weights"):
        apply_to_llama4(model)
    model = llama4()
    model.vision_model.model.layers[1] = model.vision_model.model.layers[0]
    with pytest.raises(ValueError, match="share weights"):
        apply_to_llama4(model)


def test_a_class_derived_from_theirs_is_refused(model: Any) -> None:
    model.vision_model.__class__ = type("Sharded", (type(model.vision_model),), {})
    with pytest.raises(TypeError, match="got Sharded, expected"):
        apply_to_llama4(model)


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("part", ["", "layers.0.self_attn.q_proj.weight"], ids=["all", "one"])
def test_other_weights_of_a_functional_call_are_used(model: Any, part: str, differentiated: bool) -> None:
    def results(vision: Any) -> Any:
        def loss(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(vision, weights, tiles(1)).last_hidden_state.square().sum()

        weights = {name: x.detach() * 1.1 for name, x in vision.named_parameters() if part in name}
        return torch.func.grad(loss)(weights) if differentiated else loss(weights).detach()

    expected = results(llama4().vision_model)
    apply_to_llama4(model)
    before = features(model.vision_model)
    torch.testing.assert_close(results(model.vision_model), expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(features(model.vision_model), before)


def test_what_was_applied_in_inference_mode_trains(model: Any) -> None:
    with torch.inference_mode():
        apply_to_llama4(model)
        model.vision_model(tiles(1))
    model.vision_model(tiles(1)).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for parameter in model.vision_model.parameters())


def test_it_can_be_pickled_whole(model: Any, tmp_path: Path) -> None:
    apply_to_llama4(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(features(loaded.vision_model), features(model.vision_model))


def test_a_module_put_in_later_is_followed(model: Any) -> None:
    apply_to_llama4(model)
    expected = llama4()
    replacement = nn.Linear(704, 176)
    for target in (model, expected):
        target.vision_model.model.layers[0].mlp.fc2 = replacement
    torch.testing.assert_close(features(model.vision_model), features(expected.vision_model))


def test_weights_that_leave_are_missed_by_name(model: Any) -> None:
    apply_to_llama4(model)
    model.vision_model.model.to("meta")
    with pytest.raises(ValueError, match="got a vision model on cpu, meta, expected loaded weights on one device"):
        model.vision_model(tiles(1))


def test_a_model_with_weights_that_hooks_move_is_refused(model: Any) -> None:
    model.vision_model.layernorm_pre._hf_hook = object()
    with pytest.raises(ValueError, match="hooks of accelerate"):
        apply_to_llama4(model)


def test_importing_the_integration_imports_no_transformers() -> None:
    code = "import sys, vit_encoder.integrations.transformers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
