"""Artefacts in `cache_dir`: what is taken from there is right, and what is broken there is compiled again."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vit_encoder.compilation import CompilationConfig, compilation_counter, set_model_tag, support_torch_compile
from vit_encoder.compilation import cache as store

pytestmark = [pytest.mark.costly, pytest.mark.usefixtures("fresh_dynamo", "new_process")]


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


def stored(folder: Path | str) -> Any:
    """The block in which a graph is compiled for `folder`, without a compiler."""
    graph = torch.fx.symbolic_trace(nn.Identity())
    return store.artifacts(graph, CompilationConfig(compile_mm_encoder=True, cache_dir=folder), "stub")


def make(name: str = "made.txt") -> Path:
    """What a compiler does in that block: a file in the directory that it was told."""
    file = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("made")
    return file


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The process's for the length of a test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_the_files_follow_the_umask(umask: int, tmp_path: Path) -> None:
    with stored(tmp_path / "cache"):
        make()
    (file,) = (tmp_path / "cache").iterdir()
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask
    assert file.parent.stat().st_mode & 0o777 == 0o777 & ~umask


def test_what_another_user_keeps_to_himself_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stored(tmp_path):
        make()
    forget()
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.suffix == ".artefact":
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path)

    # Root may read everything: the mode alone would not do.
    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.warns(UserWarning, match="cannot read .*Permission denied; compiling again"), stored(tmp_path):
        make()


def test_an_interrupted_or_failed_save_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")):
        with monkeypatch.context() as patch:
            patch.setattr(store, "_publish", lambda *args, error=error: (_ for _ in ()).throw(error))
            caught: Any = (
                pytest.warns(UserWarning, match="No space left")
                if isinstance(error, OSError)
                else pytest.raises(KeyboardInterrupt)
            )
            with caught, stored(tmp_path):
                make()
        assert list(tmp_path.iterdir()) == []
    with compilation_counter.expect(artifacts_saved=1), stored(tmp_path):
        make()
    with compilation_counter.expect(artifacts_saved=0), stored(tmp_path):
        make("later.txt")


def test_a_compilation_that_fails_saves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), stored(tmp_path):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with compilation_counter.expect(artifacts_saved=1), stored(tmp_path):
        make()


FULL = OSError(errno.ENOSPC, "No space left on device")


def full(*args: Any, **options: Any) -> Any:
    raise FULL


def test_a_full_disk_before_the_compilation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.warns(UserWarning, match="cache_dir: cannot make .*No space left"), stored(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "step",
    ["zipfile.ZipFile.write", "pathlib.Path.mkdir", "pathlib.Path.open", "vit_encoder.compilation.cache._publish"],
)
def test_a_disk_that_fills_up_while_saving(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_the_last_file() -> None:
        make()
        monkeypatch.setattr(step, full)

    with pytest.warns(UserWarning, match="cache_dir: cannot write .*No space left"), stored(tmp_path):
        make_the_last_file()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stored(tmp_path):
        make("first.txt")
    forget()

    def half(archive: Any, folder: Path) -> None:
        folder.mkdir()
        (folder / "first.txt").write_text("ma")
        raise FULL

    monkeypatch.setattr("zipfile.ZipFile.extractall", half)
    with pytest.warns(UserWarning, match="cannot unpack .*No space left.*; compiling again"), stored(tmp_path):
        assert not (make("other.txt").parent / "first.txt").exists()
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupted_load_leaves_nothing_that_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stored(tmp_path):
        make()
    forget()

    def interrupted(archive: Any, folder: Path) -> None:
        folder.mkdir()
        (folder / "made.txt").write_text("ma")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("zipfile.ZipFile.extractall", interrupted)
        with pytest.raises(KeyboardInterrupt), stored(tmp_path):
            pass
    with stored(tmp_path):
        assert (Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "made.txt").read_text() == "made"


def test_a_tilde_is_the_home_and_a_relative_folder_the_one_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for folder, found in (("~/home", "home"), ("here", "here")):
        with stored(folder):
            make()
        assert len(list((tmp_path / found).iterdir())) == 1
    (tmp_path / "there").mkdir()
    monkeypatch.chdir("there")
    with stored("here"):
        make()
    assert len(list((tmp_path / "there" / "here").iterdir())) == 1


def test_the_environment_stays_what_others_make_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("CHANGED_BY_A_THREAD", "0")
    monkeypatch.setenv("DELETED_BY_A_THREAD", "0")
    monkeypatch.delenv("SET_BY_A_THREAD", raising=False)

    def change() -> None:
        os.environ.update(CHANGED_BY_A_THREAD="1", SET_BY_A_THREAD="1")
        del os.environ["DELETED_BY_A_THREAD"]

    with stored(tmp_path):
        folder = make().parent
        assert Path(os.environ["TRITON_CACHE_DIR"]).is_relative_to(folder)
        thread = threading.Thread(target=change)
        thread.start()
        thread.join()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "before"
    assert "TRITON_CACHE_DIR" not in os.environ
    assert os.environ["CHANGED_BY_A_THREAD"] == os.environ.pop("SET_BY_A_THREAD") == "1"
    assert "DELETED_BY_A_THREAD" not in os.environ


FORKS = """
    import multiprocessing, os, sys
    from pathlib import Path
    import torch
    from vit_encoder import CompilationConfig
    from vit_encoder.compilation.cache import artifacts

    def make(folder):
        graph = torch.fx.symbolic_trace(torch.nn.Identity())
        with artifacts(graph, CompilationConfig(compile_mm_encoder=True, cache_dir=folder), "stub"):
            file = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "made.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("made")
        return file

    def child(file, folder, told):
        told.write_text(str(own := make(folder)))
        assert own != file and file.exists()

    if __name__ == "__main__":
        folder = Path(sys.argv[1])
        file = make(folder / "cache")
        ways = ("exit", "multiprocessing")
        for way in ways:
            arguments = (file, folder / "cache", folder / way)
            if way == "exit":
                if (pid := os.fork()) == 0:
                    child(*arguments)
                    sys.exit()
                assert os.waitpid(pid, 0)[1] == 0
            else:
                process = multiprocessing.get_context("fork").Process(target=child, args=arguments)
                process.start()
                process.join()
                assert process.exitcode == 0
        print(file.exists(), *(Path((folder / way).read_text()).parent.parent.exists() for way in ways))
        (folder / "parent").write_text(str(file))
