"""The architecture as rules on who imports whom, read from the source, and what a fresh process loads."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = {"vit_kernels": ROOT / "kernels", "vit_encoder": ROOT / "encoder", "experiments": ROOT}
NOT_OPS = {"reference", "testing", "inspection"}
ROOMS = sorted(path.parent.name for path in (ROOT / "experiments").glob("*/__init__.py"))
# The report of a GPU runs the microbenchmarks and the tuning.
BENEATH = {"gpu": ("kernels",)}


class Reference(NamedTuple):
    """A dotted name that a module imports, or reaches through an import; `lazy` when not at the module's import."""

    name: str
    line: int
    lazy: bool


class _References(ast.NodeVisitor):
    def __init__(self, package: str) -> None:
        self.package = package
        self.lazy = False
        self.bound: dict[str, str] = {}
        self.found: list[Reference] = []

    def _add(self, name: str, node: ast.expr | ast.stmt) -> None:
        self.found.append(Reference(name, node.lineno, self.lazy))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node)
            self.bound[alias.asname or alias.name.partition(".")[0]] = (
                alias.name if alias.asname else alias.name.partition(".")[0]
            )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parents = self.package.split(".")
            base = ".".join([*parents[: len(parents) - node.level + 1], *base.split(".")]).rstrip(".")
        for alias in node.names:
            self._add(f"{base}.{alias.name}", node)
            self.bound[alias.asname or alias.name] = f"{base}.{alias.name}"

    def visit_Attribute(self, node: ast.Attribute) -> None:
        root, attributes = _attribute_chain(node)
        if root in self.bound:
            self._add(".".join([self.bound[root], *attributes]), node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in {"import_module", "__import__"} and node.args and isinstance(node.args[0], ast.Constant):
            self._add(str(node.args[0].value), node)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            self._visit_lazily(node)
        else:
            self.generic_visit(node)

    def _visit_lazily(self, node: ast.AST) -> None:
        outer, self.lazy = self.lazy, True
        self.generic_visit(node)
        self.lazy = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_lazily(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._visit_lazily(node)


def _attribute_chain(node: ast.Attribute) -> tuple[str, list[str]]:
    attributes: list[str] = []
    inner: ast.expr = node
    while isinstance(inner, ast.Attribute):
        attributes.insert(0, inner.attr)
        inner = inner.value
    return (inner.id if isinstance(inner, ast.Name) else ""), attributes


def references(module: str, source: str, *, is_package: bool = False) -> list[Reference]:
    """Return what a module's source imports, without running it."""
    visitor = _References(module if is_package else module.rpartition(".")[0])
    visitor.visit(ast.parse(source))
    return visitor.found


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def is_private_to(name: str, package: str) -> bool:
    parts = name.split(".")[1:]
    return within(name, package) and any(part.startswith("_") and not part.endswith("__") for part in parts)


def is_op(module: str) -> bool:
    package, _, name = module.partition(".")
    return package == "vit_kernels" and name.isidentifier() and not name.startswith("_") and name not in NOT_OPS


def is_helper_of_ops(module: str) -> bool:
    return module.startswith("vit_kernels._") and not within(module, "vit_kernels._triton")


def is_foreign_to_kernels(name: str) -> bool:
    top = name.partition(".")[0]
    return not within(name, "vit_kernels._triton", "torch", "triton") and top not in sys.stdlib_module_names


def is_another_room(name: str, room: str) -> bool:
    mine = ("common", room, *BENEATH.get(room, ()))
    return within(name, *(f"experiments.{other}" for other in ROOMS if other not in mine))


class Rule(NamedTuple):
    """What modules that `applies` names must not do."""

    applies: Callable[[str], bool]
    forbids: Callable[[Reference], bool]


RULES = {
    "a kernel file imports only torch, triton and its siblings": Rule(
        lambda module: within(module, "vit_kernels._triton"),
        lambda ref: is_foreign_to_kernels(ref.name),
    ),
    "an op imports no other op, nor reference, testing, inspection": Rule(
        is_op,
        lambda ref: within(ref.name, "vit_kernels") and not ref.name.startswith("vit_kernels._"),
    ),
    "dispatch, validation and other helpers import no op": Rule(
        is_helper_of_ops,
        lambda ref: within(ref.name, "vit_kernels") and not ref.name.startswith("vit_kernels._"),
    ),
    "triton, flash_attn and the kernels are imported at the first launch": Rule(
        lambda module: module == "vit_kernels" or is_op(module) or is_helper_of_ops(module),
        lambda ref: within(ref.name, "vit_kernels._triton", "triton", "flash_attn") and not ref.lazy,
    ),
    "the reference shares no code with what it judges": Rule(
        lambda module: module == "vit_kernels.reference",
        lambda ref: within(ref.name, "vit_kernels", "vit_encoder"),
    ),
    "vit_kernels knows nothing above it": Rule(
        lambda module: within(module, "vit_kernels"),
        lambda ref: within(ref.name, "vit_encoder", "experiments", "scripts", "tests"),
    ),
    "vit_encoder knows nothing above it": Rule(
        lambda module: within(module, "vit_encoder"),
        lambda ref: within(ref.name, "experiments", "scripts", "tests"),
    ),
    "vit_encoder uses only public names of vit_kernels": Rule(
        lambda module: within(module, "vit_encoder"),
        lambda ref: is_private_to(ref.name, "vit_kernels"),
    ),
    "transformers and vllm appear only in the integrations": Rule(
        lambda module: within(module, "vit_kernels", "vit_encoder") and not within(module, "vit_encoder.integrations"),
        lambda ref: within(ref.name, "transformers", "vllm"),
    ),
    "experiments do without the tests": Rule(
        lambda module: within(module, "experiments"),
        lambda ref: within(ref.name, "tests"),
    ),
} | {
    f"experiments.{room} imports no other room": Rule(
        lambda module, room=room: within(module, f"experiments.{room}"),  # type: ignore[misc]
        lambda ref, room=room: is_another_room(ref.name, room),  # type: ignore[misc]
    )
    for room in ROOMS
}


def violations(module: str, source: str, *, is_package: bool = False) -> list[tuple[str, str]]:
    """Return (rule, what broke it) for everything that the source of `module` does against RULES."""
    found = references(module, source, is_package=is_package)
    return [
        (name, f"{module}:{ref.line} {ref.name}")
        for name, rule in RULES.items()
        if rule.applies(module)
        for ref in found
        if rule.forbids(ref)
    ]


def project_modules() -> Iterator[tuple[str, Path]]:
    for package, source_root in SOURCE_ROOTS.items():
        for path in sorted((source_root / package).rglob("*.py")):
            parts = path.relative_to(source_root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def test_every_module_keeps_the_rules() -> None:
    broken = [
        violation
        for module, path in project_modules()
        for violation in violations(module, path.read_text(encoding="utf-8"), is_package=path.name == "__init__.py")
    ]
    assert not broken, "\n".join(f"{what}: {rule}" for rule, what in broken)


def test_every_rule_applies_to_a_module_of_the_project() -> None:
    modules = [module for module, _ in project_modules()]
    assert [name for name, rule in RULES.items() if not any(map(rule.applies, modules))] == []


KERNEL, OP, HELPER, ENCODER = "vit_kernels._triton.an_op", "vit_kernels.an_op", "vit_kernels._dispatch", "vit_encoder.a"


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        ("a kernel file imports only", KERNEL, "from vit_kernels import _validation"),
        ("a kernel file imports only", KERNEL, "def f():\n    import vit_kernels.an_op"),
        ("a kernel file imports only", KERNEL, "from .. import an_op"),
        ("a kernel file imports only", KERNEL, "import numpy"),
        ("an op imports no other op", OP, "from vit_kernels.rotary_2d import rotary_2d"),
        ("an op imports no other op", OP, "from vit_kernels import rotary_2d"),
        ("an op imports no other op", OP, "from . import rotary_2d"),
        ("an op imports no other op", OP, "from .rotary_2d import rotary_2d"),
        ("an op imports no other op", OP, "def f():\n    from vit_kernels import testing"),
        ("an op imports no other op", OP, "import vit_kernels"),
        ("an op imports no other op", OP, "import importlib\nimportlib.import_module('vit_kernels.reference')"),
        ("dispatch, validation and other helpers", HELPER, "from vit_kernels import an_op"),
        ("triton, flash_attn and the kernels", OP, "from vit_kernels._triton import an_op"),
        ("triton, flash_attn and the kernels", OP, "import triton"),
        ("triton, flash_attn and the kernels", HELPER, "try:\n    import triton\nexcept ImportError:\n    pass"),
        ("triton, flash_attn and the kernels", "vit_kernels", "import triton.language as tl"),
        ("the reference shares no code", "vit_kernels.reference", "from vit_kernels import _validation"),
        ("vit_kernels knows nothing above", OP, "def f():\n    import vit_encoder"),
        ("vit_kernels knows nothing above", KERNEL, "from tests.conftest import settings"),
        ("vit_kernels knows nothing above", "vit_kernels.testing.strategies", "import experiments.common.environment"),
        ("vit_encoder knows nothing above", ENCODER, "from experiments import environment"),
        ("vit_encoder uses only public names", ENCODER, "from vit_kernels import _dispatch"),
        ("vit_encoder uses only public names", ENCODER, "from vit_kernels._triton.rotary_2d import launch"),
        ("vit_encoder uses only public names", ENCODER, "import vit_kernels as vk\nvk._dispatch.chosen()"),
        ("vit_encoder uses only public names", ENCODER, "import vit_kernels.testing\nvit_kernels.testing._hooks"),
        ("transformers and vllm appear only", ENCODER, "def f():\n    import transformers.models"),
        ("transformers and vllm appear only", OP, "__import__('vllm')"),
        ("experiments do without the tests", "experiments.a", "from tests import conftest"),
        ("experiments.common imports no", "experiments.common.a", "from experiments.encode import report"),
        ("experiments.kernels imports no", "experiments.kernels.a.b", "def f():\n    import experiments.launches.text"),
        ("experiments.encode imports no", "experiments.encode.__main__", "from experiments.gpu.summary import table"),
    ],
)
def test_a_broken_rule_is_reported(rule: str, module: str, source: str) -> None:
    assert any(name.startswith(rule) for name, _ in violations(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (KERNEL, "import math\nimport torch\nimport triton.language as tl\nfrom vit_kernels._triton import a_sibling"),
        (OP, "from vit_kernels import _dispatch, _validation\ndef f():\n    from vit_kernels._triton.an_op import g"),
        (OP, "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import triton"),
        (HELPER, "from vit_kernels import _validation\ndef f():\n    import triton"),
        ("vit_kernels", "from vit_kernels.an_op import an_op"),
        ("vit_kernels.testing", "import triton\nfrom vit_kernels.reference import an_op_reference"),
        ("vit_kernels.testing.strategies", "from vit_kernels import an_op"),
        (ENCODER, "import vit_kernels\nvit_kernels.an_op.__name__\nfrom vit_encoder import _private"),
        (ENCODER, "import torch\ntorch.ops.vit_kernels._an_op"),
        ("vit_encoder.integrations.hf", "import transformers, vllm"),
        ("experiments.a", "import transformers\nfrom vit_kernels import reference"),
        ("experiments.encode.a", "from experiments.common import measure\nfrom experiments.encode import report"),
        ("experiments.gpu.tuning", "from experiments.kernels import tune"),
    ],
)
def test_what_the_rules_allow_is_not_reported(module: str, source: str) -> None:
    assert violations(module, source) == []


def run_fresh(code: str, cwd: Path) -> str:
    """Return what the code prints in a new process that turns warnings into errors and runs in another folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-c", code]
    finished = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.mark.parametrize("package", ["vit_kernels", "vit_encoder"])
def test_a_cold_import_loads_nothing_optional(package: str, tmp_path: Path) -> None:
    optional = ["triton", "flash_attn", "transformers", "torchvision", "vllm", "matplotlib", "hypothesis", "pytest"]
    code = f"import sys, {package}; print([name for name in {optional} if name in sys.modules])"
    assert run_fresh(code, tmp_path) == "[]"


# Every finder is wrapped, so that `find_spec("triton")` is None as it is where triton is not installed.
WITHOUT_TRITON = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
try:
    import triton
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("triton is still importable")

import torch
"""


def test_an_op_runs_on_the_cpu_where_triton_is_absent(tmp_path: Path) -> None:
    code = """
import vit_kernels
from vit_kernels.reference import pixel_shuffle_reference

x = torch.arange(3 * 24 * 5, dtype=torch.float32).reshape(3, 24, 5)
shuffled = vit_kernels.pixel_shuffle(x, 4, 6, factor=2)
assert torch.equal(shuffled.double(), pixel_shuffle_reference(x, 4, 6, factor=2))
print(tuple(shuffled.shape))
"""
    assert run_fresh(WITHOUT_TRITON + code, tmp_path) == "(3, 6, 20)"


def test_the_encoder_runs_on_the_cpu_where_triton_is_absent(tmp_path: Path) -> None:
    code = """
from vit_encoder import Llama4VisionConfig, Llama4VisionModel

config = Llama4VisionConfig.tiny()
pixel_values = torch.rand(2, 3, config.image_size, config.image_size)
with torch.no_grad():
    print(torch.isfinite(Llama4VisionModel(config).eval()(pixel_values)).all().item())
"""
    assert run_fresh(WITHOUT_TRITON + code, tmp_path) == "True"
