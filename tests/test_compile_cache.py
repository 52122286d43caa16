"""Artefacts in `cache_dir`: what is taken from there is right, and what is broken there is compiled again."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vit_encoder.compilation import CompilationConfig, compilation_counter, set_model_tag, support_torch_compile
from vit_encoder.compilation import artifacts as store

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "new_process")


@support_torch_compile(dynamic_arg_dims={"x": 0})
class Small(nn.Module):
    """A little arithmetic."""

    def __init__(self, config: CompilationConfig) -> None:
        super().__init__()
        self.compilation_config = config
        self.weight = nn.Parameter(torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [n, 3] -> [n]."""
        return (x.sin() * self.weight).sum(1)


@pytest.fixture
def new_process() -> Iterator[None]:
    """Nothing is left in this process of what was compiled before."""
    forget()
    yield
    forget()


def forget() -> None:
    torch._dynamo.reset()
    store._forget()


def compiled(folder: Path, tag: str = "small", *, grad: bool = False, **fields: Any) -> None:
    """Construct and call a module as a new process would, and judge the result."""
    forget()
    with set_model_tag(tag):
        module = Small(CompilationConfig(compile_mm_encoder=True, cache_dir=folder, **fields))
    x = torch.ones(2, 3)
    with torch.set_grad_enabled(grad):
        out = module(x)
    torch.testing.assert_close(out.detach(), torch.full((2,), 3.0).mul(torch.ones(2).sin()))
    if grad:
        out.sum().backward()
        torch.testing.assert_close(module.weight.grad, x.sin().sum(0))


def made() -> Any:
    return compilation_counter.expect(artifacts_saved=1, artifacts_loaded=0, backend_compilations=1, cache_hits=0)


def taken() -> Any:
    return compilation_counter.expect(artifacts_saved=0, artifacts_loaded=1, backend_compilations=0, cache_hits=1)


@pytest.mark.parametrize("grad", [False, True])
def test_a_second_process_compiles_nothing(grad: bool, tmp_path: Path) -> None:
    with made():
        compiled(tmp_path, grad=grad)
    with taken():
        compiled(tmp_path, grad=grad)


def test_components_configurations_and_versions_have_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with made():
        compiled(tmp_path, "one")
    with made():
        compiled(tmp_path, "two")
    with made():
        compiled(tmp_path, "one", inductor_options={"max_fusion_size": 3})
    for attribute, value in (("torch.__version__", "0"), ("torch.backends.cpu.get_cpu_capability", lambda: "none")):
        with monkeypatch.context() as patch, made():
            patch.setattr(attribute, value)
            compiled(tmp_path, "one")
    with monkeypatch.context() as patch, made():
        patch.setattr(store, "_triton_version", lambda: "0")
        compiled(tmp_path, "one")
    with taken():
        compiled(tmp_path, "one")


