"""What the folder of an exported module says of itself: all that its graph was made for."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_encoder.compilation.cache import package_code

GRAPH, WEIGHTS, MANIFEST = "graph.pt2", "weights.safetensors", "manifest.json"
FORMAT = 2

_SHAPED = {"dtype": str, "shape": [int]}
_FORM: dict[str, Any] = {
    "module": str,
    "configuration": object,
    "inputs": [{"name": str, "dtype": str, "shape": [(int, re.compile(r"(\d+\*)?[A-Za-z_]\w*"))]}],
    "weights": {str: _SHAPED},
    "torch": str,
    "machine": ({"type": re.compile("cpu"), "features": [str]}, {"type": re.compile("cuda"), "architecture": str}),
    # Top-level names only: to find a module inside of a package imports the package.
    "ops": {"packages": [re.compile(r"[A-Za-z_]\w*")], "code": str},
    "graph_sha256": re.compile("[0-9a-f]{64}"),
}
"""The types of a manifest's values: a pattern is one of strings, a tuple has alternatives, `str` is any key."""


def described(x: Tensor) -> dict[str, Any]:
    """A tensor's dtype and shape, as JSON."""
    return {"dtype": str(x.dtype), "shape": list(x.shape)}


def check_plain(name: str, x: Any) -> None:
    """Whether generated code can read a tensor where it lies.

    Raises:
        TypeError: no tensor; a sparse or nested one; one that holds its values elsewhere, such as a quantised,
            distributed or fake tensor, or one of a transform of torch.func.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor")
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise TypeError(f"{name}: got a tensor of a torch.func transform, expected a plain one: exports have no rules")
    if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__ or x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name}: got a {type(x).__name__} of layout {x.layout}, expected a plain dense tensor")


def check_no_autocast(device: torch.device) -> None:
    """Whether the modules of a device compute in the dtypes of their weights.

    Raises:
        ValueError: autocast is on.
    """
    if torch.is_autocast_enabled(device.type):
        raise ValueError(
            f"autocast: got it enabled for {device.type}, expected none: an export computes in the dtypes that its "
            "module had; cast the module before the export, or leave autocast for this call"
        )


def plain(configuration: Any) -> Any:
    """A configuration (a dataclass, a mapping or None) as JSON."""
    if dataclasses.is_dataclass(configuration) and not isinstance(configuration, type):
        configuration = dataclasses.asdict(configuration)
    return json.loads(json.dumps(configuration, default=repr))


def machine(device: torch.device) -> dict[str, Any]:
    """What generated code depends on: it may use every feature of the processor that compiled it."""
    if device.type == "cpu":
        features = [name for name, present in torch.cpu.get_capabilities().items() if present is True]
        return {"type": "cpu", "features": sorted(features)}
    properties = torch.cuda.get_device_properties(device)
    architecture = getattr(properties, "gcnArchName", f"sm_{properties.major}{properties.minor}")
    return {"type": device.type, "architecture": architecture}


def checksum(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose graph is as it was written.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: the manifest or the graph is broken, or of another format; all keys that are missing or hold what
            they never do are named at once.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got no JSON, expected what export wrote: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: got another format, expected {FORMAT}; export again")
    if broken := [key for key, form in _FORM.items() if key not in manifest or not _has_form(manifest[key], form)]:
        found = ", ".join(f"{key} {manifest[key]!r:.100}" if key in manifest else f"no {key}" for key in broken)
        raise ValueError(f"{path}: got {found}, expected what export wrote; export again")
    if (found := checksum(folder / GRAPH)) != manifest["graph_sha256"]:
        raise ValueError(f"{folder / GRAPH}: got checksum {found}, expected {manifest['graph_sha256']}; export again")
    return manifest


def _has_form(value: Any, form: Any) -> bool:
    if isinstance(form, re.Pattern):
        return isinstance(value, str) and form.fullmatch(value) is not None
    if isinstance(form, tuple):
        return any(_has_form(value, each) for each in form)
    if isinstance(form, list):
        return isinstance(value, list) and all(_has_form(item, form[0]) for item in value)
    if not isinstance(form, dict):
        return isinstance(value, form) and not (form is int and isinstance(value, bool))
    if not isinstance(value, dict):
        return False
    if str in form:
        return all(_has_form(item, form[str]) for item in value.values())
    return all(key in value and _has_form(value[key], each) for key, each in form.items())


def check_surroundings(manifest: dict[str, Any], device: torch.device) -> None:
    """Whether a graph may run here.

    Raises:
        ValueError: another version of torch, another device, or other code of the custom ops.
    """
    if torch.__version__ != manifest["torch"]:
        raise ValueError(f"torch: got {torch.__version__}, expected {manifest['torch']} as at the export; export again")
    _check_machine(manifest["machine"], device)
    if package_code(manifest["ops"]["packages"]) != manifest["ops"]["code"]:
        names = ", ".join(manifest["ops"]["packages"])
        raise ValueError(f"ops: the code of {names} is not what it was at the export; export again")


def import_ops(manifest: dict[str, Any]) -> None:
    """Import the packages of a graph's custom ops, which `check_surroundings` has compared with those of the export."""
    for namespace in manifest["ops"]["packages"]:
        importlib.import_module(namespace)


def _check_machine(exported: dict[str, Any], device: torch.device) -> None:
    if device.type != exported["type"]:
        raise ValueError(f"device: got {device}, expected {exported['type']} as at the export")
    if device.type != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device: got {device}, which this process does not have; the export was made for one")
    present = machine(device)
    if missing := sorted(set(exported.get("features", ())) - set(present.get("features", ()))):
        raise ValueError(f"device: got a processor without {', '.join(missing)}, expected that of the export")
    if present.get("architecture") != exported.get("architecture"):
        raise ValueError(f"device: got {present['architecture']}, expected {exported['architecture']}")


def check_configuration(manifest: dict[str, Any], configuration: Any) -> None:
    """Compare with the configuration that a caller expects.

    Raises:
        ValueError: they differ; the message names the fields.
    """
    expected, exported = plain(configuration), manifest["configuration"]
    if expected == exported:
        return
    if not isinstance(expected, dict) or not isinstance(exported, dict):
        raise ValueError(f"configuration: got {expected!r}, expected {exported!r} as at the export")
    fields = [name for name in {**exported, **expected} if exported.get(name) != expected.get(name)]
    differences = ", ".join(f"{name} {expected.get(name)!r} (exported: {exported.get(name)!r})" for name in fields)
    raise ValueError(f"configuration: got {differences}; expected that of the export")
