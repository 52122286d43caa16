"""How much of what CUDA graphs compute is padding: our budgets and planner beside powers of two and vLLM's packing.

Batches of 1 to 8 images are drawn from mixes of image sizes. Nothing is encoded. Budgets of patches come from here:
single steps from evenly spaced ones, over batches of both mixes.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from experiments.common import cli
from experiments.graph_budgets.encoders import ENCODERS, Encoder
from experiments.graph_budgets.mixes import MIXES
from experiments.graph_budgets.padding import (
    BATCHES,
    LARGEST_BATCH,
    draw,
    packed_by_plan,
    packed_smallest_first,
    padding,
    powers_of_two,
    search,
)

START = (512, 1024, 2048, 3072, 4096, 5120)
STEPS = tuple(sign * step for step in (64, 128, 256, 512) for sign in (-1, 1))
SEARCHED = 40
"""Batches of each number of images and of each mix, for the search; the report draws others."""
INTRO = f"""# Padding in CUDA graphs

Written by `python -m experiments.graph_budgets`. {BATCHES} batches of each number of images, 1 to {LARGEST_BATCH},
drawn from a mix of sizes and packed into the budgets of captured graphs; padding is the share of the tiles or patches
that the graphs compute in vain. Nothing was encoded. "Smallest first" adds images, the smallest first, until the
largest budget is full, as vLLM does; "planner" is `plan_replays`. Replays: of a batch, on average. Beyond: the images
that are larger than the largest budget, which no graph takes; they count in nothing else. Budgets
of patches were chosen on other batches of these mixes.
"""


def rows(encoder: Encoder) -> list[dict[str, Any]]:
    """Each mix, set of budgets and way of packing."""
    doubled = powers_of_two(encoder.smallest, encoder.budgets[-1])
    found = []
    for mix in MIXES:
        batches = draw(encoder.images(mix), BATCHES, seed=1)
        for name, budgets, packing, packed in (
            ("powers of two", doubled, "smallest first", packed_smallest_first),
            ("powers of two", doubled, "planner", packed_by_plan),
            ("ours", encoder.budgets, "planner", packed_by_plan),
        ):
            found.append(
                {
                    **{"encoder": encoder.name, "unit": encoder.unit, "mix": mix.name},
                    **{"budgets": budgets, "which": name, "packing": packing},
                    "single": dataclasses.asdict(padding(batches[:BATCHES], budgets, packed)),
                    "batches": dataclasses.asdict(padding(batches, budgets, packed)),
                }
            )
    return found


def searched(encoder: Encoder) -> tuple[int, ...]:
    """The budgets of an encoder of patches."""
    batches = [batch for mix in MIXES for batch in draw(encoder.images(mix), SEARCHED, seed=0)]
    return search(batches, START, STEPS)


def markdown(result: dict[str, Any]) -> str:
    """The table, and what the mixes are."""
    columns = ("encoder", "mix", "budgets", "packing", "padding, single images", "padding", "replays", "beyond")
    lines = [columns, ["---"] * 4 + ["---:"] * 4, *map(_cells, result["rows"])]
    mixes = [f"- {mix.name}: {mix.source}." for mix in MIXES]
    found = [f"The search for {name} found {', '.join(map(str, of))}." for name, of in result["searched"].items()]
    return "\n".join([INTRO, *(f"| {' | '.join(line)} |" for line in lines), "", *mixes, "", *found, ""])


def _cells(row: dict[str, Any]) -> Sequence[str]:
    budgets = f"{row['which']}: {', '.join(map(str, row['budgets']))} {row['unit']}"
    single, batches = row["single"], row["batches"]
    figures = (
        f"{single['fraction']:.1%}",
        f"{batches['fraction']:.1%}",
        f"{batches['replays']:.2f}",
        f"{batches['beyond']:.0%}",
    )
    return row["encoder"], row["mix"], budgets, row["packing"], *figures


def main(arguments: list[str] | None = None) -> int:
    """Draw, pack, print the table, write the files and return the exit status."""
    parser = cli.parser("python -m experiments.graph_budgets", __doc__)
    cli.add_out(parser, "JSON and the table")
    options = parser.parse_args(arguments)
    result = cli.result(
        "graph_budgets",
        mixes={mix.name: mix.source for mix in MIXES},
        searched={encoder.name: searched(encoder) for encoder in ENCODERS if encoder.unit == "patches"},
        rows=[row for encoder in ENCODERS for row in rows(encoder)],
    )
    text = markdown(result)
    cli.write_json(options.out / "graph_budgets.json", result)
    (options.out / "graph_budgets.md").write_text(text, encoding="utf-8")
    console = cli.console(markup=False)
    console.print(text, soft_wrap=True)
    console.print(f"wrote graph_budgets.json and .md to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
