"""`python -m experiments` lists every command, and each of them answers --help."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments.__main__ import COMMANDS, main
from experiments.common import cli

ROOT = Path(__file__).parents[2]
ROOMS = sorted(path.parent.name for path in (ROOT / "experiments").glob("*/__init__.py"))
# What another command starts, or a script.
STARTED = {
    "experiments",
    "experiments.common.environment",
    "experiments.compile_cost.process",
    "experiments.gpu.case",
    "experiments.gpu.tiny",
    "experiments.vllm.generate",
}
LINES = [command.line for command in COMMANDS]


def test_every_room_but_the_shared_one_is_a_command() -> None:
    listed = {line.split()[2].split(".")[1] for line in LINES if line.startswith("python -m experiments.")}
    assert listed == {*ROOMS} - {"common"}


def test_every_module_that_can_be_run_is_listed() -> None:
    runnable = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for path in (ROOT / "experiments").rglob("*.py")
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    listed = {line.split()[2] for line in LINES if line.startswith("python -m ")}
    assert listed == runnable - STARTED
    assert runnable >= STARTED


def test_the_list_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    _, *printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(COMMANDS)
    for line, command in zip(printed, COMMANDS, strict=True):
        assert line.startswith(command.line)
        assert line.endswith(command.takes)
        assert command.question in line
        assert len(line) <= 120


@pytest.mark.parametrize("line", ["python -m experiments", *LINES])
def test_a_command_answers_help_from_a_checkout(line: str) -> None:
    program, *arguments = [*line.split(), "--help"]
    if program == "pytest":
        arguments = ["-m", "pytest", *arguments]
    variables = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {line}") or program == "pytest" or line.endswith(".gpu")


@dataclass
class Row:
    name: str
    seconds: tuple[float, ...]


def test_a_file_has_dataclasses_as_objects_and_null_for_what_json_lacks(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    cli.write_json(path, cli.result("name", rows=[Row("a", (1.5, math.nan, math.inf))], notes=("b",)))
    written = json.loads(path.read_text(encoding="utf-8"))
    assert list(written) == ["experiment", "environment", "rows", "notes"]
    assert written["rows"] == [{"name": "a", "seconds": [1.5, None, None]}]
    assert {"date", "packages"} <= written["environment"].keys()


def test_help_has_the_examples_and_what_each_status_means() -> None:
    parser = cli.parser("./run", "What it does.", examples="  %(prog)s 1\n", statuses={1: "wrong", 0: "right"})
    assert parser.format_help().endswith(
        "examples:\n  ./run 1\n\nexit status:\n  0  right\n  1  wrong\n  2  bad arguments\n"
    )


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "one", ""])
def test_an_option_that_takes_a_positive_integer_refuses(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.parser("./run", None)
    parser.add_argument("--layers", type=cli.positive)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([f"--layers={text}"])
    assert f"--layers: got {text!r}, expected a positive integer" in capsys.readouterr().err
