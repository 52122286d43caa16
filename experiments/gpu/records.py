"""What a report found, one JSON line a finding: appended and flushed at once, so that being killed loses nothing."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Records:
    """Appends lines to a file; several processes may do so at once.

    Args:
        path: of the file.
        fields: of every line.
    """

    def __init__(self, path: Path, **fields: Any) -> None:
        self.path = path
        self.fields = fields

    def write(self, kind: str, **fields: Any) -> None:
        """Append a line; what JSON lacks, NaN and infinities, becomes null."""
        record = {"kind": kind, **self.fields, **fields, "at": round(time.time(), 3)}
        line = json.dumps(_plain(record), allow_nan=False, default=str) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def doing(self, what: str) -> None:
        """Note what is tried next: the last of these names what a process died of."""
        self.write("doing", what=what)


def read(path: Path) -> list[Record]:
    """All lines of a file but those that were cut off; none where there is no file."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "kind" in record:
            found.append(record)
    return found


def latest(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Each case's lines since it last began, in the order in which the cases first began."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if (case := record.get("case")) is not None:
            if record["kind"] == "begin":
                found[case] = []
            found.setdefault(case, []).append(record)
    return found


def of_kind(records: Iterable[Record], *kinds: str) -> list[Record]:
    """Those lines."""
    return [record for record in records if record["kind"] in kinds]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
