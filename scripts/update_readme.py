"""Write the main job's results into README.md: python scripts/update_readme.py [--check].

Replaces what stands between the two markers by a table for each experiments/results/compile_encoder-*.json.
With --check nothing is written, and the exit status is 1 if something would be.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.encode.report import cutting, encoder_text, header, notes, table_rows

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- results: written by scripts/update_readme.py -->"
END = "<!-- end of results -->"


def main(arguments: list[str] | None = None) -> int:
    """Update or check the README and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, report by the exit status")
    options = parser.parse_args(arguments)
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    try:
        after = with_results(before, results_text(ROOT / "experiments" / "results"))
    except ValueError as error:
        parser.error(str(error))
    if not options.check:
        readme.write_text(after, encoding="utf-8")
        return 0
    return int(before != after)


def with_results(readme: str, results: str) -> str:
    """The README's text with the results between its markers.

    Raises:
        ValueError: the markers are not there once each.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md: expected one line {BEGIN!r} and one {END!r}")
    head, _, rest = readme.partition(BEGIN)
    return f"{head}{BEGIN}\n{results}\n{END}{rest.partition(END)[2]}"


def results_text(folder: Path) -> str:
    """Markdown of all results of the main job in a folder.

    Raises:
        ValueError: one of them says that something was wrong.
    """
    return "\n\n".join(_result_text(path) for path in sorted(folder.glob("compile_encoder-*.json")))


def _result_text(path: Path) -> str:
    result = json.loads(path.read_text(encoding="utf-8"))
    if not result["right"]:
        raise ValueError(f"{path.name}: got a result that is not right, expected one to be shown")
    columns = header(result)
    table = [columns, ["---"] + ["---:"] * (len(columns) - 1), *table_rows(result)]
    lines = [
        f"![The photograph, its features and the comparison]({path.with_suffix('.png').relative_to(ROOT).as_posix()})",
        "",
        f"{encoder_text(result)}. {cutting(result).capitalize()}.",
        f"{_measured_on(result['environment'])}.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in table),
        "",
        *(f"- {note}" for note in notes(result)),
    ]
    return "\n".join(lines)


def _measured_on(environment: dict[str, Any]) -> str:
    cpu, packages = environment["cpu"], environment["packages"]
    devices = ", ".join(device["name"] for device in environment["devices"])
    where = devices or f"{cpu['model']}, {cpu['threads']} threads, {cpu['capability']}"
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton", "transformers") if packages[name])
    return f"Measured on {environment['date'][:10]} on {where}, with Python {environment['python']}, {versions}"


if __name__ == "__main__":
    sys.exit(main())
