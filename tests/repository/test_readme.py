"""README.md: its snippets run, its figures are those of the result files, its links lead somewhere."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from experiments.vllm.tiny_llama4 import make_tiny_llama4
from scripts import update_readme

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
TEXTS = [path for path in (ROOT, ROOT / "encoder", ROOT / "experiments/results") for path in path.glob("*.md")]


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_python_snippets_run_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_llama4(tmp_path / "Llama-4-Scout-17B-16E-Instruct")
    for name, size in (("cat.png", (300, 200)), ("dog.jpg", (90, 120))):
        Image.new("RGB", size, "teal").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "readme"}
    found = snippets("python")
    for snippet in found:
        exec(compile(snippet, str(README), "exec"), namespace)
    assert len(found) == 4
    assert [len(image) % 4 for image in namespace["features"]] == [0, 0]
    assert namespace["out"].shape == (5, 8)


def test_the_commands_are_there() -> None:
    commands = [line.partition("#")[0].split() for snippet in snippets("sh") for line in snippet.splitlines()]
    assert [command[0] for command in commands] == ["pip", "./scripts/run.sh", "./scripts/test.sh", "export"]
    assert all(os.access(ROOT / command[0], os.X_OK) for command in commands[1:3])


def test_it_is_read_in_a_few_minutes() -> None:
    before_the_layout = README.read_text(encoding="utf-8").partition("## Where things are")[0]
    assert len(before_the_layout.split()) <= 700


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(text: Path) -> None:
    content = text.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", content) + re.findall(r'(?:src|srcset)="([^"]+)"', content)
    missing = [target for target in targets if "://" not in target and not (text.parent / target).exists()]
    assert not missing


def test_the_texts_show_the_results_that_are_there() -> None:
    assert update_readme.main(["--check"]) == 0


def test_the_figure_shows_the_numbers_of_the_tables() -> None:
    layers, attention = (
        update_readme.layer_costs(update_readme.RESULTS),
        update_readme.attention_flops(update_readme.RESULTS),
    )
    expected = {f"{moved:.2f}" for _, moved in layers.values()} | {
        f"{ratio:.2f}  {name}" for ratios in attention.values() for name, ratio in ratios.items()
    }
    for path in update_readme.RESULTS.glob("comparison-*.svg"):
        texts = {
            (element.text or "").strip() for element in ElementTree.parse(path).iter() if element.tag.endswith("text")
        }
        assert expected <= texts, path.name


def test_a_changed_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = update_readme.first_results(update_readme.RESULTS)
    monkeypatch.setattr(update_readme, "first_results", lambda folder: dict.fromkeys(seconds, (1.0, 1)))
    assert update_readme.main(["--check"]) == 1


def test_text_goes_between_the_markers() -> None:
    old = f"before\n{update_readme.BEGIN}\nold\n{update_readme.END}\nafter\n"
    new = f"before\n{update_readme.BEGIN}\nnew\n{update_readme.END}\nafter\n"
    assert update_readme.between_markers(old, "new") == new
    with pytest.raises(ValueError, match="expected one line"):
        update_readme.between_markers(old + old, "new")
