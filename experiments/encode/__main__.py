"""A photograph through a vision encoder, eager and compiled: is it one graph, is it right, how fast is it.

The main job, for Llama 4 or Qwen2.5-VL. Prints how the image is cut and a table, and writes a JSON file and a figure.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import torch
from matplotlib.cbook import get_sample_data
from torch import Tensor
from vit_encoder import (
    CompilationConfig,
    whole_graph,
)
from vit_encoder.compilation import GraphReport
from vit_encoder.compilation.config import DynamicShapes

from experiments.common import cli
from experiments.common.comparison import ALLOWED_EPS, Row, compare, first_line
from experiments.common.measure import MAX_ROUNDS, MIN_ROUNDS, ROUND_SECONDS, Call, empty_caches, peak_memory, summary
from experiments.common.weights import SEED
from experiments.encode import llama4, qwen2_5_vl
from experiments.encode.figure import draw
from experiments.encode.report import print_result, print_subject
from experiments.encode.subject import Subject

# The first of each is the default; the options are those that make sense for one encoder only.
CONFIGS = {"llama4": list(llama4.CONFIGS), "qwen2_5_vl": list(qwen2_5_vl.CONFIGS)}
FOREIGN_OPTIONS = {"llama4": ("max_pixels",), "qwen2_5_vl": ("max_tiles", "tile_counts")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Names in torch.cpu.get_capabilities(): without one of them the products are emulated, at a quarter of float32's speed.
FAST_WITH = {"bfloat16": ("amx_bf16", "avx512_bf16"), "float16": ("amx_fp16", "avx512_fp16")}

EXAMPLES = """  %(prog)s
      the sample photograph as one tile through 34 layers of random weights
  %(prog)s --layers 2 --max-tiles 16
      a quick look at all tiles of the photograph
  %(prog)s --image cat.png --checkpoint Llama-4-Scout-17B-16E-Instruct
  %(prog)s --device cuda --repeats 50
  %(prog)s --model qwen2_5_vl
      the photograph as patches through Qwen2.5-VL's encoder
  %(prog)s --config tiny --out /tmp/tiny
      seconds instead of minutes
"""
STATUSES = {
    0: "every result is right and the encoder is one graph",
    1: "a result is wrong (it is not timed), or the encoder is not one graph",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the job and return its exit status."""
    start, load = time.perf_counter(), os.getloadavg()[0]
    parser = _parser()
    options = parser.parse_args(arguments)
    console = cli.console()
    try:
        subject = _prepare(options)
    except (OSError, TypeError, ValueError) as error:
        parser.error(_shortened(str(error)))
    print_subject(console, subject.description)
    with torch.inference_mode(), peak_memory(torch.device("cpu")) as job_memory:
        result, features = _measure(options, subject)
    seconds = time.perf_counter() - start
    result |= {"job": {"seconds": seconds, "peak_bytes": job_memory.nbytes, "load_before": load}}
    print_result(console, result)
    for path in _write(options.out, result, subject, features):
        console.print(f"wrote {path}")
    return 0 if result["right"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("python -m experiments.encode", __doc__, examples=EXAMPLES, statuses=STATUSES)
    parser.add_argument("--model", choices=CONFIGS, default="llama4", help="which encoder (default: llama4)")
    parser.add_argument("--image", type=Path, help="image file (default: matplotlib's sample photograph)")
    parser.add_argument(
        "--max-tiles",
        type=cli.positive,
        help="most tiles of the canvas (default: on a GPU the checkpoint's, without one 16; on a CPU 1)",
    )
    parser.add_argument(
        "--max-pixels",
        type=cli.positive,
        help="most pixels of the resized image, for qwen2_5_vl (default: on a GPU the checkpoint's, without one 1280 "
        "features'; on a CPU 256 features')",
    )
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint", type=Path, help=f"folder with config.json and safetensors (default: random, seed {SEED})"
    )
    weights.add_argument(
        "--config",
        choices=list(dict.fromkeys(name for names in CONFIGS.values() for name in names)),
        help="sizes of random weights (default: scout, for qwen2_5_vl 7b)",
    )
    parser.add_argument("--layers", type=cli.positive, help="use only the first layers (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--backend", choices=("inductor", "aot_eager", "eager"), default="inductor")
    parser.add_argument("--dynamic-shapes", choices=get_args(DynamicShapes), default="unbacked")
    parser.add_argument(
        "--tile-counts", type=cli.positive, nargs="+", metavar="N", help="for llama4 (default: 1 17 2 5 33)"
    )
    parser.add_argument(
        "--repeats",
        type=cli.positive,
        help=f"timed rounds (default: {MIN_ROUNDS} to {MAX_ROUNDS}, as many as start within {ROUND_SECONDS:.0f} s)",
    )
    cli.add_out(parser, "JSON and PNG")
    return parser


def _shortened(message: str) -> str:
    # A checkpoint's error lists every missing tensor, several hundred for a folder of something else.
    lines = message.splitlines()
    return "\n".join([*lines[:8], f"  ... and {len(lines) - 8} lines more"] if len(lines) > 9 else lines)


