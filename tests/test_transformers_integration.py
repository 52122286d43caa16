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

IMAGE_TOKEN = 60
TOKENS_PER_TILE = 4
# Their image features are read from where their own vision model does not put them.
BROKEN_UPSTREAM = ("5.0.", "5.1.")


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


def generated(model: Any, count: int) -> tuple[list[int], Tensor]:
    """Twelve greedy tokens for `count` tiles, and the scores of each."""
    prompt = [1, 7, *[IMAGE_TOKEN] * TOKENS_PER_TILE * count, 9, 11]
    model.generation_config.eos_token_id = None
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    out = model.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        pixel_values=tiles(count), return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.scores)


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
        pytest.skip("transformers 5.0 and 5.1 cannot give images to Llama 4 themselves")
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


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_what_our_encoder_does_not_keep_is_refused(model: Any, option: str) -> None:
    apply_to_llama4(model)
    with pytest.raises(ValueError, match=f"{option}: got True.*revert first"):
        model.vision_model(tiles(1), **{option: True})
    model.vision_model.set_attn_implementation("eager")
    setattr(model.vision_model.config, option, True)
    with pytest.raises(ValueError, match=f"{option}: got True"):
        model.vision_model(tiles(1))


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


def test_an_adapter_on_a_projection_is_refused_also_when_it_comes_later(model: Any) -> None:
    adapted = llama4()
    apply_to_llama4(model)
    for target in (model, adapted):
        target.vision_model.model.layers[1].self_attn.v_proj = nn.Sequential(nn.Linear(176, 176))
    with pytest.raises(TypeError, match="got torch.nn.modules.container.Sequential as .*expected torch.nn.modules.linear.Linear"):
        apply_to_llama4(adapted)
    with pytest.raises(TypeError, match="got torch.nn.modules.container.Sequential as .*expected torch.nn.modules.linear.Linear"):
        model.vision_model(tiles(1))


def test_a_module_put_in_later_is_followed(model: Any) -> None:
    apply_to_llama4(model)
    expected = llama4()
    replacement = nn.Linear(704, 176)
    for target in (model, expected):
        target.vision_model.model.layers[0].mlp.fc2 = replacement
    torch.testing.assert_close(features(model.vision_model), features(expected.vision_model))


def test_a_model_with_weights_that_hooks_move_is_refused(model: Any) -> None:
    model.vision_model.layernorm_pre._hf_hook = object()
    with pytest.raises(ValueError, match="hooks of accelerate"):
        apply_to_llama4(model)


def test_importing_the_integration_imports_no_transformers() -> None:
    code = "import sys, vit_encoder.integrations.transformers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
