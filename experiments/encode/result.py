"""The main job's result, and its JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vit_encoder.compilation import GraphReport

from experiments.common import cli
from experiments.common.comparison import Error
from experiments.common.encoders import ENCODERS, Encoder
from experiments.common.measure import Spread

_AS_THEY_ARE = ("dtype", "device", "slow_dtype", "environment", "compilation", "allowed_eps")


@dataclass(frozen=True, kw_only=True)
class Image:
    """The image, and what it became: tiles of a canvas (high x wide, of at most max_tiles), or a grid of patches."""

    name: str
    width: int
    height: int
    encoder_tokens: int
    features: int
    max_tiles: int | None = None
    canvas: list[int] | None = None
    tiles: int | None = None
    grid: list[int] | None = None


@dataclass(frozen=True)
class EncoderUsed:
    """The encoder: which configuration, whose weights, and all its sizes by name."""

    config: str
    weights: str
    parameters: int
    sizes: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is measured.

    Attributes:
        slow_dtype: whether the CPU only emulates the dtype.
        size_chosen: whether the bound on the image's size is the command's default.
    """

    model: str
    image: Image
    encoder: EncoderUsed
    dtype: str
    device: str
    slow_dtype: bool
    size_chosen: bool

    @property
    def kind(self) -> Encoder:
        """The encoder's entry among those that commands know."""
        return ENCODERS[self.model]


@dataclass(frozen=True)
class Row:
    """One form of the encoder; it is not timed where there is a problem."""

    name: str
    problem: str | None
    error: Error | None
    first_call_seconds: float | None
    seconds: Spread | None
    peak_bytes: int | None


@dataclass
class Sweep:
    """What calls with batches of several sizes saw; `problem` says what was not as it must be.

    Attributes:
        layers, hidden_size: of the encoder that was called.
        deviation: largest relative RMS difference between the compiled and the eager features, of those allowed.
    """

    sizes: list[Any]
    layers: int
    hidden_size: int
    graphs: GraphReport = field(default_factory=GraphReport)
    deviation: float = 0.0
    problem: str | None = None


@dataclass(frozen=True)
class Job:
    """What the whole job cost, and the load average before it."""

    seconds: float
    peak_bytes: int | None
    load_before: float


@dataclass(frozen=True, kw_only=True)
class Result(Task):
    """Everything that the job found; `graph_problem` says why the encoder is not one graph."""

    environment: dict[str, Any]
    compilation: dict[str, str]
    allowed_eps: int
    rows: list[Row]
    graphs: GraphReport
    graph_problem: str | None
    sweep: Sweep
    job: Job

    @property
    def problems(self) -> dict[str, str]:
        """What is not as it must be, by what it concerns."""
        found = {row.name: row.problem for row in self.rows}
        found |= {"one graph": self.graph_problem, self.kind.swept.replace("_", " "): self.sweep.problem}
        return {name: problem for name, problem in found.items() if problem}

    def described(self) -> dict[str, Any]:
        """The result as its file has it: under the names of what the encoder's images are cut into."""
        whole = cli.plain(self)
        named, swept = _names(self.kind)
        whole["image"] = {name: value for name, value in whole["image"].items() if value is not None}
        whole["encoder"] |= whole["encoder"].pop("sizes")
        whole["graphs"]["problem"] = whole.pop("graph_problem")
        for row in whole["rows"]:
            row[named["seconds"]] = row.pop("seconds")
        whole[swept] = {swept: whole["sweep"].pop("sizes"), **whole.pop("sweep")}
        whole[named["size_chosen"]] = whole.pop("size_chosen")
        return {"experiment": "compile_encoder", **whole, "right": not self.problems}


def result_of(described: Mapping[str, Any]) -> Result:
    """The result that was described so; one without a `model` is of Llama 4.

    Raises:
        KeyError, TypeError: something is missing, or unknown.
    """
    whole = dict(described)
    model = whole.pop("model", "llama4")
    named, swept = _names(ENCODERS[model])
    encoder, graphs, sweep = dict(whole["encoder"]), dict(whole["graphs"]), dict(whole[swept])
    return Result(
        model=model,
        image=Image(**whole["image"]),
        encoder=EncoderUsed(encoder.pop("config"), encoder.pop("weights"), encoder.pop("parameters"), encoder),
        size_chosen=whole[named["size_chosen"]],
        rows=[_row(dict(row), named["seconds"]) for row in whole["rows"]],
        graph_problem=graphs.pop("problem"),
        graphs=GraphReport(**graphs),
        sweep=Sweep(sweep.pop(swept), **sweep | {"graphs": GraphReport(**sweep["graphs"])}),
        job=Job(**whole["job"]),
        **{
            name: whole[name] for name in ("dtype", "device", "slow_dtype", "environment", "compilation", "allowed_eps")
        },
    )


def _row(row: dict[str, Any], seconds: str) -> Row:
    spread, error = row.pop(seconds), row.pop("error")
    return Row(**row, seconds=spread and Spread(**spread), error=error and Error(**error))


def _names(kind: Encoder) -> tuple[dict[str, str], str]:
    """The file's names of two values, and of the sweep with its sizes."""
    return {
        "seconds": f"seconds_per_{kind.part}",
        "size_chosen": "max_tiles_chosen" if kind.limit == "max_tiles" else "size_chosen",
    }, kind.swept
