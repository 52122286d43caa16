"""The built distribution: what is in it, that it works where only it is installed, and that its pins are complete."""

import email
import importlib.metadata
import json
import os
import site
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in {"TRITON_INTERPRET", "PYTHONPATH"}}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source distribution, and the wheel from it, so that the former is complete too.

    Without build isolation: the build backend comes from the `test` extra, and no network is needed.
    """
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of a new environment: the wheel installed, and the dependencies lent by this environment.

    A .pth file lends them. Python reads the .pth files of an environment's own site-packages only, so the editable
    install of this checkout, itself a .pth file in the folder lent, has no effect there.
    """
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return python


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"vit_kernels", "vit_encoder", "vit_kernels-0.2.0.dist-info"}
    assert {"vit_kernels/py.typed", "vit_encoder/py.typed"} <= set(names)
    sources = {
        path.relative_to(root).as_posix()
        for root in (ROOT / "kernels", ROOT / "encoder")
        for path in root.rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == sources


def test_the_metadata_names_licence_python_and_extras(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata_name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(metadata_name))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"test", "flash-attn", "transformers", "dev"} <= set(metadata.get_all("Provides-Extra", []))
    licence = archive.read(metadata_name.replace("METADATA", "licenses/LICENSE"))
    assert licence == (ROOT / "LICENSE").read_bytes()


def test_the_installed_wheel_is_what_gets_imported(clean_python: Path, tmp_path: Path) -> None:
    code = "import json, vit_kernels, vit_encoder; print(json.dumps([vit_kernels.__file__, vit_encoder.__file__]))"
    for file in json.loads(run(clean_python, "-I", "-c", code, cwd=tmp_path)):
        assert Path(file).is_relative_to(clean_python.parents[1])


def test_the_wheel_takes_no_generic_import_name(clean_python: Path, tmp_path: Path) -> None:
    code = """
from importlib.util import find_spec
import sys

for name in ("kernels", "encoder", "experiments", "tests", "scripts", "compilation", "llama4"):
    spec = find_spec(name)  # one of them may be a real package that the lending environment has
    places = [str(spec.origin), *(spec.submodule_search_locations or [])] if spec else []
    if any(place.startswith(sys.prefix) for place in places):
        print(spec)
"""
    assert run(clean_python, "-I", "-c", code, cwd=tmp_path) == ""


def test_the_installed_wheel_encodes_tiles(clean_python: Path, tmp_path: Path) -> None:
    code = """
import torch
from vit_encoder import Llama4VisionConfig, Llama4VisionModel

torch.manual_seed(0)
config = Llama4VisionConfig.tiny()
with torch.no_grad():
    features = Llama4VisionModel(config).eval()(torch.rand(3, 3, config.image_size, config.image_size))
grid = config.image_size // config.patch_size
assert features.shape[:2] == (3, (grid * config.pixel_shuffle_ratio) ** 2), features.shape
assert torch.isfinite(features).all() and features.std() > 0
print("encoded")
"""
    assert run(clean_python, "-I", "-W", "error", "-c", code, cwd=tmp_path) == "encoded\n"


def pinned_versions() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): str(pin.specifier) for pin in pins}


def installed_requirements(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """Yield what a distribution requires here with these extras, indirectly too."""
    waiting, seen = [(name, extras)], set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            environments = [{"extra": extra} for extra in extras or {""}]
            if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
                yield requirement
                waiting.append((requirement.name, frozenset(requirement.extras)))


def test_every_pin_is_exact_and_without_a_local_label() -> None:
    loose = [pin for pin in pinned_versions().items() if not pin[1].startswith("==") or "+" in pin[1] or "*" in pin[1]]
    assert loose == []


def test_everything_that_dev_installs_is_pinned() -> None:
    # setuptools is left open on purpose; what a parent pins exactly (a CUDA build of torch its libraries) needs no pin.
    pins = pinned_versions() | {"setuptools": "", "vit-kernels": ""}
    unpinned = {
        requirement.name
        for requirement in installed_requirements("vit-kernels", frozenset({"dev"}))
        if canonicalize_name(requirement.name) not in pins and not str(requirement.specifier).startswith("==")
    }
    assert unpinned == set()