def _prepare(options: argparse.Namespace) -> Subject:
    _check_writable(options.out)
    _check_options(options)
    device = _usable_device(options.device)
    dtype_name = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    path = options.image or Path(get_sample_data("grace_hopper.jpg", asfileobj=False))
    prepare = {"llama4": llama4.prepare, "qwen2_5_vl": qwen2_5_vl.prepare}[options.model]
    subject = prepare(options, DTYPES[dtype_name], device, path)
    slow_dtype = device.type == "cpu" and not _is_fast(dtype_name)
    around = {"model": options.model, "dtype": dtype_name, "device": str(device), "slow_dtype": slow_dtype}
    return replace(subject, description=subject.description | around)


def _check_options(options: argparse.Namespace) -> None:
    """Fill in the default of --config, and refuse options that would be ignored."""
    options.config = options.config or CONFIGS[options.model][0]
    if options.config not in CONFIGS[options.model]:
        raise ValueError(f"--config: got {options.config!r}, expected one of {', '.join(CONFIGS[options.model])}")
    for name in FOREIGN_OPTIONS[options.model]:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: not for --model {options.model}")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"--out: expected a folder to write into, got {str(folder)!r}: {error.strerror}") from error


def _usable_device(name: str) -> torch.device:
    expected = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name not in (*expected, *(["cuda"] if torch.cuda.is_available() else [])):
        raise ValueError(f"--device: got {name!r}, but PyTorch {torch.__version__} sees only {', '.join(expected)}")
    return torch.device(name)


def _is_fast(dtype_name: str) -> bool:
    capabilities = torch.cpu.get_capabilities()
    return dtype_name == "float32" or any(capabilities.get(name) for name in FAST_WITH[dtype_name])


def _measure(options: argparse.Namespace, subject: Subject) -> tuple[dict[str, Any], Tensor | None]:
    """Everything that is computed, as the result without the job's own cost; and features to show."""
    compilation = CompilationConfig(
        compile_mm_encoder=True, backend=options.backend, dynamic_shapes=options.dynamic_shapes
    )
    expected = subject.reference()
    with empty_caches():
        sweep = subject.sweep(compilation)
    known = {"compiled": sweep.problem} if sweep.problem else {}
    # The sweep may have compiled the same encoder. For versions of Dynamo that count a class's graphs, and not an
    # instance's, the next one would be a recompilation; and the first call's time would not be that of compiling.
    with empty_caches():
        rows, graphs, problem = _compare(subject, compilation, expected, options.repeats, known)
    shown = next((row.features for row in rows if row.problem is None), None)
    swept, sizes = subject.swept
    content = {
        **subject.description,
        "compilation": {"backend": options.backend, "dynamic_shapes": options.dynamic_shapes},
        "allowed_eps": ALLOWED_EPS,
        "rows": [_describe_row(row, subject) for row in rows],
        "graphs": asdict(graphs) | {"problem": problem},
        swept: {swept: sizes} | asdict(sweep),
        "right": not any([problem, sweep.problem, *(row.problem for row in rows)]),
    }
    return cli.result("compile_encoder", **content), shown


def _compare(
    subject: Subject,
    compilation: CompilationConfig,
    expected: Tensor,
    rounds: int | None,
    known_problems: dict[str, str],
) -> tuple[list[Row], GraphReport, str | None]:
    calls = _calls(subject, compilation)
    baseline = "transformers" if "transformers" in calls else "eager"
    rows: list[Row] = []
    report = GraphReport()
    problem: str | None = None
    try:
        with whole_graph() as report:
            rows = compare(
                calls,
                expected,
                baseline=baseline,
                device=subject.device,
                rounds=rounds,
                known_problems=known_problems,
            )
            rows.sort(key=lambda row: row.name != "eager")
    except AssertionError as error:
        problem = first_line(error)
    return rows, report, problem


def _calls(subject: Subject, compilation: CompilationConfig) -> dict[str, Call]:
    """The forms that are compared, all with the same weights in the same memory, in the order of their first calls.

    The compiled one comes first, while the kernels that it shares with the eager one are not compiled either.
    """

    def own(config: CompilationConfig | None) -> Tensor:
        subject.model.compilation_config = config
        features: Tensor = subject.model(*subject.inputs)
        return features

    calls: dict[str, Call] = {"compiled": lambda: own(compilation), "eager": lambda: own(None)}
    if subject.peer is not None:
        calls["transformers"] = subject.peer
    return calls


def _describe_row(row: Row, subject: Subject) -> dict[str, Any]:
    seconds = row.timing.seconds
    return {
        "name": row.name,
        "problem": row.problem,
        # JSON has no NaN; the problem says it.
        "error": asdict(row.error) if row.error and math.isfinite(row.error.maximum) else None,
        "first_call_seconds": row.first_call_seconds if row.problem is None else None,
        f"seconds_per_{subject.part}": summary([s / subject.parts for s in seconds]) if seconds else None,
        "peak_bytes": row.timing.peak.nbytes,
    }


def _write(folder: Path, result: dict[str, Any], subject: Subject, features: Tensor | None) -> list[Path]:
    encoder = result["encoder"]
    stem = f"compile_encoder-{encoder['config']}-{encoder['num_hidden_layers']}-{subject.device.type}-{result['dtype']}"
    data, figure = folder / f"{stem}.json", folder / f"{stem}.png"
    cli.write_json(data, result)
    draw(result, subject.inputs[0], features, figure)
    return [data, figure]


if __name__ == "__main__":
    sys.exit(main())
