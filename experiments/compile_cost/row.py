"""The report's rows: what the processes of a form measured, and their medians; and the goals for them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FIGURES = ("cpu_seconds", "seconds", "seconds_with_imports", "graphs")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What one process took to its first result, and whether all of its results are right.

    Attributes:
        cpu_seconds: user and system time of the process and its children after the imports.
        seconds, seconds_with_imports: time by the clock, after the imports and with them.
        graphs: how many Dynamo made for batches of all sizes.
        deviation, allowed: relative RMS difference of the features from the eager encoder's, and the largest allowed.
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
    """A form and what its processes measured; where one of them has no figures, the row has none."""

    name: str
    what: str
    samples: Sequence[Sample | Failure]

    @property
    def problem(self) -> str | None:
        """Why the row has no figures."""
        return next((sample.problem for sample in self.samples if isinstance(sample, Failure)), None)

    def median(self, figure: str) -> float:
        """Return the median of a figure over all samples, where there is no problem."""
        return statistics.median(getattr(sample, figure) for sample in self.samples)

    def described(self) -> dict[str, Any]:
        """Return the row as its file has it, with the medians beside the samples."""
        medians = {} if self.problem else {figure: self.median(figure) for figure in FIGURES}
        return vars(self) | {"problem": self.problem} | medians


@dataclass(frozen=True)
class Goal:
    """A bound for a row.

    Attributes:
        row: the name of the row.
        of: another row, whose CPU-seconds those of the row are divided by; None bounds the seconds with imports.
        bound: the largest value that meets the goal.
        reached: the value; None where a row that it needs has no figures.
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
    """All rows of a model with so many layers of such a width, and the load average before they were measured."""

    model: str
    layers: int
    width: int
    rounds: int
    load_before: float
    rows: Sequence[Row]
    goals: Sequence[Goal]

    @property
    def title(self) -> str:
        """The model and its size."""
        return f"{self.model}, {self.layers} layers of width {self.width}"

    def described(self) -> dict[str, Any]:
        """Return the report as its file has it."""
        return vars(self) | {"rows": [row.described() for row in self.rows]}
