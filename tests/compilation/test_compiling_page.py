"""Every snippet of encoder/COMPILING.md runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "encoder" / "COMPILING.md"


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_python_snippets_run_from_top_to_bottom() -> None:
    namespace: dict[str, Any] = {"__name__": "compiling_page"}
    for snippet in snippets("python"):
        exec(compile(snippet, str(PAGE), "exec"), namespace)
    assert namespace["compilation_counter"].graphs_seen > 0


@pytest.mark.parametrize("snippet", snippets("bash"))
def test_a_command_runs(snippet: str) -> None:
    # The page's `python` is the one that runs the tests.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", snippet], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_snippet_is_of_a_language_that_is_run() -> None:
    assert set(re.findall(r"^```(\w*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)) == {"python", "bash", ""}
