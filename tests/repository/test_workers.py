"""How scripts/test.sh spreads the suite: the workers it takes, what they keep to themselves, what --quick runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import vit_kernels

from tests.workers import BYTES_OF_A_WORKER, cores, memory, worker_count

TESTS = next(folder for folder in Path(__file__).parents if folder.name == "tests")

# A suite of its own with the project's conftest.
SUITE = """
import json, os
from pathlib import Path

import pytest

ENVIRONMENT = ("PYTEST_XDIST_WORKER", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_INTERPRET")

@pytest.fixture
def worker(request):
    return getattr(request.config, "workerinput", {}).get("workerid")

@pytest.mark.parametrize("number", range(2))
def test_note(number, worker):
    for name in ENVIRONMENT[1:3]:
        if folder := os.environ.get(name):
            Path(folder).mkdir(parents=True, exist_ok=True)
    note = {name: os.environ.get(name) for name in ENVIRONMENT} | {"file": Path(__file__).name, "number": number}
    note["worker"] = worker
    with open(os.environ["NOTES"], "a") as notes:
        notes.write(json.dumps(note) + "\\n")
"""


@pytest.mark.parametrize(
    ("cores", "memory", "expected"),
    [(1, 64, 0), (2, 64, 2), (16, 64, 16), (16, 5, 5), (16, 1, 0)],
)
def test_a_worker_takes_a_core_and_its_memory(cores: int, memory: int, expected: int) -> None:
    assert worker_count(cores=cores, memory=memory * BYTES_OF_A_WORKER, files=[], in_process=False) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], 4),
        (["tests"], 4),
        (["tests/test_a.py", "tests/test_b.py"], 4),
        (["tests/test_a.py"], 0),
        (["tests/test_a.py::test_b", "tests/test_a.py::test_c[x]"], 0),
    ],
)
def test_a_single_file_takes_no_worker(files: list[str], expected: int) -> None:
    assert worker_count(cores=4, memory=4 * BYTES_OF_A_WORKER, files=files, in_process=False) == expected


def test_a_debugger_takes_no_worker() -> None:
    assert worker_count(cores=4, memory=4 * BYTES_OF_A_WORKER, files=[], in_process=True) == 0


def test_the_machine_has_cores_and_memory() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert 1 << 30 < memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def notes_of(folder: Path, *arguments: str) -> list[dict[str, str | None]]:
    """What each test of two files noted of its process; the second file is marked costly."""
    (folder / "tests").mkdir()
    for name in ("conftest.py", "workers.py"):
        (folder / "tests" / name).write_text((TESTS / name).read_text())
    (folder / "tests/test_a.py").write_text(SUITE)
    (folder / "tests/test_b.py").write_text(SUITE + "\npytestmark = pytest.mark.costly\n")
    (folder / "pyproject.toml").write_text((TESTS.parent / "pyproject.toml").read_text())
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON", "TORCHIND"))}
    variables = kept | {"NOTES": str(folder / "notes"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), *arguments]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (folder / "notes").read_text().splitlines()]


def test_each_worker_has_caches_of_its_own_and_leaves_nothing(tmp_path: Path) -> None:
    notes = notes_of(tmp_path, "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
    of_file = {note["file"]: note for note in notes}
    assert {note["worker"] for note in of_file.values()} == {"gw0", "gw1"}
    assert {note["PYTEST_XDIST_WORKER"] for note in notes} == {None}, "a process that a test starts is no worker"
    folders = [of_file[file][name] for file in of_file for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")]
    assert len({*folders}) == 4
    assert not any(Path(folder).exists() for folder in folders if folder)
    for file, note in of_file.items():
        assert {json.dumps(of | {"number": 0}) for of in notes if of["file"] == file} == {
            json.dumps(note | {"number": 0})
        }, "a file stays with its worker"


@pytest.mark.parametrize(
    ("argument", "files"),
    [("tests/test_a.py", ["test_a.py"] * 2), ("--pdb", ["test_b.py"] * 2 + ["test_a.py"] * 2)],
)
def test_without_workers_the_caches_are_the_user_s(tmp_path: Path, argument: str, files: list[str]) -> None:
    notes = notes_of(tmp_path, "-n", "auto", "--dist", "loadfile", argument)
    assert {(note["worker"], note["TRITON_CACHE_DIR"], note["TRITON_INTERPRET"]) for note in notes} == {
        (None, None, "1")
    }
    assert [note["file"] for note in notes] == files, "the costly file begins"


def test_the_quick_run_has_examples_of_every_op_and_encoder() -> None:
    ops = {name.rstrip("_") for name in vit_kernels.__all__} - {"force_impl"}
    of_encoders = {f"{of}{what}" for of in ("", "qwen2_5_vl_", "qwen3_vl_") for what in ("parity", "whole_graph")}
    marked = {path.stem for path in TESTS.rglob("test_*.py") if "pytest.mark.quick\n" in path.read_text()}
    assert {f"test_{name}" for name in ops | of_encoders | {"import_graph"}} <= marked


def test_a_process_of_a_test_imports_this_checkout_from_any_folder_installed_or_not(tmp_path: Path) -> None:
    # -S leaves out what is installed.
    names = "vit_kernels", "vit_encoder", "experiments"
    script = f"from importlib.util import find_spec\nfor name in {names}: print(find_spec(name).origin)"
    command = [sys.executable, "-S", "-c", script]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True).stdout
    folders = (TESTS.parent / folder for folder in ("kernels", "encoder", ""))
    expected = [str(folder / name / "__init__.py") for folder, name in zip(folders, names, strict=True)]
    assert found.splitlines() == expected
