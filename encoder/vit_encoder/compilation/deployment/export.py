"""A compiled module as a folder that another process loads without tracing or compiling."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
import torch.fx.experimental._config as fx_config
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram

from vit_encoder.compilation.cache import op_packages, package_code
from vit_encoder.compilation.config import CompilationConfig
from vit_encoder.compilation.decorator import argument_names
from vit_encoder.compilation.deployment.load import laid_out
from vit_encoder.compilation.deployment.manifest import (
    FORMAT,
    GRAPH,
    MANIFEST,
    WEIGHTS,
    check_no_autocast,
    check_plain,
    checksum,
    described,
    machine,
    plain,
)
from vit_encoder.compilation.thread_state import surroundings
from vit_encoder.compilation.workarounds import workarounds


@torch.no_grad()
def export(module: nn.Module, args: Sequence[Tensor], folder: str | os.PathLike[str]) -> Path:
    """Compile a module with AOTInductor into a new folder, for `load` in another process.

    The folder holds graph.pt2 (without weights), weights.safetensors and manifest.json. It is one graph for every size
    of the dynamic dimensions that `support_torch_compile` was told of, without gradients; parameters and buffers are
    arguments of it, whatever their shape. Nested compile regions are inlined, since AOTInductor of torch 2.13 has no
    calls between graphs: many equal layers take longer to export than to compile. Inductor's options are those of the
    module's `compilation_config`.
    Source: PyTorch, `torch._inductor.aoti_compile_and_package`.

    Args:
        module: of a class decorated with `support_torch_compile`, with one tensor as its result, in the dtype and on
            the device that it will run with, and in eval mode where that makes a difference.
        args: example arguments for the first arguments of forward; dynamic dimensions have any size from 1.
        folder: must not exist, and appears when everything in it is complete; `~` is the home.

    Returns:
        The folder.

    Raises:
        FileExistsError: `folder` exists.
        TypeError: a class that is not decorated, too many arguments, an argument or result that is no tensor, or a
            weight or argument that is no plain dense tensor.
        ValueError: the graph does not hold for every size, writes to its arguments or buffers, or calls custom ops of
            which no package has the name; weights that share memory, lie on another device than the arguments or have
            no values; a tensor that requires a gradient and is no weight; train mode in which another graph results; a
            forward context with tensors; autocast.
    """
    folder = Path(os.path.expanduser(folder))
    if os.path.lexists(folder):
        raise FileExistsError(f"folder: got {folder}, expected one that does not exist")
    names = _check_arguments(module, args)
    weights = _weights(module, args[0].device)
    with fx_config.patch(backed_size_oblivious=True), warnings.catch_warnings():  # type: ignore[attr-defined]
        # torch 2.13 against itself.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        program = _program(module, names, weights, args)
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            # Inside of it: a temporary folder itself is closed to other users.
            complete = scratch / folder.name
            complete.mkdir()
            _write(complete, module, names, weights, program, args[0].device)
            complete.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _write(
    folder: Path,
    module: nn.Module,
    names: Sequence[str],
    weights: dict[str, Tensor],
    program: ExportedProgram,
    device: torch.device,
) -> None:
    packages = op_packages(program.graph_module)
    if (code := package_code(packages)) is None:
        raise ValueError(f"module: got ops of {', '.join(packages)}, expected those of packages of these names")
    inputs = _inputs(names, program)
    _compile(program, module, folder / GRAPH)
    # Which can narrow the sizes too.
    _inputs(names, program)
    save_file(weights, folder / WEIGHTS)
    manifest = {
        "format": FORMAT,
        "module": type(module).__name__,
        "configuration": plain(getattr(module, "config", None)),
        "inputs": inputs,
        "weights": {name: described(x) for name, x in weights.items()},
        "torch": torch.__version__,
        "machine": machine(device),
        "ops": {"packages": packages, "code": code},
        "graph_sha256": checksum(folder / GRAPH),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for name in (GRAPH, WEIGHTS):
        # Their writers close them to other users, whatever the umask says.
        (folder / name).chmod((folder / MANIFEST).stat().st_mode)


def _check_arguments(module: nn.Module, args: Sequence[Tensor]) -> list[str]:
    """The names of the arguments that are given, all of them on one device."""
    if isinstance(args, Tensor) or not args or not all(isinstance(x, Tensor) for x in args):
        found = "one tensor" if isinstance(args, Tensor) else ", ".join(type(x).__name__ for x in args) or "no tensors"
        raise TypeError(f"args: got {found}, expected one or more tensors in a sequence")
    if not hasattr(type(module), "_compile_settings"):
        raise TypeError(f"module: got {type(module).__name__}, expected a class decorated with support_torch_compile")
    names = argument_names(type(module))
    if len(args) > len(names):
        raise TypeError(f"args: got {len(args)}, expected at most {len(names)}: {', '.join(names)}")
    for name, x in zip(names, args, strict=False):
        check_plain(name, x)
        if x.device != args[0].device or x.is_meta:
            raise ValueError(f"{name}: got device {x.device}, expected {args[0].device}, and values")
    check_no_autocast(args[0].device)
    if (context := surroundings.context) is not None and context.attention_metadata:
        raise ValueError(
            f"set_forward_context: got {', '.join(context.attention_metadata)}, expected no tensors: the graph would "
            "keep these; give them in args"
        )
    return names[: len(args)]


def _weights(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Parameters and buffers, those outside of the state_dict too, as the graph reads them; ordered by name.

    Raises:
        TypeError: one is no plain dense tensor.
        ValueError: one lies on another device, or two share memory: given other values, they would be two.
    """
    parameters = module.named_parameters(remove_duplicate=False)
    weights = dict(sorted([*parameters, *module.named_buffers(remove_duplicate=False)]))
    for name, x in weights.items():
        check_plain(f"module: {name}", x)
        if x.device != device:
            raise ValueError(f"module: got {name} on {x.device}, expected {device} as the arguments are")
    spans = sorted((*_span(x), name) for name, x in weights.items() if x.numel())
    for (_, end, first), (start, _, second) in itertools.combinations(spans, 2):
        if start < end and _share_memory(weights[first], weights[second]):
            raise ValueError(f"module: got {first} and {second} in the same memory, expected weights of their own")
    return {name: laid_out(x) for name, x in weights.items()}


