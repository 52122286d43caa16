"""Print what differs between two kernel reports, better or worse, such as those of two versions of Triton."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from experiments.common import cli
from experiments.kernels.check import FEWER_IS_BETTER, MORE_IS_BETTER, read_report
from experiments.kernels.row import Row

FIGURES = FEWER_IS_BETTER | MORE_IS_BETTER


def differences(before: Sequence[Row], after: Sequence[Row]) -> list[tuple[str, str]]:
    """Return each row that is in both reports and differs, with the figures that do."""
    known = {row.key: row for row in before}
    found = []
    for row in after:
        if (other := known.get(row.key)) is None:
            continue
        if row.figures is None or other.figures is None:
            changes = [] if row.error == other.error else [f"{other.error} -> {row.error}"]
        else:
            changes = [
                f"{name} {was} -> {now}"
                for name, read in FIGURES.items()
                if (was := read(other.figures)) != (now := read(row.figures))
            ]  # fmt: skip
        if changes:
            found.append((row.key, ", ".join(changes)))
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
    changed = differences(before.rows, after.rows)
    table = Table("row", f"triton {before.triton} -> {after.triton}")
    for cells in changed:
        table.add_row(*cells)
    console = cli.console()
    console.print(table)
    known = {row.key for row in before.rows}
    both = [row.figures for row in after.rows if row.key in known]
    spilling = sum(bool(of and of.spill_store_bytes + of.spill_load_bytes) for of in both)
    console.print(f"{len(changed)} of {len(both)} rows differ; {spilling} of the second report spill.")


if __name__ == "__main__":
    main()
