"""Whether a hot number of tiles deserves a graph of its own: static against dynamic sizes, call by call.

The same encoder is compiled once for every size, and once more with a static graph for the hot one. What the second
costs is another compilation (`experiments.compile_cost`); what it gains is measured here, interleaved. For launches
and bytes of the CUDA graph with static and dynamic sizes see `experiments.launches`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from vit_encoder import CompilationConfig, Llama4VisionModel

from experiments.common.comparison import ALLOWED_EPS, relative_error
from experiments.common.environment import environment
from experiments.common.measure import interleaved, summary
from experiments.common.weights import random_encoder
from experiments.compile_cost.subjects import llama4_config, pixels

RESULTS = Path(__file__).parent / "results" / "local"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write; the exit status is 1 where the features were wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.range_splitting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=int, default=34, help="default: %(default)s")
    parser.add_argument("--heads", type=int, default=2, help="of 88 (default: 2, width 176)")
    parser.add_argument("--hot", type=int, default=5, metavar="TILES", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (default: %(default)s)")
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    with torch.inference_mode():
        result = measure(options.layers, options.heads, options.hot, options.rounds)
    result |= {"load_before": load, "environment": environment()}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "range_splitting.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _print(Console(width=None if sys.stdout.isatty() else 120, highlight=False), result)
    print(f"wrote {path}")
    return int(result["problem"] is not None)


def measure(layers: int, heads: int, hot: int, rounds: int) -> dict[str, Any]:
    """Seconds of a call of `hot` tiles in both forms."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = llama4_config(layers, heads)
    x = pixels(config, hot).to(device)
    forms = {"one range": (), "a static graph for the hot size": tuple(size for size in (hot - 1, hot) if size)}
    models: dict[str, Llama4VisionModel] = {}
    result: dict[str, Any] = {"layers": layers, "width": config.hidden_size, "hot_tiles": hot, "problem": None}
    for name, endpoints in forms.items():
        model = models[name] = random_encoder(config, dtype=torch.float32, device=device)
        expected = model(x).double()
        model.compilation_config = CompilationConfig(compile_mm_encoder=True, compile_ranges_endpoints=endpoints)
        deviation = relative_error(model(x), expected).rms
        if not deviation <= 2 * ALLOWED_EPS * torch.finfo(torch.float32).eps:
            return result | {"problem": f"{name}: features differ by {deviation:.2g} from the eager encoder's"}
    timings = interleaved({name: lambda m=m: m(x) for name, m in models.items()}, device, rounds=rounds)  # type: ignore[misc]
    rows = [{"form": name, "seconds": summary(timing.seconds)} for name, timing in timings.items()]
    return result | {"rows": rows}


def _print(console: Console, result: dict[str, Any]) -> None:
    if result["problem"]:
        console.print(result["problem"])
        return
    console.print(f"{result['layers']} layers of width {result['width']}, calls of {result['hot_tiles']} tiles")
    for row in result["rows"]:
        seconds = row["seconds"]
        console.print(
            f"{1e3 * seconds['median']:8.2f} ms a call ({1e3 * seconds['low']:.2f} to {1e3 * seconds['high']:.2f}): "
            f"{row['form']}"
        )
    dynamic, static = (row["seconds"] for row in result["rows"])
    gain = dynamic["median"] - static["median"]
    apart = static["high"] < dynamic["low"] or dynamic["high"] < static["low"]
    console.print(
        f"the static graph gains {1e3 * gain:.2f} ms a call, {100 * gain / dynamic['median']:.1f} %"
        + ("" if apart else "; the ranges overlap: no difference is shown")
    )


if __name__ == "__main__":
    sys.exit(main())
