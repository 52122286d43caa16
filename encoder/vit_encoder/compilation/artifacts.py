"""Inductor's artefacts between processes: one checked file for each graph.

Inductor's own cache directory trusts what it finds there, and its keys do not see the code of custom ops. So each
process compiles in a directory of its own, and what arose there travels as one archive behind its checksum. A file is
read completely before it is used and replaced as a whole, which leaves nothing for two processes, a killed writer or
a truncated file to break.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib.util
import io
import os
import platform
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch._functorch.config
from torch.fx import GraphModule

from vit_encoder.compilation.config import CompilationConfig
from vit_encoder.compilation.counter import compilation_counter

_publish = os.replace
_MAGIC = b"vit_encoder artefact 1\n"
_directories: dict[Path, str] = {}


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
    path = Path(config.cache_dir) / f"{tag}-{key[:32]}.artefact"
    new = path not in _directories
    with (
        torch.compiler.config.patch(cache_key_tag=key),  # type: ignore[attr-defined]
        # Otherwise the backward is compiled at its first call, too late for the archive.
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        _private_directory(path) as folder,
    ):
        # Never over files that this process has mapped already.
        known = new and _load(path, folder)
        yield
        if new and not known:
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
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return None
    origin = Path(spec.origin)
    files = sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations else [origin]
    return _hash("".join(f"{file.relative_to(origin.parent)}\n{file.read_text(encoding='utf-8')}" for file in files))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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


@contextlib.contextmanager
def _private_directory(path: Path) -> Iterator[Path]:
    if path not in _directories:
        folder = _directories[path] = tempfile.mkdtemp(prefix="vit_encoder-")
        # Not before: code is loaded from there.
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    folder = _directories[path]
    with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
        yield Path(folder)


def _load(path: Path, folder: Path) -> bool:
    """Whether `folder` now holds what the file at `path` does."""
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
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        files.extractall(folder)
    compilation_counter.artifacts_loaded += 1
    return True


def _save(path: Path, folder: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as files:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.suffix != ".lock":
                files.write(file, file.relative_to(folder))
    content = archive.getvalue()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, _MAGIC + hashlib.sha256(content).digest() + content)
    except OSError as error:
        warnings.warn(f"cache_dir: cannot write {path.name}: {error}; the next process compiles again", stacklevel=2)
        return
    compilation_counter.artifacts_saved += 1


def _replace(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        _publish(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
