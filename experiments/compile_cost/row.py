"""What a form of compiling costs: what its processes measured, their medians, and the goals for them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FIGURES = ("cpu_seconds", "seconds", "seconds_with_imports", "graphs")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one process took to the first result, and what all of its results were.

    Attributes:
        cpu_seconds: user and system time of the process and its children, after the imports.
        seconds, seconds_with_imports: by the clock.
        graphs: for batches of all sizes.
        deviation, allowed: of the features from the eager encoder's.
    """

    cpu_seconds: float
    seconds: float
    seconds_with_imports: float
    graphs: int
    deviation: float
    allowed: float


@dataclass(frozen=True)
class Failure:
    """Why a process has no figures."""

    problem: str


@dataclass(frozen=True)
class Row:
    """A form, and what its processes measured; it has no figures where one of them has none."""

    name: str
    what: str
    samples: Sequence[Sample | Failure]

    @property
    def problem(self) -> str | None:
        """Why it has no figures."""
        return next((sample.problem for sample in self.samples if isinstance(sample, Failure)), None)

    def median(self, figure: str) -> float:
        """Of all samples, where there is no problem."""
        return statistics.median(getattr(sample, figure) for sample in self.samples)

    def described(self) -> dict[str, Any]:
        """The row as the report has it, its medians beside what names it."""
        medians = {} if self.problem else {figure: self.median(figure) for figure in FIGURES}
        return vars(self) | {"problem": self.problem} | medians


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
