"""What every command has: a parser, a console, a folder for its results, and the file that it writes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from rich.console import Console

from experiments.common.environment import environment

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "experiments/results"
LOCAL = COMMITTED / "local"
"""The default folder of results, which git ignores."""


def parser(
    prog: str,
    description: str | None,
    *,
    arguments: str = "[options]",
    examples: str = "",
    statuses: Mapping[int, str] = {},
) -> argparse.ArgumentParser:
    """Make a parser whose help shows the examples and what each exit status means.

    Args:
        prog: what is typed before the arguments.
        description: the module's docstring.
        arguments: what the usage line has after `prog`.
        examples: lines in which %(prog)s stands for `prog`.
        statuses: the meaning of each exit status; that of 2, bad arguments, is added.
    """
    sections = ["examples:\n" + examples.rstrip("\n")] if examples else []
    if statuses:
        meanings = {2: "bad arguments", **statuses}
        sections.append("exit status:\n" + "\n".join(f"  {status}  {meanings[status]}" for status in sorted(meanings)))
    return argparse.ArgumentParser(
        prog=prog,
        usage=f"%(prog)s {arguments}",
        description=description,
        epilog="\n\n".join(sections),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # A shortened option would slip past what looks for the whole one.
        allow_abbrev=False,
    )


def add_out(parser: argparse.ArgumentParser, what: str = "JSON") -> None:
    """Add `--out`, the folder for what a command writes."""
    parser.add_argument("--out", type=Path, default=LOCAL, help=f"folder for the {what} (default: %(default)s)")


def positive(text: str) -> int:
    """Convert the text of an option that takes a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive integer")
    return int(text)


def console(width: int = 160, *, markup: bool = True) -> Console:
    """Make a console that is as wide as the terminal, or `width` where there is none."""
    return Console(width=None if sys.stdout.isatty() else width, highlight=False, markup=markup)


def result(experiment: str, **content: Any) -> dict[str, Any]:
    """Return what an experiment found with its name and the environment that it ran in."""
    return {"experiment": experiment, "environment": environment(), **content}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file and make its folder; dataclasses become objects, NaN and infinities become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """Convert dataclasses, mappings, sequences, numbers and strings to what the json module writes."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parsed(kind: Any, value: Any) -> Any:
    """Convert what `plain` made of a value of this type back: of a dataclass, a list, or either of them or None.

    Raises:
        TypeError: a field is missing or unknown.
    """
    if dataclasses.is_dataclass(kind):
        types = get_type_hints(kind)
        return kind(**{name: parsed(types[name], part) for name, part in value.items()})  # type: ignore[operator]
    if get_origin(kind) is list:
        return [parsed(get_args(kind)[0], part) for part in value]
    if get_origin(kind) is UnionType and value is not None:
        return parsed(get_args(kind)[0], value)
    return value
