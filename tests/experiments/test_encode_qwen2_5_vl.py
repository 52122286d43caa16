"""The main job on Qwen2.5-VL: what it writes, that a wrong result is not timed, and options that are not for it."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vit_encoder import Qwen2_5_VLImageSettings, Qwen2_5_VLVisionConfig
from vit_encoder.qwen2_5_vl import patch_image, reference_forward

from experiments.common.comparison import ALLOWED_EPS, relative_error
from experiments.common.encoders import PatchEncoder
from experiments.common.weights import random_encoder
from experiments.encode.__main__ import main
from experiments.encode.subject import prepare
from tests.encoder.qwen2_5_vl_batches import patches
from tests.encoder.test_qwen2_5_vl_config import CONFIG, save

QUICK = ["--model", "qwen2_5_vl", "--backend", "eager", "--repeats", "1", "--max-pixels", "30000"]

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def run(out: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    """Run the job in this process and return what it wrote."""
    assert main([*QUICK, "--out", str(out), *arguments]) == code
    (path,) = out.glob("*.json")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_the_result_holds_everything_and_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, "--config", "tiny", "--layers", "2")
    assert result["right"] is True
    assert result["model"] == "qwen2_5_vl"
    assert result["image"] == {
        "name": "grace_hopper.jpg",
        "width": 512,
        "height": 600,
        "grid": [12, 10],
        "encoder_tokens": 120,
        "features": 30,
    }
    assert result["graphs"] == {"graphs": 1, "unique_graphs": 1, "graph_breaks": {}, "problem": None}
    assert result["grids"]["grids"] == PatchEncoder.sizes
    assert result["grids"]["graphs"] == {"graphs": 1, "unique_graphs": 1, "graph_breaks": {}}
    assert [row["name"] for row in result["rows"]] == ["eager", "compiled", "transformers"]
    for row in result["rows"]:
        assert row["problem"] is None
        assert 0 < row["error"]["rms"] < ALLOWED_EPS * torch.finfo(torch.float32).eps
        assert row["seconds_per_image"]["median"] > 0
    printed = capsys.readouterr().out
    assert "resized to 140 x 168 pixels, 12 x 10 (high x wide) patches of 14: 120 tokens in the encoder" in printed
    assert "s an image" in printed
    assert "over 2x2 patches, 18x10 + 2x8x8 + 2x40 patches, 8x8 patches, 9 of 2x2 patches" in printed
    with Image.open(tmp_path / "compile_encoder-qwen2_5_vl-tiny-2-cpu-float32.png") as figure:
        assert figure.size[0] > 1000


def test_a_checkpoint_and_a_wrong_rotary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").mkdir()
    save(tmp_path / "weights", "visual.")
    monkeypatch.setattr("vit_encoder.attention.rotary_2d_qkv_", lambda qkv, cos, sin, interleaved: qkv)
    result = run(tmp_path / "out", "--checkpoint", str(tmp_path / "weights"), "--layers", "1", code=1)
    assert result["encoder"]["weights"] == "checkpoint"
    assert result["encoder"]["num_hidden_layers"] == result["grids"]["layers"] == 1
    assert [bool(row["problem"]) for row in result["rows"]] == [True, True, False]
    assert not result["right"]


def test_an_image_is_prepared_as_the_checkpoint_says(tmp_path: Path) -> None:
    save(tmp_path, "visual.")
    said = {"min_pixels": 1, "max_pixels": 4096, "patch_size": 4, "image_mean": [0.1, 0.2, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    image = tmp_path / "image.png"
    Image.effect_noise((100, 80), 50).save(image)
    sizes = {"config": "7b", "layers": None, "dtype": None, "tile_counts": None, "max_tiles": None, "max_pixels": None}
    options = argparse.Namespace(model="qwen2_5_vl", checkpoint=tmp_path, **sizes)
    pixel_values, grid_thw = prepare(options, torch.device("cpu"), image).inputs
    expected = patch_image(image, CONFIG, settings=Qwen2_5_VLImageSettings.from_hf(tmp_path))
    assert torch.equal(pixel_values, expected.pixel_values)
    assert grid_thw.tolist() == [[1, 14, 16]]
    options.max_pixels = 1024
    assert prepare(options, torch.device("cpu"), image).inputs[1].tolist() == [[1, 6, 8]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--config scout", "--config: got 'scout', expected one of 7b, 3b, 32b, 72b, tiny"),
        ("--tile-counts 1 2", "--tile-counts: not for --model qwen2_5_vl"),
        ("--max-tiles 2", "--max-tiles: not for --model qwen2_5_vl"),
        ("--model llama4 --config tiny", "--max-pixels: not for --model llama4"),
        ("--max-pixels 0", "argument --max-pixels: got '0', expected a positive integer"),
        ("--image absent.png", "image: expected the path of an image file, got"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*QUICK, "--out", str(tmp_path), *arguments.split()])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_random_weights_do_not_amplify_rounding_but_show_a_missing_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Qwen2_5_VLVisionConfig(hidden_size=160, num_heads=2, intermediate_size=428, out_hidden_size=96)
    model = random_encoder(config, dtype=torch.float32, device=torch.device("cpu"))
    grid_thw = torch.tensor([[1, 10, 12]])
    pixel_values = patches(config, grid_thw)
    expected = reference_forward(model, pixel_values, grid_thw)
    with torch.no_grad():
        right = relative_error(model(pixel_values, grid_thw), expected).rms
        monkeypatch.setattr("vit_encoder.attention.rotary_2d_qkv_", lambda qkv, cos, sin, interleaved: qkv)
        wrong = relative_error(model(pixel_values, grid_thw), expected).rms
    assert right < ALLOWED_EPS / 2 * torch.finfo(torch.float32).eps
    assert wrong > ALLOWED_EPS * torch.finfo(torch.bfloat16).eps
