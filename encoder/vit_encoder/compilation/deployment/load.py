"""An exported module in a process that only runs it: nothing is traced or compiled, Inductor is not even imported."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.autograd import forward_ad

from vit_encoder.compilation.deployment.manifest import (
    GRAPH,
    WEIGHTS,
    check_configuration,
    check_no_autocast,
    check_plain,
    check_surroundings,
    described,
    import_ops,
    read_manifest,
)

_ALIGNMENT = 16
_runners: weakref.WeakSet[Any] = weakref.WeakSet()


def _keep_runners() -> None:
    """Keep a forked child's runners for good: a dying one deletes the files that it unpacked, those of the parent."""
    for runner in _runners:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(runner))


os.register_at_fork(after_in_child=_keep_runners)


class DeployedModule:
    """What `load` returns: called with the tensors that the exported module's forward took, without gradients."""

    def __init__(self, manifest: dict[str, Any], graph: Path, weights: dict[str, Tensor], device: torch.device) -> None:
        self.manifest = manifest
        self.device = device
        # The graph reads them where they lie, and does not own them.
        self.weights = MappingProxyType({name: weights[name] for name in sorted(weights)})
        # aoti_load_package does the same behind an import of all of Inductor.
        index = -1 if device.index is None else device.index
        self._runner = torch._C._aoti.AOTIModelPackageLoader(os.fspath(graph), "model", False, 1, index)
        _runners.add(self._runner)
        # Without it a second thread waits inside the runner for the first, with the interpreter's lock that the
        # first one's custom ops need.
        self._one_at_a_time = threading.Lock()

    def __call__(self, *args: Tensor) -> Tensor:
        """Run the graph.

        Args:
            args: those of the export, the sizes of dynamic dimensions free from 1.

        Returns:
            What forward returns, without gradients to the arguments or the weights.

        Raises:
            TypeError: not a plain dense tensor, or another dtype.
            ValueError: another number of arguments, another shape or device, an argument that requires a gradient or
                has a tangent, or a call under autocast, which would reach nothing inside of the graph.
        """
        expected = self.manifest["inputs"]
        if len(args) != len(expected):
            names = ", ".join(each["name"] for each in expected)
            raise ValueError(f"args: got {len(args)} arguments, expected {len(expected)}: {names}")
        check_no_autocast(self.device)
        sizes: dict[str, int] = {}
        for x, each in zip(args, expected, strict=True):
            _check_input(x, each, self.device, sizes)
        inputs = [*self.weights.values(), *map(laid_out, args)]
        with self._one_at_a_time:
            (out,) = self._runner.boxed_run(inputs)
        return out


def _check_input(x: Tensor, expected: dict[str, Any], device: torch.device, sizes: dict[str, int]) -> None:
    """Compare with the manifest; `sizes` is what its symbols stand for so far."""
    name, shape = expected["name"], expected["shape"]
    check_plain(name, x)
    if str(x.dtype) != expected["dtype"]:
        raise TypeError(f"{name}: got {x.dtype}, expected {expected['dtype']}")
    if x.device != device:
        raise ValueError(f"{name}: got device {x.device}, expected {device}")
    fits = x.dim() == len(shape) and all(_fits(size, known, sizes) for size, known in zip(x.shape, shape, strict=True))
    if not fits:
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}, expected {shape}, each at least 1, where {sizes or '{}'}"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: got requires_grad, expected none: a deployed module has no gradients")
    if forward_ad.unpack_dual(x).tangent is not None:
        raise ValueError(f"{name}: got a dual tensor, expected none: a deployed module has no gradients")


def _fits(size: int, known: int | str, sizes: dict[str, int]) -> bool:
    if isinstance(known, int):
        return size == known
    times, _, symbol = known.rpartition("*")
    count, rest = divmod(size, int(times or 1))
    return rest == 0 and count > 0 and sizes.setdefault(symbol, count) == count


def laid_out(x: Tensor) -> Tensor:
    """The tensor as the generated code takes it: its values themselves, contiguous, on a boundary of 16 bytes."""
    x = x.detach().resolve_conj().resolve_neg().contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


def load(
    folder: str | os.PathLike[str],
    *,
    configuration: Any = None,
    weights: Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
) -> DeployedModule:
    """Load what `export` wrote, ready to be called.

    An export is native code that runs in this process with all of its rights: load only what you trust. The checks
    here find what is broken or does not fit, not what is forged.

    Args:
        folder: as `export` left it; `~` is the home.
        configuration: that of the module which the caller expects (a dataclass or a mapping); None expects nothing.
        weights: tensors in place of the folder's of the same names, such as a trained module's state_dict(); those
            that lie on `device`, contiguous and on a boundary of 16 bytes, are used where they lie.
        device: of the type that the module was exported on; the default one of that type when None.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a broken file; another configuration, torch version, device or code of the custom ops than at the
            export; weights of another name or shape, or without values (on the meta device).
        TypeError: weights of another dtype, or that are no plain dense tensors.
    """
    folder = Path(os.path.expanduser(folder))
    manifest = read_manifest(folder)
    device = _device(manifest["machine"]["type"] if device is None else device)
    check_surroundings(manifest, device)
    if configuration is not None:
        check_configuration(manifest, configuration)
    if not isinstance(weights, Mapping | None):
        raise TypeError(f"weights: got {type(weights).__name__}, expected a mapping of names to tensors")
    given = dict(weights or {})
    _check_weights("weights", given, manifest)
    stored = _stored(folder / WEIGHTS, manifest["weights"].keys() - given.keys(), device)
    _check_weights(str(folder / WEIGHTS), stored, manifest)
    # Not before everything was compared: it runs code that the manifest names.
    import_ops(manifest)
    tensors = {name: laid_out(x.detach().to(device)) for name, x in (stored | given).items()}
    return DeployedModule(manifest, folder / GRAPH, tensors, device)


def _device(device: torch.device | str) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, expected a device of torch: {error}") from error
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    # A tensor on "cpu:0" says that it is on "cpu".
    return torch.device("cpu") if device.type == "cpu" else device


def _stored(path: Path, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in sorted(names)}
    except SafetensorError as error:
        raise ValueError(f"{path}: got a broken file, expected the weights that export wrote: {error}") from error


def _check_weights(source: str, tensors: Mapping[str, Tensor], manifest: dict[str, Any]) -> None:
    expected = manifest["weights"]
    if unknown := sorted(map(str, tensors.keys() - expected.keys())):
        raise ValueError(f"{source}: got {', '.join(unknown)}, expected names of {manifest['module']}'s weights")
    for name, x in tensors.items():
        check_plain(f"{source}: {name}", x)
        if (found := described(x)) != expected[name]:
            error = ValueError if found["shape"] != expected[name]["shape"] else TypeError
            raise error(f"{source}: got {name} of {found}, expected {expected[name]}")
        if x.is_meta:
            raise ValueError(f"{source}: got {name} on meta, expected tensors that hold values")
