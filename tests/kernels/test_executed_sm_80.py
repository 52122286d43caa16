"""The compiled code of every kernel for sm_80, executed: right, within bounds, and without a race.

The tests that name no target run here too.
"""

import pytest

from tests.kernels.executed_process import assert_tests_pass

pytestmark = pytest.mark.costly


def test_executed_on_sm_80() -> None:
    assert_tests_pass("-k", "not sm_90")


@pytest.mark.thorough
def test_every_mutant_and_layout_on_sm_80() -> None:
    assert_tests_pass("-k", "sm_80", "-m", "thorough")
