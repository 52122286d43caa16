"""Our encoder inside transformers' Qwen2.5-VL."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from vit_encoder import CompilationConfig, compilation_counter
from vit_encoder.integrations.transformers import apply_to_qwen2_5_vl, revert_qwen2_5_vl
from vit_kernels.testing import assert_close_to_reference

from tests.support import checkpoint_layers, saved_bytes

IMAGE_TOKEN, VISION_START = 60, 58
# Relative, over all elements: some hundred roundings of float32. Other weights make a difference of 1.
ROUNDING = 1e-4
GRIDS = [[[1, 4, 6]], [[1, 6, 4], [1, 2, 6]]]


def qwen2_5_vl(seed: int = 0) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 2, "hidden_size": 80, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 64,
        "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": None, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]
        },
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, vision_start_token_id=VISION_START,
        video_token_id=59, vision_end_token_id=61,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                gain = 3.0 if "qkv" in name else 1.0
                parameter.normal_(0, gain * parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.normal_(float("norm" in name or "ln_q" in name), 0.1, generator=generator)
    return model.eval()


@pytest.fixture
def model() -> Any:
    return qwen2_5_vl()


def inputs(grids: list[list[int]], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    grid_thw = torch.tensor(grids)
    patches = int(grid_thw.prod(-1).sum())
    generator = torch.Generator().manual_seed(patches)
    return torch.randn(patches, 3 * 2 * 14 * 14, generator=generator).to(dtype), grid_thw


def features(model: Any, grids: list[list[int]] = GRIDS[1], dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        return model.model.visual(*inputs(grids, dtype)).pooler_output


def question(model: Any, grids: list[list[int]]) -> dict[str, Any]:
    """What the whole model takes for a question about these images."""
    pixel_values, grid_thw = inputs(grids)
    prompt = [1]
    for grid in grid_thw:
        prompt += [VISION_START, *[IMAGE_TOKEN] * (int(grid.prod()) // 4), 61]
    ids = torch.tensor([[*prompt, 9, 11]])
    # New in a later transformers 5.
    newer = "mm_token_type_ids" in inspect.signature(model.forward).parameters
    types = {"mm_token_type_ids": (ids == IMAGE_TOKEN).int()} if newer else {}
    images = {"pixel_values": pixel_values, "image_grid_thw": grid_thw}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images, **types}


def generated(model: Any, grids: list[list[int]]) -> tuple[list[int], Tensor]:
    """Twelve greedy tokens for these images, and the scores of each."""
    asked = question(model, grids)
    out = model.generate(**asked, max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_scores=True)
    return out.sequences[0, asked["input_ids"].shape[1] :].tolist(), torch.cat(out.scores)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """The same but for the order of sums in float32."""
    assert (actual - expected).norm() <= ROUNDING * expected.norm()


def storage_bytes(model: nn.Module) -> int:
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in model.parameters()}
    return sum(storages.values())


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_same_tokens_are_generated(model: Any, compiled: bool) -> None:
    expected = [generated(model, grids) for grids in GRIDS]
    assert expected[0][0] != expected[1][0]
    apply_to_qwen2_5_vl(model, compile=compiled)
    with compilation_counter.expect(graphs_seen=int(compiled)):
        actual = [generated(model, grids) for grids in GRIDS]
    for (tokens, scores), (their_tokens, their_scores) in zip(actual, expected, strict=True):
        assert tokens == their_tokens
        torch.testing.assert_close(scores, their_scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("target", [lambda m: m, lambda m: m.model, lambda m: m.model.visual])
def test_the_features_are_the_same_until_reverted(target: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = features(model)
    apply_to_qwen2_5_vl(target(model))
    monkeypatch.setattr(type(model.model.visual.blocks[0]), "forward", None)
    assert_same(features(model), expected)
    monkeypatch.undo()
    revert_qwen2_5_vl(target(model))
    assert torch.equal(features(model), expected)
    with pytest.raises(ValueError, match="expected one with our encoder applied"):
        revert_qwen2_5_vl(target(model))


def test_weights_are_held_once_and_saved_under_the_same_names(model: Any, tmp_path: Path) -> None:
    held, names = storage_bytes(model), list(model.state_dict())
    model.save_pretrained(tmp_path / "before")
    apply_to_qwen2_5_vl(model)
    features(model)
    assert (storage_bytes(model), list(model.state_dict())) == (held, names)
    model.save_pretrained(tmp_path / "after")
    saved, expected = (load_file(tmp_path / when / "model.safetensors") for when in ("after", "before"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)


def test_weights_that_change_are_followed_also_in_a_copy(model: Any) -> None:
    apply_to_qwen2_5_vl(model)
    before = features(model)
    twin = copy.deepcopy(model)
    model.load_state_dict(qwen2_5_vl(seed=1).state_dict())
    assert_same(features(model), features(qwen2_5_vl(seed=1)))
    model.load_state_dict(qwen2_5_vl(seed=2).state_dict(), assign=True)
    assert_same(features(model), features(qwen2_5_vl(seed=2)))
    assert torch.equal(features(twin), before)


def test_a_cast_model_is_as_exact_as_theirs(model: Any) -> None:
    apply_to_qwen2_5_vl(model)
    model.to(torch.bfloat16)
    theirs = qwen2_5_vl().to(torch.bfloat16)
    exact = copy.deepcopy(theirs).double()
    # Enough outputs for their maximum to mean something.
    grids = [[1, 12, 16], [1, 10, 8], [2, 8, 8]]
    with torch.no_grad():
        pixel_values, grid_thw = inputs(grids, torch.bfloat16)
        expected = exact.model.visual(pixel_values.double(), grid_thw).pooler_output
    assert_close_to_reference(features(model, grids, torch.bfloat16), expected, features(theirs, grids, torch.bfloat16))


def test_gradients_reach_the_models_own_parameters(model: Any) -> None:
    theirs = qwen2_5_vl().model.visual
    theirs(*inputs(GRIDS[1])).pooler_output.square().sum().backward()
    apply_to_qwen2_5_vl(model)
    ours = model.model.visual
    ours(*inputs(GRIDS[1])).pooler_output.square().sum().backward()
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert parameter.grad is not None, name
        assert (parameter.grad - expected.grad).norm() <= ROUNDING * expected.grad.norm(), name


def test_other_models_and_extras_are_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="got Linear, expected Qwen2_5_VLForConditionalGeneration"):
        apply_to_qwen2_5_vl(nn.Linear(2, 2))
    apply_to_qwen2_5_vl(model)
    with pytest.raises(ValueError, match="output_hidden_states: got True"):
        model.model.visual(*inputs(GRIDS[0]), output_hidden_states=True)


@pytest.mark.parametrize("target", [lambda m: m, lambda m: m.model.visual], ids=["whole model", "vision model"])
def test_what_is_asked_of_the_whole_model_is_the_text_models(target: Any, model: Any) -> None:
    model.set_attn_implementation({"text_config": "eager"})
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = len(model(**question(model, GRIDS[1]), **asked, return_dict=False))
        apply_to_qwen2_5_vl(target(model))
        out = model(**question(model, GRIDS[1]), **asked)
        assert (len(out.hidden_states), len(out.attentions)) == (3, 2)
        assert len(model(**question(model, GRIDS[1]), **asked, return_dict=False)) == expected
    out = model.generate(
        **question(model, GRIDS[1]), **asked, max_new_tokens=2, do_sample=False, return_dict_in_generate=True
    )
    assert (len(out.hidden_states), len(out.attentions)) == (2, 2)
    # Whatever the vision model's configuration says, nobody could see its hidden states.
    model.model.visual.config.output_hidden_states = True
    model.generate(**question(model, GRIDS[1]), max_new_tokens=1)
    with pytest.raises(ValueError, match="output_hidden_states: got True"):
        model.get_image_features(*inputs(GRIDS[1]))


def test_both_ways_to_return_are_kept(model: Any) -> None:
    apply_to_qwen2_5_vl(model)
    visual, expected = model.model.visual, features(model)
    with torch.no_grad():
        assert torch.equal(visual(*inputs(GRIDS[1]), return_dict=False)[1], expected)
        visual.config.return_dict = False
        assert torch.equal(visual(*inputs(GRIDS[1]))[1], expected)


@pytest.mark.parametrize("name", ["cu_seqlens", "cu_window_seqlens", "position_ids", "window_index"])
def test_what_follows_from_the_sizes_is_refused(model: Any, name: str) -> None:
    apply_to_qwen2_5_vl(model)
    with pytest.raises(ValueError, match=f"{name}: got Tensor, expected None"):
        model.model.visual(*inputs(GRIDS[0]), **{name: torch.zeros(2)})


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("compiled", "reentrant"), [(False, False), (False, True), (True, False)])
def test_checkpointed_layers_have_the_same_gradients(model: Any, compiled: bool, reentrant: bool) -> None:
    visual = model.model.visual.train()

    def gradients() -> list[Tensor]:
        visual.zero_grad()
        visual(*inputs(GRIDS[1])).pooler_output.square().sum().backward()
        return [parameter.grad.clone() for parameter in visual.parameters()]

    expected = gradients()
    checkpoint_layers(model, use_reentrant=reentrant)
    apply_to_qwen2_5_vl(model, compile=CompilationConfig(compile_mm_encoder=compiled, backend="aot_eager"))
    with compilation_counter.expect(graphs_seen=int(compiled)):
        actual = gradients()
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same(ours, theirs)


def test_a_checkpointed_layer_keeps_its_input_alone() -> None:
    kept = []
    for layers in (1, 2):
        model = qwen2_5_vl()
        visual = model.model.visual.train()
        visual.blocks = visual.blocks[-layers:]
        visual.config.depth, visual.config.fullatt_block_indexes = layers, [layers - 1]
        apply_to_qwen2_5_vl(model)
        checkpoint_layers(model, use_reentrant=False)
        kept.append(saved_bytes(visual, *inputs([[1, 12, 16]])))
    assert kept[1] - kept[0] == 12 * 16 * 80 * 4


def norm(visual: Any) -> None:
    visual.blocks[1].norm1 = nn.RMSNorm(80)


def convolution(visual: Any) -> None:
    visual.patch_embed.proj = nn.Sequential(visual.patch_embed.proj)


def projection(visual: Any) -> None:
    visual.blocks[0].mlp.up_proj = nn.Sequential(nn.Linear(80, 96))


@pytest.mark.parametrize("change", [norm, convolution, projection])
def test_what_is_bypassed_must_be_what_transformers_makes(model: Any, change: Any) -> None:
    apply_to_qwen2_5_vl(model)
    change(model.model.visual)
    with pytest.raises(TypeError, match=r"model: got torch.nn.modules.* of the vision model, expected "):
        features(model)
