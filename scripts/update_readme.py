"""Write what experiments measured into the texts: python scripts/update_readme.py [--check].

README.md gets three tables beside peers and a predicted time between its markers, and the figure of the tables in a
light and a dark form;
experiments/results/README.md the main job's results, a table for each compile_encoder-*.json.
With --check nothing is written, and the exit status is 1 if something would be.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.common import comparison_figure
from experiments.encode.report import cutting, encoder_text, header, notes, table_rows
from experiments.encode.result import result_of
from experiments.predictions.text import measured_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
BEGIN = "<!-- comparison: written by scripts/update_readme.py -->"
END = "<!-- end of comparison -->"
TILES = 16
PREDICTED = {"gpu": "H100", "sequences": 16, "length": 576, "head_dim": 80}
"""Of the sizes that a peer was measured at, the nearest to a batch of Llama 4's tiles."""


def main(arguments: list[str] | None = None) -> int:
    """Update or check the texts and the figure, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, report by the exit status")
    options = parser.parse_args(arguments)
    layers, attention, seconds = layer_costs(RESULTS), attention_flops(RESULTS), first_results(RESULTS)
    predicted = predicted_time(RESULTS)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    try:
        texts = {
            ROOT / "README.md": between_markers(readme, comparison_text(layers, attention, seconds, predicted)),
            RESULTS / "README.md": results_text(RESULTS),
        }
    except ValueError as error:
        parser.error(str(error))
    texts |= {
        RESULTS / f"comparison-{theme}.svg": comparison_figure.svg(layers, attention, theme)
        for theme in comparison_figure.THEMES
    }
    old = {path: path.read_text(encoding="utf-8") if path.exists() else None for path in texts}
    if options.check:
        return int(old != texts)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return 0


def layer_costs(folder: Path) -> dict[str, tuple[float, float]]:
    """Launches and GB of one compiled layer of Llama 4 at 16 tiles, by encoder."""
    rows = json.loads((folder / "graph_ledger.json").read_text(encoding="utf-8"))["rows"]
    shown = {
        "transformers": "transformers, with flash attention",
        "ours": "vit-kernels",
        "ours, fused GELU": "vit-kernels, `fuse_gelu=True`",
    }
    return {
        shown[row["encoder"]]: (row["layer"]["launches"], row["layer"]["bytes"] / 1e9)
        for name in shown
        for row in rows
        if row["encoder"] == name and row["tiles"] == TILES and row["shapes"] == "dynamic"
    }


def attention_flops(folder: Path) -> dict[str, dict[str, float]]:
    """Matrix FLOPs that attention issues over the useful ones, by workload and implementation."""
    rows = json.loads((folder / "attention_work.json").read_text(encoding="utf-8"))["rows"]
    workloads = {
        "Llama 4, a tile of 577 tokens": "Llama 4, a tile (577 tokens, head_dim 88)",
        "Qwen2.5-VL, windows of 64 patches": "Qwen2.5-VL, windows (64 patches, head_dim 80)",
        "Qwen2.5-VL, 74 x 54 patches, all layers": "Qwen2.5-VL, an image of 74 x 54 patches, all layers",
    }
    names = {
        "ours": "vit-kernels",
        "flash-attn 2": "flash-attn 2 (modelled)",
        "flash-attn 3": "flash-attn 3 (modelled)",
        "vLLM's Triton kernel": "vLLM's Triton kernel",
    }
    return {
        shown: {
            names[row["attention"]]: row["flops_issued_over_useful"]
            for row in rows
            if row["workload"] == workload and row["attention"] in names
        }
        for workload, shown in workloads.items()
    }


def first_results(folder: Path) -> dict[str, tuple[float, int]]:
    """Seconds to the first result of Llama 4's 34 layers on a CPU, and graphs, by way of compiling."""
    rows = json.loads((folder / "compile_ledger-llama4-176.json").read_text(encoding="utf-8"))["rows"]
    shown = {
        "transformers": "`torch.compile` of transformers",
        "plain": "`torch.compile` of our encoder's layers",
        "ours, cold": "vit-kernels, nothing cached",
        "ours, warm": "vit-kernels, a new process with the same cache",
        "load": "vit-kernels, a new process that loads an export",
    }
    by_name = {row["name"]: row for row in rows}
    return {text: (by_name[name]["seconds"], by_name[name]["graphs"]) for name, text in shown.items()}


