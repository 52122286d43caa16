"""The GPU report's summary, in Markdown, from the files that its stages left."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.encode.report import BUSY, encoder_text, header, notes, table_rows
from experiments.encode.result import result_of


@dataclass(frozen=True)
class Outcome:
    """How a stage ended; `problem` is None where it succeeded, `last_line` the last that it printed."""

    name: str
    problem: str | None
    seconds: float
    last_line: str


def summary_text(folder: Path, around: dict[str, Any], device: str, load: float, outcomes: Sequence[Outcome]) -> str:
    """The whole summary. What a stage did not leave is left out; a file that cannot be read is named.

    Args:
        folder: of the report.
        around: `environment()`.
        device: its name.
        load: the load average before the first stage.
        outcomes: of the stages.
    """
    sections = [_opening(around, device, load), _stages(outcomes)]
    for pattern, section in SECTIONS.items():
        for path in sorted(folder.glob(pattern)):
            try:
                sections.append(section(json.loads(path.read_text(encoding="utf-8"))))
            except (KeyError, TypeError, ValueError) as error:
                sections.append(f"{path.relative_to(folder)} cannot be read: {error!r}")
    return "\n\n".join(sections) + "\n"


def _opening(around: dict[str, Any], device: str, load: float) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in around["packages"].items() if version)
    commit = around["git"] or {"commit": "unknown", "dirty": False}
    lines = [
        f"# {device}, {around['date']}",
        "",
        f"- commit {commit['commit']}{', with changes' if commit['dirty'] else ''}",
        f"- Python {around['python']}, {versions}",
    ]
    if not around["devices"]:
        lines.append(
            "- No GPU: the kernels' correctness on one, and the tuning, were not run. No time here is a GPU's."
        )
    if load > BUSY * around["cpu"]["cores"]:
        lines.append(
            f"- Other work ran on the machine (load {load:.1f} before the start): no time here is to be trusted."
        )
    return "\n".join(lines)


def _stages(outcomes: Sequence[Outcome]) -> str:
    rows = [
        [outcome.name, outcome.problem or "ok", f"{outcome.seconds:.0f}", outcome.last_line] for outcome in outcomes
    ]
    return "## Stages\n\n" + _table(["stage", "result", "s", "last line of its log"], rows)


def _tuning(tuned: dict[str, Any]) -> str:
    rows = []
    for kernel, cases in tuned["measurements"].items():
        for case, attempts in cases.items():
            chosen = tuned["configurations"][kernel].get(case)
            for attempt in attempts:
                shape = "x".join(map(str, attempt["configuration"].values()))
                note = "chosen" if attempt["configuration"] == chosen else (attempt["problem"] or "").partition("\n")[0]
                rows.append([kernel, case, shape, _microseconds(attempt["seconds"]), note])
    header = ["kernel", "head_dim, dtype", "BLOCK_M x BLOCK_N x warps x stages", "us, median (range)", ""]
    return "## Tuning\n\nThe first of each is the default. " + f"Target {tuned['target']}.\n\n" + _table(header, rows)


def _microseconds(seconds: list[float]) -> str:
    if not seconds:
        return "-"
    low, middle, high = (1e6 * pick(seconds) for pick in (min, statistics.median, max))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def _microbenchmarks(results: dict[str, Any]) -> str:
    rows = []
    for benchmark in results["benchmarks"]:
        info = benchmark["extra_info"]
        times = [benchmark["stats"][name] for name in ("median", "min", "max")]
        rates = [f"{info['GB/s']:.1f}", f"{info['TFLOP/s']:.3g}" if info["flops"] else "-"]
        fractions = [f"{info['fraction of copy']:.2f}", f"{info['fraction of matmul']:.2f}" if info["flops"] else "-"]
        spread = "{:.1f} ({:.1f} to {:.1f})".format(*(1e6 * time for time in times))
        rows.append([info["case"], info["sizes"], info["dtype"], info["contender"], spread, *rates, *fractions])
    header = ["case", "sizes", "dtype", "form", "us, median (range)", "GB/s", "TFLOP/s", "of the copy", "of the matmul"]
    text = (
        "Bytes are the compulsory ones, FLOPs the useful ones. The last two columns are fractions of what a large "
        "copy, and a large square matmul of the dtype, reached in the same interleaved rounds. Compare within a case."
    )
    return f"## Microbenchmarks\n\n{text}\n\n{_table(header, rows)}"


def _main_job(described: dict[str, Any]) -> str:
    result = result_of(described)
    said = "\n".join(f"- {line}" for line in notes(result))
    return f"## Main job\n\n{encoder_text(result)}\n\n{_table(header(result), table_rows(result))}\n\n{said}"


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tuned/*.json": _tuning,
    "microbenchmarks.json": _microbenchmarks,
    "compile_encoder-*.json": _main_job,
}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(_lines(header, rows))


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
