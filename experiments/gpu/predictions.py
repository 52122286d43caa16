"""What the roofline model predicted for a kernel, beside what this report measured of it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.roofline import ACHIEVABLE_BANDWIDTH, GPUS, interval
from experiments.gpu.records import Record, Records, latest, of_kind, read

RESULTS = Path(__file__).resolve().parents[1] / "results"
OURS = "triton"
COMPILED = ("compiled", "CUDA graphs of the compiled")
FIGURE = "predictions.png"
SUMMED = {"varlen_attention_backward": ("varlen_attention grad_q", "varlen_attention grad_kv")}
"""An op of several kernels; the one that mends large log-sum-exps reads them and returns."""

SAME_BYTES = {
    "rotary_2d_backward": "rotary_2d backward",
    "pixel_shuffle_backward": "pixel_shuffle backward",
}
ENCODERS = {
    "llama4": ("graph_ledger.json", {"ours": 34}),
    "qwen2_5_vl": ("graph_ledger_qwen2_5_vl.json", {"ours, windows": 28, "ours, full": 4}),
}
"""The ledger of an encoder, and how many layers of each of its rows the encoder has."""


@dataclass(frozen=True)
class Prediction:
    """One kernel, or an encoder.

    Attributes:
        low, high: microseconds that the model says.
        measured: the median, in microseconds; of a CUDA graph's replay where there is one.
        launches: of the ledger, and those that the profiler saw, where both are known.
    """

    name: str
    sizes: str
    low: float
    high: float
    measured: float
    launches: tuple[float, float] | None = None

    @property
    def verdict(self) -> str:
        """Where the measurement lies."""
        if self.measured < self.low:
            return "faster than the model allows: the measurement or the model is wrong"
        return "within" if self.measured <= self.high else f"{self.measured / self.high:.2f} x the upper end"


def predictions(records: Iterable[Record]) -> list[Prediction]:
    """Every measurement of ours that the model has a prediction for, on the GPU that the report ran on."""
    records = list(records)
    gpu = gpu_of(records)
    if gpu is None:
        return []
    found = []
    for lines in latest(records).values():
        found += [*_kernels(lines, gpu), *_encoders(lines, gpu)]
    return found


def gpu_of(records: Iterable[Record]) -> str | None:
    """The GPU as the model names it, or None where it does not know it, or the CPU stood in for it."""
    around = of_kind(records, "environment")
    if not around or around[-1]["rehearsal"] or not around[-1]["environment"]["devices"]:
        return None
    name = around[-1]["environment"]["devices"][0]["name"]
    return next((gpu for gpu in GPUS if gpu in name), None)


def _kernels(lines: list[Record], gpu: str) -> Iterator[Prediction]:
    report = json.loads((RESULTS / "kernel_report.json").read_text(encoding="utf-8"))
    rows = [
        row
        for row in report["rows"]
        if row["default"] and row["dtype"] == "bfloat16" and row["target"] == GPUS[gpu].target and not row["error"]
    ]
    replayed = {(line["form"], line["sizes"]): line for line in of_kind(lines, "replayed") if not line.get("problem")}
    for line in of_kind(lines, "timed"):
        if line["form"] != OURS or "flops" not in line:
            continue
        measured = statistics.median(replayed.get((OURS, line["sizes"]), line)["us"])
        bounds = _bounds(line, rows, gpu)
        if bounds:
            name = line.get("op") or f"varlen_attention, head_dim {line['head_dim']}"
            if line.get("op") and line.get("head_dim"):
                name += f", head_dim {line['head_dim']}"
            yield Prediction(name, line["sizes"], *bounds, measured)


def _bounds(line: Record, rows: list[dict[str, Any]], gpu: str) -> tuple[float, float] | None:
    """The interval of one measurement: the kernel report's where it has the sizes, else from what is counted here."""
    op, head_dim = line.get("op") or "varlen_attention", line.get("head_dim") or 88
    kernels = SUMMED.get(op, (SAME_BYTES.get(op, op),))
    matching = [row for row in rows if row["kernel"] in kernels and row["head_dim"] == head_dim]
    reported = "577" in line["sizes"].split(" x ") or op not in ("varlen_attention", "varlen_attention_backward")
    if len(matching) == len(kernels) and reported and all(row["roofline_us"].get(gpu) for row in matching):
        low, high = (sum(row["roofline_us"][gpu][end] for row in matching) for end in (0, 1))
        return low, high
    model = GPUS[gpu]
    if op == "varlen_attention":
        # Whole blocks of 64 tokens: only the columns are padded.
        blocks = {64: 64, 72: 80, 80: 80, 88: 96, 96: 96, 128: 128}[head_dim]
        count, length, heads, _ = map(int, line["sizes"].split(" x "))
        low, high = interval(
            model,
            "bfloat16",
            matrix_flops=line["flops"] * blocks / head_dim,
            exponentials=count * length**2 * heads,
            nbytes=line["nbytes"],
        )
        return 1e6 * low, 1e6 * high
    if line["flops"]:
        return None
    moved = 1e6 * line["nbytes"] / model.bandwidth
    return moved, moved / ACHIEVABLE_BANDWIDTH


