"""Reading the encoder's tensors out of Hugging Face checkpoints: whole, in shards, foreign and damaged."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from vit_encoder.llama4.checkpoint import (
    HfTensors,
    projector_tensors,
    read_tensors,
    to_hf_tensors,
    vision_tensors,
)
from vit_encoder.llama4.config import Llama4VisionConfig, text_hidden_size
from vit_encoder.llama4.model import Llama4MultiModalProjector, Llama4VisionModel

from experiments.common.peers import allow_torchvision_beside_cpu_torch
from tests.gpu import DEVICE

CONFIG = Llama4VisionConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=128,
    image_size=28,
    projector_input_dim=24,
    projector_output_dim=24,
    vision_output_dim=24,
)
WANTED = vision_tensors(CONFIG)
PROJECTOR = projector_tensors(CONFIG.vision_output_dim, 40)
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567\n"
QUERY, KEY, VALUE = WANTED["layers.1.attention.qkv.weight"].names


def random_tensors(mapping: dict[str, HfTensors], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Ours, by our names."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(parts.shape, generator=generator).to(dtype) for name, parts in mapping.items()}


TENSORS = random_tensors(WANTED)
HF_TENSORS = to_hf_tensors(TENSORS, WANTED)


def save_shards(folder: Path, tensors: dict[str, Tensor], shards: int = 3) -> dict[str, str]:
    """Saves `tensors` dealt out to shards like cards, so that q, k and v lie apart; returns the weight map."""
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, folder / file)
    save_index(folder, {"metadata": {"total_size": 0}, "weight_map": weight_map})
    return weight_map


def save_index(folder: Path, index: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_same(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Names, order, dtypes and every bit."""
    assert list(result) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(result[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}


# The mapping


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("config", [Llama4VisionConfig.tiny(), CONFIG], ids=["tiny", "small"])
def test_mapping_is_the_models_parameters(config: Llama4VisionConfig) -> None:
    with torch.device("meta"):
        model, projector = Llama4VisionModel(config), Llama4MultiModalProjector(config.vision_output_dim, 40)
    mapping = vision_tensors(config)
    assert shapes(model) == {name: parts.shape for name, parts in mapping.items()}
    mapping = projector_tensors(config.vision_output_dim, 40)
    assert shapes(projector) == {name: parts.shape for name, parts in mapping.items()}


def test_names_are_the_published_ones() -> None:
    layer = "vision_model.model.layers.0"
    modules = {
        "norm_pre": ["vision_model.layernorm_pre"],
        "norm_in": [f"{layer}.input_layernorm"],
        "layers.0.norm_out": ["vision_model.layernorm_post"],
        "layers.0.norm_2": [f"{layer}.post_attention_layernorm"],
        "layers.0.attention.qkv": [f"{layer}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")],
        "layers.0.attention.out_proj": [f"{layer}.self_attn.o_proj"],
        "layers.0.mlp.fc1": [f"{layer}.mlp.fc1"],
        "layers.0.mlp.fc2": [f"{layer}.mlp.fc2"],
    }
    expected = {
        "class_embedding": ["vision_model.class_embedding"],
        "position_embedding": ["vision_model.positional_embedding_vlm"],
        "patch_embed.weight": ["vision_model.patch_embedding.linear.weight"],
        "adapter.fc1.weight": ["vision_model.vision_adapter.mlp.fc1.weight"],
        "adapter.fc2.weight": ["vision_model.vision_adapter.mlp.fc2.weight"],
    }
    for kind in ("weight", "bias"):
        expected |= {f"{ours}.{kind}": [f"{name}.{kind}" for name in names] for ours, names in modules.items()}
    one_layer = vision_tensors(dataclasses.replace(CONFIG, num_hidden_layers=1))
    assert {name: list(parts.names) for name, parts in one_layer.items()} == expected
    assert PROJECTOR["linear.weight"].names == ("multi_modal_projector.linear_1.weight",)


