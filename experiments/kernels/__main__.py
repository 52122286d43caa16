"""Compile every kernel for five GPUs, none of which need be present, and report the code and the work it does.

Prints a table and writes a JSON file and a figure. Nothing is run on a GPU or timed: times are a model's predictions.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from vit_kernels.inspection.targets import TARGETS

from experiments.common import cli, roofline
from experiments.common.problem import HEADS, POSITIONS, TILES
from experiments.kernels.check import Report, read_report, regressions
from experiments.kernels.compile import KERNELS, Case, cases_of, compile_case, interpret_case, run_all
from experiments.kernels.figure import draw
from experiments.kernels.registry import DTYPES, HEAD_DIMS, OURS, Kernel, Problem, installed_peers, version_of
from experiments.kernels.row import Compiled, Figures, Row
from experiments.kernels.text import print_report

if TYPE_CHECKING:
    from vit_kernels.testing.counts import OperationCounts

COMMITTED = cli.COMMITTED / "kernel_report.json"

EXAMPLES = """  %(prog)s --defaults-only --dtype bfloat16 --head-dim 88
      a quick look (a minute)
  %(prog)s --kernel varlen_attention --target sm_90 --head-dim 88 --head-dim 80
  %(prog)s --out experiments/results
      everything, over the committed report: about 20 minutes on 2 cores, half that when Triton's cache has the kernels
  %(prog)s --kernel rotary_2d --out experiments/results
      makes the rows of one kernel anew; the others stay
  %(prog)s --check --defaults-only
      compares with the committed report, writes nothing
