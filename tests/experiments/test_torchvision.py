"""torchvision beside a torch that its library of operators does not load in, or does under any name."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# torchvision as it is imported: its operators come from its library, or it fails for want of them.
TORCHVISION = """
import torch
try:
    torch.ops.load_library(__path__[0] + "/{library}")
except OSError:
    pass
print(torch.ops.torchvision.nms.default._schema)
"""

# A library that loads declares the operators; a second declaration aborts where C++ makes it, here it raises.
LOADING = """
import sys, torch
sys.path[:0] = {path}
declared = []
def load(path):
    if {loads} and str(path).endswith("/{library}"):
        if not declared:
            declared.append(torch.library.Library("torchvision", "DEF"))
            declared[0].define("nms(Tensor compiled) -> Tensor")
        return
    raise OSError(path)
torch.ops.load_library = load
"""
IN_ONE_PROCESS = """
from experiments.common.peers import allow_torchvision_beside_cpu_torch
allow_torchvision_beside_cpu_torch()
allow_torchvision_beside_cpu_torch()
"""
IN_EVERY_PROCESS = "import torchvision_beside_cpu_torch\n"


@pytest.mark.parametrize(
    "way", [pytest.param(IN_ONE_PROCESS, id="one process"), pytest.param(IN_EVERY_PROCESS, id="every process")]
)
@pytest.mark.parametrize(("library", "loads"), [("_C.so", True), ("_C_stable.so", True), ("_C_stable.so", False)])
def test_its_operators_are_declared_once(tmp_path: Path, way: str, library: str, loads: bool) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(TORCHVISION.format(library=library))
    (package / library).touch()
    path = [str(tmp_path), str(ROOT), str(ROOT / "encoder"), str(ROOT / "kernels"), str(ROOT / "scripts")]
    program = LOADING.format(path=path, library=library, loads=loads) + way + "import torchvision\n"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("torchvision::nms(Tensor compiled)" if loads else "torchvision::nms(Tensor dets,")
