"""Measure what compiling a vision encoder costs: cold, warm, and from an export, beside its peers.

Each form runs in processes of its own, with one thread and empty caches (except the warm one). CPU-seconds are those of
the process and its children, from after the imports of torch and of this project to the first result. A form whose
features are not those of the eager encoder has no figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from experiments.common import cli
from experiments.compile_cost import calls
from experiments.compile_cost.figure import draw
from experiments.compile_cost.row import FIGURES, Failure, Goal, Report, Row, Sample
from experiments.compile_cost.subjects import HEAD_DIMS, SUBJECTS

SECONDS_OF_A_PROCESS = 1800

# The name of a row, the form that experiments.compile_cost.process measures for it, and what that is.
ROWS = (
    ("plain", "plain", "torch.compile of the same module, its layers inlined, every size unbacked"),
    ("transformers", "transformers", "torch.compile of transformers' encoder, dynamic sizes"),
    ("ours, cold", "decorated", "support_torch_compile, nothing cached"),
    ("ours, warm", "decorated", "a new process with the same cache_dir"),
    ("export", "exported", "AOTInductor package and weights, and its first call"),
    ("load", "loaded", "a new process with that package, and its first call"),
)
GOALS = {
    "llama4": (
        Goal("ours, cold", "plain", 0.55),
        Goal("ours, cold", "transformers", 0.55),
        Goal("ours, warm", "plain", 0.15),
        Goal("load", None, 5.0),
    ),
    "qwen2_5_vl": (Goal("ours, cold", "plain", 0.5),),
    "qwen3_vl": (Goal("ours, cold", "plain", 0.45),),
}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the report, and return the exit status: 1 where a form was wrong or failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--calls" in arguments:
        return calls.main([argument for argument in arguments if argument != "--calls"])
    parser = cli.parser("python -m experiments.compile_cost", __doc__)
    parser.add_argument("--calls", action="store_true", help="measure what a call costs instead; see --calls --help")
    parser.add_argument("--model", choices=SUBJECTS, default="llama4", help="the encoder (default: %(default)s)")
    parser.add_argument("--layers", type=cli.positive, default=34, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--heads", type=cli.positive, default=2, metavar="N", help="default: 2, so width 176, 160 or 144"
    )
    parser.add_argument("--rounds", type=cli.positive, default=1, metavar="N", help="default: 1, about 4 minutes")
    cli.add_out(parser, "JSON and PNG")
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    samples = measure(options.model, options.layers, options.heads, options.rounds)
    rows = [Row(name, what, samples[name]) for name, _, what in ROWS]
    report = Report(
        model=options.model,
        layers=options.layers,
        width=options.heads * HEAD_DIMS[options.model],
        rounds=options.rounds,
        load_before=load,
        rows=rows,
        goals=[reached(goal, rows) for goal in GOALS[options.model]],
    )
    path = options.out / f"compile_ledger-{report.model}-{report.width}.json"
    cli.write_json(path, cli.result("compile_ledger", **report.described()))
    draw(report, path.with_suffix(".png"))
    _print(cli.console(), report)
    print(f"wrote {path} and {path.with_suffix('.png').name}")
    return int(any(row.problem for row in rows))


def measure(model: str, layers: int, heads: int, rounds: int) -> dict[str, list[Sample | Failure]]:
    """Run the processes of all rows `rounds` times in turn, and return what they measured by the row's name."""
    samples: dict[str, list[Sample | Failure]] = defaultdict(list)
    size = ["--model", model, "--layers", str(layers), "--heads", str(heads)]
    with tqdm(total=2 + rounds * len(ROWS), desc="processes", unit="process", disable=None) as progress:
        # Inductor compiles the headers that its code includes once a machine: not part of any form.
        for form in ("decorated", "exported"):
            progress.set_postfix_str("headers")
            with tempfile.TemporaryDirectory() as folder:
                _run(form, ["--model", "llama4", "--layers", "1", "--heads", "1"], Path(folder))
            progress.update()
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                for name, form, _ in ROWS:
                    progress.set_postfix_str(name)
                    samples[name].append(_run(form, size, Path(folder)))
                    progress.update()
    return samples


def _run(form: str, size: list[str], folder: Path) -> Sample | Failure:
    """Run one process and return what it measured, or why it has no figures."""
    command = [sys.executable, "-m", "experiments.compile_cost.process", form, *size]
    command += ["--cache", str(folder / "cache"), "--artefact", str(folder / "artefact"), "--started"]
    with tempfile.TemporaryDirectory() as inductor:
        variables = {"TORCHINDUCTOR_CACHE_DIR": inductor, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                [*command, str(time.time())],
                env={**os.environ, **variables},
                cwd=cli.ROOT,
                capture_output=True,
                text=True,
                check=False,
                timeout=SECONDS_OF_A_PROCESS,
            )
        except subprocess.TimeoutExpired:
            return Failure(f"no end within {SECONDS_OF_A_PROCESS} s")
    if done.returncode:
        return Failure((done.stderr.strip().splitlines() or ["no message"])[-1])
    sample = Sample(**json.loads(done.stdout.splitlines()[-1]))
    if sample.deviation <= sample.allowed:
        return sample
    return Failure(f"features differ by {sample.deviation:.2g} from the eager encoder's")


def reached(goal: Goal, rows: Sequence[Row]) -> Goal:
    """Return the goal with what the rows reached of it."""
    by_name = {row.name: row for row in rows}
    row, of = by_name[goal.row], by_name[goal.of or goal.row]
    if row.problem or of.problem:
        return goal
    ratio = row.median("cpu_seconds") / of.median("cpu_seconds")
    return replace(goal, reached=ratio if goal.of else row.median("seconds_with_imports"))


def _print(console: Console, report: Report) -> None:
    table = Table(title=f"{report.title}, to the first result; median of {report.rounds}", title_justify="left")
    for column in ("form", "CPU-seconds", "seconds", "with imports", "graphs", "what it is"):
        table.add_column(column, justify="left" if column in ("form", "what it is") else "right")
    for row in report.rows:
        table.add_row(row.name, *_cells(row), row.problem or row.what)
    console.print(table)
    for goal in report.goals:
        console.print(str(goal))
    console.print(f"graphs: over four batches of different sizes; load before: {report.load_before:.2g}")


def _cells(row: Row) -> list[str]:
    if row.problem:
        return ["-"] * 4
    *times, graphs = map(row.median, FIGURES)
    return [*(f"{time:.1f}" for time in times), "-" if row.name in ("export", "load") else f"{graphs:g}"]


if __name__ == "__main__":
    sys.exit(main())
