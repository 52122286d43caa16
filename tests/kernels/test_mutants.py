"""Every mutant of the kernels fails a check, or is listed with the reason why it is no error."""

import hashlib
import itertools
import tomllib
from pathlib import Path

import pytest

from tests.kernels.mutant_checks import killer
from tests.kernels.mutants import MODULES, Mutant, mutants_of, source_of

pytestmark = pytest.mark.costly

SAMPLE_OF_A_FUNCTION = 2

MUTANTS = {
    function: tuple(group)
    for module in MODULES
    for function, group in itertools.groupby(mutants_of(module), lambda mutant: mutant.name.partition(":")[0])
}
EQUIVALENT = {
    name: entry["reason"]
    for entry in tomllib.loads((Path(__file__).parent / "equivalent_mutants.toml").read_text(encoding="utf-8"))[
        "because"
    ]
    for name in entry["mutants"]
}


def sample(function: str) -> list[Mutant]:
    """A fixed choice that edits elsewhere in the function leave as it is."""
    judged = [mutant for mutant in MUTANTS[function] if mutant.name not in EQUIVALENT]
    return sorted(judged, key=lambda mutant: hashlib.sha256(mutant.name.encode()).digest())[:SAMPLE_OF_A_FUNCTION]


@pytest.mark.parametrize("module", MODULES)
def test_intact_kernels_pass_the_checks(module: str) -> None:
    assert killer(Mutant(module, "intact", source_of(module))) is None


@pytest.mark.parametrize("function", MUTANTS)
def test_a_sample_of_mutants_is_killed(function: str) -> None:
    assert not [mutant.name for mutant in sample(function) if killer(mutant) is None]


@pytest.mark.thorough
@pytest.mark.parametrize("function", MUTANTS)
def test_every_mutant_is_killed_unless_equivalent(function: str) -> None:
    survivors = {mutant.name for mutant in MUTANTS[function] if killer(mutant) is None}
    assert survivors == {name for name in EQUIVALENT if name.startswith(f"{function}:")}


def test_every_equivalent_mutant_exists() -> None:
    assert not EQUIVALENT.keys() - {mutant.name for mutants in MUTANTS.values() for mutant in mutants}


def test_names_are_unique() -> None:
    names = [mutant.name for mutants in MUTANTS.values() for mutant in mutants]
    assert len(names) == len(set(names))
