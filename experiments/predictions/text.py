"""The tables as Markdown, from the content of the result file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from experiments.common.roofline import ACHIEVABLE_BANDWIDTH
from experiments.predictions.ours import LABEL

TEXTS = ("GPU", "engine", "products", "the model", "sequences x tokens")
"""Columns that hold no numbers."""

INTRO = """# Predictions held against measurements

Written by `python -m experiments.predictions`. The times called measured are others', of {source}: medians of the
rows in [attention.csv](../predictions/attention.csv) and [products.csv](../predictions/products.csv). Nothing of ours
was run on a GPU.

![The model against every measured row, its error by size, and ours beside the peer](predictions.png)
"""

INTERVAL = """## The interval of the roofline

Its lower end takes all peaks of the data sheets, perfectly overlapped; its upper end 60 % of them, one after the other.
It knows no launch and no waves. FlashAttention issues whole tiles (192 x 192 at head_dim 64 and 192 x 144 at 96
otherwise on an H100 and H200, 256 x 128 at the next multiple of 16 on a B200); the tiles of TensorRT-LLM (TRTLLM) are
not public, so its rows stand beside FlashAttention's work. Inside: share of the measured times within the interval.
"""

MODEL = """## The calibrated model

A call takes launch + the longer of (waves x (tile + products + exponentials) and bytes / ({bandwidth:.0%} of the
bandwidth)): launch {launch:.1f} us, {tile:.1f} us for the start and the end of a tile, products at {matrix:.2f} and
exponentials at {exponentials:.2f} of their peaks (above 1: they overlap, while the model adds them). These four were
fitted to FlashAttention 3 on an H100 at head_dim 64 and 80 alone, and the form of the model was chosen by its error
there; all other rows judge it (they entered no fit and no choice, though the model's author had read them). The H200
has the H100's processors and other memory, so its head_dim 64 and 80 say little more than how well a measurement
repeats; head_dim 72 and the B200, with another kernel and other tiles, are what the model did not know. On all of
FlashAttention that was held out ({count} rows) half of the errors are below {median:.1%}, nine of ten below
{ninetieth:.1%}. TensorRT-LLM's bias says how much slower it is than FlashAttention would be: no error of a model that
knows its tiles.
"""

SIZES = """FlashAttention's rows that were held out, by tokens of a sequence. Up to 256 tokens a call is mostly launch
and start-up: the interval, without them, holds few of these rows. The model counts whole tiles of 192 x 192 even for 64
tokens, and is worst there.
"""

PRODUCTS = """## Matrix products on an H100

The best of eight tiles from 64 x 128 to 128 x 256, in waves; launch, tile and rate fitted where n and k are 3072 or
more, judged where one of them is 1536, which is outside that range. fp8 includes the engine's quantisation of the
activations, at a fitted share of the bandwidth.
"""

OURS = """## Ours, beside the peer at the same size

"Ours" is {label}: the work that our kernel issues, in its blocks, at the launch, start-up and rates that were fitted to
FlashAttention. Nobody knows yet whether Triton's code reaches them: **our own efficiency is unknown until a GPU has run
it.** The model's held-out error is {median:.1%} (median) and {ninetieth:.1%} (90th percentile). The interval is the
roofline's for our kernel; where it reaches beyond the measured time, ours may be the slower one. Microseconds.
"""

CLOSING = """{behind} Llama 4's 577 tokens at head_dim 88 are not among the measured sizes, and 576 tokens do not stand
for them: 577 take FlashAttention 3 a fourth tile of queries and a fifth of keys, where 576 fill three and four. So
nothing is predicted there.
"""


def markdown(result: dict[str, Any]) -> str:
    """The whole text."""
    efficiency, held_out = result["efficiency"], result["held_out"]
    in_microseconds = {name: 1e6 * efficiency[name] for name in ("launch", "tile")}
    parts = [
        INTRO.format(source=result["source"]),
        INTERVAL,
        _table(
            ("GPU", "engine", "head_dim", "rows", "inside", "measured / lower", "measured / upper"),
            ((*_key(g), g["errors"]["count"], *_interval(g)) for g in result["attention"]),
        ),
        MODEL.format(bandwidth=ACHIEVABLE_BANDWIDTH, **{**efficiency, **in_microseconds, **held_out}),
        _table(
            ("GPU", "engine", "head_dim", "the model", "bias", "median error", "90th percentile"),
            ((*_key(g), _role(g), *_errors(g)) for g in result["attention"]),
        ),
        SIZES,
        _table(
            ("tokens", "head_dim", "rows", "bias", "median error", "90th percentile", "inside the interval"),
            ((*_key(g), g["errors"]["count"], *_errors(g), _interval(g)[0]) for g in result["attention_sizes"]),
        ),
        PRODUCTS,
        _table(
            ("products", "rows", "the model", "bias", "median error", "90th percentile", "inside the interval"),
            ((*_key(g), g["errors"]["count"], _role(g), *_errors(g), _interval(g)[0]) for g in result["products"]),
        ),
        "Those held out, by rows of the activations:\n",
        _table(
            ("products", "m", "rows", "bias", "median error", "90th percentile"),
            ((*_key(g), g["errors"]["count"], *_errors(g)) for g in result["product_sizes"] if not g["fitted"]),
        ),
        OURS.format(label=LABEL, **held_out),
        _table(
            ("GPU", "sequences x tokens", "head_dim", "FlashAttention, measured", "modelled", "ours", "interval"),
            map(_beside, result["ours"]),
        ),
        CLOSING.format(behind=_behind(result["ours"])),
    ]
    return "\n".join(parts)


def measured_text(row: dict[str, Any]) -> str:
    """The measured times of a peer, as one number or from the least to the most."""
    least, most = (f"{end:.3g}" for end in (min(row["measured"].values()), max(row["measured"].values())))
    return least if least == most else f"{least} to {most}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---" if name in TEXTS else "---:" for name in columns], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def _key(group: dict[str, Any]) -> list[Any]:
    return list(group["key"].values())


def _role(group: dict[str, Any]) -> str:
    return "fitted" if group["fitted"] else "held out"


def _errors(group: dict[str, Any]) -> list[str]:
    of = group["errors"]
    return [f"{of['bias']:+.1%}", f"{of['median']:.1%}", f"{of['ninetieth']:.1%}"]


def _interval(group: dict[str, Any]) -> list[str]:
    of = group["interval"]
    return [f"{of['inside']:.0%}", f"{of['over_lower']:.2f}", f"{of['over_upper']:.2f}"]


def _beside(row: dict[str, Any]) -> list[Any]:
    low, high = row["interval"]
    size = f"{row['sequences']} x {row['length']} ({row['like']})"
    return [row["gpu"], size, row["head_dim"], measured_text(row), row["peer"], row["ours"], f"{low:g} to {high:g}"]


def _behind(rows: Sequence[dict[str, Any]]) -> str:
    behind = [row for row in rows if row["ours"] > max(row["measured"].values())]
    if not behind:
        return "At none of these sizes would ours be behind the measured peer at its efficiency."
    sizes = ", ".join(f"{row['sequences']} x {row['length']} at {row['head_dim']} on {row['gpu']}" for row in behind)
    return f"Even at the peer's efficiency ours would be **behind** the measured peer at {sizes}."
