"""What run.sh, test.sh, .ci/run and env_report.py do, with stubs in place of Python, pip and the tools."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import settings

from experiments.common.environment import _variables, environment

ROOT = Path(__file__).parents[2]
STEPS = {
    "-m venv": "make the virtual environment",
    "-m pip install": "install the project and its pinned packages",
    "-c import torch": "import what was installed",
}

WORKERS = ["-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder"]

# Stands for python3 and for the python of the venv it makes: notes each call, fails on the one that FAIL begins,
# and reports how a job was started. What computes the fingerprint and checks versions is run by a real Python.
STUB = f"""#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CALLS"
case "$*" in "${{FAIL:-never}}"*) exit 7 ;; esac
case "$*" in
  "-m venv "*) rm -rf "${{@: -1}}"; mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python" ;;
  "-m pip --version") ;;
  "-m pip install "*) echo "what pip says in $PWD"; sleep "${{INSTALL_SECONDS:-0}}" ;;
  "-c import torch"*) ;;
  "-m ruff"*) ;;
  *experiments.encode* | "-m pytest"*)
    printf '%s\\n' "cwd=$PWD" "path=$PYTHONPATH" "profile=$HYPOTHESIS_PROFILE" "threads=$OMP_NUM_THREADS" "$@" ;;
  *) exec '{sys.executable}' "$@" ;;
esac
"""


class Project:
    """A copy of the scripts in a folder with a space in its name, and the stub as the only python3 on PATH."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a project"
        self.venv = self.root / ".venv"
        self.calls_file = folder / "calls"
        self.calls_file.touch()
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root)
        (folder / "bin").mkdir()
        write_executable(folder / "bin/python3", STUB)
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        kept["PATH"] = f"{folder / 'bin'}{os.pathsep}{kept['PATH']}"
        self.environment = kept | {"CALLS": str(self.calls_file), "PYTHONPATH": ""}

    def run(
        self, *arguments: str, script: str | Path = "scripts/run.sh", cwd: Path = ROOT, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        self.calls_file.write_text("")
        command = [str(self.root / script), *arguments]
        environment = self.environment | variables
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)

    def steps(self) -> list[str]:
        """Return which steps of the set-up were started since the last run began."""
        calls = self.calls_file.read_text().splitlines()
        return [step for call in calls for step in STEPS if call.startswith(step)]


def write_executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_the_first_call_sets_up_and_the_second_installs_nothing(project: Project) -> None:
    first = project.run("--layers", "2")
    assert first.returncode == 0, first.stderr
    assert project.steps() == list(STEPS)
    assert f"what pip says in {project.root}\n" in first.stderr
    assert "-m pip install --no-input -c constraints.txt -e .[dev]\n" in project.calls_file.read_text()
    second = project.run("--layers", "2")
    assert project.steps() == []
    assert second.stderr == ""
    assert second.stdout == first.stdout


def test_both_scripts_share_one_set_up(project: Project) -> None:
    project.run(script="scripts/run.sh")
    assert project.run(script="scripts/test.sh").returncode == 0
    assert project.steps() == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_is_installed_into_the_same_venv(project: Project, name: str) -> None:
    project.run()
    with (project.root / name).open("a") as file:
        file.write("\n# changed\n")
    assert project.run().returncode == 0
    assert project.steps() == ["-m pip install", "-c import torch"]


def test_a_copied_tree_is_installed_again_because_the_install_names_its_folder(project: Project) -> None:
    project.run()
    project.root = project.root.rename(project.root.with_name("moved"))
    assert project.run().returncode == 0
    assert "-m pip install" in project.steps()


@pytest.mark.parametrize("step", STEPS)
def test_a_failed_step_is_named_with_its_repair_and_keeps_its_exit_code(project: Project, step: str) -> None:
    failed = project.run(FAIL=step)
    assert failed.returncode == 7
    assert f"set-up failed with exit code 7 at the step: {STEPS[step]}" in failed.stderr
    assert "to repair it: " in failed.stderr
    assert failed.stdout == ""
    assert project.run().returncode == 0, "the next call takes the set-up up again"
    assert "-m pip install" in project.steps()


def test_an_old_python_is_refused_with_its_version(project: Project) -> None:
    setup = project.root / "scripts/setup.sh"
    setup.write_text(setup.read_text().replace('MINIMUM_PYTHON="3.11"', 'MINIMUM_PYTHON="99.1"'))
    refused = project.run()
    assert refused.returncode == 1
    assert f"is Python {sys.version.split()[0]}" in refused.stderr
    assert "install Python 99.1 or newer, or name one: PYTHON=/path/to/python" in refused.stderr
    assert project.steps() == []