BROKEN = {
    "truncated": lambda content: content[:-100],
    "header only": lambda content: content[:40],
    "empty": lambda content: b"",
    "foreign": lambda content: b"something else entirely",
    "one bit": lambda content: content[:-50] + bytes([content[-50] ^ 1]) + content[-49:],
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_compiled_again_and_replaced(how: str, tmp_path: Path) -> None:
    compiled(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(BROKEN[how](file.read_bytes()))
    with made(), pytest.warns(UserWarning, match=r"small-.*\.artefact is truncated or not an artefact"):
        compiled(tmp_path)
    with taken():
        compiled(tmp_path)


def test_a_folder_in_the_file_s_place(tmp_path: Path) -> None:
    compiled(tmp_path)
    (file,) = tmp_path.iterdir()
    file.unlink()
    file.mkdir()
    unusable = compilation_counter.expect(artifacts_saved=0, backend_compilations=1)
    with unusable, pytest.warns(UserWarning, match="cannot write"), pytest.warns(UserWarning, match="cannot read"):
        compiled(tmp_path)


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "_publish", killed)
        with pytest.raises(KeyboardInterrupt):
            compiled(tmp_path)
    assert list(tmp_path.iterdir()) == []
    compiled(tmp_path)
    (file,) = tmp_path.iterdir()
    file.rename(f"{file}.x3f")  # as a process killed outright would leave it
    with made():
        compiled(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_directory(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(store, "_replace", refused)
    with compilation_counter.expect(artifacts_saved=0), pytest.warns(UserWarning, match=os.strerror(code)):
        compiled(tmp_path)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot write .* Not a directory"):
        compiled(tmp_path / "file" / "below")


def run(script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error:cache_dir:UserWarning", "-c", textwrap.dedent(script), *arguments]
    environment = {**os.environ, **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def printed(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip()


OP = """
import torch

library = torch.library.Library("swapped_op", "DEF")
library.define("scale(Tensor x) -> Tensor")
library.impl("scale", lambda x: 2 * x, "CompositeExplicitAutograd")
torch.library.register_fake("swapped_op::scale", lambda x: torch.empty_like(x), lib=library)
torch.library.register_autograd("swapped_op::scale", lambda ctx, grad: FACTOR * grad, lib=library)
"""

USES_OP = """
    import sys
    import torch
    import swapped_op
    from torch import nn
    from vit_encoder import CompilationConfig, compilation_counter, support_torch_compile

    @support_torch_compile(dynamic_arg_dims={"x": 0})
    class Uses(nn.Module):
        compilation_config = CompilationConfig(compile_mm_encoder=True, cache_dir=sys.argv[1])

        def forward(self, x):
            return torch.ops.swapped_op.scale(x) + 1

    x = torch.ones(3, requires_grad=True)
    Uses()(x).sum().backward()
    print(x.grad[0].item(), compilation_counter.artifacts_loaded)
"""


def test_processes_at_once_and_a_swapped_op(tmp_path: Path) -> None:
    folders = {factor: tmp_path / str(factor) for factor in (2, 7)}
    for factor, folder in folders.items():
        folder.mkdir()
        (folder / "swapped_op.py").write_text(OP.replace("FACTOR", str(factor)))
    cache = str(tmp_path / "cache")
    # The two bodies of the op differ in their backward only, which no graph shows before it is traced.
    at_once = [run(USES_OP, cache, PYTHONPATH=str(folders[2])) for _ in range(2)]
    assert [printed(process).split()[0] for process in at_once] == ["2.0", "2.0"]
    after = [run(USES_OP, cache, PYTHONPATH=str(folders[factor])) for factor in (2, 7)]
    assert [printed(process) for process in after] == ["2.0 1", "7.0 0"]


def test_inductor_s_own_keys_see_the_ops_code_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tags: list[str] = []

    def inductor(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        tags.append(torch.compiler.config.cache_key_tag)
        return graph.forward

    class Shuffled(Small):
        def forward(self, x: Tensor) -> Tensor:
            shuffled: Tensor = torch.ops.vit_kernels.pixel_shuffle.default(x[None], 1, 2, 1, "eager")
            return shuffled

    monkeypatch.setattr("torch._dynamo.lookup_backend", lambda name: inductor)
    for content in ("a = 1", "a = 1", "a = 2"):
        forget()
        store._package_hash.cache_clear()
        package = tmp_path / "vit_kernels"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(content)
        spec = SimpleNamespace(origin=str(package / "__init__.py"), submodule_search_locations=[str(package)])
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(store.importlib.util, "find_spec", lambda name, spec=spec: spec)
            Shuffled(CompilationConfig(compile_mm_encoder=True))(torch.ones(2, 3))
    store._package_hash.cache_clear()
    assert tags[0] == tags[1] != tags[2]


def test_an_op_of_no_package_is_compiled_without_caches(tmp_path: Path) -> None:
    library = torch.library.Library("of_no_package", "DEF")
    library.define("scale(Tensor x) -> Tensor")
    library.impl("scale", lambda x: 2 * x, "CompositeExplicitAutograd")
    torch.library.register_fake("of_no_package::scale", torch.empty_like, lib=library)

    @support_torch_compile(dynamic_arg_dims={"x": 0})
    class Uses(nn.Module):
        compilation_config = CompilationConfig(compile_mm_encoder=True, cache_dir=tmp_path)

        def forward(self, x: Tensor) -> Tensor:
            scaled: Tensor = torch.ops.of_no_package.scale(x)
            return scaled + 1

    with torch.no_grad(), compilation_counter.expect(artifacts_saved=0, backend_compilations=1):
        assert Uses()(torch.ones(2)).tolist() == [3, 3]
    assert list(tmp_path.iterdir()) == []