"""


def test_forked_children_have_directories_of_their_own_and_delete_only_these(tmp_path: Path) -> None:
    assert printed(run(FORKS, str(tmp_path))) == "True False False"
    assert not Path((tmp_path / "parent").read_text()).parent.parent.exists()


def test_packages_whose_code_cannot_be_seen_have_no_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.writestr("ops_in_an_archive/__init__.py", "")
    (tmp_path / "ops_in_latin_1.py").write_bytes("# -*- coding: latin-1 -*-\n# \xe9".encode("latin-1"))
    monkeypatch.syspath_prepend(tmp_path / "packed.zip")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "without_a_spec", ModuleType("without_a_spec"))
    for name in ("sys", "without_a_spec", "no_such_package", "ops_in_an_archive"):
        assert store.package_code([name]) is None
    assert store.package_code(["ops_in_latin_1"])


def run(script: str, *arguments: str, folder: Path | None = None) -> subprocess.Popen[str]:
    """A process that runs the script and can import from the folder."""
    path = [str(folder)] if folder else []
    command = [sys.executable, "-W", "error:cache_dir:UserWarning", "-c", textwrap.dedent(script), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*path, os.environ["PYTHONPATH"]])}
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
    # The two implementations of the op differ in their backward only, which no graph shows before it is traced.
    at_once = [run(USES_OP, cache, folder=folders[2]) for _ in range(2)]
    assert [printed(process).split()[0] for process in at_once] == ["2.0", "2.0"]
    after = [run(USES_OP, cache, folder=folders[factor]) for factor in (2, 7)]
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