def test_scout_has_the_published_parameter_count() -> None:
    def count(mapping: dict[str, HfTensors]) -> int:
        return sum(math.prod(parts.part_shape) * len(parts.names) for parts in mapping.values())

    assert count(vision_tensors(Llama4VisionConfig.scout())) == 850_960_896
    assert count(projector_tensors(4096, 5120)) == 20_971_520


def test_hf_tensors_are_views_of_ours() -> None:
    qkv = TENSORS["layers.1.attention.qkv.weight"]
    for part, name in zip(qkv.chunk(3), (QUERY, KEY, VALUE), strict=True):
        assert HF_TENSORS[name].data_ptr() == part.data_ptr()
        assert torch.equal(HF_TENSORS[name], part)


def test_to_hf_tensors_lists_all_that_does_not_fit() -> None:
    tensors = TENSORS | {"norm_pre.bias": torch.zeros(3), "rotary.cos": torch.zeros(2)}
    del tensors["class_embedding"]
    with pytest.raises(ValueError, match="tensors must hold every mapped parameter and no other") as caught:
        to_hf_tensors(tensors, WANTED)
    assert str(caught.value).splitlines()[1:] == [
        "  class_embedding: missing, expected (32,)",
        "  norm_pre.bias: (3,), expected (32,)",
        "  rotary.cos: (2,), expected none",
    ]


# What can be read


@pytest.mark.parametrize("prefixed", [True, False], ids=["whole model", "vision alone"])
@pytest.mark.parametrize("shards", [0, 1, 2, 3, 7])
def test_round_trip(shards: int, prefixed: bool, tmp_path: Path) -> None:
    stored = HF_TENSORS if prefixed else bare(HF_TENSORS)
    if shards:
        save_shards(tmp_path, stored, shards)
    else:
        save_file(stored, tmp_path / "model.safetensors")
    assert_same(read_tensors(tmp_path, WANTED), TENSORS)
    assert_same(read_tensors(str(tmp_path), WANTED), TENSORS)


def test_reads_the_tower_and_the_projector_of_a_whole_model(tmp_path: Path) -> None:
    projector = random_tensors(PROJECTOR)
    language = {"language_model.lm_head.weight": torch.zeros(3), "language_model.norm.weight": torch.ones(2).int()}
    save_shards(tmp_path, HF_TENSORS | to_hf_tensors(projector, PROJECTOR) | language)
    assert_same(read_tensors(tmp_path, WANTED), TENSORS)
    assert_same(read_tensors(tmp_path, PROJECTOR), projector)
    assert_same(read_tensors(tmp_path, WANTED | PROJECTOR), TENSORS | projector)


def test_shards_without_wanted_tensors_need_not_exist(tmp_path: Path) -> None:
    weight_map = save_shards(tmp_path, HF_TENSORS)
    foreign = {"language_model.lm_head.weight": "model-00004-of-00004.safetensors"}
    save_index(tmp_path, {"weight_map": weight_map | foreign})
    assert_same(read_tensors(tmp_path, WANTED), TENSORS)


def test_the_single_file_wins_over_an_index(tmp_path: Path) -> None:
    save_file(HF_TENSORS, tmp_path / "model.safetensors")
    save_index(tmp_path, {"weight_map": {}})
    assert_same(read_tensors(tmp_path, WANTED), TENSORS)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asked", [None, torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_casts_to_the_dtype_asked_for(stored: torch.dtype, asked: torch.dtype | None, tmp_path: Path) -> None:
    tensors = random_tensors(WANTED, stored)
    save_shards(tmp_path, to_hf_tensors(tensors, WANTED))
    expected = {name: tensor.to(asked or stored) for name, tensor in tensors.items()}
    assert_same(read_tensors(tmp_path, WANTED, dtype=asked), expected)