def test_a_missing_python_is_reported(project: Project) -> None:
    refused = project.run(PYTHON="/nowhere/python3")
    assert refused.returncode == 127
    assert "at the step: find Python 3.11 or newer (trying: /nowhere/python3)" in refused.stderr


def remove_interpreter(venv: Path) -> None:
    (venv / "bin/python").unlink()


def remove_pip(venv: Path) -> None:
    (venv / ".set-up-done").unlink()
    python = f"""#!/bin/sh\n[ "$2" != pip ] || exit 1\nexec '{sys.executable}' "$@"\n"""
    write_executable(venv / "bin/python", python)


def interrupt_creation(venv: Path) -> None:
    shutil.rmtree(venv)
    (venv / "lib").mkdir(parents=True)


@pytest.mark.parametrize("damage", [remove_interpreter, remove_pip, interrupt_creation])
def test_a_broken_or_half_made_venv_is_made_anew(project: Project, damage: Callable[[Path], None]) -> None:
    project.run()
    damage(project.venv)
    repaired = project.run()
    assert repaired.returncode == 0, repaired.stderr
    assert "is half made, broken or older" in repaired.stderr
    assert project.steps() == list(STEPS)


def test_a_venv_that_cannot_be_made_is_reported(project: Project) -> None:
    project.venv.write_text("in the way")
    refused = project.run(FAIL="-m venv")
    assert refused.returncode == 7
    assert f"remove {project.venv} and run this again" in refused.stderr


@pytest.mark.skipif(shutil.which("flock") is None, reason="first calls take turns only where flock exists")
def test_two_first_calls_at_once_install_once(project: Project) -> None:
    command = [str(project.root / "scripts/run.sh")]
    environment = project.environment | {"INSTALL_SECONDS": "0.5"}
    quiet = subprocess.DEVNULL
    both = [subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert project.steps() == list(STEPS)


def direct(script: Path) -> Path:
    return script


def through_a_link_to_the_script(script: Path) -> Path:
    link = script.parents[2] / f"link to {script.name}"
    link.symlink_to(script)
    return link


def through_a_link_to_the_folder(script: Path) -> Path:
    link = script.parents[2] / "linked folder"
    link.symlink_to(script.parents[1])
    return link / "scripts" / script.name


@pytest.mark.parametrize("reach", [direct, through_a_link_to_the_script, through_a_link_to_the_folder])
def test_the_main_job_runs_in_the_folder_of_the_call_and_imports_from_the_project(
    project: Project, tmp_path: Path, reach: Callable[[Path], Path]
) -> None:
    arguments = ["--image", "a photo.jpg", "--help", "*"]
    done = project.run(*arguments, script=reach(project.root / "scripts/run.sh"), cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"cwd={tmp_path}", f"path={project.root}"]
    assert lines[4:] == ["-P", "-m", "experiments.encode", *arguments]


@pytest.mark.parametrize("reach", [direct, through_a_link_to_the_script, through_a_link_to_the_folder])
def test_the_tests_run_in_the_project_with_the_profile_and_one_thread(
    project: Project, tmp_path: Path, reach: Callable[[Path], Path]
) -> None:
    arguments = ["-k", "a or b", "--help"]
    done = project.run(*arguments, script=reach(project.root / "scripts/test.sh"), cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0] == f"cwd={project.root}"
    assert lines[2:] == ["profile=ci", "threads=1", "-m", "pytest", *WORKERS, *arguments]


@pytest.mark.parametrize("off", [["-p", "no:xdist"], ["-pno:xdist"]])
def test_options_of_the_workers_are_left_out_where_the_plugin_is_off(project: Project, off: list[str]) -> None:
    done = project.run("-x", *off, script="scripts/test.sh")
    assert done.stdout.splitlines()[4:] == ["-m", "pytest", "-x", *off]


def test_the_quick_run_is_the_linter_the_formatter_and_the_tests_marked_quick(project: Project) -> None:
    done = project.run("--quick", "-x", script="scripts/test.sh")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2:] == ["profile=quick", "threads=1", "-m", "pytest", *WORKERS, "-m", "quick", "-x"]
    calls = project.calls_file.read_text().splitlines()
    assert [call for call in calls if "ruff" in call] == ["-m ruff check", "-m ruff format --check"]


@pytest.mark.parametrize("call", ["-m ruff check", "-m ruff format", "-m pytest"])
def test_the_quick_run_fails_where_a_part_of_it_fails(project: Project, call: str) -> None:
    assert project.run("--quick", script="scripts/test.sh", FAIL=call).returncode == 7