def _encoders(lines: list[Record], gpu: str) -> Iterator[Prediction]:
    seen = {(line["form"], line["sizes"]): line for line in of_kind(lines, "kernels") if "launches" in line}
    for line in of_kind(lines, "timed"):
        encoder = line.get("encoder")
        if encoder not in ENCODERS or line["form"] not in COMPILED:
            continue
        asked = ledger(encoder, line["sizes"])
        if asked is None or (kernels := seen.get((line["form"], line["sizes"]))) is None:
            continue
        low, high = (1e6 * sum(part["predicted_seconds"][gpu][end] * times for part, times in asked) for end in (0, 1))
        launches = sum(part["launches"] * times for part, times in asked)
        yield Prediction(
            f"{encoder}, {line['form']} (kernels alone)",
            line["sizes"],
            low,
            high,
            kernels["us"],
            (launches, kernels["launches"]),
        )


def ledger(encoder: str, sizes: str) -> list[tuple[dict[str, Any], int]] | None:
    """The parts of an encoder that the ledger has, each with how often it is run, or None for other sizes."""
    file, layers = ENCODERS[encoder]
    rows = json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]
    if encoder == "llama4":
        tiles = int(sizes.split()[0])
        wanted = [row for row in rows if row["shapes"] == "dynamic" and row["tiles"] == tiles]
    else:
        patches = math.prod(int(word) for word in sizes.split() if word.isdecimal())
        wanted = [row for row in rows if row["patches"] == patches and "patches" in sizes]
    parts = {row["encoder"]: row for row in wanted}
    if not parts.keys() >= layers.keys():
        return None
    first = parts[next(iter(layers))]
    rest = [(first["rest"], 1)] if "rest" in first else []
    return [(parts[name]["layer"], times) for name, times in layers.items()] + rest


def draw_figure(records: Records) -> None:
    """Write what was predicted and measured, and draw it beside the results."""
    found = predictions(read(records.path))
    for each in found:
        records.write("predicted", verdict=each.verdict, **vars(each))
    if not found:
        records.write("absent", form="predictions", problem="nothing was measured on a GPU that the model knows")
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.32 * len(found)), layout="constrained")
    axes = figure.subplots()
    for place, each in enumerate(reversed(found)):
        axes.plot([each.low, each.high], [place, place], color="#9aa4af", linewidth=7, solid_capstyle="butt")
        axes.plot([each.measured], [place], marker="o", color="#d9480f")
    axes.set_yticks(range(len(found)), [f"{each.name}, {each.sizes}" for each in reversed(found)], fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("microseconds: the model's interval (bar), measured (dot)")
    figure.savefig(records.path.with_name(FIGURE), dpi=120)