def _span(x: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize


def _share_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors whose spans overlap have bytes in common: interleaved views have none."""
    starts, ends = zip(_span(first), _span(second), strict=True)
    used = torch.zeros(max(ends) - min(starts), dtype=torch.bool, device="cpu")
    one, other = (
        used.as_strided(
            (*x.shape, x.itemsize), (*(x.itemsize * stride for stride in x.stride()), 1), x.data_ptr() - min(starts)
        )
        for x in (first, second)
    )
    one.fill_(True)
    return bool(other.any())


class _Pure(nn.Module):
    """A module as a function of its weights: Inductor folds weights that a graph holds, not those that it is given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # A module in its place would be registered, and its weights with it.
        self.function = functools.partial(torch.func.functional_call, module)

    def forward(self, weights: dict[str, Tensor], args: tuple[Tensor, ...]) -> Any:
        """What the module's forward returns, of any shapes."""
        return self.function(weights, args)


def _program(
    module: nn.Module, names: Sequence[str], weights: dict[str, Tensor], args: Sequence[Tensor]
) -> ExportedProgram:
    program = _traced(module, names, weights, args)
    if training := [part for part in module.modules() if part.training]:
        for part in training:
            part.training = False
        try:
            evaluated = _traced(module, names, weights, args)
        finally:
            for part in training:
                part.training = True
        if evaluated.graph_module.code != program.graph_module.code:
            raise ValueError("module: got train mode, which computes something else here, expected eval mode")
    if kept := [name for name, x in program.constants.items() if isinstance(x, Tensor) and x.requires_grad]:
        # Not registered, or computed from weights before (as `parametrize.cached` does).
        raise ValueError(f"module: got {', '.join(kept)} that require gradients, expected these of its parameters")
    outputs = program.graph.output_node().args[0]
    if not (program.call_spec.out_spec.is_leaf() and isinstance(getattr(outputs[0], "meta", {}).get("val"), Tensor)):
        raise TypeError(f"module: got a result of {program.call_spec.out_spec}, expected one tensor")
    if any(isinstance(node.target, OpOverload) and node.target._schema.is_mutable for node in program.graph.nodes):
        program = program.run_decompositions({})
    if written := program.graph_signature.user_inputs_to_mutate.values():
        known = dict(zip(program.graph_signature.user_inputs, [*weights, *names], strict=True))
        raise ValueError(f"module: got a forward that writes to {', '.join(known[name] for name in written)}")
    return program


def _traced(
    module: nn.Module, names: Sequence[str], weights: dict[str, Tensor], args: Sequence[Tensor]
) -> ExportedProgram:
    settings = type(module)._compile_settings  # type: ignore[attr-defined]
    dynamic: list[dict[int, Any]] = []
    for name, x in zip(names, args, strict=True):
        dims = {*settings.dims.get(name, ()), *settings.unbacked.get(name, ())}
        if beyond := [dim for dim in sorted(dims) if not -x.dim() <= dim < x.dim()]:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected dimensions {', '.join(map(str, beyond))}")
        dynamic.append(dict.fromkeys((dim % x.dim() for dim in dims), Dim.DYNAMIC))
    example = (weights, tuple(map(laid_out, args)))
    return torch.export.export(
        _Pure(module), example, dynamic_shapes=(dict.fromkeys(weights), tuple(dynamic)), strict=False
    )


def _compile(program: ExportedProgram, module: nn.Module, path: Path) -> None:
    config = getattr(module, "compilation_config", None) or CompilationConfig()
    # Not around the tracing, which waits for Dynamo's lock: who compiles takes that one first.
    with workarounds():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=config.options())


def _inputs(names: Sequence[str], program: ExportedProgram) -> list[dict[str, Any]]:
    placeholders = {node.name: node.meta["val"] for node in program.graph.find_nodes(op="placeholder")}
    given = program.graph_signature.user_inputs[-len(names) :]
    return [_input(name, placeholders[str(each)]) for name, each in zip(names, given, strict=True)]


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
