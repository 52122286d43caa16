"""The range-splitting experiment measures two right forms, and says when they are no different."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import range_splitting


@pytest.mark.usefixtures("fresh_dynamo")
def test_both_forms_are_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--layers", "1", "--heads", "1", "--hot", "2", "--rounds", "2", "--out", str(tmp_path)]
    assert range_splitting.main(arguments) == 0
    result = json.loads((tmp_path / "range_splitting.json").read_text())
    assert [len(row["seconds"]["samples"]) for row in result["rows"]] == [2, 2]
    assert "the static graph gains" in capsys.readouterr().out


@pytest.mark.usefixtures("fresh_dynamo")
def test_wrong_features_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder: Any = range_splitting.random_encoder

    def wrong(*args: Any, **kwargs: Any) -> Any:
        model = encoder(*args, **kwargs)
        call = model.forward
        monkeypatch.setattr(model, "forward", lambda x: call(x) * (1.001 if model.compilation_config else 1.0))
        return model

    monkeypatch.setattr(range_splitting, "random_encoder", wrong)
    with torch.inference_mode():
        result = range_splitting.measure(1, 1, 2, 1)
    assert "one range: features differ by 0.001" in result["problem"]
    assert "rows" not in result
