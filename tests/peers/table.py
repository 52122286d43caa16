"""The last result of each suite: a JSON file, and the same as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.peers.comparison import Comparison


def record(
    comparison: Comparison, *, source: str, versions: dict[str, str], date: str, seconds: float
) -> dict[str, Any]:
    """A suite's result, ready for JSON; failures are named, agreements counted."""
    return {
        "source": source,
        "date": date,
        "versions": versions,
        "seconds": round(seconds),
        "agreed": len(comparison.agreed),
        "allowed": dict(sorted(comparison.allowed.items())),
        "failed": dict(sorted(comparison.failed.items())),
        "stale": comparison.stale,
        "not_compared": dict(sorted(comparison.not_compared.items())),
    }


def write_results(records: dict[str, dict[str, Any]], folder: Path) -> None:
    """Write peers.json and peers.md; suites that did not run this time keep their last result."""
    path = folder / "peers.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = dict(sorted((known | records).items()))
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    (folder / "peers.md").write_text(_table(known), encoding="utf-8")


def _table(records: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# Peers' own suites on ours",
        "",
        "Written by `./scripts/test_peers.sh`. A test counts as agreed where it passes with the peer alone and with",
        "ours; as allowed where ours refuses it for a reason of `tests/peers/allowed.toml`; as not compared where it",
        "is skipped or fails with the peer alone too, and, in the sweep, where a class has no small model.",
        "",
        "| suite | from | date | agreed | allowed | failed | not compared | s |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for suite, result in records.items():
        counts = (
            result["agreed"], sum(result["allowed"].values()), len(result["failed"]),
            sum(result["not_compared"].values()), result["seconds"],
        )  # fmt: skip
        lines.append(" | ".join(("| " + suite, result["source"], result["date"], *map(str, counts))) + " |")
    lines += ["", "## What is allowed, and why", ""]
    lines += [
        f"- {suite}, {count}: {reason}"
        for suite, result in records.items()
        for reason, count in result["allowed"].items()
    ]
    lines += ["", "## With", ""]
    for suite, result in records.items():
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        lines.append(f"- {suite}: {versions}")
    return "\n".join(lines) + "\n"
