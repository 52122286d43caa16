"""The main job on Qwen3-VL: one graph, right beside transformers, with the deepstack features."""

import json
from pathlib import Path

import pytest
import torch
from vit_encoder import Qwen3VLVisionConfig

from experiments.common.comparison import ALLOWED_EPS
from experiments.encode.__main__ import main


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_result_holds_everything_and_is_right(tmp_path: Path) -> None:
    quick = ["--model", "qwen3_vl", "--backend", "eager", "--repeats", "1", "--max-pixels", "30000"]
    assert main([*quick, "--config", "tiny", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    high, wide = result["image"]["grid"]
    assert 16 * 16 * high * wide <= 30000
    assert result["image"]["features"] == high * wide // 4
    assert result["graphs"] == {"graphs": 1, "unique_graphs": 1, "graph_breaks": {}, "problem": None}
    assert result["grids"]["graphs"] == {"graphs": 1, "unique_graphs": 1, "graph_breaks": {}}
    assert result["encoder"]["num_hidden_layers"] == Qwen3VLVisionConfig.tiny().depth
    assert [row["name"] for row in result["rows"]] == ["eager", "compiled", "transformers"]
    for row in result["rows"]:
        assert row["problem"] is None
        assert 0 < row["error"]["rms"] < ALLOWED_EPS * torch.finfo(torch.float32).eps
