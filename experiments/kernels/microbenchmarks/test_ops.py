"""Each op and its backward against its eager form, torch.compile'd eager, PyTorch's attention and installed peers.

`pytest experiments/kernels/microbenchmarks` runs them.

All contenders of a case are judged, and those that are right timed in interleaved rounds, when the first of them is
asked for; pytest-benchmark then gets each one's samples. So drift reaches all of them alike, and only ratios within a
case are to be trusted. A peer, or a kernel of PyTorch's attention, that is wrong or fails is skipped with the reason;
another form fails.
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import pytest
import torch

from experiments.common.environment import environment
from experiments.common.measure import timer_for
from experiments.kernels.microbenchmarks.cases import BACKENDS, PEERS, Case, Setting, case_builders, contenders
from experiments.kernels.microbenchmarks.comparison import Ceilings, Outcome, compare

# Peers may warn as they like.
pytestmark = pytest.mark.filterwarnings("default")

SETTING = Setting(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
BUILDERS = case_builders(SETTING)


class Clock:
    """Gives pytest-benchmark, as its timer, samples that were taken before."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let a sample pass."""
        self.now += seconds


CLOCK = Clock()


# Only the last case stays in memory; the tests of a case follow each other.
@functools.lru_cache(maxsize=1)
def measured(name: str) -> tuple[Case, dict[str, Outcome], Ceilings]:
    case = BUILDERS[name]()
    with torch.no_grad():
        return case, *compare(case, contenders(name), SETTING, timer_for(SETTING.device))


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("name", "contender"), [(name, who) for name in BUILDERS for who in contenders(name)])
def test_op(benchmark: Any, name: str, contender: str) -> None:
    case, outcomes, ceilings = measured(name)
    outcome = outcomes[contender]
    if outcome.absent:
        pytest.skip(outcome.absent)
    if outcome.problem and contender in (*PEERS, *BACKENDS):
        pytest.skip(f"not timed: {outcome.problem}")
    assert outcome.problem is None, f"not timed: {outcome.problem}"
    benchmark.group = f"{name}: {case.sizes}"
    benchmark.extra_info.update(described(name, contender, case, outcome, ceilings))
    samples = iter(outcome.seconds)
    benchmark.pedantic(CLOCK.advance, setup=lambda: ((next(samples),), {}), rounds=len(outcome.seconds))


def described(name: str, contender: str, case: Case, outcome: Outcome, ceilings: Ceilings) -> dict[str, Any]:
    """The rates of a contender, and of the device in the same rounds."""
    seconds = statistics.median(outcome.seconds)
    gigabytes = ceilings.copy / statistics.median(ceilings.copy_seconds) / 1e9
    teraflops = ceilings.matmul / statistics.median(ceilings.matmul_seconds) / 1e12
    around = environment()
    return {
        "case": name,
        "sizes": case.sizes,
        "contender": contender,
        "device": ", ".join(device["name"] for device in around["devices"][:1]) or around["cpu"]["model"],
        "dtype": str(SETTING.dtype).removeprefix("torch."),
        "date": around["date"],
        "versions": {package: version for package, version in around["packages"].items() if version},
        "caches": "L2 overwritten before each run" if SETTING.device.type == "cuda" else "as the rounds leave them",
        "nbytes": case.nbytes,
        "flops": case.flops,
        "GB/s": case.nbytes / seconds / 1e9,
        "TFLOP/s": case.flops / seconds / 1e12,
        "measured copy GB/s": gigabytes,
        "measured matmul TFLOP/s": teraflops,
        "fraction of copy": case.nbytes / seconds / 1e9 / gigabytes,
        "fraction of matmul": case.flops / seconds / 1e12 / teraflops,
    }