def test_parts_of_different_dtypes_keep_the_wider_one(tmp_path: Path) -> None:
    save_file(HF_TENSORS | {QUERY: HF_TENSORS[QUERY].bfloat16()}, tmp_path / "model.safetensors")
    result = read_tensors(tmp_path, WANTED)["layers.1.attention.qkv.weight"]
    expected = [HF_TENSORS[QUERY].bfloat16().float(), HF_TENSORS[KEY], HF_TENSORS[VALUE]]
    assert_same({"qkv": result}, {"qkv": torch.cat(expected)})


def test_results_own_exactly_their_memory(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(HF_TENSORS, file)
    result = read_tensors(tmp_path, WANTED)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in result.values())
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.write(b"\xff" * size)
    assert_same(result, TENSORS)


def test_result_lies_on_the_device_asked_for(tmp_path: Path) -> None:
    save_file(HF_TENSORS, tmp_path / "model.safetensors")
    with torch.device("meta"):
        assert {tensor.device.type for tensor in read_tensors(tmp_path, WANTED).values()} == {"meta"}
        assert_same(read_tensors(tmp_path, WANTED, device="cpu"), TENSORS)


@pytest.mark.cuda
def test_reads_to_a_gpu(tmp_path: Path) -> None:
    save_shards(tmp_path, HF_TENSORS)
    result = read_tensors(tmp_path, WANTED, dtype=torch.bfloat16, device=DEVICE)
    assert_same(result, {name: tensor.bfloat16().to(DEVICE) for name, tensor in TENSORS.items()})


def test_prints_nothing_where_there_is_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_file(HF_TENSORS, tmp_path / "model.safetensors")
    read_tensors(tmp_path, WANTED)
    assert capfd.readouterr() == ("", "")


# What transformers writes


@pytest.fixture(scope="module")
def transformers_model() -> Any:
    """A random tiny Llama4ForConditionalGeneration in bf16."""
    allow_torchvision_beside_cpu_torch()
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    text = {
        "vocab_size": 32,
        "hidden_size": 40,
        "intermediate_size": 16,
        "intermediate_size_mlp": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_local_experts": 2,
        "pad_token_id": 0,
    }
    config = Llama4Config(vision_config=dataclasses.asdict(CONFIG), text_config=text)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Llama4ForConditionalGeneration._from_config(config, dtype=torch.bfloat16)


@pytest.mark.parametrize("max_shard_size", ["50KB", "1GB"])
@pytest.mark.parametrize("vision_alone", [False, True], ids=["whole model", "vision alone"])
def test_reads_what_transformers_saves(
    vision_alone: bool, max_shard_size: str, transformers_model: Any, tmp_path: Path
) -> None:
    vision = transformers_model.vision_model
    (vision if vision_alone else transformers_model).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "50KB")
    assert Llama4VisionConfig.from_hf(tmp_path) == CONFIG

    result = read_tensors(tmp_path, WANTED)
    assert {tensor.dtype for tensor in result.values()} == {torch.bfloat16}
    assert bare(to_hf_tensors(result, WANTED)).keys() == vision.state_dict().keys()
    assert_same(bare(to_hf_tensors(result, WANTED)), {n: vision.state_dict()[n] for n in bare(HF_TENSORS)})
    if vision_alone:
        with pytest.raises(ValueError, match=r"missing \(1\):\n    multi_modal_projector\.linear_1\.weight$"):
            read_tensors(tmp_path, PROJECTOR)
    else:
        mapping = projector_tensors(CONFIG.vision_output_dim, text_hidden_size(tmp_path))
        projector = transformers_model.multi_modal_projector.linear_1.weight
        assert_same(read_tensors(tmp_path, mapping), {"linear.weight": projector.detach()})