"""
STATUSES = {
    0: "every kernel compiles, and with --check no figure is worse than in the committed report",
    1: "a kernel does not compile, or a figure got worse",
    2: "bad arguments, or --check with another version of Triton than the committed report's",
}

WORKLOAD = f"{TILES} tiles of {POSITIONS} tokens, {HEADS} heads"
NOTES = (
    roofline.ASSUMPTIONS,
    "flash-attn's attention is compiled ahead of time, for NVIDIA only: no compiler here can make it again for these "
    "targets, so it is never among the peers. It pads head_dim 72 to 96 and 80 and 88 to 96.",
    "Loads and asynchronous copies are those of the main loop (of the whole kernel where there is none), stores those "
    "of the whole kernel; the number is bytes a lane. FLOPs and bytes: counted by the interpreter on one tile of 577 "
    "tokens. Requested bytes include what caches serve. MMA/dot: matrix FLOPs of the main loop's instructions over "
    "those of its dots: more than 1 when warps repeat each other's work.",
)


def main(arguments: list[str] | None = None) -> int:
    """Make the report and return its exit status."""
    start = time.perf_counter()
    parser = _parser()
    options = parser.parse_args(arguments)
    console = cli.console(200)
    try:
        committed = _comparable_report() if options.check else None
        earlier = None if options.check else _earlier_report(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    cases = _cases(options)
    if not cases:
        parser.error("no kernel is left by --kernel, --dtype, --head-dim and --target")
    rows = make_rows(cases, options.jobs)
    if committed:
        return _print_check(console, committed.rows, rows)
    seconds = round(time.perf_counter() - start)
    print_report(console, rows, NOTES)
    console.print(f"Workload of the predictions: {WORKLOAD}. {len(rows)} rows in {seconds} s.")
    for path in _write(options.out, [*rows, *_kept(earlier, rows, options.defaults_only)], seconds):
        console.print(f"wrote {path}")
    return 1 if any(row.error for row in rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("python -m experiments.kernels", __doc__, examples=EXAMPLES, statuses=STATUSES)
    names = [kernel.name for kernel in (*OURS, *installed_peers())]
    parser.add_argument("--kernel", choices=names, action="append", metavar="NAME", help=_choices(names))
    parser.add_argument("--dtype", choices=DTYPES, action="append", metavar="NAME", help=_choices(DTYPES))
    parser.add_argument(
        "--head-dim", type=int, choices=HEAD_DIMS, action="append", metavar="N", help=_choices(HEAD_DIMS)
    )
    parser.add_argument("--target", choices=TARGETS, action="append", metavar="NAME", help=_choices(TARGETS))
    parser.add_argument("--defaults-only", action="store_true", help="only what is launched where nothing is tuned")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="compare with the committed report instead of writing one")
    cli.add_out(parser, "JSON and PNG")
    return parser


def _choices(values: Iterable[object]) -> str:
    return f"may be repeated (default: all): {', '.join(map(str, values))}"


def _selected(options: argparse.Namespace) -> bool:
    return bool(options.kernel or options.dtype or options.head_dim or options.target or options.defaults_only)


def _kernels(options: argparse.Namespace) -> list[Kernel]:
    kernels = OURS if options.check else (*OURS, *installed_peers())
    return [kernel for kernel in kernels if not options.kernel or kernel.name in options.kernel]


def _cases(options: argparse.Namespace) -> list[Case]:
    return [
        case
        for kernel in _kernels(options)
        for case in cases_of(
            kernel,
            options.dtype or DTYPES,
            options.head_dim or HEAD_DIMS,
            options.target or [*TARGETS],
            defaults_only=options.defaults_only,
        )
    ]


def make_rows(cases: Sequence[Case], jobs: int) -> list[Row]:
    """Compile every case, interpret each that does different work once, and put the figures together."""
    different = {case.blocks(): case for case in cases}
    counts = run_all(interpret_case, [*different.values()], interpret=True, jobs=jobs, title="interpreting")
    by_blocks = {case.blocks(): counted for case, counted in counts.items()}
    compiled = run_all(compile_case, cases, interpret=False, jobs=jobs, title="compiling")
    return [_row(case, compiled[case], by_blocks[case.blocks()]) for case in cases]


def _row(case: Case, compiled: Compiled | str, counts: OperationCounts | None) -> Row:
    kernel = KERNELS[case.kernel]
    return Row(
        kernel=case.kernel,
        package=f"{kernel.package} {version_of(kernel.package)}",
        dtype=case.dtype,
        head_dim=case.head_dim,
        target=case.target,
        configuration=dict(case.configuration),
        default=case.default,
        error=compiled if isinstance(compiled, str) else None,
        figures=None if isinstance(compiled, str) else _figures(case, kernel, compiled, counts),
    )


def _figures(case: Case, kernel: Kernel, compiled: Compiled, counts: OperationCounts | None) -> Figures:
    """Return ratios that are counted on the interpreted problem, and the roofline model of the whole one."""
    if counts is None:
        return Figures(**vars(compiled))
    whole = Problem(case.head_dim, case.dtype)
    small = kernel.interpreted_problem(case.head_dim, case.dtype)
    requested = counts.bytes_loaded + counts.bytes_stored
    useful = kernel.useful_flops(small)
    times = kernel.useful_flops(whole) / useful if useful else 0
    issued = counts.dot_flops * times * compiled.products * (compiled.matrix_flops_over_dots or 1)
    return Figures(
        **vars(compiled),
        flops_issued_over_useful=round(counts.dot_flops / useful, 4) if useful else None,
        bytes_requested_over_compulsory=round(requested / kernel.compulsory_bytes(small), 4),
        roofline_us={
            name: [
                float(f"{1e6 * seconds:.4g}")
                for seconds in roofline.interval(
                    gpu,
                    kernel.factors or case.dtype,
                    matrix_flops=issued,
                    exponentials=counts.exp2 * times,
                    nbytes=kernel.compulsory_bytes(whole),
                )
            ]
            for name, gpu in roofline.GPUS.items()
            if gpu.target == case.target
        },
    )


def _comparable_report() -> Report:
    committed = read_report(COMMITTED)
    if committed.triton != (here := metadata.version("triton")):
        raise ValueError(
            f"--check: the committed report is of triton {committed.triton}, this is {here}: "
            "figures of different compilers are not compared"
        )
    return committed


def _earlier_report(options: argparse.Namespace) -> Report | None:
    """Read the report whose other rows are kept: of kernels that were not selected or are not installed here."""
    path = options.out / COMMITTED.name
    if not path.exists():
        return None
    earlier = read_report(path)
    if earlier.triton == metadata.version("triton"):
        return earlier
    if _selected(options):
        raise ValueError(f"{path} is of triton {earlier.triton}: give another --out, or select nothing")
    return None


def _kept(earlier: Report | None, rows: list[Row], defaults_only: bool) -> list[Row]:
    """Return the rows of the earlier report that were not to be made anew."""
    again = {(_group(row), default) for row in rows for default in ((True,) if defaults_only else (True, False))}
    return [row for row in earlier.rows if (_group(row), row.default) not in again] if earlier else []


def _group(row: Row) -> tuple[Any, ...]:
    return row.kernel, row.dtype, row.head_dim, row.target


def _print_check(console: Console, committed: list[Row], rows: list[Row]) -> int:
    worse = regressions(committed, rows)
    for line in worse:
        console.print(f"WORSE: {line}", soft_wrap=True)
    console.print(f"{len(rows)} rows compared with the committed report: {len(worse)} figures worse")
    return 1 if worse else 0


def _write(folder: Path, rows: list[Row], seconds: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    data, figure = folder / COMMITTED.name, folder / COMMITTED.with_suffix(".png").name
    rows = sorted(rows, key=lambda row: ([*KERNELS].index(row.kernel), row.dtype, row.head_dim))
    around = cli.result("kernel_report", seconds=seconds, workload=WORKLOAD, notes=NOTES, gpus=roofline.GPUS)
    head = json.dumps(cli.plain(around), indent=2, allow_nan=False)
    # One row a line, so that a difference shows the rows that changed.
    lines = ",\n".join(json.dumps(row.described(), allow_nan=False) for row in rows)
    data.write_text(f'{head[:-2]},\n  "rows": [\n{lines}\n]\n}}\n', encoding="utf-8")
    draw(rows, figure)
    return [data, figure]


if __name__ == "__main__":
    sys.exit(main())
