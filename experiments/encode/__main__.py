"""The main job: encode a photograph, eagerly and compiled, and say whether it is one graph, right, and how fast.

Prints how the image is cut and a table, and writes a JSON file and a figure.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

import torch
from matplotlib.cbook import get_sample_data
from torch import Tensor
from vit_encoder import CompilationConfig, whole_graph
from vit_encoder.compilation import GraphReport
from vit_encoder.compilation.config import DynamicShapes

from experiments.common import cli, comparison, encoders
from experiments.common.comparison import ALLOWED_EPS, compare, first_line
from experiments.common.environment import environment
from experiments.common.measure import MAX_ROUNDS, MIN_ROUNDS, ROUND_SECONDS, Call, empty_caches, peak_memory, spread
from experiments.encode.figure import draw
from experiments.encode.report import print_result, print_task
from experiments.encode.result import Graphs, Job, Result, Row
from experiments.encode.subject import Subject, prepare

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
        _check_writable(options.out)
        device = _usable_device(options.device)
        path = options.image or Path(get_sample_data("grace_hopper.jpg", asfileobj=False))
        subject = prepare(options, device, path)
    except (OSError, TypeError, ValueError) as error:
        parser.error(_shortened(str(error)))
    print_task(console, subject.task)
    result, features = _measure(options, subject, start, load)
    print_result(console, result)
    for written in _write(options.out, result, subject, features):
        console.print(f"wrote {written}")
    return int(bool(result.problems))


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("python -m experiments.encode", __doc__, examples=EXAMPLES, statuses=STATUSES)
    encoders.add_options(parser, lower_on_cpu=True)
    parser.add_argument("--image", type=Path, help="image file (default: matplotlib's sample photograph)")
    parser.add_argument("--layers", type=cli.positive, help="use only the first layers (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--dtype", choices=encoders.DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
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


def _measure(options: argparse.Namespace, subject: Subject, start: float, load: float) -> tuple[Result, Tensor | None]:
    """Compute everything, and return the result and the features to show, where there are right ones."""
    compilation = CompilationConfig(
        compile_mm_encoder=True, backend=options.backend, dynamic_shapes=options.dynamic_shapes
    )
    with torch.inference_mode(), peak_memory(torch.device("cpu")) as memory:
        expected = subject.reference()
        with empty_caches():
            sweep = subject.sweep(compilation)
        known = {"compiled": sweep.problem} if sweep.problem else {}
        # The sweep may have compiled the same encoder. For versions of Dynamo that count a class's graphs, and not an
        # instance's, the next one would be a recompilation; and the first call's time would not be that of compiling.
        with empty_caches():
            rows, graphs = _compare(subject, _calls(subject, compilation), expected, options.repeats, known)
    result = Result(
        **vars(subject.task),
        environment=environment(),
        compilation={"backend": options.backend, "dynamic_shapes": options.dynamic_shapes},
        allowed_eps=ALLOWED_EPS,
        rows=[_row(row, subject.parts) for row in rows],
        graphs=graphs,
        sweep=sweep,
        job=Job(time.perf_counter() - start, memory.nbytes, load),
    )
    return result, next((row.features for row in rows if row.problem is None), None)


def _compare(
    subject: Subject, calls: dict[str, Call], expected: Tensor, rounds: int | None, known: dict[str, str]
) -> tuple[list[comparison.Row], Graphs]:
    baseline = "transformers" if "transformers" in calls else "eager"
    rows: list[comparison.Row] = []
    report, problem = GraphReport(), None
    try:
        with whole_graph() as report:
            rows = compare(
                calls, expected, baseline=baseline, device=subject.device, rounds=rounds, known_problems=known
            )
    except AssertionError as error:
        problem = first_line(error)
    return sorted(rows, key=lambda row: row.name != "eager"), Graphs(**vars(report), problem=problem)


def _calls(subject: Subject, compilation: CompilationConfig) -> dict[str, Call]:
    """Return the forms that are compared, with the same weights in the same memory, in the order of their first calls.

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


def _row(row: comparison.Row, parts: int) -> Row:
    seconds = row.timing.seconds
    return Row(
        row.name,
        row.problem,
        # JSON has no NaN; the problem says it.
        row.error if row.error and math.isfinite(row.error.maximum) else None,
        row.first_call_seconds if row.problem is None else None,
        spread([second / parts for second in seconds]) if seconds else None,
        row.timing.peak.nbytes,
    )


def _write(folder: Path, result: Result, subject: Subject, features: Tensor | None) -> list[Path]:
    layers = result.encoder.sizes["num_hidden_layers"]
    stem = f"compile_encoder-{result.encoder.config}-{layers}-{subject.device.type}-{result.dtype}"
    data, figure = folder / f"{stem}.json", folder / f"{stem}.png"
    cli.write_json(data, result.described())
    draw(result, subject.inputs[0], features, figure)
    return [data, figure]


if __name__ == "__main__":
    sys.exit(main())
