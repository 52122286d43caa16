"""The vision configuration: Scout's sizes, what is read from Hugging Face configurations, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vit_encoder.llama4.config import Llama4VisionConfig, read_config, text_hidden_size

from experiments.common.peers import allow_torchvision_beside_cpu_torch

SCOUT_VISION = {
    "attention_dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 1408,
    "image_size": 336,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "model_type": "llama4_vision_model",
    "multi_modal_projector_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 34,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_dropout": 0.0,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "rope_theta": 10000,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "vision_output_dim": 4096,
}
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567\n"
SCOUT = {"model_type": "llama4", "text_config": {"hidden_size": 5120}, "vision_config": SCOUT_VISION}
FIELDS = [field.name for field in dataclasses.fields(Llama4VisionConfig)]
TINY = dataclasses.asdict(Llama4VisionConfig.tiny())


def test_scout_has_the_published_sizes() -> None:
    config = Llama4VisionConfig.scout()
    assert dataclasses.asdict(config) == {name: SCOUT_VISION[name] for name in FIELDS}
    assert (config.head_dim, config.grid, config.patch_dim, config.shuffle_factor) == (88, 24, 588, 2)
    assert (config.patches_per_tile, config.tokens_per_tile, config.output_tokens_per_tile) == (576, 577, 144)


def test_tiny_is_small_and_awkward() -> None:
    config = Llama4VisionConfig.tiny()
    assert (config.head_dim, config.num_attention_heads, config.num_hidden_layers) == (88, 2, 2)
    assert (config.tokens_per_tile, config.output_tokens_per_tile) == (65, 16)


def test_fields_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Llama4VisionConfig.tiny().hidden_size = 352  # type: ignore[misc]


@pytest.mark.parametrize("config", [SCOUT, SCOUT_VISION], ids=["whole model", "vision alone"])
def test_reads_a_mapping_a_file_and_its_folder(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    for source in (config, tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert Llama4VisionConfig.from_hf(source) == Llama4VisionConfig.scout()


def test_reads_transformers_configurations(tmp_path: Path) -> None:
    allow_torchvision_beside_cpu_torch()
    import transformers

    vision = transformers.Llama4VisionConfig(**TINY)
    whole = transformers.Llama4Config(vision_config=vision, text_config={"hidden_size": 64})
    for config in (vision, whole):
        config.save_pretrained(tmp_path)
        assert Llama4VisionConfig.from_hf(config) == Llama4VisionConfig.from_hf(tmp_path) == Llama4VisionConfig.tiny()
    assert text_hidden_size(whole) == text_hidden_size(tmp_path) == 64


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_theta": 500}, 500),
        ({"rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}}, 300),
        ({"rope_theta": 500, "rope_parameters": {"rope_theta": 300.0}}, 300),
        ({"rope_theta": 500, "rope_parameters": None}, 500),
        ({"rope_theta": 500, "rope_parameters": {"rope_type": "default"}}, 500),
    ],
)
def test_rope_theta_is_found_where_transformers_finds_it(rope: dict[str, Any], expected: float) -> None:
    without = {name: value for name, value in SCOUT_VISION.items() if name != "rope_theta"}
    assert Llama4VisionConfig.from_hf(without | rope).rope_theta == expected


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_scaled_rotary_embeddings_are_refused(name: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be of rope_type default or axial, got 'linear'"):
        Llama4VisionConfig.from_hf(SCOUT_VISION | {name: {key: "linear", "factor": 2.0, "rope_theta": 1e4}})


def test_maverick_has_scout_s_encoder() -> None:
    assert Llama4VisionConfig.maverick() == Llama4VisionConfig.scout()


@pytest.mark.parametrize("name", ["image_size", "patch_size"])
def test_a_side_may_be_given_twice(name: str) -> None:
    side = SCOUT_VISION[name]
    assert Llama4VisionConfig.from_hf(SCOUT_VISION | {name: [side, side]}) == Llama4VisionConfig.scout()
    with pytest.raises(ValueError, match=rf"{name} must be one number or the same one twice, got \[{side}, 28\]"):
        Llama4VisionConfig.from_hf(SCOUT_VISION | {name: [side, 28]})
    with pytest.raises(TypeError, match=rf"{name} must be a positive integer, got \[{side}\]"):
        Llama4VisionConfig.from_hf(SCOUT_VISION | {name: [side]})


def test_numpy_s_numbers_are_numbers() -> None:
    numbers = {name: np.int64(TINY[name]) for name in ("hidden_size", "patch_size")} | {"rope_theta": np.float32(1e4)}
    config = Llama4VisionConfig(**(TINY | numbers))
    assert config == Llama4VisionConfig.tiny()
    assert (type(config.hidden_size), type(config.rope_theta)) == (int, float)
    with pytest.raises(TypeError, match=r"hidden_size must be a positive integer, got np\.float64"):
        Llama4VisionConfig(**(TINY | {"hidden_size": np.float64(176)}))


@given(st.sets(st.sampled_from(FIELDS), min_size=1), st.booleans())
def test_missing_fields_are_all_listed_and_never_filled_in(missing: set[str], null: bool) -> None:
    kept = {name: value for name, value in SCOUT_VISION.items() if name not in missing}
    absent = dict.fromkeys(missing) if null else {}
    with pytest.raises(ValueError, match="the vision configuration lacks ") as caught:
        Llama4VisionConfig.from_hf({"vision_config": kept | absent})
    listed = str(caught.value).removeprefix("the vision configuration lacks ").split(";")[0].split(", ")
    assert sorted(listed) == sorted(missing)


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in {"pixel_shuffle_ratio", "rope_theta"}])
@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1, ValueError), (14.0, TypeError), ("14", TypeError), (True, TypeError), ([14, 14], TypeError)],
)
def test_sizes_are_positive_integers(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name} must be a positive integer, got ") as caught:
        Llama4VisionConfig(**(TINY | {name: value}))
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", ["pixel_shuffle_ratio", "rope_theta"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0.0, ValueError),
        (-0.5, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        pytest.param(10**400, ValueError, id="beyond a float"),
        ("0.5", TypeError),
        (True, TypeError),
        (1j, TypeError),
    ],
)
def test_numbers_are_positive_and_finite(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name} must be a positive finite number, got "):
        Llama4VisionConfig(**(TINY | {name: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 113}, "image_size must be a multiple of patch_size, got image_size 113 and patch_size 14"),
        ({"image_size": 98}, r"must be a multiple of 1 / pixel_shuffle_ratio = 2, got 98 / 14 = 7"),
        ({"num_attention_heads": 3}, "hidden_size must be a multiple of num_attention_heads, got hidden_size 176 and"),
        ({"num_attention_heads": 4}, r"multiple of 8 in 8\.\.256 .*, got 176 / 4 = 44"),
        ({"num_attention_heads": 44}, r"multiple of 8 in 8\.\.256 .*, got 176 / 44 = 4"),
        ({"hidden_size": 528}, r"multiple of 8 in 8\.\.256 .*, got 528 / 2 = 264"),
        ({"pixel_shuffle_ratio": 0.4}, "pixel_shuffle_ratio must be 1 / a whole number, got 0.4"),
        ({"pixel_shuffle_ratio": 2.0}, "pixel_shuffle_ratio must be 1 / a whole number, got 2.0"),
        ({"pixel_shuffle_ratio": 1e300}, r"pixel_shuffle_ratio must be 1 / a whole number, got 1e\+300"),
        ({"pixel_shuffle_ratio": 5e-324}, "pixel_shuffle_ratio must be 1 / a whole number, got 5e-324"),
        ({"intermediate_size": 700}, "intermediate_size must be .*: expected 704, got 700"),
        ({"pixel_shuffle_ratio": 0.25}, "intermediate_size must be .*: expected 2816, got 704"),
        ({"projector_input_dim": 128}, "projector_input_dim must equal projector_output_dim, got .* 128 .* 120"),
        ({"vision_output_dim": 128}, "vision_output_dim must equal projector_output_dim, got .* 128 .* 120"),
    ],
)
def test_sizes_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Llama4VisionConfig(**(TINY | changes))


@given(
    heads=st.integers(1, 16),
    head_dim=st.integers(2, 32).map(lambda n: 8 * n),
    factor=st.integers(1, 7),
    output_grid=st.integers(1, 12),
    patch_size=st.integers(1, 20),
)
def test_consistent_sizes_are_accepted(
    heads: int, head_dim: int, factor: int, output_grid: int, patch_size: int
) -> None:
    config = dataclasses.replace(
        Llama4VisionConfig.tiny(),
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        intermediate_size=heads * head_dim * factor**2,
        image_size=output_grid * factor * patch_size,
        patch_size=patch_size,
        pixel_shuffle_ratio=1 / factor,
    )
    assert (config.head_dim, config.shuffle_factor, config.output_tokens_per_tile) == (head_dim, factor, output_grid**2)
    assert config.patches_per_tile * config.patch_dim == config.num_channels * config.image_size**2


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*FIELDS, "rope_parameters", "vision_config"]), json_values, max_size=3))
def test_odd_json_is_read_or_refused(changes: dict[str, Any]) -> None:
    with contextlib.suppress(ValueError, TypeError):
        config = Llama4VisionConfig.from_hf(SCOUT_VISION | changes)
        read = {name: value for name, value in dataclasses.asdict(config).items() if name != "rope_theta"}
        given: dict[str, Any] = SCOUT_VISION | changes
        assert read == {name: given[name][0] if isinstance(given[name], list) else given[name] for name in read}


def test_transformers_class_defaults_are_no_llama_4() -> None:
    allow_torchvision_beside_cpu_torch()
    import transformers

    with pytest.raises(ValueError, match=r"intermediate_size must be .*: expected 3072, got 5632"):
        Llama4VisionConfig.from_hf(transformers.Llama4VisionConfig())


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (None, "config"),
        (7, "config"),
        ([("hidden_size", 1408)], "config"),
        ({"vision_config": None}, "vision_config"),
        ({"vision_config": "config.json"}, "vision_config"),
        (SCOUT_VISION | {"rope_parameters": [10000]}, "rope_parameters"),
    ],
)
def test_anything_else_is_a_type_error(config: Any, name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be a configuration object or a mapping, got "):
        Llama4VisionConfig.from_hf(config)


def test_a_class_is_no_configuration() -> None:
    allow_torchvision_beside_cpu_torch()
    import transformers

    with pytest.raises(TypeError, match=r"^config must be a configuration object or a mapping, got "):
        Llama4VisionConfig.from_hf(transformers.Llama4Config)


def test_text_hidden_size() -> None:
    assert text_hidden_size(SCOUT) == 5120
    for config in (SCOUT_VISION, SCOUT | {"text_config": {}}, SCOUT | {"text_config": None}):
        with pytest.raises(ValueError, match=r"lacks text_config\.hidden_size"):
            text_hidden_size(config)
    with pytest.raises(TypeError, match=r"text_config\.hidden_size must be a positive integer, got '5120'"):
        text_hidden_size({"text_config": {"hidden_size": "5120"}})


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"], ids=lambda content: content[:4]
)
def test_broken_json_is_a_value_error_that_names_the_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", '"config"', "3"])
def test_json_that_is_no_object_is_a_value_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object, got "):
        Llama4VisionConfig.from_hf(tmp_path)


def test_missing_files_are_os_errors_that_name_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a file"):
        Llama4VisionConfig.from_hf(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json is not a file: .* is empty"):
        Llama4VisionConfig.from_hf(tmp_path)
    for number in range(11):
        (tmp_path / f"model-{number:02}.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"holds model-00\.gguf, .*, model-07\.gguf and 3 more$"):
        Llama4VisionConfig.from_hf(tmp_path)


@pytest.mark.parametrize("hub_id", ["meta-llama/Llama-4-Scout-17B-16E-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"])
def test_a_hub_id_is_told_from_a_folder(hub_id: str) -> None:
    for source in (hub_id, Path(hub_id)):
        with pytest.raises(FileNotFoundError, match=rf"local folder .*hf download {re.escape(hub_id)} --local-dir"):
            Llama4VisionConfig.from_hf(source)
    with pytest.raises(FileNotFoundError, match="pass the local folder of a checkpoint"):
        Llama4VisionConfig.from_hf(f"https://huggingface.co/{hub_id}")


def test_the_root_of_a_hub_cache_is_told_from_a_snapshot(tmp_path: Path) -> None:
    root = tmp_path / "hub" / "models--meta-llama--Llama-4"
    snapshot = root / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for folder in (root, root / "snapshots"):
        with pytest.raises(FileNotFoundError, match=rf"pass the folder of a snapshot: {re.escape(str(snapshot))}$"):
            Llama4VisionConfig.from_hf(folder)
    with pytest.raises(FileNotFoundError, match=rf"is a hub cache; pass .* such as {re.escape(str(root))}/snapshots/"):
        Llama4VisionConfig.from_hf(tmp_path / "hub")
    snapshot.rmdir()
    with pytest.raises(FileNotFoundError, match="pass the folder of a snapshot: none is there: download it"):
        Llama4VisionConfig.from_hf(root)


def test_a_link_whose_blob_is_gone(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("../../blobs/0123")
    with pytest.raises(FileNotFoundError, match=r"is a symbolic link to \.\./\.\./blobs/0123, which does not exist"):
        Llama4VisionConfig.from_hf(tmp_path)


def test_a_git_lfs_pointer_is_told_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(LFS_POINTER)
    with pytest.raises(ValueError, match=r"config\.json is a git-lfs pointer, .*`git lfs pull`"):
        Llama4VisionConfig.from_hf(tmp_path)


def test_a_file_of_tensors_is_not_read_as_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"model\.safetensors holds tensors, expected JSON; pass the folder"):
        Llama4VisionConfig.from_hf(tmp_path / "model.safetensors")


def test_the_home_folder_has_its_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(SCOUT))
    for source in ("~", "~/config.json", Path("~")):
        assert Llama4VisionConfig.from_hf(source) == Llama4VisionConfig.scout()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX only")
def test_a_named_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match=r"config\.json is not a file"):
        read_config(tmp_path)