def test_transformers_loads_what_the_mapping_saves(transformers_model: Any, tmp_path: Path) -> None:
    vision = transformers_model.vision_model
    vision.config.save_pretrained(tmp_path)
    save_file(bare(HF_TENSORS), tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = type(vision).from_pretrained(tmp_path, dtype=torch.float32)
    assert_same({name: loaded.state_dict()[name] for name in bare(HF_TENSORS)}, bare(HF_TENSORS))


# What is refused


def groups(message: str) -> dict[str, list[str]]:
    """The lines of an error message under their group's title."""
    titles = re.split(r"\n  (?=\S)", message)[1:]
    return {lines[0]: [line.strip() for line in lines[1:]] for lines in map(str.splitlines, titles)}


def test_one_error_lists_everything(tmp_path: Path) -> None:
    extra = "vision_model.model.layers.2.mlp.fc1.bias"
    wrong = {
        extra: torch.zeros(128),
        "vision_model.class_embedding": torch.zeros(33),
        QUERY: torch.zeros(32, 32, 1),
        KEY: torch.zeros(32, 32, dtype=torch.int64),
        VALUE: torch.zeros(32, 32).to(torch.float8_e4m3fn),
    }
    missing = ["vision_model.layernorm_pre.bias", "vision_model.vision_adapter.mlp.fc1.weight"]
    stored = {name: tensor for name, tensor in (HF_TENSORS | wrong).items() if name not in missing}
    weight_map = save_shards(tmp_path, stored | {"language_model.norm.weight": torch.zeros(1).bool()}, 9)
    gone, cut = sorted(set(weight_map.values()) - {weight_map[name] for name in wrong})[:2]
    (tmp_path / gone).unlink()
    (tmp_path / cut).write_bytes((tmp_path / cut).read_bytes()[:-1])

    with pytest.raises(ValueError, match="does not hold the expected tensors") as caught:
        read_tensors(tmp_path, WANTED)
    message = str(caught.value)
    assert message.startswith(f"the checkpoint {tmp_path} ")
    unreadable = groups(message)["in files that cannot be read (2):"]
    assert groups(message) == {
        "missing (2):": missing,
        "unexpected (1):": [repr(extra)],
        "of another shape (2):": [
            "vision_model.class_embedding: [33], expected [32]",
            f"{QUERY}: [32, 32, 1], expected [32, 32]",
        ],
        "not of a dtype in F64, F32, F16, BF16 (2):": [f"{KEY}: I64", f"{VALUE}: F8_E4M3"],
        "in files that cannot be read (2):": unreadable,
    }
    for file, reason in ((gone, "is not a file"), (cut, "is not a sound safetensors file")):
        lost = ", ".join(name for name in HF_TENSORS if weight_map.get(name) == file)
        assert any(line.startswith(f"{lost}: {tmp_path / file} {reason}") for line in unreadable)


def test_a_tensor_that_its_shard_lacks_is_missing(tmp_path: Path) -> None:
    weight_map = save_shards(tmp_path, HF_TENSORS)
    other = next(file for file in weight_map.values() if file != weight_map[QUERY])
    save_index(tmp_path, {"weight_map": weight_map | {QUERY: other}})
    with pytest.raises(ValueError, match=rf"missing \(1\):\n    {QUERY}$"):
        read_tensors(tmp_path, WANTED)


def test_an_unknown_tensor_in_a_shard_is_found_without_the_index(tmp_path: Path) -> None:
    stored = HF_TENSORS | {"vision_model.model.layers.2.mlp.fc1.bias": torch.zeros(128)}
    weight_map = save_shards(tmp_path, stored)
    del weight_map["vision_model.model.layers.2.mlp.fc1.bias"]
    save_index(tmp_path, {"weight_map": weight_map})
    with pytest.raises(ValueError, match=r"unexpected \(1\):\n    'vision_model\.model\.layers\.2\.mlp\.fc1\.bias'$"):
        read_tensors(tmp_path, WANTED)


def test_an_unknown_tensor_beside_a_bare_vision_model(tmp_path: Path) -> None:
    save_file(bare(HF_TENSORS) | {"head.\nweight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensors\n  unexpected \(1\):\n    'head\.\\nweight'$"):
        read_tensors(tmp_path, WANTED)


def test_a_foreign_model_misses_everything(tmp_path: Path) -> None:
    save_file({"encoder.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"tensors\n  missing \({len(HF_TENSORS)}\):\n") as caught:
        read_tensors(tmp_path, WANTED)
    assert [line.strip() for line in str(caught.value).splitlines()[2:]] == list(HF_TENSORS)


@pytest.mark.parametrize(
    "file",
    [
        "../model-00001-of-00003.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "./model-00001-of-00003.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        "..",
        "",
        "pytorch_model.bin",
        "model.safetensors\n",
        None,
        3,
        ["model.safetensors"],
    ],
)
def test_an_index_that_points_outside_its_folder(file: object, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    weight_map: dict[str, object] = {**save_shards(folder, HF_TENSORS)}
    for place in (tmp_path / "model-00001-of-00003.safetensors", folder / "sub" / "model.safetensors"):
        save_file(HF_TENSORS, place)
    save_index(folder, {"weight_map": weight_map | {QUERY: file}})
    with pytest.raises(ValueError, match=r"must name only \.safetensors files of its own folder, got ") as caught:
        read_tensors(folder, WANTED)
    assert str(caught.value).endswith(f"got {file!r}")
    assert "model.safetensors.index.json" in str(caught.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("", "is not valid JSON"),
        ('{"weight_map": {', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("{}", "must hold a weight_map of tensor names to file names, got None"),
        ('{"weight_map": ["a"]}', r"must hold a weight_map of tensor names to file names, got \['a'\]"),
    ],
    ids=["empty", "cut", "deep", "list", "no map", "map of another form"],
)
def test_a_broken_index(index: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json {message}"):
        read_tensors(tmp_path, WANTED)


@pytest.mark.parametrize("file", ["model\0.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors"])
def test_impossible_file_names_are_missing_files(file: str, tmp_path: Path) -> None:
    save_index(tmp_path, {"weight_map": dict.fromkeys(HF_TENSORS, file)})
    with pytest.raises(ValueError, match=r"in files that cannot be read \(1\):"):
        read_tensors(tmp_path, WANTED)


@pytest.mark.parametrize("file", ["model-q4_0.gguf", "tf_model.h5", "model.onnx"])
def test_other_formats_are_named(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=rf"holds no safetensors, only {file}, a format that is not read: download"):
        read_tensors(tmp_path, WANTED)


def test_a_git_lfs_pointer_is_no_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text(LFS_POINTER)
    with pytest.raises(ValueError, match=r"model\.safetensors is a git-lfs pointer, .*`git lfs pull`"):
        read_tensors(tmp_path, WANTED)
    (tmp_path / "model.safetensors").unlink()
    weight_map = save_shards(tmp_path, HF_TENSORS)
    (tmp_path / weight_map[QUERY]).write_text(LFS_POINTER)
    with pytest.raises(ValueError, match=rf"cannot be read \(1\):\n.*{weight_map[QUERY]} is a git-lfs pointer"):
        read_tensors(tmp_path, WANTED)
    (tmp_path / "model.safetensors.index.json").write_text(LFS_POINTER)
    with pytest.raises(ValueError, match=r"index\.json is a git-lfs pointer"):
        read_tensors(tmp_path, WANTED)


def test_a_link_whose_blob_is_gone_is_named(tmp_path: Path) -> None:
    save_shards(tmp_path, HF_TENSORS)
    (tmp_path / "model.safetensors").symlink_to("../../blobs/0123")
    with pytest.raises(FileNotFoundError, match=r"a symbolic link to \.\./\.\./blobs/0123, which does not exist"):
        read_tensors(tmp_path, WANTED)


def test_the_root_of_a_hub_cache_is_told_from_a_snapshot(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--meta-llama--Llama-4" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=rf"pass the folder of a snapshot: {re.escape(str(snapshot))}"):
        read_tensors(snapshot.parents[1], WANTED)


def test_a_hub_id_and_a_file_are_no_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a folder: .*pass the local folder of a checkpoint"):
        read_tensors("meta-llama/Llama-4-Scout-17B-16E-Instruct", WANTED)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"config\.json is not a folder: it is a file; pass the folder that it"):
        read_tensors(tmp_path / "config.json", WANTED)
    with pytest.raises(FileNotFoundError, match=r"index\.json: .* holds config\.json$"):
        read_tensors(tmp_path, WANTED)


def test_the_home_folder_has_its_short_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(HF_TENSORS, tmp_path / "model.safetensors")
    assert_same(read_tensors("~", WANTED), TENSORS)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_read(file: str, tmp_path: Path) -> None:
    torch.save(HF_TENSORS, tmp_path / file)
    with pytest.raises(ValueError, match=rf"holds no safetensors, only {file}: pickles are never read"):
        read_tensors(tmp_path, WANTED)


def test_a_pickle_under_a_safetensors_name_is_unsound(tmp_path: Path) -> None:
    torch.save(HF_TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a sound safetensors file"):
        read_tensors(tmp_path, WANTED)


def test_missing_folders_and_files_are_os_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder"):
        read_tensors(tmp_path / "nowhere", WANTED)
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor .*\.index\.json"):
        read_tensors(tmp_path, WANTED)
    save_file(HF_TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is not a folder"):
        read_tensors(tmp_path / "model.safetensors", WANTED)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX only")
def test_named_pipes_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is not a file"):
        read_tensors(tmp_path, WANTED)
    (tmp_path / "model.safetensors").rename(tmp_path / "pipe.safetensors")
    save_index(tmp_path, {"weight_map": dict.fromkeys(HF_TENSORS, "pipe.safetensors")})
    with pytest.raises(ValueError, match=r"pipe\.safetensors is not a file"):
        read_tensors(tmp_path, WANTED)


def test_symbolic_links_to_elsewhere_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    snapshot.mkdir()
    blobs.mkdir()
    save_shards(blobs, HF_TENSORS)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(os.path.join("..", "blobs", blob.name))
    assert_same(read_tensors(snapshot, WANTED), TENSORS)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_dtypes_that_no_weight_can_have(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"dtype must be None or one of .*, got {dtype}"):
        read_tensors(tmp_path, WANTED, dtype=dtype)


def test_a_dtype_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"dtype must be None or one of .*, got 'bfloat16'"):
        read_tensors(tmp_path, WANTED, dtype="bfloat16")  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["nonsense", "xla:3", "cuda:99"])
def test_a_device_that_cannot_be_used(device: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"device must be one that PyTorch can use here, got '{device}'"):
        read_tensors(tmp_path, WANTED, device=device)


# Damage, drawn by Hypothesis


class Damaged:
    """A sound checkpoint of one file, or of three and an index, whose files can be replaced and put back."""

    def __init__(self, folder: Path, shards: int) -> None:
        self.folder = folder
        folder.mkdir()
        if shards == 1:
            save_file(HF_TENSORS, folder / "model.safetensors")
        else:
            save_shards(folder, HF_TENSORS, shards)
        self.sound = {path: path.read_bytes() for path in sorted(folder.iterdir())}

    def file(self, index: int) -> Path:
        """One of its safetensors files."""
        files = [path for path in self.sound if path.suffix == ".safetensors"]
        return files[index % len(files)]

    def read(self, path: Path, content: bytes) -> dict[str, Tensor]:
        """Reads with `content` in place of one file."""
        path.write_bytes(content)
        try:
            return read_tensors(self.folder, WANTED)
        finally:
            path.write_bytes(self.sound[path])


@pytest.fixture(scope="module", params=[1, 3], ids=["one file", "three shards"])
def damaged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    return Damaged(tmp_path_factory.mktemp("damaged") / "checkpoint", request.param)


def header_size(content: bytes) -> int:
    return 8 + struct.unpack("<Q", content[:8])[0]


edits = st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=4)


def edit(content: bytes, changes: list[tuple[int, int]], first: int, last: int) -> bytes:
    edited = bytearray(content)
    for position, value in changes:
        edited[first + position % (last - first)] = value
    return bytes(edited)


@given(index=st.integers(0, 2), changes=edits)
def test_a_damaged_header_never_gives_wrong_tensors(
    damaged: Damaged, index: int, changes: list[tuple[int, int]]
) -> None:
    path = damaged.file(index)
    sound = damaged.sound[path]
    try:
        result = damaged.read(path, edit(sound, changes, 0, header_size(sound)))
    except (ValueError, OSError) as error:
        assert path.name in str(error) or "vision_model" in str(error)  # noqa: PT017
    else:
        assert_same(result, TENSORS)


header_fields = (
    st.tuples(st.just("dtype"), st.sampled_from(["F64", "F32", "F16", "BF16", "I32", "F8_E5M2", "C64", "F4", "X"]))
    | st.tuples(st.just("shape"), st.lists(st.sampled_from([0, 1, 2, 16, 32, 128, 2**63, 2**64, -1]), max_size=3))
    | st.tuples(st.just("data_offsets"), st.lists(st.integers(-1, 2**64), min_size=1, max_size=3))
    | st.tuples(st.just("data_offsets"), st.lists(st.integers(0, 64).map(lambda n: 128 * n), min_size=2, max_size=2))
)


@given(name=st.sampled_from(list(HF_TENSORS)), field=header_fields)
def test_a_header_that_contradicts_itself_never_gives_wrong_tensors(
    damaged: Damaged, name: str, field: tuple[str, object]
) -> None:
    path = next(damaged.file(i) for i in range(3) if f'"{name}"'.encode() in damaged.sound[damaged.file(i)])
    sound = damaged.sound[path]
    header = json.loads(sound[8 : header_size(sound)])
    header[name] |= dict([field])
    encoded = json.dumps(header).encode()
    try:
        result = damaged.read(path, struct.pack("<Q", len(encoded)) + encoded + sound[header_size(sound) :])
    except ValueError as error:
        assert path.name in str(error) or name in str(error)  # noqa: PT017
    else:
        assert_same(result, TENSORS)


@given(index=st.integers(0, 2), changes=edits)
def test_damaged_contents_change_nothing_else(
    damaged: Damaged, index: int, changes: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = damaged.file(index)
    sound = damaged.sound[path]
    content = edit(sound, changes, header_size(sound), len(sound))
    copy = tmp_path_factory.getbasetemp() / "copy.safetensors"
    copy.write_bytes(content)
    expected = HF_TENSORS | load_file(copy)
    assert_same(to_hf_tensors(damaged.read(path, content), WANTED), expected)


@given(index=st.integers(0, 2), kept=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(damaged: Damaged, index: int, kept: float) -> None:
    path = damaged.file(index)
    sound = damaged.sound[path]
    with pytest.raises(ValueError, match=rf"{path.name} is not a sound safetensors file"):
        damaged.read(path, sound[: int(kept * len(sound))])


@given(index=st.integers(0, 2), content=st.binary(max_size=200), pretend=st.booleans())
def test_arbitrary_bytes_are_refused(damaged: Damaged, index: int, content: bytes, pretend: bool) -> None:
    path = damaged.file(index)
    with pytest.raises(ValueError, match=rf"{path.name} is not a sound safetensors file|missing|cannot be read"):
        damaged.read(path, struct.pack("<Q", len(content)) + content if pretend else content)


@given(changes=edits)
def test_a_damaged_index_never_gives_wrong_tensors(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    checkpoint = Damaged(tmp_path_factory.mktemp("index") / "checkpoint", 3)
    path = checkpoint.folder / "model.safetensors.index.json"
    sound = checkpoint.sound[path]
    try:
        result = checkpoint.read(path, edit(sound, changes, 0, len(sound)))
    except (ValueError, OSError) as error:
        assert str(checkpoint.folder) in str(error)  # noqa: PT017
    else:
        assert_same(result, TENSORS)
