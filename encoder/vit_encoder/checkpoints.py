"""How the parameters of an encoder are read from a Hugging Face checkpoint.

A folder holds either one `model.safetensors` or several shards and a `model.safetensors.index.json`; like transformers,
the single file is taken where there are both. Only safetensors are ever read: unpickling a .bin or .pt file runs code.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain
from pathlib import Path, PureWindowsPath
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from vit_encoder.configs import check_file, read_json_object, what_it_is

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
FOREIGN_SUFFIXES = {".gguf", ".h5", ".msgpack", ".npz", ".onnx"}
# By their names in a safetensors header. Float8 is left out: such a weight means nothing without its scales.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Shape = tuple[int, ...]
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class HfTensors:
    """The tensors of a Hugging Face checkpoint that make up one of our parameters, concatenated on dimension 0.

    Args:
        names: in the whole model's checkpoint.
        part_shape: of each of them.
        prefixes: what all names begin with, and what they may begin with instead in other checkpoints: nothing where
            the vision model is alone.
        flattened: our parameter has the dimensions after the first as one.
    """

    names: tuple[str, ...]
    part_shape: Shape
    prefixes: tuple[str, ...] = ("",)
    flattened: bool = False

    @property
    def shape(self) -> Shape:
        """Shape of our parameter."""
        rest = self.part_shape[1:]
        return (len(self.names) * self.part_shape[0], *((math.prod(rest),) if self.flattened else rest))

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """The parts of our parameter under their Hugging Face names, as views."""
        parts = tensor.split(self.part_shape[0])
        if self.flattened:
            parts = tuple(part.unflatten(1, self.part_shape[1:]) for part in parts)
        return dict(zip(self.names, parts, strict=True))

    def beginning_with(self, prefix: str) -> HfTensors:
        """The same tensors in a checkpoint where `prefix` stands for the first one."""
        names = tuple(prefix + name.removeprefix(self.prefixes[0]) for name in self.names)
        return replace(self, names=names, prefixes=(prefix,))


@dataclass(frozen=True)
class _Header:
    dtype: str
    shape: Shape


def to_hf_tensors(tensors: Mapping[str, Tensor], mapping: Mapping[str, HfTensors]) -> dict[str, Tensor]:
    """Our parameters, mapped as an encoder's `vision_tensors` has it, under their Hugging Face names, as views.

    Raises ValueError listing the parameters that are missing, unknown or of another shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: parts.shape for name, parts in mapping.items()}
    wrong = sorted(name for name in shapes.keys() | expected if shapes.get(name) != expected.get(name))
    if wrong:
        lines = [f"{name}: {shapes.get(name, 'missing')}, expected {expected.get(name, 'none')}" for name in wrong]
        raise ValueError("tensors must hold every mapped parameter and no other:\n  " + "\n  ".join(lines))
    return {hf: part for name, parts in mapping.items() for hf, part in parts.split(tensors[name]).items()}