def predicted_time(folder: Path) -> str:
    """Our attention beside the measured peer at one size: no predicted time stands anywhere without these words."""
    result = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))
    (row,) = (row for row in result["ours"] if [row[name] for name in PREDICTED] == list(PREDICTED.values()))
    errors, (low, high) = result["held_out"], row["interval"]
    return (
        f"On an {row['gpu']} flash-attn 3 takes {measured_text(row)} us for attention over {row['sequences']} x "
        f"{row['length']} tokens, head_dim {row['head_dim']} ([measured by others]"
        f"(experiments/results/predictions.md)); {row['ours']:.3g} us is {row['label']} (held-out error: median "
        f"{errors['median']:.1%}, 90th percentile {errors['ninetieth']:.1%}). Ours is unknown until a GPU has run it: "
        f"the roofline's {low:.3g} to {high:.3g} us leave open which is faster."
    )


def comparison_text(
    layers: dict[str, tuple[float, float]],
    attention: dict[str, dict[str, float]],
    seconds: dict[str, tuple[float, int]],
    predicted: str,
) -> str:
    """Markdown of the figure, the three tables and the predicted time."""
    implementations = list(next(iter(attention.values())))
    base = "experiments/results/comparison"
    lines = [
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="{base}-dark.svg">',
        f'  <img alt="The tables below as bars" src="{base}-light.svg">',
        "</picture>",
        "",
        f"| one layer of Llama 4, {TILES} tiles, bfloat16, read off the CUDA code | launches | GB moved |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {launches:g} | {moved:.2f} |" for name, (launches, moved) in layers.items()),
        "",
        f"| attention: matrix FLOPs issued over useful | {' | '.join(implementations)} |",
        f"| --- | {' | '.join(['---:'] * len(implementations))} |",
        *(
            f"| {workload} | {' | '.join(f'{ratio:.2f}' for ratio in ratios.values())} |"
            for workload, ratios in attention.items()
        ),
        "",
        "| first result of 34 narrow layers, after imports, on one CPU thread | seconds |",
        "| --- | ---: |",
        *(f"| {name} | {first:.2g} |" for name, (first, _) in seconds.items()),
        "",
        predicted,
    ]
    return "\n".join(lines)


def between_markers(readme: str, text: str) -> str:
    """The README with the text between its markers.

    Raises:
        ValueError: the markers are not there once each.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md: expected one line {BEGIN!r} and one {END!r}")
    head, _, rest = readme.partition(BEGIN)
    return f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"


def results_text(folder: Path) -> str:
    """Markdown of all results of the main job in a folder.

    Raises:
        ValueError: one of them says that something was wrong.
    """
    intro = (
        "# Results\n\nThe JSON files of this folder were written by the commands that `python -m experiments` lists, "
        "with their date and versions inside; `peers.*` by `./scripts/test_peers.sh`; [predictions.md](predictions.md) "
        "holds predicted times against those that others measured, [graph_budgets.md](graph_budgets.md) the padding in "
        "CUDA graphs; `range_splitting.json` and "
        "`rotate_queries.json` by experiments that are settled and gone. Below is the main job, `./scripts/run.sh`: a "
        "photograph is cut into tiles (Llama 4) or resized to whole patches (Qwen2.5-VL) and encoded eagerly, compiled "
        "and by transformers, all on the same weights. Each result is first compared with an fp64 reference; what is "
        "wrong is not timed.\n\n"
        "On a CPU the encoder is bound by its matrix products, so compiling gains little or nothing there: it is for "
        "the launches and the memory traffic of a GPU. Written by `scripts/update_readme.py`."
    )
    return "\n\n".join([intro, *map(_result_text, sorted(folder.glob("compile_encoder-*.json")))]) + "\n"


def _result_text(path: Path) -> str:
    result = result_of(json.loads(path.read_text(encoding="utf-8")))
    if result.problems:
        raise ValueError(f"{path.name}: got a result that is not right, expected one to be shown")
    columns = header(result)
    table = [columns, ["---"] + ["---:"] * (len(columns) - 1), *table_rows(result)]
    name = encoder_text(result)
    lines = [
        f"## {name.partition(':')[0]}",
        "",
        f"![The photograph, its features and the comparison]({path.with_suffix('.png').name})",
        "",
        f"{name}. {cutting(result).capitalize()}.",
        f"{_measured_on(result.environment)}.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in table),
        "",
        *(f"- {note}" for note in notes(result)),
    ]
    return "\n".join(lines)


def _measured_on(environment: dict[str, Any]) -> str:
    cpu, packages = environment["cpu"], environment["packages"]
    devices = ", ".join(device["name"] for device in environment["devices"])
    where = devices or f"{cpu['model']}, {cpu['threads']} threads, {cpu['capability']}"
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton", "transformers") if packages[name])
    return f"Measured on {environment['date'][:10]} on {where}, with Python {environment['python']}, {versions}"


if __name__ == "__main__":
    sys.exit(main())
