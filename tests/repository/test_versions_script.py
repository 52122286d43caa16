"""scripts/test_versions.sh, without the environments that it makes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the scripts in a folder with a space in its name."""
    root = tmp_path / "a project"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root)
    return root


def run(root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(root / "scripts/test_versions.sh"), *arguments]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=60, check=False)


def test_help_names_every_environment(project: Path) -> None:
    shown = run(project, "--help")
    assert shown.returncode == 0
    for name in ("triton-3.6: triton==3.6.0", "triton-3.9: triton==3.9.0", "torch-2.15: python==3.13 torch==2.15.0"):
        assert name in shown.stdout
    assert not list(project.glob(".venv-*"))


def test_an_unknown_environment_is_refused_with_the_known_ones(project: Path) -> None:
    refused = run(project, "triton-3.9", "triton-1.0")
    assert refused.returncode == 2
    assert (
        "got triton-1.0, expected --no-report or one of: "
        "triton-3.6 triton-3.9 torch-2.11 torch-2.14 torch-2.15 transformers-5.0" in refused.stderr
    )
    assert not list(project.glob(".venv-*"))


def test_an_environment_that_cannot_be_made_is_in_the_summary_and_the_next_one_is_tried(project: Path) -> None:
    failed = run(project, "triton-3.6", "triton-3.9", PYTHON="false")
    assert failed.returncode == 1
    lines = failed.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["triton-3.6", "triton-3.9"]
    assert all(line.endswith("not set up, see above") for line in lines)
    assert "set-up failed with exit code" in failed.stderr


# Stands for python3 and for the python of the environments: pip, pytest and the experiments only say that they ran.
STUB = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CALLS"
case "$*" in
  "-m venv "*) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;;
  "scripts/record_versions.py "*) exit "${RECORD:-0}" ;;
  "-m pytest"*) echo "3 passed in 1s"; exit "${TESTS:-0}" ;;
  "-m experiments.kernels "*) echo "a table"; exit "${REPORT_STATUS:-0}" ;;
  "-c import torch, triton"*) echo "torch 9, triton 8" ;;
esac
"""


def run_with_stub(project: Path, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], str]:
    stub, calls = project / "python-stub", project / "calls"
    stub.write_text(STUB)
    stub.chmod(0o755)
    shutil.copytree(ROOT / "tests", project / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    finished = run(project, *arguments, PYTHON=str(stub), CALLS=str(calls), **variables)
    return finished, calls.read_text()


def test_versions_override_the_constraints_and_the_tests_of_what_they_concern_run(project: Path) -> None:
    finished, calls = run_with_stub(project, "torch-2.11")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split(maxsplit=1) == [
        "torch-2.11",
        "torch 9, triton 8                  tests: 3 passed in 1s; report: made\n",
    ]
    pins = (project / ".venv-torch-2.11/constraints.txt").read_text().splitlines()
    given = (ROOT / "constraints.txt").read_text().splitlines()
    assert {"torch==2.11.0", "torchvision==0.26.0"} <= {*pins}
    assert [pin for pin in pins if pin.startswith(("torch==", "triton=="))] == ["torch==2.11.0"]
    others = ("torch==", "torchvision==", "triton==", "transformers==")
    assert {pin for pin in given if not pin.startswith(others)} <= {*pins}
    assert "-m pip install --no-input --no-deps triton==3.6.0\n" in calls
    (tests,) = [call for call in calls.splitlines() if call.startswith("-m pytest")]
    folders = {name.split("/")[1] for name in tests.split() if name.startswith("tests/")}
    assert folders == {"kernels", "compilation", "encoder", "integrations", "experiments"}
    assert "vllm" not in tests
    recorded = f"scripts/record_versions.py torch-2.11 {project}/.venv-torch-2.11/tests.xml\n"
    assert recorded in calls


def test_another_triton_runs_the_kernels_tests_alone(project: Path) -> None:
    _, calls = run_with_stub(project, "triton-3.9")
    (tests,) = [call for call in calls.splitlines() if call.startswith("-m pytest")]
    assert {"tests/kernels/test_varlen_attention.py", "tests/kernels/test_inspection.py"} <= {*tests.split()}
    assert "tests/encoder/test_parity.py" not in tests


def test_an_environment_takes_the_python_that_it_names_unless_one_is_given(project: Path, tmp_path: Path) -> None:
    (tmp_path / "commands").mkdir()
    for name, code in (("python3.13", 7), ("python3", 8)):
        command = tmp_path / "commands" / name
        command.write_text(f"#!/bin/sh\necho {name} {code} >&2; exit {code}\n")
        command.chmod(0o755)
    variables = {"PATH": f"{tmp_path / 'commands'}:{os.environ['PATH']}"}
    assert "python3.13 7" in run(project, "torch-2.15", PYTHON="", **variables).stderr
    assert "python3 8" in run(project, "triton-3.9", PYTHON="", **variables).stderr


def test_the_oldest_transformers_runs_the_tests_of_its_integration_alone(project: Path) -> None:
    finished, calls = run_with_stub(project, "transformers-5.0")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.endswith("tests: 3 passed in 1s; report: not made\n")
    pins = (project / ".venv-transformers-5.0/constraints.txt").read_text().splitlines()
    assert {"transformers==5.0.0", "tokenizers==0.22.2"} <= {*pins}
    assert [pin for pin in pins if pin.startswith("transformers==")] == ["transformers==5.0.0"]
    (tests,) = [call for call in calls.splitlines() if call.startswith("-m pytest")]
    assert [word for word in tests.split() if word.startswith("tests/")] == [
        "tests/integrations/test_transformers_attention.py",
        "tests/integrations/test_transformers_integration.py",
        "tests/integrations/test_transformers_packed_attention.py",
        "tests/integrations/test_transformers_qwen2_5_vl.py",
        "tests/integrations/test_transformers_qwen3_vl.py",
    ]
    assert "experiments" not in calls


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"TESTS": "1"}, "report: made"),
        ({"RECORD": "1"}, "report: made"),
        ({"REPORT_STATUS": "1"}, "report: failed, see above"),
    ],
)
def test_what_fails_is_told_by_the_exit_status(project: Path, variables: dict[str, str], told: str) -> None:
    finished, _ = run_with_stub(project, "triton-3.6", **variables)
    assert finished.returncode == 1
    assert told in finished.stdout


def test_the_report_can_be_left_out(project: Path) -> None:
    finished, calls = run_with_stub(project, "triton-3.6", "--no-report")
    assert finished.returncode == 0
    assert "-m experiments" not in calls