def read_tensors(
    folder: str | os.PathLike[str],
    wanted: Mapping[str, HfTensors],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Reads our parameters out of a Hugging Face checkpoint folder, without reading the rest of it.

    The files are memory-mapped and each tensor is copied once, straight to its place in the result and cast on the
    way: beside the result no more than one tensor is held (the mapped pages belong to the system's file cache, which
    drops them when memory is short). `dtype` (floating; None: as stored, and the wider one where
    parts differ) and `device` (None: PyTorch's default) are the result's. Progress is shown on a terminal when reading
    takes longer than a second.

    Every file's header is checked before anything is read. One ValueError lists all tensors that are missing,
    unexpected (unknown names under the prefixes of the wanted ones), of another shape or not floating, and the files
    that cannot be read. ValueError also for a folder that holds only pickles or another format, for a git-lfs
    pointer, for an index that is malformed or names anything but files directly in its folder (these may be symbolic
    links to elsewhere, as in Hugging Face's cache), and for a dtype or device that cannot be had; TypeError for a dtype
    that is none; OSError, which says what is there instead and what to pass, for a missing folder or file.
    """
    _check_dtype(dtype)
    device = _usable_device(device)
    folder = Path(os.path.expanduser(folder))
    files = _file_of_each_tensor(folder)
    wanted = _as_stored(wanted, files)
    stored_dtypes = _checked_dtypes(folder, wanted, files)
    result = {}
    for name, parts in wanted.items():
        widest = reduce(torch.promote_types, (stored_dtypes[n] for n in parts.names))
        result[name] = torch.empty(parts.shape, dtype=dtype or widest, device=device)
    _fill(folder, files, {n: part for name, parts in wanted.items() for n, part in parts.split(result[name]).items()})
    return result


def read_module(
    make: Callable[[], Module],
    folder: str | os.PathLike[str],
    wanted: Mapping[str, HfTensors],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Module:
    """The module that `make` constructs, in eval mode, with the tensors of a checkpoint folder as its parameters.

    Args:
        make: called on the meta device once the tensors are there, so that no memory is filled twice.
        folder, wanted, dtype, device: as for `read_tensors`; `wanted` names every parameter of the module.

    Raises:
        OSError, TypeError, ValueError: as `read_tensors` says.
    """
    tensors = read_tensors(folder, wanted, dtype=dtype, device=device)
    with torch.device("meta"):
        module = make()
    module.load_state_dict(tensors, assign=True)
    # What is computed rather than read, such as rotary tables, follows the parameters.
    return module.to(next(iter(tensors.values())).device).eval()


def _check_dtype(dtype: object) -> None:
    if dtype is None or dtype in DTYPES.values():
        return
    error = ValueError if isinstance(dtype, torch.dtype) else TypeError
    raise error(f"dtype must be None or one of {list(DTYPES.values())}, got {dtype!r}")


def _usable_device(device: torch.device | str | None) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch built without that backend
        raise ValueError(f"device must be one that PyTorch can use here, got {device!r}: {error}") from error


def _file_of_each_tensor(folder: Path) -> dict[str, str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"the checkpoint {folder} is not a folder{what_it_is(folder)}")
    # A link whose file is gone is there, too: it must not make another file win.
    if os.path.lexists(folder / SINGLE_FILE):
        return dict.fromkeys(_headers(folder / SINGLE_FILE), SINGLE_FILE)
    if os.path.lexists(folder / INDEX_FILE):
        return _weight_map(folder / INDEX_FILE)
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES):
        raise ValueError(
            f"the checkpoint {folder} holds no safetensors, only {', '.join(pickles)}: pickles are never read, because "
            "unpickling runs code; convert them to safetensors"
        )
    if foreign := sorted(path.name for path in folder.iterdir() if path.suffix in FOREIGN_SUFFIXES):
        raise ValueError(
            f"the checkpoint {folder} holds no safetensors, only {', '.join(foreign)}, a format that is not read: "
            "download the safetensors that it was converted from"
        )
    raise FileNotFoundError(f"the checkpoint {folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{what_it_is(folder)}")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} must hold a weight_map of tensor names to file names, got {weight_map!r:.80}")
    if foreign := sorted({repr(file) for file in weight_map.values() if not _is_shard_name(file)}):
        raise ValueError(f"{index} must name only .safetensors files of its own folder, got {', '.join(foreign)}")
    return weight_map


def _is_shard_name(file: object) -> bool:
    # Windows' rules are the stricter ones: both slashes separate, and so does a drive's colon.
    return isinstance(file, str) and file.endswith(".safetensors") and PureWindowsPath(file).name == file


@contextmanager
def _open_shard(path: Path) -> Iterator[safe_open]:
    check_file(path)
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except SafetensorError as error:
        raise ValueError(f"{path} is not a sound safetensors file: {error}") from error


def _headers(path: Path) -> dict[str, _Header]:
    with _open_shard(path) as shard:
        slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (safe_open cannot be iterated)
        return {name: _Header(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def _as_stored(wanted: Mapping[str, HfTensors], stored: Iterable[str]) -> dict[str, HfTensors]:
    """The wanted tensors under the names that this checkpoint uses."""
    stored = set(stored)
    used = {prefixes: _used(prefixes, wanted.values(), stored) for prefixes in {p.prefixes for p in wanted.values()}}
    return {name: parts.beginning_with(used[parts.prefixes]) for name, parts in wanted.items()}


def _used(prefixes: tuple[str, ...], wanted: Iterable[HfTensors], stored: set[str]) -> str:
    """Which of the prefixes the stored names begin with: the first where none of them is known."""
    for prefix in prefixes:
        renamed = (parts.beginning_with(prefix).names for parts in wanted if parts.prefixes == prefixes)
        if (prefix and any(name.startswith(prefix) for name in stored)) or not stored.isdisjoint(chain(*renamed)):
            return prefix
    return prefixes[0]


def _all_names(wanted: Mapping[str, HfTensors]) -> list[str]:
    return [name for parts in wanted.values() for name in parts.names]


def _by_file(names: Iterable[str], files: Mapping[str, str]) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for name in names:
        if name in files:
            groups[files[name]].append(name)
    return groups


def _checked_dtypes(folder: Path, wanted: Mapping[str, HfTensors], files: Mapping[str, str]) -> dict[str, torch.dtype]:
    """The stored dtype of each wanted tensor; raises the one ValueError that lists everything wrong with them."""
    names = _all_names(wanted)
    headers, unreadable = _readable_headers(folder, _by_file(names, files))
    found = {name: headers[files[name]][name] for name in names if name in headers.get(files.get(name, ""), {})}
    lost = {name for name in names if name in files and files[name] not in headers}
    _raise_problems(
        folder,
        {
            "missing": [name for name in names if name not in found and name not in lost],
            "unexpected": _unexpected(wanted.values(), {*files, *chain.from_iterable(headers.values())}),
            "of another shape": [
                f"{name}: {list(found[name].shape)}, expected {list(parts.part_shape)}"
                for parts in wanted.values()
                for name in parts.names
                if name in found and found[name].shape != parts.part_shape
            ],
            "not of a dtype in " + ", ".join(DTYPES): [
                f"{name}: {header.dtype}" for name, header in found.items() if header.dtype not in DTYPES
            ],
            "in files that cannot be read": unreadable,
        },
    )
    return {name: DTYPES[header.dtype] for name, header in found.items()}


def _readable_headers(
    folder: Path, by_file: Mapping[str, list[str]]
) -> tuple[dict[str, dict[str, _Header]], list[str]]:
    """The headers of the files that can be read, and a line for each that cannot."""
    headers, unreadable = {}, []
    for file, names in by_file.items():
        try:
            headers[file] = _headers(folder / file)
        except (ValueError, OSError) as error:
            unreadable.append(f"{', '.join(names)}: {error}")
    return headers, unreadable


def _unexpected(wanted: Iterable[HfTensors], stored: Iterable[str]) -> list[str]:
    """The names under the prefixes of the wanted ones that nobody wants, quoted: a foreign file chose them."""
    names = {name for parts in wanted for name in parts.names}
    prefixes = tuple({parts.prefixes[0] for parts in wanted})
    return [repr(name) for name in sorted(stored) if name.startswith(prefixes) and name not in names]


def _raise_problems(folder: Path, problems: Mapping[str, list[str]]) -> None:
    groups = [f"{what} ({len(lines)}):\n    " + "\n    ".join(lines) for what, lines in problems.items() if lines]
    if groups:
        raise ValueError(f"the checkpoint {folder} does not hold the expected tensors\n  " + "\n  ".join(groups))


def _fill(folder: Path, files: Mapping[str, str], targets: Mapping[str, Tensor]) -> None:
    """Copies each stored tensor into its target."""
    size = sum(target.nbytes for target in targets.values())
    with tqdm(total=size, desc="reading tensors", unit="B", unit_scale=True, disable=None, delay=1) as progress:
        for file, names in _by_file(targets, files).items():
            with _open_shard(folder / file) as shard:
                for name in names:
                    targets[name].copy_(shard.get_tensor(name))
                    progress.update(targets[name].nbytes)
