"""Benchmarks are on in this folder, and its results name no machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from experiments.common.environment import environment
from experiments.kernels.tune import interpreted


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Turn on what the project's configuration turns off for its tests.

    Raises:
        UsageError: kernels would be interpreted on a GPU.
    """
    if torch.cuda.is_available() and interpreted():
        raise pytest.UsageError(
            "TRITON_INTERPRET is 1 (tests/ sets it), expected 0: interpreted kernels are never timed"
        )
    config.option.benchmark_enable = True


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """What the results depend on, instead of pytest-benchmark's list, which names the host."""
    return environment()


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    """Nothing: the environment has the commit, and pytest-benchmark adds the folder's and the branch's names."""
    return {}
