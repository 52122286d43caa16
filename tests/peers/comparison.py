"""Outcomes of a peer's suite with ours in its place, against those of the peer alone and a list of refusals."""

from __future__ import annotations

import fnmatch
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Outcomes = dict[str, dict[str, str]]
"""Test: its `outcome` (passed, failed, skipped) and the `message` that it ended with."""


@dataclass(frozen=True)
class Allowed:
    """Tests that ours refuses for a reason: their names match `tests`, their failures hold `message`."""

    suite: str
    tests: tuple[str, ...]
    message: str
    reason: str

    def covers(self, test: str, message: str) -> bool:
        """Whether this explains that a test failed with a message."""
        return self.message in message and any(fnmatch.fnmatchcase(test, pattern) for pattern in self.tests)


@dataclass
class Comparison:
    """What became of each test of a suite."""

    agreed: list[str] = field(default_factory=list)
    """Passed, as they do with the peer alone."""
    allowed: Counter[str] = field(default_factory=Counter)
    """Refused, by the reason in the list."""
    failed: dict[str, str] = field(default_factory=dict)
    """Failed with no reason listed, and the message; a test that did not run at all counts."""
    stale: list[str] = field(default_factory=list)
    """Reasons in the list that no failure needs."""
    not_compared: Counter[str] = field(default_factory=Counter)
    """Skipped, or failing with the peer alone too, by the first line of the message."""


def read_allowed(path: Path) -> list[Allowed]:
    """Read the list of refusals.

    Raises:
        ValueError: an entry with a key too many, too few, or empty.
    """
    entries: list[dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8"))["allowed"]
    for number, entry in enumerate(entries, 1):
        if set(entry) != {"suite", "tests", "message", "reason"} or not all(entry.values()):
            raise ValueError(
                f"{path.name}: entry {number}: got {sorted(entry)}, expected message, reason, suite, tests"
            )
    return [Allowed(**(entry | {"tests": tuple(entry["tests"])})) for entry in entries]


def compare(stock: Outcomes, ours: Outcomes, allowed: list[Allowed]) -> Comparison:
    """Judge every test that passes with the peer alone, by what it does with ours.

    Args:
        stock: outcomes with the peer alone; ours where there is no such run, and then every test counts.
        ours: outcomes with ours in its place.
        allowed: the refusals of this suite.
    """
    result = Comparison()
    used = set()
    for test, before in stock.items():
        if before["outcome"] != "passed" and stock is not ours:
            result.not_compared[_first_line(before)] += 1
            continue
        after = ours.get(test, {"outcome": "missing", "message": "did not run"})
        if after["outcome"] == "passed":
            result.agreed.append(test)
        elif after["outcome"] == "skipped" and stock is ours:
            result.not_compared[_first_line(after)] += 1
        elif entry := next((entry for entry in allowed if entry.covers(test, after["message"])), None):
            result.allowed[entry.reason] += 1
            used.add(entry)
        else:
            result.failed[test] = f"{after['outcome']}: {after['message']}"
    result.stale = [entry.reason for entry in allowed if entry not in used]
    return result


def _first_line(outcome: dict[str, str]) -> str:
    return f"{outcome['outcome']}: {outcome['message'].partition(chr(10))[0]:.160}"
