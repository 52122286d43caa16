"""A compiled module as a folder that another process loads without tracing or compiling."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
import torch.fx.experimental._config as fx_config
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vit_encoder.compilation.artifacts import op_packages, package_code
from vit_encoder.compilation.config import CompilationConfig
from vit_encoder.compilation.decorator import argument_names
from vit_encoder.compilation.manifest import FORMAT, GRAPH, MANIFEST, WEIGHTS, checksum, described, machine, plain
from vit_encoder.compilation.workarounds import workarounds


@torch.no_grad()
def export(module: nn.Module, args: Sequence[Tensor], folder: str | os.PathLike[str]) -> Path:
    """Compile a module with AOTInductor into a new folder, for `load` in another process.

    The folder holds graph.pt2 (without weights), weights.safetensors and manifest.json. It is one graph for every size
    of the dynamic dimensions that `support_torch_compile` was told of, without gradients. Nested compile regions are
    inlined, since AOTInductor of torch 2.13 has no calls between graphs: many equal layers take longer to export than
    to compile. Inductor's options are those of the module's `compilation_config`.
    Source: PyTorch, `torch._inductor.aoti_compile_and_package`.

    Args:
        module: of a class decorated with `support_torch_compile`, with one tensor as its result, in the dtype and on
            the device that it will run with.
        args: example arguments for the first arguments of forward; dynamic dimensions have any size from 1.
        folder: must not exist, and appears when everything in it is complete.

    Returns:
        The folder.

    Raises:
        FileExistsError: `folder` exists.
        TypeError: a class that is not decorated, too many arguments, or an argument or result that is no tensor.
        ValueError: the graph does not hold for every size, or calls custom ops of which no package has the name.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"folder: got {folder}, expected one that does not exist")
    if not args or not all(isinstance(x, Tensor) for x in args):
        raise TypeError(f"args: got {', '.join(type(x).__name__ for x in args) or 'no tensors'}, expected one or more")
    with fx_config.patch(backed_size_oblivious=True), workarounds():  # type: ignore[attr-defined]
        program = _traced(module, args)
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            # Inside of it: a temporary folder itself is closed to other users.
            complete = scratch / folder.name
            complete.mkdir()
            _write(complete, module, program, args[0].device)
            complete.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _traced(module: nn.Module, args: Sequence[Tensor]) -> ExportedProgram:
    settings = getattr(type(module), "_compile_settings", None)
    if settings is None:
        raise TypeError(f"module: got {type(module).__name__}, expected a class decorated with support_torch_compile")
    names = argument_names(type(module))
    if len(args) > len(names):
        raise TypeError(f"args: got {len(args)}, expected at most {len(names)}: {', '.join(names)}")
    dims = tuple(dict.fromkeys(settings.dims.get(name, ()), Dim.DYNAMIC) for name in names[: len(args)])
    example = tuple(x.detach().contiguous() for x in args)
    program = torch.export.export(module, example, dynamic_shapes=dims, strict=False)
    if not program.call_spec.out_spec.is_leaf():
        raise TypeError(f"module: got a result of {program.call_spec.out_spec}, expected one tensor")
    return program


def _write(folder: Path, module: nn.Module, program: ExportedProgram, device: torch.device) -> None:
    packages = op_packages(program.graph_module)
    code = package_code(packages)
    if code is None:
        raise ValueError(f"module: got ops of {', '.join(packages)}, expected those of packages of these names")
    config = getattr(module, "compilation_config", None) or CompilationConfig()
    options = {**config.options(), "aot_inductor.package_constants_in_so": False}
    with warnings.catch_warnings():
        # torch 2.13 against itself.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / GRAPH), inductor_configs=options)
    weights = {name: x.detach().contiguous() for name, x in _weights(program).items()}
    save_file(weights, folder / WEIGHTS)
    manifest = {
        "format": FORMAT,
        "module": type(module).__name__,
        "configuration": plain(getattr(module, "config", None)),
        # Not before the compilation, which can narrow the sizes too.
        "inputs": [_input(name, value) for name, value in _user_inputs(program)],
        "weights": {name: described(x) for name, x in sorted(weights.items())},
        "torch": torch.__version__,
        "machine": machine(device),
        "ops": {"packages": packages, "code": code},
        "graph_sha256": checksum(folder / GRAPH),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _weights(program: ExportedProgram) -> dict[str, Tensor]:
    """Parameters and buffers, those outside of the state_dict too."""
    return {name: x for name, x in (program.state_dict | program.constants).items() if isinstance(x, Tensor)}


def _user_inputs(program: ExportedProgram) -> list[tuple[str, Any]]:
    placeholders = {node.name: node.meta["val"] for node in program.graph.find_nodes(op="placeholder")}
    return [(str(name), placeholders[str(name)]) for name in program.graph_signature.user_inputs]


def _input(name: str, value: Any) -> dict[str, Any]:
    """A size stands as a number, a symbol, or a multiple of one: "s0", "4*s0"."""
    sizes = [size if isinstance(size, int) else size.node.expr for size in value.shape]
    guards = [guard.expr for guard in value.fake_mode.shape_env.guards]
    # Equal sizes, and multiples of one another, are one symbol in the manifest.
    limits = [x for x in guards if not (isinstance(x, sympy.Eq) and _is_multiple(x.lhs) and _is_multiple(x.rhs))]
    limits += [size for size in sizes if not (isinstance(size, int) or _is_multiple(size))]
    if limits:
        found = ", ".join(map(str, limits))
        raise ValueError(f"{name}: got a graph that holds for {found}, expected one for every size from 1")
    shape = [size if isinstance(size, int) else str(size) for size in sizes]
    return {"name": name, "dtype": str(value.dtype), "shape": shape}


def _is_multiple(size: Any) -> bool:
    """Whether it is a symbol, or a positive whole number of times one."""
    times, symbol = size.as_coeff_Mul()
    return bool(symbol.is_symbol and times.is_Integer and times > 0)
