"""Peers' test files as modules: loaded from where they lie, since they are installed nowhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TRANSFORMERS = "transformers_tests"
# What transformers' source distribution lacks of the packages that its common tests import; a checkout has them.
_LACKING = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def load_package(name: str, folder: Path) -> None:
    """Make a folder of Python files importable as the package `name`, with what its files import relatively."""
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def load_transformers_tests(folder: Path) -> None:
    """Make `tests` of transformers' source distribution or checkout importable as `transformers_tests`."""
    load_package(TRANSFORMERS, folder / "tests")
    for name, mixin in _LACKING.items():
        if not (folder / "tests" / name.replace(".", "/")).with_suffix(".py").is_file():
            parent, _, _ = name.partition(".")
            load_package(f"{TRANSFORMERS}.{parent}", folder / "tests" / parent)
            module = ModuleType(f"{TRANSFORMERS}.{name}")
            setattr(module, mixin, type(mixin, (), {}))
            sys.modules[module.__name__] = module


def load_file(name: str, path: Path, replacements: dict[str, str] | None = None) -> ModuleType:
    """Import a test file as the module `name`, its source changed by the replacements.

    Raises:
        ValueError: the source does not hold what is to be replaced: another version of the suite.
    """
    source = path.read_text(encoding="utf-8")
    for old, new in (replacements or {}).items():
        if old not in source:
            raise ValueError(f"{path.name}: got a file without {old!r}, expected a version of the suite that has it")
        source = source.replace(old, new)
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def narrow_parameters(test: Callable[..., None], kept: dict[str, Callable[[Any], bool]]) -> None:
    """Leave a parametrised test only those values of the named arguments that `kept` says yes to.

    Arguments that are parametrised together are named as in their mark: "seqlen_q,seqlen_k". Names that the test does
    not take are none of its business.
    """
    marks: list[pytest.Mark] = test.pytestmark  # type: ignore[attr-defined]
    test.pytestmark = [  # type: ignore[attr-defined]
        pytest.mark.parametrize(mark.args[0], [value for value in mark.args[1] if kept[mark.args[0]](value)]).mark
        if mark.name == "parametrize" and mark.args[0] in kept
        else mark
        for mark in marks
    ]


def cases_of(module: ModuleType) -> Iterator[tuple[str, type]]:
    """The unittest classes that a module defines itself."""
    for name, thing in vars(module).items():
        if isinstance(thing, type) and thing.__module__ == module.__name__ and hasattr(thing, "run"):
            yield name, thing
