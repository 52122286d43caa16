"""The serving experiment's result as a table, as sentences and as a figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

Round = dict[str, Any]


def _encoder_share(of: Round) -> float | None:
    return None if of["encoder_seconds"] is None else 100 * of["encoder_seconds"] / of["duration"]


# The rows of vLLM's pull request 30709, and the encoder's.
ROWS: dict[str, Callable[[Round], float | None]] = {
    "Successful requests": lambda of: of["completed"],
    "Failed requests": lambda of: of["failed"],
    "Benchmark duration (s)": lambda of: of["duration"],
    "Total generated tokens": lambda of: of["total_output_tokens"],
    "Request throughput (req/s)": lambda of: of["request_throughput"],
    "Output token throughput (tok/s)": lambda of: of["output_throughput"],
    "Mean TTFT (ms)": lambda of: of["mean_ttft_ms"],
    "Mean TPOT (ms)": lambda of: of["mean_tpot_ms"],
    "Mean ITL (ms)": lambda of: of["mean_itl_ms"],
    "Vision encoder (s)": lambda of: of["encoder_seconds"],
    "Vision encoder (% of duration)": _encoder_share,
}
# Ranges of so many rounds each lie apart by chance in 3 of 100 cases; of two rounds each in 33.
ENOUGH_ROUNDS = 4
COMPARED = ("Request throughput (req/s)", "Mean TTFT (ms)", "Vision encoder (s)")


def samples(variant: dict[str, Any], row: str) -> list[float]:
    """A row's value in each round of a variant that has one."""
    values = [ROWS[row](of) for of in variant["rounds"]]
    return [value for value in values if value is not None]


def table(report: dict[str, Any]) -> Table:
    """Median (lowest to highest) over the rounds, a column a variant."""
    load = report["load"]
    images = f"images of {load['images']}" if load["images"] else "random images in a mix of sizes"
    shown = Table(
        title=f"{report['model']}: {load['prompts']} requests a round, {images}; median (range) over the rounds",
        title_justify="left",
    )
    shown.add_column("")
    for variant in report["variants"]:
        shown.add_column(variant["name"], justify="right")
    for row in ROWS:
        shown.add_row(row, *(_cell(samples(variant, row)) for variant in report["variants"]))
    return shown


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    low, middle, high = (_number(value) for value in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) or value >= 1000 else f"{value:.3g}"


def differences(report: dict[str, Any]) -> list[str]:
    """What the spread allows to be said of each of our variants against vLLM alone, and every problem."""
    lines = []
    by_name = {variant["name"]: variant for variant in report["variants"]}
    for name, variant in by_name.items():
        alone = by_name.get(f"vLLM alone, {name.partition(', ')[2]}")
        if alone is not None and alone is not variant:
            lines += [_difference(row, variant, alone) for row in COMPARED]
    problems = [f"{name}: {problem}" for name, variant in by_name.items() for problem in variant["problems"]]
    return [*(line for line in lines if line), *problems]


def _difference(row: str, ours: dict[str, Any], alone: dict[str, Any]) -> str:
    ours_samples, alone_samples = samples(ours, row), samples(alone, row)
    if not ours_samples or not alone_samples or not statistics.median(alone_samples):
        return ""
    # Other requests than those of the rounds that are compared would be another load.
    if any(of["failed"] for of in (*ours["rounds"], *alone["rounds"])):
        return f"{row}: {ours['name']} is not compared, since requests failed"
    ratio = statistics.median(ours_samples) / statistics.median(alone_samples)
    text = f"{row}: {ours['name']} is at {ratio:.2f} x {alone['name']}"
    rounds = min(len(ours_samples), len(alone_samples))
    if rounds < ENOUGH_ROUNDS:
        return f"{text}, of {rounds} round(s): {ENOUGH_ROUNDS} are needed to tell a difference from the spread"
    if min(ours_samples) <= max(alone_samples) and min(alone_samples) <= max(ours_samples):
        return f"{text}, but the spread of the rounds hides the difference"
    return f"{text}, more than the spread of {rounds} rounds"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the compared rows, each round a dot, into a PNG file."""
    figure = Figure(figsize=(12, 0.6 * len(report["variants"]) + 2), layout="constrained")
    names = [variant["name"] for variant in report["variants"]]
    plots = figure.subplots(1, len(COMPARED), sharey=True)
    plots[0].invert_yaxis()
    for axes, row in zip(plots, COMPARED, strict=True):
        for place, variant in enumerate(report["variants"]):
            if values := samples(variant, row):
                axes.barh(place, statistics.median(values), color="#d95f02" if "our" in variant["name"] else "#8da0b6")
                axes.plot(values, [place] * len(values), "k.", markersize=5)
        axes.set_title(row, fontsize=10)
        axes.set_yticks(range(len(names)), names)
    figure.suptitle(f"vLLM serving {report['model']}, {report['environment']['cpu']['model']}", fontsize=11)
    figure.savefig(path, dpi=110)
