"""Record what the tests did under the versions of this Python: python scripts/record_versions.py NAME JUNIT_XML...

A row of experiments/results/versions.json is replaced or added, and the table beside it, versions.md, is written anew.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.common.environment import environment

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "experiments/results/versions.json"
PACKAGES = ("torch", "triton", "torchvision", "transformers", "numpy")
FOLDERS = ("kernels", "compilation", "encoder", "integrations", "experiments")

HEADER = """# Versions

What ran, on CPUs: tests of a folder that passed, failed or were skipped, by what was installed. Written by
`scripts/record_versions.py`, which `./scripts/test_versions.sh` calls, from `versions.json`, which has the dates and
commits. Tested are these versions; others between the oldest and the newest are expected to do, and beyond them the
import of `vit_kernels` warns, once. Tests that need a GPU are among the skipped ones."""


def main(arguments: list[str] | None = None) -> int:
    """Add the row, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the row")
    parser.add_argument(
        "xml", nargs="+", type=Path, help="what pytest --junitxml wrote; of two runs of a test the last"
    )
    options = parser.parse_args(arguments)
    if missing := [path for path in options.xml if not path.is_file()]:
        parser.error(f"xml: got {missing[0]}, expected a file that pytest --junitxml wrote")
    row = {"name": options.name, **versions(), "tests": counts(options.xml)}
    known = json.loads(RECORD.read_text(encoding="utf-8"))
    rows = {each["name"]: each for each in known["rows"]} | {options.name: row}
    known["rows"] = [rows[name] for name in sorted(rows)]
    RECORD.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    RECORD.with_suffix(".md").write_text(table(known), encoding="utf-8")
    return 0


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    columns = ("Python", *PACKAGES, *(f"tests/{folder}" for folder in FOLDERS))
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
    for row in record["rows"]:
        cells = [row["python"], *(row["packages"][name] or "-" for name in PACKAGES)]
        cells += [_cell(row["tests"].get(folder), folder) for folder in FOLDERS]
        lines.append(f"| {' | '.join(cells)} |")
    engines = [f"| vLLM {row['version']} | {row['modes']} | {row['state']} | {row['how']} |" for row in record["vllm"]]
    return "\n".join(
        (HEADER, "", *lines, "", "| engine | modes | state | how |", "| --- | --- | --- | --- |", *engines, "")
    )


def _cell(count: dict[str, int] | None, folder: str) -> str:
    """What passed of a folder; which files ran is said where some did not."""
    if count is None:
        return "not run"
    files = len([path for path in (ROOT / "tests" / folder).glob("test_*.py") if "vllm" not in path.name])
    parts = [f"{count['passed']} passed"]
    parts += [f"{count[outcome]} {outcome}" for outcome in ("failed", "skipped") if count[outcome]]
    parts += [f"of {count['files']} of {files} files"] if count["files"] < files else []
    return ", ".join(parts)


def versions() -> dict[str, Any]:
    """Of Python and of the packages that matter, when, and at which commit."""
    found = environment()
    packages = {name: found["packages"][name] for name in PACKAGES}
    return {"date": found["date"][:10], "git": found["git"], "python": found["python"], "packages": packages}


def counts(files: list[Path]) -> dict[str, dict[str, int]]:
    """How many tests passed, failed and were skipped, and in how many files, by their folder in tests/."""
    outcomes: dict[tuple[str, str], str] = {}
    for path in files:
        for case in ElementTree.parse(path).iter("testcase"):
            failed = case.find("failure") is not None or case.find("error") is not None
            outcome = "failed" if failed else "skipped" if case.find("skipped") is not None else "passed"
            outcomes[case.attrib["classname"], case.attrib["name"]] = outcome
    found: dict[str, Counter[str]] = {}
    modules: dict[str, set[str]] = {}
    for (module, _), outcome in sorted(outcomes.items()):
        folder = module.split(".")[1]
        found.setdefault(folder, Counter(passed=0, failed=0, skipped=0))[outcome] += 1
        modules.setdefault(folder, set()).add(module)
    return {folder: {"files": len(modules[folder]), **counter} for folder, counter in found.items()}


if __name__ == "__main__":
    sys.exit(main())
