"""Contenders of a case: judged first, timed only if right, in turn with the device's ceilings."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

import torch
from vit_kernels.testing import assert_close_to_reference

from experiments.common.measure import Run, Timer, interleaved_seconds
from experiments.kernels.microbenchmarks.cases import BACKENDS, OURS, PEERS, Call, Case, Results, Setting

ROUNDS = 7
COPY, MATMUL = "copy", "matmul"


@dataclass
class Outcome:
    """A contender's seconds, or why it has none: it is `absent` here, or it failed."""

    absent: str | None = None
    problem: str | None = None
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in the same rounds.

    Attributes:
        copy: bytes read and written by one copy of a large tensor.
        matmul: FLOPs of one square product in the dtype of the case.
        copy_seconds, matmul_seconds: of each round.
    """

    copy: int
    matmul: int
    copy_seconds: list[float]
    matmul_seconds: list[float]


def absence(contender: str, device: torch.device) -> str | None:
    """Why a contender cannot run here, or None."""
    if contender in PEERS and importlib.util.find_spec(contender) is None:
        return f"{contender} is not installed"
    if device.type != "cuda" and contender in BACKENDS:
        return "needs a GPU"
    if device.type != "cuda" and contender in (OURS, *PEERS):
        return "needs a GPU: interpreted kernels are never timed"
    return None


def compare(case: Case, names: tuple[str, ...], setting: Setting, timer: Timer) -> tuple[dict[str, Outcome], Ceilings]:
    """Judge, then time in interleaved rounds, so that drift reaches contenders and ceilings alike."""
    outcomes = {name: Outcome(absent=absence(name, setting.device)) for name in names}
    baseline = case.calls[case.baseline]()()
    runs: dict[str, Run] = {}
    for name, outcome in outcomes.items():
        if outcome.absent is None:
            try:
                call = case.calls[name]()
                outcome.problem = judge(call, case.expected, baseline)
                runs |= {} if outcome.problem else {name: call}
            # A peer of another version may raise anything; it must not keep the others from being measured.
            except Exception as error:
                outcome.problem = f"failed: {type(error).__name__}: {error}"
    copied, multiplied, limits = ceilings(setting.device, setting.dtype)
    seconds = interleaved_seconds(runs | limits, timer, rounds=ROUNDS)
    for name in runs:
        outcomes[name].seconds = seconds[name]
    return outcomes, Ceilings(copied, multiplied, seconds[COPY], seconds[MATMUL])


def judge(call: Call, expected: Results, pytorch: Results) -> str | None:
    """What is wrong with the results of the first call, by the rule of `vit_kernels.testing`; None if nothing is."""
    try:
        for actual, exact, same_precision in zip(call(), expected, pytorch, strict=True):
            assert_close_to_reference(actual, exact, same_precision)
    except AssertionError as error:
        return f"wrong: {error}"
    return None


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[int, int, dict[str, Run]]:
    """The bytes of a copy, the FLOPs of a product of `dtype`, and their runs."""
    on_gpu = device.type == "cuda"
    source = torch.ones(2**30 if on_gpu else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = 8192 if on_gpu else 1024
    # Random, since a GPU's clock, and with it the ceiling, depends on how many bits change; drawn where it is fast.
    a, b = torch.randn(2, side, side, dtype=dtype, device=device)
    product = torch.empty_like(a)
    runs: dict[str, Run] = {COPY: lambda: target.copy_(source), MATMUL: lambda: torch.mm(a, b, out=product)}
    return 2 * source.nbytes, 2 * side**3, runs
