"""What differs between two kernel reports, better or worse, such as those of two versions of Triton."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from experiments.common import cli
from experiments.kernels.check import FEWER_IS_BETTER, MORE_IS_BETTER, Row, key_of, read_report, triton_version

FIGURES = FEWER_IS_BETTER | MORE_IS_BETTER
SPILLS = ("spill_store_bytes", "spill_load_bytes")


def differences(before: Sequence[Row], after: Sequence[Row]) -> list[tuple[str, str]]:
    """(row, the figures that differ) of the rows in both reports."""
    known = {key_of(row): row for row in before}
    found = []
    for row in after:
        if (other := known.get(key_of(row))) is None:
            continue
        if row["error"] or other["error"]:
            changes = [] if row["error"] == other["error"] else [f"{other['error']} -> {row['error']}"]
        else:
            changes = [
                f"{name} {was} -> {now}"
                for name, read in FIGURES.items()
                if (was := read(other)) != (now := read(row))
            ]  # fmt: skip
        if changes:
            found.append((key_of(row), ", ".join(changes)))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print the differences."""
    parser = cli.parser("python -m experiments.kernels.diff", __doc__, arguments="before after")
    parser.add_argument("before", type=Path, help="a report of experiments.kernels")
    parser.add_argument("after", type=Path, help="another one; only rows in both are compared")
    options = parser.parse_args(arguments)
    try:
        before, after = read_report(options.before), read_report(options.after)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    changed = differences(before["rows"], after["rows"])
    table = Table("row", f"triton {triton_version(before)} -> {triton_version(after)}")
    for cells in changed:
        table.add_row(*cells)
    console = cli.console()
    console.print(table)
    known = {key_of(row) for row in before["rows"]}
    both = [row for row in after["rows"] if key_of(row) in known]
    spilling = sum(not row["error"] and any(row[name] for name in SPILLS) for row in both)
    console.print(f"{len(changed)} of {len(both)} rows differ; {spilling} of the second report spill.")


if __name__ == "__main__":
    main()
