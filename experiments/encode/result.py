"""The main job's result, and the form that its JSON file has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vit_encoder.compilation import GraphReport

from experiments.common import cli
from experiments.common.comparison import Error
from experiments.common.encoders import ENCODERS, Encoder
from experiments.common.measure import Spread


@dataclass(frozen=True, kw_only=True)
class Image:
    """The image and what it was cut into: tiles of a canvas (high x wide, at most max_tiles), or a grid of patches."""

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
    """The encoder's configuration, the origin of its weights, and all its sizes by name."""

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
    """The outcome of calls with batches of several sizes; `problem` says what is wrong.

    Attributes:
        layers, hidden_size: of the encoder that was called.
        deviation: the largest relative RMS difference between compiled and eager features, of those allowed.
    """

    sizes: list[Any]
    layers: int
    hidden_size: int
    graphs: GraphReport = field(default_factory=GraphReport)
    deviation: float = 0.0
    problem: str | None = None


@dataclass
class Graphs(GraphReport):
    """The graphs of the calls that are compared, and why they are not one."""

    problem: str | None = None


@dataclass(frozen=True)
class Job:
    """What the whole job cost, and the load average before it."""

    seconds: float
    peak_bytes: int | None
    load_before: float


@dataclass(frozen=True, kw_only=True)
class Result(Task):
    """Everything that the job found."""

    environment: dict[str, Any]
    compilation: dict[str, str]
    allowed_eps: int
    rows: list[Row]
    graphs: Graphs
    sweep: Sweep
    job: Job

    @property
    def problems(self) -> dict[str, str]:
        """What is wrong, by what it concerns."""
        found = {row.name: row.problem for row in self.rows}
        found |= {"one graph": self.graphs.problem, self.kind.swept.replace("_", " "): self.sweep.problem}
        return {name: problem for name, problem in found.items() if problem}

    def described(self) -> dict[str, Any]:
        """Return the result as its file has it, where some names are those of what the images are cut into."""
        whole, (seconds, swept, chosen) = cli.plain(self), _names(self.kind)
        whole["image"] = {name: value for name, value in whole["image"].items() if value is not None}
        whole["encoder"] |= whole["encoder"].pop("sizes")
        whole["rows"] = [{seconds if name == "seconds" else name: row[name] for name in row} for row in whole["rows"]]
        whole[swept] = {swept: whole["sweep"].pop("sizes"), **whole.pop("sweep")}
        whole[chosen] = whole.pop("size_chosen")
        return {"experiment": "compile_encoder", **whole, "right": not self.problems}


def result_of(described: Mapping[str, Any]) -> Result:
    """Return the result that a file describes; one without a `model` is of Llama 4.

    Raises:
        KeyError, TypeError: something is missing or unknown.
    """
    whole = {"model": "llama4", **described}
    seconds, swept, chosen = _names(ENCODERS[whole["model"]])
    del whole["experiment"], whole["right"]
    sizes = dict(whole["encoder"])
    whole["encoder"] = {name: sizes.pop(name) for name in ("config", "weights", "parameters")} | {"sizes": sizes}
    whole["rows"] = [{"seconds" if name == seconds else name: row[name] for name in row} for row in whole["rows"]]
    sweep = dict(whole.pop(swept))
    whole["sweep"] = {"sizes": sweep.pop(swept), **sweep}
    whole["size_chosen"] = whole.pop(chosen)
    result: Result = cli.parsed(Result, whole)
    return result


def _names(kind: Encoder) -> tuple[str, str, str]:
    """Return the file's names of a row's seconds, of the sweep and its sizes, and of `size_chosen`."""
    return f"seconds_per_{kind.part}", kind.swept, "size_chosen" if kind.unit == "patch" else "max_tiles_chosen"
