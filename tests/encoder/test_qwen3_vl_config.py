"""The Qwen3-VL encoder's sizes and weights as Hugging Face has them, and what is refused of both."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from vit_encoder import Qwen3VLImageSettings, Qwen3VLVisionConfig, Qwen3VLVisionModel
from vit_encoder.checkpoints import to_hf_tensors
from vit_encoder.qwen3_vl.checkpoint import PREFIXES, vision_tensors

from experiments.common.peers import allow_torchvision_beside_cpu_torch, side_by_side
from tests.encoder.qwen2_5_vl_batches import patches
from tests.encoder.qwen3_vl_batches import encoder

PUBLISHED = {
    "deepstack_visual_indexes": [8, 16, 24],
    "depth": 27,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 4304,
    "model_type": "qwen3_vl",
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 4096,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
"""The `vision_config` of Qwen3-VL 8B."""
CONFIG = dataclasses.replace(Qwen3VLVisionConfig.tiny(), depth=2, patch_size=4)
TINY = dataclasses.asdict(Qwen3VLVisionConfig.tiny())
GRID = torch.tensor([[1, 4, 6]])

NAMED: dict[str, tuple[Callable[[], Qwen3VLVisionConfig], int, float | None]] = {
    "2b": (Qwen3VLVisionConfig.qwen3_vl_2b, 64, 407.0),
    "4b": (Qwen3VLVisionConfig.qwen3_vl_4b, 64, 415.3),
    "8b": (Qwen3VLVisionConfig.qwen3_vl_8b, 72, 576.4),
    "30b-a3b": (Qwen3VLVisionConfig.qwen3_vl_30b_a3b, 72, 538.6),
    "32b": (Qwen3VLVisionConfig.qwen3_vl_32b, 72, 595.3),
    "3.5 0.8b": (Qwen3VLVisionConfig.qwen3_5_0_8b, 64, 100.6),
    "3.5 27b": (Qwen3VLVisionConfig.qwen3_5_27b, 72, 460.7),
    "3.5 35b-a3b": (Qwen3VLVisionConfig.qwen3_5_35b_a3b, 72, None),
    "3.5 397b-a17b": (Qwen3VLVisionConfig.qwen3_5_397b_a17b, 72, None),
}
"""Head_dim, and millions of parameters."""


@pytest.mark.parametrize("name", NAMED)
def test_the_published_towers_have_their_sizes(name: str) -> None:
    make, head_dim, millions = NAMED[name]
    config = make()
    assert config.head_dim == head_dim
    assert config.feature_width == (1 if "3.5" in name else 4) * config.out_hidden_size
    with torch.device("meta"):
        model = Qwen3VLVisionModel(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert millions is None or round(count / 1e6, 1) == millions


def test_the_published_configurations_are_read() -> None:
    whole = {"model_type": "qwen3_vl", "text_config": {"hidden_size": 4096}, "vision_config": PUBLISHED}
    assert Qwen3VLVisionConfig.from_hf(whole) == Qwen3VLVisionConfig.qwen3_vl_8b()
    of_27b = PUBLISHED | {"deepstack_visual_indexes": [], "out_hidden_size": 5120, "model_type": "qwen3_5"}
    assert Qwen3VLVisionConfig.from_hf({"vision_config": of_27b}) == Qwen3VLVisionConfig.qwen3_5_27b()
    of_omni = PUBLISHED | {"out_hidden_size": 2048, "model_type": "qwen3_omni_moe_vision_encoder"}
    omni = {"model_type": "qwen3_omni_moe", "thinker_config": {"vision_config": of_omni}}
    assert Qwen3VLVisionConfig.from_hf(omni) == Qwen3VLVisionConfig.qwen3_vl_30b_a3b()
    config = Qwen3VLVisionConfig.qwen3_vl_8b()
    assert (config.patch_dim, config.merge_unit, config.position_side) == (1536, 4, 48)


@pytest.mark.parametrize(
    "name", ["Qwen3VLConfig", "Qwen3VLMoeConfig", "Qwen3_5Config", "Qwen3_5MoeConfig", "Qwen3OmniMoeThinkerConfig"]
)
def test_transformers_objects_and_their_files_are_read(name: str, tmp_path: Path) -> None:
    allow_torchvision_beside_cpu_torch()
    import transformers

    make = getattr(transformers, name)
    deepstack: dict[str, Any] = {"deepstack_visual_indexes": []} if "5" in name else {}
    sizes = {**TINY, "in_channels": 4} | deepstack
    assert sizes.pop("rope_theta") != 300.0
    vision = sizes | {"rope_parameters": {"rope_type": "axial", "rope_theta": 300.0}}
    whole = make(vision_config=vision)
    whole.save_pretrained(tmp_path)
    expected = Qwen3VLVisionConfig(**sizes, rope_theta=300.0)
    for config in (whole, whole.vision_config, whole.to_dict(), tmp_path, tmp_path / "config.json"):
        assert Qwen3VLVisionConfig.from_hf(config) == expected
    # What a class alone has, and what it writes of that.
    default = make()
    default.save_pretrained(tmp_path)
    defaults = dataclasses.replace(Qwen3VLVisionConfig(out_hidden_size=3584), **deepstack)
    assert Qwen3VLVisionConfig.from_hf(default.vision_config) == defaults
    assert Qwen3VLVisionConfig.from_hf(tmp_path) == defaults


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_vl_vision", "qwen3_vl_moe", "qwen3_omni_moe_vision_encoder"])
@given(missing=st.sets(st.sampled_from(sorted(TINY.keys()))))
def test_any_field_may_be_left_out_where_it_is_the_default(model_type: str, missing: set[str]) -> None:
    default = dataclasses.asdict(Qwen3VLVisionConfig(out_hidden_size=3584))
    given = {"model_type": model_type} | {key: value for key, value in default.items() if key not in missing}
    assert dataclasses.asdict(Qwen3VLVisionConfig.from_hf(given)) == default


def test_without_deepstack_where_qwen3_5_s_class_has_none() -> None:
    without = {key: value for key, value in PUBLISHED.items() if key != "deepstack_visual_indexes"}
    for model_type in ("qwen3_5", "qwen3_5_vision", "qwen3_5_moe", "qwen3_5_moe_vision"):
        config = Qwen3VLVisionConfig.from_hf(without | {"model_type": model_type})
        assert config.deepstack_visual_indexes == ()
    with pytest.raises(ValueError, match="the vision configuration lacks deepstack_visual_indexes; it has"):
        Qwen3VLVisionConfig.from_hf(without | {"model_type": "glm4v"})


@pytest.mark.parametrize("text", [{"hidden_size": 8192}, {"text_config": {"hidden_size": 8192}}])
def test_a_default_that_the_text_model_contradicts_is_refused(text: dict[str, Any]) -> None:
    section = {key: value for key, value in PUBLISHED.items() if key != "out_hidden_size"}
    with pytest.raises(ValueError, match=r"lacks out_hidden_size: transformers' default, 3584, is not .*, 8192"):
        Qwen3VLVisionConfig.from_hf({"vision_config": section} | text)


@pytest.mark.parametrize(
    "other",
    [
        {"model_type": "qwen3_vl", "hidden_size": 4096, "vocab_size": 152064, "num_attention_heads": 28},
        {"model_type": "qwen3_vl", "text_config": {"hidden_size": 4096}},
        {"model_type": "qwen3_vl", "vision_config": PUBLISHED | {"depth": None}},
        {"model_type": "qwen2_5_vl", "hidden_size": 1280},
        {},
    ],
)
def test_nothing_is_filled_in_for_what_is_no_qwen3_vl_encoder(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"the vision configuration lacks .*depth.*; it has"):
        Qwen3VLVisionConfig.from_hf(other)


def test_sides_may_be_given_twice() -> None:
    twice = PUBLISHED | {"patch_size": [16, 16], "temporal_patch_size": [2, 2]}
    assert Qwen3VLVisionConfig.from_hf(twice) == Qwen3VLVisionConfig.qwen3_vl_8b()
    with pytest.raises(ValueError, match=r"temporal_patch_size must be one number or the same one twice, got \[2, 1\]"):
        Qwen3VLVisionConfig.from_hf(PUBLISHED | {"temporal_patch_size": [2, 1]})


def test_scaled_rotary_embeddings_and_another_activation_are_refused() -> None:
    with pytest.raises(ValueError, match="rope_parameters must be of rope_type default or axial, got 'yarn'"):
        Qwen3VLVisionConfig.from_hf(PUBLISHED | {"rope_parameters": {"rope_type": "yarn"}})
    with pytest.raises(ValueError, match="hidden_act must be gelu_pytorch_tanh, got 'gelu'"):
        Qwen3VLVisionConfig.from_hf(PUBLISHED | {"hidden_act": "gelu"})


def test_numpy_s_numbers_are_numbers() -> None:
    numbers = {"depth": np.int64(3), "deepstack_visual_indexes": [np.int32(0), np.int64(1)]}
    config = Qwen3VLVisionConfig(**(TINY | numbers))
    assert config == Qwen3VLVisionConfig.tiny()
    assert {type(index) for index in config.deepstack_visual_indexes} == {int}


def test_indexes_beyond_the_depth_mean_nothing() -> None:
    config = dataclasses.replace(Qwen3VLVisionConfig(), depth=17)
    assert (config.deepstack_layers, config.feature_width) == ((8, 16), 3 * 4096)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"depth": 0}, ValueError, "depth must be a positive integer, got 0"),
        ({"patch_size": [16, 16]}, TypeError, "patch_size must be a positive integer"),
        ({"rope_theta": float("nan")}, ValueError, "rope_theta must be a positive finite number"),
        ({"num_heads": 5}, ValueError, "hidden_size must be a multiple of num_heads, got hidden_size 144"),
        ({"num_heads": 12}, ValueError, r"must be a multiple of 8 in 8\.\.256 .* 144 / 12 = 12"),
        ({"num_position_embeddings": 50}, ValueError, "num_position_embeddings must be a square, got 50"),
        ({"deepstack_visual_indexes": 7}, TypeError, "deepstack_visual_indexes must be a sequence of integers, got 7"),
        ({"deepstack_visual_indexes": [True]}, TypeError, r"deepstack_visual_indexes must be .*, got \[True\]"),
        ({"deepstack_visual_indexes": [-1]}, ValueError, "deepstack_visual_indexes must not be negative"),
        ({"deepstack_visual_indexes": [1, 0]}, ValueError, r"deepstack_visual_indexes must increase, got \(1, 0\)"),
        ({"deepstack_visual_indexes": [1, 1]}, ValueError, r"deepstack_visual_indexes must increase, got \(1, 1\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Qwen3VLVisionConfig(**(TINY | changes))


@pytest.mark.parametrize("omni", [False, True])
def test_the_mapping_is_the_model_s_parameters(omni: bool) -> None:
    with torch.device("meta"):
        model = Qwen3VLVisionModel(CONFIG)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {name: parts.shape for name, parts in vision_tensors(CONFIG, omni=omni).items()}


def save(folder: Path, prefix: str, *, omni: bool = False, **changes: Tensor | None) -> None:
    """The weights of an encoder under other names than the published, with some replaced or left out."""
    tensors = to_hf_tensors(dict(encoder(CONFIG).named_parameters()), vision_tensors(CONFIG, omni=omni))
    renamed = {prefix + name.removeprefix(PREFIXES[0]): tensor.contiguous() for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in (renamed | changes).items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")
    whole: dict[str, Any] = {"vision_config": dataclasses.asdict(CONFIG)}
    if omni:
        whole = {"thinker_config": whole} if prefix else dataclasses.asdict(CONFIG) | {"model_type": "qwen3_omni_moe"}
    (folder / "config.json").write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("prefix", "omni"),
    [("model.visual.", False), ("visual.", False), ("", False), ("thinker.visual.", True), ("", True)],
)
def test_from_pretrained_reads_every_way_of_naming(prefix: str, omni: bool, tmp_path: Path) -> None:
    save(tmp_path, prefix, omni=omni)
    model = Qwen3VLVisionModel.from_pretrained(tmp_path)
    pixel_values = patches(CONFIG, GRID)
    with torch.no_grad():
        assert torch.equal(model(pixel_values, GRID), encoder(CONFIG)(pixel_values, GRID))
    assert not model.training
    assert model.image_settings == Qwen3VLImageSettings()
    half = Qwen3VLVisionModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_what_is_wrong_with_a_checkpoint_is_listed(tmp_path: Path) -> None:
    wrong: dict[str, Any] = {
        "model.visual.blocks.1.attn.qkv.bias": None,
        "model.visual.deepstack_merger_list.0.norm.weight": torch.zeros(144),
        "model.visual.deepstack_merger_list.2.norm.weight": torch.zeros(576),
    }
    save(tmp_path, "model.visual.", **wrong)
    with pytest.raises(ValueError, match="does not hold the expected tensors") as caught:
        Qwen3VLVisionModel.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "missing (1):\n    model.visual.blocks.1.attn.qkv.bias\n" in message
    assert "unexpected (1):\n    'model.visual.deepstack_merger_list.2.norm.weight'\n" in message
    assert "model.visual.deepstack_merger_list.0.norm.weight: [144], expected [576]" in message


def test_a_sharded_checkpoint_of_the_whole_model_is_read(tmp_path: Path) -> None:
    allow_torchvision_beside_cpu_torch()
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    sizes = {key: value for key, value in dataclasses.asdict(CONFIG).items() if key != "rope_theta"}
    text = {
        "vocab_size": 64, "hidden_size": 96, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 48,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 8, 8]},
    }  # fmt: skip
    torch.manual_seed(0)
    whole = Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=sizes, text_config=text)).eval()
    whole.save_pretrained(tmp_path, max_shard_size="800KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = Qwen3VLVisionModel.from_pretrained(tmp_path)
    pixel_values = patches(CONFIG, GRID)
    with torch.no_grad():
        theirs = side_by_side(whole.model.visual(pixel_values, grid_thw=GRID))
        torch.testing.assert_close(model(pixel_values, GRID), theirs)


@pytest.mark.parametrize("wrong", [TINY, None])
def test_what_is_no_configuration_is_refused_by_the_model(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"config: got .*, expected a Qwen3VLVisionConfig"):
        Qwen3VLVisionModel(wrong)
    with pytest.raises(TypeError, match="compilation_config: got str, expected a CompilationConfig or None"):
        Qwen3VLVisionModel(CONFIG, compilation_config="yes")  # type: ignore[arg-type]
