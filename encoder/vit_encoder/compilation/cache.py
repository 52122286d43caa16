"""Inductor's artefacts between processes: one checked file for each graph.

Inductor's own cache directory trusts what it finds there, and its keys do not see the code of custom ops. So each
process compiles in a directory of its own, and what arose there travels as one archive behind its checksum. A file is
read completely before it is used and replaced as a whole, which leaves nothing for two processes, a killed writer or
a truncated file to break.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import os
import platform
import secrets
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from multiprocessing.util import Finalize
from pathlib import Path

import torch
import torch._functorch.config
from torch.fx import GraphModule

from vit_encoder.compilation.config import CompilationConfig
from vit_encoder.compilation.counter import compilation_counter
from vit_encoder.compilation.workarounds import compilation_lock

_publish = os.replace
_MAGIC = b"vit_encoder artefact 1\n"
_directories: dict[Path, Path] = {}
_complete: set[Path] = set()
"""The artefacts that this process has loaded or saved: an interrupted or failed save is tried again."""


@contextlib.contextmanager
def artifacts(graph: GraphModule, config: CompilationConfig, tag: str) -> Iterator[None]:
    """Compile `graph` in the block with keys that see its ops' code, and through `config.cache_dir` if there is one."""
    code = package_code(op_packages(graph))
    if code is None:
        with torch._inductor.config.patch(force_disable_caches=True):
            yield
        return
    if config.cache_dir is None:
        with torch.compiler.config.patch(cache_key_tag=_hash(code)):  # type: ignore[attr-defined]
            yield
        return
    text = "\n".join([code, config.as_text(), graph.print_readable(print_output=False), *_environment()])
    key = _hash(text)
    path = Path(os.path.expanduser(config.cache_dir)).absolute() / f"{tag}-{key[:32]}.artefact"
    with (
        torch.compiler.config.patch(cache_key_tag=key),  # type: ignore[attr-defined]
        # Otherwise the backward is compiled at its first call, too late for the archive.
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        # The variables are the whole process's.
        compilation_lock(),
    ):
        folder = _folder(path)
        if folder is None:
            yield
            return
        with _variables(TORCHINDUCTOR_CACHE_DIR=str(folder), TRITON_CACHE_DIR=str(folder / "triton")):
            yield
        if path not in _complete:
            _save(path, folder)


def op_packages(graph: GraphModule) -> list[str]:
    """The names of the packages that a graph's custom ops come from: the ops' namespaces."""
    targets = [
        node.target
        for module in graph.modules()
        if isinstance(module, GraphModule)
        for node in module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
    ]
    namespaces = {str(target).partition(".")[0] for target in targets}
    return sorted(namespaces - {"aten", "prims", "prim"})


def package_code(names: Iterable[str]) -> str | None:
    """A hash of packages' code; None if one of them does not exist: nobody could say when its code has changed."""
    hashes = [_package_hash(name) for name in names]
    return None if None in hashes else " ".join(map(str, hashes))


@functools.cache
def _package_hash(name: str) -> str | None:
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:
        # Of a module without a spec, such as __main__.
        return None
    if spec is None or spec.origin is None:
        return None
    origin = Path(spec.origin)
    files = sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations else [origin]
    if not all(file.is_file() for file in files or [origin]):
        # Built in, or inside of an archive.
        return None
    return _hash("".join(f"{file.relative_to(origin.parent)}\n{_hash(file.read_bytes())}\n" for file in files))


def _hash(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def _environment() -> list[str]:
    triton = importlib.util.find_spec("triton")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return [torch.__version__, str(triton and triton.origin), _triton_version(), platform.machine(), device]


def _triton_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""


def _folder(path: Path) -> Path | None:
    """A directory of this process for the artefact at `path`, with what is there; None if it cannot be made."""
    if path in _directories:
        # Never loaded again, over files that this process has mapped already.
        return _directories[path]
    try:
        private = tempfile.mkdtemp(prefix="vit_encoder-")
    except OSError as error:
        warnings.warn(f"cache_dir: cannot make a folder for {path.name}: {error}; compiling without it", stacklevel=2)
        return None
    # Not before the end: code is loaded from there. By nobody but this process: forked children run atexit too.
    Finalize(None, shutil.rmtree, args=(private,), kwargs={"ignore_errors": True}, exitpriority=0)
    folder = Path(private) / "artefact"
    if _load(path, folder):
        _complete.add(path)
    _directories[path] = folder
    return folder


def _forget() -> None:
    """Forget the directories in a forked child: they are its parent's, which deletes them at its own end."""
    _directories.clear()
    _complete.clear()


os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def _variables(**values: str) -> Iterator[None]:
    """Environment variables for a while, one by one: other threads may change others meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _load(path: Path, folder: Path) -> bool:
    """Whether `folder`, which is new, now holds what the file at `path` does."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        warnings.warn(f"cache_dir: cannot read {path.name}: {error}; compiling again", stacklevel=2)
        return False
    header, archive = content[: len(_MAGIC) + 32], content[len(_MAGIC) + 32 :]
    if header != _MAGIC + hashlib.sha256(archive).digest():
        warnings.warn(f"cache_dir: {path.name} is truncated or not an artefact; compiling again", stacklevel=2)
        return False
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            files.extractall(folder)
    except (OSError, zipfile.BadZipFile) as error:
        warnings.warn(f"cache_dir: cannot unpack {path.name}: {error}; compiling again", stacklevel=2)
        # Half a library would crash this process.
        shutil.rmtree(folder, ignore_errors=True)
        return False
    compilation_counter.artifacts_loaded += 1
    return True


def _save(path: Path, folder: Path) -> None:
    try:
        content = _archive(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, _MAGIC + hashlib.sha256(content).digest() + content)
    except OSError as error:
        warnings.warn(f"cache_dir: cannot write {path.name}: {error}; the next process compiles again", stacklevel=2)
        return
    _complete.add(path)
    compilation_counter.artifacts_saved += 1


def _archive(folder: Path) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as files:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.suffix != ".lock":
                files.write(file, file.relative_to(folder))
    return archive.getvalue()


def _replace(path: Path, content: bytes) -> None:
    # Not tempfile's: its files are closed to other users, whatever the umask says.
    new = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        with new.open("xb") as file:
            file.write(content)
        _publish(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
