"""The Qwen2.5-VL encoder's sizes and weights as Hugging Face has them, and what is refused of both."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from vit_encoder import Qwen2_5_VLVisionConfig, Qwen2_5_VLVisionModel
from vit_encoder.checkpoints import to_hf_tensors
from vit_encoder.qwen2_5_vl.checkpoint import vision_tensors

from experiments.common.peers import allow_torchvision_beside_cpu_torch
from tests.encoder.qwen2_5_vl_batches import encoder, patches

PUBLISHED = {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "out_hidden_size": 2048,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
}
"""The `vision_config` of Qwen2.5-VL 3B."""
CONFIG = dataclasses.replace(Qwen2_5_VLVisionConfig.tiny(), depth=2, patch_size=4, window_size=32)
TINY = dataclasses.asdict(Qwen2_5_VLVisionConfig.tiny())
GRID = torch.tensor([[1, 4, 6]])


def test_the_published_configurations_are_read() -> None:
    whole = {"rope_theta": 1000000.0, "hidden_size": 2048, "vision_config": PUBLISHED}
    assert Qwen2_5_VLVisionConfig.from_hf(whole) == Qwen2_5_VLVisionConfig.qwen2_5_vl_3b()
    of_7b = PUBLISHED | {"out_hidden_size": 3584}
    assert Qwen2_5_VLVisionConfig.from_hf(of_7b) == Qwen2_5_VLVisionConfig.qwen2_5_vl_7b()
    config = Qwen2_5_VLVisionConfig.qwen2_5_vl_7b()
    assert (config.head_dim, config.patch_dim, config.merge_unit, config.window_units) == (80, 1176, 4, 4)


def test_transformers_objects_and_their_files_are_read(tmp_path: Path) -> None:
    allow_torchvision_beside_cpu_torch()
    import transformers

    sizes = {**TINY, "in_channels": 4}
    theta = sizes.pop("rope_theta")
    vision = sizes | {"rope_parameters": {"rope_type": "axial", "rope_theta": 300.0}}
    whole = transformers.Qwen2_5_VLConfig(vision_config=vision)
    whole.save_pretrained(tmp_path)
    expected = Qwen2_5_VLVisionConfig(**sizes, rope_theta=300.0)
    assert theta != 300.0
    for config in (whole, whole.vision_config, whole.to_dict(), tmp_path, tmp_path / "config.json"):
        assert Qwen2_5_VLVisionConfig.from_hf(config) == expected


SHORT = {
    "hidden_size": 1280,
    "in_chans": 3,
    "model_type": "qwen2_5_vl",
    "spatial_patch_size": 14,
    "tokens_per_second": 2,
}
"""What transformers 4.49 wrote for the 7B; of the others also the last two fields here."""


@pytest.mark.parametrize(
    ("written", "text_width", "expected"),
    [
        ({"out_hidden_size": 2048}, 2048, Qwen2_5_VLVisionConfig.qwen2_5_vl_3b()),
        ({}, 3584, Qwen2_5_VLVisionConfig.qwen2_5_vl_7b()),
        ({"intermediate_size": 3456, "out_hidden_size": 5120}, 5120, Qwen2_5_VLVisionConfig.qwen2_5_vl_32b()),
        ({"intermediate_size": 3456, "out_hidden_size": 8192}, 8192, Qwen2_5_VLVisionConfig.qwen2_5_vl_72b()),
    ],
    ids=["3b", "7b", "32b", "72b"],
)
def test_what_transformers_4_49_left_out_is_filled_in(
    written: dict[str, Any], text_width: int, expected: Qwen2_5_VLVisionConfig
) -> None:
    section = SHORT | written
    text: dict[str, Any]
    for text in ({}, {"hidden_size": text_width}, {"text_config": {"hidden_size": text_width}}):
        assert Qwen2_5_VLVisionConfig.from_hf({"model_type": "qwen2_5_vl", "vision_config": section} | text) == expected
    assert Qwen2_5_VLVisionConfig.from_hf(section) == expected
    without_type = {key: value for key, value in section.items() if key != "model_type"}
    whole = {"model_type": "qwen2_5_vl", "vision_config": without_type}
    assert Qwen2_5_VLVisionConfig.from_hf(whole) == expected


def test_what_is_filled_in_are_the_defaults_of_transformers() -> None:
    allow_torchvision_beside_cpu_torch()
    import transformers

    expected = Qwen2_5_VLVisionConfig.from_hf(transformers.Qwen2_5_VLConfig().vision_config)
    assert Qwen2_5_VLVisionConfig.from_hf({"model_type": "qwen2_5_vl"}) == expected


@given(st.sets(st.sampled_from(sorted(TINY.keys() - {"rope_theta"}))))
def test_any_field_may_be_left_out_where_it_is_the_default(missing: set[str]) -> None:
    default = dataclasses.asdict(Qwen2_5_VLVisionConfig(hidden_size=3584))
    given = {"model_type": "qwen2_5_vl_vision"} | {key: value for key, value in default.items() if key not in missing}
    assert dataclasses.asdict(Qwen2_5_VLVisionConfig.from_hf(given)) == default


@pytest.mark.parametrize("text", [{"hidden_size": 8192}, {"text_config": {"hidden_size": 8192}}])
def test_a_default_that_the_text_model_contradicts_is_refused(text: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"lacks out_hidden_size: transformers' default, 3584, is not .*, 8192"):
        Qwen2_5_VLVisionConfig.from_hf({"vision_config": SHORT} | text)


@pytest.mark.parametrize(
    "other",
    [
        {"model_type": "qwen2_vl", "hidden_size": 3584, "in_chans": 3, "spatial_patch_size": 14},
        {"model_type": "qwen2_5_vl", "hidden_size": 3584, "vocab_size": 152064, "num_attention_heads": 28},
        {"model_type": "qwen2_5_vl", "text_config": {"hidden_size": 3584}},
        {"model_type": "qwen2_5_omni", "thinker_config": {"vision_config": PUBLISHED}},
        {"model_type": "qwen2_5_vl", "vision_config": SHORT | {"depth": None}},
        {},
    ],
)
def test_nothing_is_filled_in_for_what_is_no_qwen2_5_vl_encoder(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"the vision configuration lacks .*depth.*; it has"):
        Qwen2_5_VLVisionConfig.from_hf(other)


def test_other_names_of_a_field_are_read() -> None:
    others = {"num_hidden_layers": 2, "num_attention_heads": 8, "in_chans": 4, "spatial_patch_size": 7}
    config = Qwen2_5_VLVisionConfig.from_hf(SHORT | others)
    assert (config.depth, config.num_heads, config.in_channels, config.patch_size) == (2, 8, 4, 7)
    config = Qwen2_5_VLVisionConfig.from_hf(PUBLISHED | others | {"in_channels": 3})
    assert config == Qwen2_5_VLVisionConfig.qwen2_5_vl_3b()


def test_a_side_may_be_given_twice() -> None:
    expected = Qwen2_5_VLVisionConfig.qwen2_5_vl_3b()
    assert Qwen2_5_VLVisionConfig.from_hf(PUBLISHED | {"patch_size": [14, 14]}) == expected
    with pytest.raises(ValueError, match=r"patch_size must be one number or the same one twice, got \[14, 16\]"):
        Qwen2_5_VLVisionConfig.from_hf(PUBLISHED | {"patch_size": [14, 16]})


def test_scaled_rotary_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match="rope_parameters must be of rope_type default or axial, got 'yarn'"):
        Qwen2_5_VLVisionConfig.from_hf(PUBLISHED | {"rope_parameters": {"rope_type": "yarn"}})


def test_numpy_s_numbers_are_numbers() -> None:
    numbers = {"depth": np.int64(4), "fullatt_block_indexes": [np.int32(1), np.int64(3)], "rope_theta": np.float32(1e4)}
    config = Qwen2_5_VLVisionConfig(**(TINY | numbers))
    assert config == Qwen2_5_VLVisionConfig.tiny()
    assert {type(index) for index in config.fullatt_block_indexes} == {int}


@pytest.mark.parametrize("missing", [["depth"], ["hidden_size", "window_size"], ["fullatt_block_indexes"]])
def test_missing_fields_are_listed(missing: list[str]) -> None:
    with pytest.raises(ValueError, match=f"the vision configuration lacks {', '.join(missing)}; it has"):
        Qwen2_5_VLVisionConfig.from_hf({key: value for key, value in PUBLISHED.items() if key not in missing})


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"depth": 0}, ValueError, "depth must be a positive integer, got 0"),
        ({"patch_size": [14, 14]}, TypeError, "patch_size must be a positive integer"),
        ({"rope_theta": float("nan")}, ValueError, "rope_theta must be a positive finite number"),
        ({"num_heads": 3}, ValueError, "hidden_size must be a multiple of num_heads, got hidden_size 160"),
        (
            {"num_heads": 40},
            ValueError,
            r"hidden_size / num_heads must be a multiple of 8 in 8\.\.256 .* 160 / 40 = 4",
        ),
        ({"window_size": 100}, ValueError, r"window_size must be a multiple of .* = 28, got 100"),
        ({"fullatt_block_indexes": 7}, TypeError, "fullatt_block_indexes must be a sequence of integers, got 7"),
        ({"fullatt_block_indexes": [1.0]}, TypeError, r"fullatt_block_indexes must be .*, got \[1.0\]"),
        ({"fullatt_block_indexes": [True]}, TypeError, r"fullatt_block_indexes must be .*, got \[True\]"),
        ({"fullatt_block_indexes": [-1]}, ValueError, "fullatt_block_indexes must not be negative"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Qwen2_5_VLVisionConfig(**(TINY | changes))


def test_another_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_act must be silu, got 'gelu'"):
        Qwen2_5_VLVisionConfig.from_hf(PUBLISHED | {"hidden_act": "gelu"})


def test_the_mapping_is_the_model_s_parameters() -> None:
    with torch.device("meta"):
        model = Qwen2_5_VLVisionModel(CONFIG)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {name: parts.shape for name, parts in vision_tensors(CONFIG).items()}


def save(folder: Path, prefix: str, **changes: Tensor | None) -> None:
    """The weights of an encoder under other names than the published, with some replaced or left out."""
    model = encoder(CONFIG)
    tensors = to_hf_tensors(dict(model.named_parameters()), vision_tensors(CONFIG))
    renamed = {prefix + name.removeprefix("visual."): tensor.contiguous() for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in (renamed | changes).items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"vision_config": dataclasses.asdict(CONFIG)}))


@pytest.mark.parametrize("prefix", ["visual.", "model.visual.", ""])
def test_from_pretrained_reads_every_way_of_naming(prefix: str, tmp_path: Path) -> None:
    save(tmp_path, prefix)
    model = Qwen2_5_VLVisionModel.from_pretrained(tmp_path)
    pixel_values = patches(CONFIG, GRID)
    with torch.no_grad():
        assert torch.equal(model(pixel_values, GRID), encoder(CONFIG)(pixel_values, GRID))
    assert not model.training
    assert Qwen2_5_VLVisionModel.from_pretrained(tmp_path, dtype=torch.bfloat16).encoder.merger.fc1.weight.dtype == (
        torch.bfloat16
    )


def test_what_is_wrong_with_a_checkpoint_is_listed(tmp_path: Path) -> None:
    wrong = {
        "visual.blocks.1.attn.qkv.bias": None,
        "visual.blocks.0.mlp.gate_proj.weight": torch.zeros(3, 4),
        "visual.blocks.2.norm1.weight": torch.zeros(160),
    }
    save(tmp_path, "visual.", **wrong)
    with pytest.raises(ValueError, match="does not hold the expected tensors") as caught:
        Qwen2_5_VLVisionModel.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "missing (1):\n    visual.blocks.1.attn.qkv.bias\n" in message
    assert "unexpected (1):\n    'visual.blocks.2.norm1.weight'\n" in message
    assert "visual.blocks.0.mlp.gate_proj.weight: [3, 4], expected [212, 160]" in message


def test_a_sharded_checkpoint_of_the_whole_model_is_read(tmp_path: Path) -> None:
    allow_torchvision_beside_cpu_torch()
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    sizes = {key: value for key, value in dataclasses.asdict(CONFIG).items() if key != "rope_theta"}
    text = {
        "vocab_size": 64, "hidden_size": 96, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "mrope_section": [8, 8, 8]},
    }  # fmt: skip
    whole = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=sizes, text_config=text))
    whole.save_pretrained(tmp_path, max_shard_size="400KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model = Qwen2_5_VLVisionModel.from_pretrained(tmp_path)
    pixel_values = patches(CONFIG, GRID)
    with torch.no_grad():
        theirs = whole.model.visual(pixel_values, grid_thw=GRID).pooler_output
        torch.testing.assert_close(model(pixel_values, GRID), theirs)


@pytest.mark.parametrize("wrong", [TINY, None])
def test_what_is_no_configuration_is_refused_by_the_model(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"config: got .*, expected a Qwen2_5_VLVisionConfig"):
        Qwen2_5_VLVisionModel(wrong)
    with pytest.raises(TypeError, match="compilation_config: got str, expected a CompilationConfig or None"):
        Qwen2_5_VLVisionModel(CONFIG, compilation_config="yes")  # type: ignore[arg-type]