def test_the_help_of_the_tests_makes_nothing(project: Project) -> None:
    shown = project.run("--help", script="scripts/test.sh")
    assert shown.returncode == 0
    assert "--quick" in shown.stdout
    assert project.steps() == []


def test_the_profile_and_threads_of_the_caller_are_kept(project: Project) -> None:
    done = project.run(script="scripts/test.sh", HYPOTHESIS_PROFILE="thorough", OMP_NUM_THREADS="2")
    assert done.stdout.splitlines()[2:4] == ["profile=thorough", "threads=2"]


@pytest.mark.parametrize(("script", "call"), [("run.sh", "-P -m experiments.encode"), ("test.sh", "-m pytest")])
def test_the_exit_code_of_the_job_is_kept(project: Project, script: str, call: str) -> None:
    assert project.run(script=f"scripts/{script}", FAIL=call).returncode == 7


CHECKS = {
    "scripts/test.sh": "tests",
    "scripts/test_vllm.sh": "vllm",
    "ruff check": "lint",
    "ruff format --check": "format",
    "mypy": "types",
}


@pytest.mark.parametrize("failing", [None, *CHECKS])
def test_ci_runs_all_checks_and_fails_when_one_fails(tmp_path: Path, failing: str | None) -> None:
    for tool in ("scripts/test.sh", "scripts/test_vllm.sh", ".venv/bin/ruff", ".venv/bin/mypy"):
        name = tool.removeprefix(".venv/bin/")
        stub = f'#!/bin/sh\ncall="{name}${{1:+ $*}}"\necho "ran $call"\n[ "$call" != "{failing}" ]\n'
        write_executable(tmp_path / tool, stub)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    done = subprocess.run(["bash", tmp_path / ".ci/run"], cwd="/", capture_output=True, text=True, timeout=60)
    assert [line for line in done.stdout.splitlines() if line.startswith("ran ")] == [f"ran {call}" for call in CHECKS]
    assert done.returncode == (0 if failing is None else 1)
    assert failing is None or done.stdout.endswith(f"== failed: {CHECKS[failing]}\n")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not a Python package")
def test_the_shell_scripts_pass_shellcheck() -> None:
    scripts = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci/run"]
    checked = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout


def test_the_hypothesis_profile_is_the_one_asked_for() -> None:
    examples, derandomized = {"ci": (25, True), "quick": (3, True), "thorough": (200, False)}[
        os.environ.get("HYPOTHESIS_PROFILE", "ci")
    ]
    profile = settings()
    assert (profile.max_examples, profile.derandomize, profile.deadline) == (examples, derandomized, None)


def test_pre_commit_accepts_its_configuration() -> None:
    command = [sys.executable, "-m", "pre_commit", "validate-config", str(ROOT / ".pre-commit-config.yaml")]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_environment_report_names_versions_and_no_one(tmp_path: Path, form: list[str]) -> None:
    command = [sys.executable, str(ROOT / "scripts/env_report.py"), *form]
    variables = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TORCH_LOGS": "recompiles"}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "recompiles" in done.stdout
    assert "<redacted>" in done.stdout
    assert str(tmp_path) not in done.stdout
    assert str(ROOT) not in done.stdout
    if form:
        assert json.loads(done.stdout).keys() == environment().keys()


def test_the_report_hides_paths_and_names_and_shows_what_steers_a_measurement() -> None:
    shown = {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_FREEZING": "1",
        "PYTORCH_TUNING": "a",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    hidden = {"VIT_OUT": "~x", "TRITON_HOME": "/a/b", "TORCH_RUN_ID": f"{socket.gethostname()}:1", "MKL_NAME": "a-bob"}
    other = {"HOME": "/home/bob", "USER": "bob", "API_TOKEN": "secret", "VITESSE": "1"}
    assert _variables(shown | hidden | other) == shown | dict.fromkeys(hidden, "<redacted>")


def test_the_report_is_ready_for_json() -> None:
    report = environment()
    assert json.loads(json.dumps(report)) == report
    assert report["packages"]["torch"] == metadata.version("torch")


def test_the_report_names_the_commit_and_whether_files_differ_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr("experiments.common.environment._ROOT", tmp_path)
    assert environment()["git"] is None
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "a")
    assert environment()["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").touch()
    assert environment()["git"]["dirty"]
    monkeypatch.setattr("experiments.common.environment._ROOT", tmp_path / "folder")
    assert environment()["git"] is None
