"""What a form of compiling costs: what its processes measured, their medians, and the goals for them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What it takes to the first result, and how many graphs all batches take.

    Attributes:
        cpu_seconds: user and system time of the process and its children, after the imports.
        seconds, seconds_with_imports: by the clock.
    """

    cpu_seconds: float
    seconds: float
    seconds_with_imports: float
    graphs: float


@dataclass(frozen=True, kw_only=True)
class Sample(Figures):
    """What one process measured, and how far its features are from the eager encoder's, of those allowed."""

    deviation: float
    allowed: float


@dataclass(frozen=True)
class Failure:
    """Why a process has no figures."""

    problem: str


@dataclass(frozen=True)
class Row:
    """A form; `figures` is None where a process failed or was wrong, which `problem` then says."""

    name: str
    what: str
    problem: str | None
    samples: Sequence[Sample | Failure]
    figures: Figures | None = None

    def described(self) -> dict[str, Any]:
        """The row as the report has it, its figures beside what names it."""
        named = {name: value for name, value in vars(self).items() if name != "figures"}
        return named | (vars(self.figures) if self.figures else {})


def row_of(name: str, what: str, samples: Sequence[Sample | Failure]) -> Row:
    """The row of a form whose processes gave these samples."""
    right = [sample for sample in samples if isinstance(sample, Sample)]
    if len(right) < len(samples):
        problem = next(sample.problem for sample in samples if isinstance(sample, Failure))
        return Row(name, what, problem, samples)
    medians = {each.name: statistics.median(getattr(sample, each.name) for sample in right) for each in fields(Figures)}
    return Row(name, what, None, samples, Figures(**medians))


@dataclass(frozen=True)
class Goal:
    """At most `bound` of another row's CPU-seconds, or where there is none of seconds with imports.

    Attributes:
        reached: None where a row that it needs has no figures.
    """

    row: str
    of: str | None
    bound: float
    reached: float | None = None

    def __str__(self) -> str:
        unit, of = ("x", f" of {self.of}") if self.of else (" s", "")
        if self.reached is None:
            return f"{self.row}{of}: not measured (goal {self.bound}{unit})"
        verdict = "met" if self.reached <= self.bound else "MISSED"
        return f"{self.row}{of}: {self.reached:.3g}{unit}, goal {self.bound}{unit}: {verdict}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """All rows of one model, so many layers deep and so wide, and the load average before they were measured."""

    model: str
    layers: int
    width: int
    rounds: int
    load_before: float
    rows: Sequence[Row]
    goals: Sequence[Goal]

    @property
    def title(self) -> str:
        """What was compiled."""
        return f"{self.model}, {self.layers} layers of width {self.width}"

    def described(self) -> dict[str, Any]:
        """The report as its file has it."""
        return vars(self) | {"rows": [row.described() for row in self.rows]}
