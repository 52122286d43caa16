"""Would rotating the queries inside the attention kernel pay? Compile both for GPUs that are not there and compare.

The variant is the attention kernel's own source with a rotation after each load of q. Rotating k there too would do
it once a block of queries, ten times for a tile of 577 tokens, so it is not tried. Nothing is run or timed.
"""

import argparse
import importlib.machinery
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from vit_kernels._triton import varlen_attention

from experiments.environment import environment

HEAD_DIMS = (64, 80, 88, 128)
RESULTS = Path(__file__).parent / "results" / "rotate_queries.json"

_ROTATE = '''
@triton.jit
def _rotate(q, cos_ptr, sin_ptr, rows, HALF: tl.constexpr):
    """Pairs (2j, 2j + 1) of the columns of q, turned by the tables' rows."""
    turned = ()
    for block in tl.static_range(len(q)):
        x = q[block]
        j = block * q[0].shape[1] // 2 + tl.arange(0, x.shape[1] // 2)[None, :]
        cos = tl.load(cos_ptr + rows[:, None] * HALF + j, mask=j < HALF, other=0.0)
        sin = tl.load(sin_ptr + rows[:, None] * HALF + j, mask=j < HALF, other=0.0)
        a, b = tl.split(tl.reshape(x.to(tl.float32), (x.shape[0], x.shape[1] // 2, 2)))
        pairs = tl.join(a * cos - b * sin, a * sin + b * cos)
        turned += (tl.reshape(pairs, x.shape).to(x.dtype),)
    return turned


@triton.jit
def _attend('''
# What the source has, what the variant has instead, and how often.
_CHANGES = (
    ("\n@triton.jit\ndef _attend(", _ROTATE, 1),
    ("    v_ptr,\n    out_ptr,\n", "    v_ptr,\n    cos_ptr,\n    sin_ptr,\n    positions,\n    out_ptr,\n", 2),
    ("q_ptr, k_ptr, v_ptr, out_ptr,", "q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, positions, out_ptr,", 2),
    (
        "    acc = zero_head(",
        "    q = _rotate(q, cos_ptr, sin_ptr, m % positions, HEAD_DIM // 2)\n    acc = zero_head(",
        1,
    ),
    ("    scale: float,\n    *,\n", "    scale: float,\n    cos: torch.Tensor,\n    sin: torch.Tensor,\n    *,\n", 1),
    (
        "            v,\n            out,\n",
        "            v,\n            cos,\n            sin,\n            cos.shape[0],\n            out,\n",
        1,
    ),
)


def rotating_variant(folder: Path) -> ModuleType:
    """The attention kernel that rotates its queries, as a module whose source lies in `folder`.

    Its launch takes cos and sin [positions, head_dim // 2], float32, after the scale; each sequence starts at
    position 0.

    Raises:
        ValueError: the kernel's source is no longer what the changes expect.
    """
    source = Path(varlen_attention.__file__).read_text(encoding="utf-8")
    for old, new, times in _CHANGES:
        if source.count(old) != times:
            raise ValueError(f"source of varlen_attention: got {source.count(old)} x {old!r}, expected {times}")
        source = source.replace(old, new)
    path = folder / "rotating_attention.py"
    path.write_text(source, encoding="utf-8")
    loader = importlib.machinery.SourceFileLoader("rotating_attention", str(path))
    module = ModuleType(loader.name)
    module.__file__ = str(path)
    loader.exec_module(module)
    return module


def compare(target: str, head_dim: int, variant: ModuleType) -> dict[str, Any]:
    """Figures of the kernel as it is and of the variant, in bfloat16, by the default configuration."""
    q, k, v = torch.empty(1154, 3, 16, head_dim, dtype=torch.bfloat16, device="meta").unbind(1)
    cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta")
    table = torch.empty(577, head_dim // 2, device="meta")
    inputs = (q, k, v, cu_seqlens, cu_seqlens, head_dim**-0.5)
    return {
        "target": target,
        "head_dim": head_dim,
        "plain": _figures(target, varlen_attention.launch, *inputs),
        "rotating": _figures(target, variant.launch, *inputs, table, table),
    }


def _figures(target: str, launch: Callable[..., Any], *arguments: Any) -> dict[str, int]:
    from vit_kernels.inspection import compile_launch

    (report,) = compile_launch(target, launch, *arguments)
    assert report.main_loop is not None
    return {
        "registers": report.registers,
        "spilled": report.spill_store_bytes + report.spill_load_bytes,
        "ctas": report.ctas_per_sm,
        "instructions": sum(report.instructions.opcodes.values()),
        "loop": sum(report.main_loop.opcodes.values()),
    }


def print_table(console: Console, results: list[dict[str, Any]]) -> None:
    """Both kernels side by side; `loop` counts the instructions of the main loop, `ctas` are those of a processor."""
    table = Table("target", "head_dim", title="plain / rotating its queries")
    for name in results[0]["plain"]:
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        pairs = [f"{result['plain'][name]} / {result['rotating'][name]}" for name in result["plain"]]
        table.add_row(result["target"], str(result["head_dim"]), *pairs)
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, action="append", help=f"default: {', '.join(map(str, HEAD_DIMS))}")
    parser.add_argument("--target", action="append", help="default: all of them")
    parser.add_argument("--out", type=Path, help=f"JSON file to write, for instance {RESULTS.name}")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    from vit_kernels.inspection import TARGETS

    if unknown := sorted(set(options.target or []) - set(TARGETS)):
        parser.error(f"--target: got {', '.join(unknown)}, expected some of {', '.join(TARGETS)}")
    results, console = [], Console()
    with tempfile.TemporaryDirectory() as folder, console.status("compiling"):
        variant = rotating_variant(Path(folder))
        for target in options.target or TARGETS:
            results += [compare(target, head_dim, variant) for head_dim in options.head_dim or HEAD_DIMS]
    print_table(console, results)
    if options.out:
        content = {"environment": environment(), "results": results}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
