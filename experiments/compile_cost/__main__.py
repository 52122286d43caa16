"""What compiling a vision encoder costs: cold, warm, and from a deployable artefact, beside its peers.

Each form runs in processes of its own, with one thread, from empty caches (but for the warm ones); CPU-seconds are of
the process and its children, from after the imports of torch and of this project to the first result. A form whose
features are not those of the eager encoder has no figures.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm  # type: ignore[import-untyped]

from experiments.common import cli
from experiments.compile_cost import calls
from experiments.compile_cost.figure import draw
from experiments.compile_cost.subjects import HEAD_DIMS, SUBJECTS

SECONDS_OF_A_PROCESS = 1800

# (name, form of experiments.compile_cost.process, what it is)
ROWS = (
    ("plain", "plain", "torch.compile of the same module, its layers inlined, every size unbacked"),
    ("transformers", "transformers", "torch.compile of transformers' encoder, dynamic sizes"),
    ("ours, cold", "decorated", "support_torch_compile, nothing cached"),
    ("ours, warm", "decorated", "a new process with the same cache_dir"),
    ("export", "exported", "AOTInductor package and weights, and its first call"),
    ("load", "loaded", "a new process with that package, and its first call"),
)
# model -> (row, of another row's CPU-seconds or None for seconds with imports, at most)
GOALS: dict[str, tuple[tuple[str, str | None, float], ...]] = {
    "llama4": (
        ("ours, cold", "plain", 0.55),
        ("ours, cold", "transformers", 0.55),
        ("ours, warm", "plain", 0.15),
        ("load", None, 5.0),
    ),
    "qwen2_5_vl": (("ours, cold", "plain", 0.5),),
    "qwen3_vl": (("ours, cold", "plain", 0.45),),
}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write; the exit status is 1 where a form was wrong or failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--calls" in arguments:
        return calls.main([argument for argument in arguments if argument != "--calls"])
    parser = cli.parser("python -m experiments.compile_cost", __doc__)
    parser.add_argument("--calls", action="store_true", help="what each call costs instead; --calls --help says more")
    parser.add_argument("--model", choices=SUBJECTS, default="llama4", help="default: %(default)s")
    parser.add_argument("--layers", type=cli.positive, default=34, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--heads", type=cli.positive, default=2, metavar="N", help="default: 2, so width 176, 160 or 144"
    )
    parser.add_argument("--rounds", type=cli.positive, default=1, metavar="N", help="default: 1, about 4 minutes")
    cli.add_out(parser, "JSON and PNG")
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    samples = measure(options.model, options.layers, options.heads, options.rounds)
    rows = [_summary(name, what, samples[name]) for name, _, what in ROWS]
    result = cli.result(
        "compile_ledger",
        model=options.model,
        layers=options.layers,
        width=options.heads * HEAD_DIMS[options.model],
        rounds=options.rounds,
        load_before=load,
        rows=rows,
        goals=_goals(options.model, rows),
    )
    path = options.out / f"compile_ledger-{options.model}-{result['width']}.json"
    cli.write_json(path, result)
    draw(result, path.with_suffix(".png"))
    _print(cli.console(), result)
    print(f"wrote {path} and {path.with_suffix('.png').name}")
    return int(any(row["problem"] for row in rows))


def measure(model: str, layers: int, heads: int, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """What each row's processes printed, `rounds` times in turn."""
    samples: dict[str, list[dict[str, Any]]] = defaultdict(list)
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


def _run(form: str, size: list[str], folder: Path) -> dict[str, Any]:
    """One process: its JSON, with a `problem` where it failed or was wrong."""
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
            return {"problem": f"no end within {SECONDS_OF_A_PROCESS} s"}
    if done.returncode:
        return {"problem": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    right = seen["deviation"] <= seen["allowed"]
    return seen if right else seen | {"problem": f"features differ by {seen['deviation']:.2g} from the eager encoder's"}


def _summary(name: str, what: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    problem = next((sample["problem"] for sample in samples if "problem" in sample), None)
    row = {"name": name, "what": what, "problem": problem, "samples": samples}
    if problem is None:
        for figure in ("cpu_seconds", "seconds", "seconds_with_imports", "graphs"):
            row[figure] = statistics.median(sample[figure] for sample in samples)
    return row


def _goals(model: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal with what was reached; None where a form has no figures."""
    by_name = {row["name"]: row for row in rows}
    goals = []
    for name, of, bound in GOALS[model]:
        involved = [by_name[each] for each in (name, of) if each]
        reached = None
        if not any(row["problem"] for row in involved):
            first = by_name[name]
            reached = first["cpu_seconds"] / by_name[of]["cpu_seconds"] if of else first["seconds_with_imports"]
        goals.append({"row": name, "of": of, "bound": bound, "reached": reached})
    return goals


def _print(console: Console, result: dict[str, Any]) -> None:
    size = f"{result['layers']} layers of width {result['width']}"
    title = f"{result['model']}, {size}, to the first result; median of {result['rounds']}"
    table = Table(title=title, title_justify="left")
    for column in ("form", "CPU-seconds", "seconds", "with imports", "graphs", "what it is"):
        table.add_column(column, justify="left" if column in ("form", "what it is") else "right")
    for row in result["rows"]:
        table.add_row(row["name"], *_figures(row), row["problem"] or row["what"])
    console.print(table)
    for goal in result["goals"]:
        console.print(describe(goal))
    console.print(f"graphs: over four batches of different sizes; load before: {result['load_before']:.2g}")


def _figures(row: dict[str, Any]) -> list[str]:
    if row["problem"]:
        return ["-"] * 4
    times = [f"{row[name]:.1f}" for name in ("cpu_seconds", "seconds", "seconds_with_imports")]
    return [*times, "-" if row["name"] in ("export", "load") else f"{row['graphs']:g}"]


def describe(goal: dict[str, Any]) -> str:
    """A goal and what was reached, as a line."""
    unit, of = ("x", f" of {goal['of']}") if goal["of"] else (" s", "")
    if goal["reached"] is None:
        return f"{goal['row']}{of}: not measured (goal {goal['bound']}{unit})"
    verdict = "met" if goal["reached"] <= goal["bound"] else "MISSED"
    return f"{goal['row']}{of}: {goal['reached']:.3g}{unit}, goal {goal['bound']}{unit}: {verdict}"


if __name__ == "__main__":
    sys.exit(main())
