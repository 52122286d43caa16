"""The offline check, with a stand-in for vLLM's processes."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from experiments.vllm import offline
from experiments.vllm.__main__ import main


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answers: dict[str, Any], *arguments: str) -> int:
    """The experiment where each variant, by the mode and whether it is compiled, writes a text or fails with a log."""
    (tmp_path / "config.json").touch()

    def process(command: list[str], env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        engine = json.loads(command[command.index("--engine") + 1])
        assert engine["enforce_eager"] is not engine["compilation_config"]["compile_mm_encoder"]
        answer = answers[f"{env['VIT_KERNELS_VLLM']}-{'eager' if engine['enforce_eager'] else 'compiled'}"]
        if isinstance(answer, Exception):
            return subprocess.CompletedProcess(command, 1, "", f"RuntimeError: {answer}\nEngineDeadError: bye\n")
        texts = [{"text": text, "tokens": list(text.encode())} for text in answer]
        Path(command[command.index("experiments.vllm.generate") + 2]).write_text(json.dumps(texts))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(offline.subprocess, "run", process)
    monkeypatch.setattr(offline.importlib.util, "find_spec", lambda name: True)
    return main(["--offline", "--model", str(tmp_path), *arguments])


VARIANTS = ["off-compiled", "encoder-compiled"]


def test_equal_texts_stand_side_by_side(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"off-compiled": ["a tower"], "encoder-compiled": ["a tower"]}
    assert run(monkeypatch, tmp_path, answers, "--variants", *VARIANTS) == 0
    printed = capsys.readouterr().out
    assert printed.count("'a tower'") == 2
    assert "2 variants wrote the same tokens" in printed


def test_texts_that_differ_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"off-compiled": ["a tower"], "encoder-compiled": ["a flower"]}
    assert run(monkeypatch, tmp_path, answers, "--variants", *VARIANTS) == 1
    assert "the tokens differ" in capsys.readouterr().out


def test_a_variant_that_fails_is_told_with_its_first_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"off-eager": ValueError("one tile"), "kernels-eager": ["a tower"]}
    assert run(monkeypatch, tmp_path, answers, "--variants", *answers) == 1
    printed = capsys.readouterr().out
    assert "vLLM alone, not compiled failed: RuntimeError: one tile\n" in printed
    assert "1 variants wrote the same tokens" in printed


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "nowhere"], "--model: got 'nowhere'"),
        (["--image", "nowhere.png"], "--image: got 'nowhere.png', expected an image"),
        (["--max-tokens", "0"], "--max-tokens: got '0'"),
        (["--engine", "[]"], "--engine: got [], expected a JSON object"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["--offline", *arguments])
    assert exited.value.code == 2
    assert told in capsys.readouterr().err


def test_without_vllm_the_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(offline.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["--offline"])
    assert "./scripts/test_vllm.sh --set-up-only" in capsys.readouterr().err
