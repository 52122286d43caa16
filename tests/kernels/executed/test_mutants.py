"""Every barrier, wait and fence of every compiled kernel is needed, and its absence is found; see ptx_mutants.py."""

import tomllib
from pathlib import Path

import pytest

from tests.kernels.executed.ptx_mutants import CASES, outcomes

TARGETS = ("sm_80", "sm_90")
SURVIVORS = {
    mutant: because["reason"]
    for because in tomllib.loads(Path(__file__).with_name("surviving_mutants.toml").read_text("utf-8"))["because"]
    for mutant in because["mutants"]
}
"""Why nothing can tell that an instruction is gone."""


def survivors(target: str, case: str, every: int = 1) -> tuple[set[str], set[str]]:
    """Names of the mutants that were run, and of those that nothing told."""
    found = [(f"{target}, {case}: {kernel}: {site.name}", told) for kernel, site, told in outcomes(target, case, every)]
    names = {name for name, _ in found}
    assert len(names) == len(found)
    return names, {name for name, told in found if not told}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("case", "every"), [("norm", 1), ("product", 3), ("attention", 14)])
def test_a_sample_is_found_or_explained(target: str, case: str, every: int) -> None:
    run, survived = survivors(target, case, every)
    assert len(run) >= 3
    assert survived <= set(SURVIVORS)


@pytest.mark.thorough
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_every_one_is_found_or_explained(target: str, case: str) -> None:
    _, survived = survivors(target, case)
    assert survived == {name for name in SURVIVORS if name.startswith(f"{target}, {case}: ")}
