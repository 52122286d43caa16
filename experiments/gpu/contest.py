"""One op on one problem in every form: judged on the device, asked for the same bits twice, timed, and traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vit_kernels.testing import assert_close_to_reference

from experiments.common.measure import Run, interleaved_seconds
from experiments.gpu import machine
from experiments.gpu.records import Records
from experiments.kernels.microbenchmarks.cases import OURS, Call, Case, Results
from experiments.kernels.microbenchmarks.comparison import absence

ROUNDS = 5


def hold(
    records: Records, case: Case, names: Sequence[str], *, graphs: bool, trace_peers: bool = True, **problem: Any
) -> None:
    """Write what each contender computes and how fast it is.

    Args:
        records: where to.
        case: the problem.
        names: of the contenders, ours first.
        graphs: whether to time each as a CUDA graph too; autograd's backward cannot be captured by itself.
        trace_peers: whether the profiler is to see the others too, which takes it half a second each.
        problem: what names the problem, in every line.
    """
    problem = {"sizes": case.sizes, **problem}
    with torch.no_grad():
        baseline, wrong = machine.attempted(records, f"{case.baseline}, the baseline", case.calls[case.baseline]())
        if wrong:
            records.write("error", problem=f"the baseline, {case.baseline}: {wrong}", **problem)
            return
        calls = {name: call for name in names if (call := _judged(records, case, name, baseline, problem))}
        _time(records, calls, case, graphs, problem)
        for name, call in calls.items():
            if trace_peers or name == OURS:
                machine.write_kernels(records, _launching(name, call), form=name, **problem)


def _judged(records: Records, case: Case, name: str, baseline: Results, problem: dict[str, Any]) -> Call | None:
    """The contender's call where it is right; its judgement is written."""
    if why := _absence(name):
        records.write("absent", form=name, problem=why, **problem)
        return None

    def call_once() -> tuple[Call, Results]:
        with machine.launching():
            call = case.calls[name]()
            return call, call()

    made, wrong = machine.attempted(records, f"{name}, {problem}", call_once)
    if wrong:
        records.write("judged", form=name, problem=wrong, **problem)
        return None
    call, results = made
    wrong = wrong_of(results, case.expected, baseline)
    figures: dict[str, Any] = {
        "errors": errors(results, case.expected),
        "eager_errors": errors(baseline, case.expected),
    }
    if name == OURS:
        again, failed = machine.attempted(records, f"{name} again, {problem}", call_once)
        figures["same_bits"] = failed is None and same_bits(results, again[1])
        wrong = wrong or failed or (None if figures["same_bits"] else "another call gave other bits")
    records.write("judged", form=name, problem=wrong, **figures, **problem)
    return None if wrong else call


def _absence(name: str) -> str | None:
    if machine.rehearsing():
        return None if name in (OURS, "eager", "sdpa") else "rehearsal"
    return absence(name, machine.device())


def _launching(name: str, call: Run) -> Run:
    def run() -> object:
        with machine.launching():
            return call()

    # On a GPU nothing has to be arranged.
    return run if name == OURS and machine.rehearsing() else call


def _time(records: Records, calls: dict[str, Call], case: Case, graphs: bool, problem: dict[str, Any]) -> None:
    runs: dict[str, Run] = {name: _launching(name, call) for name, call in calls.items()}
    seconds, wrong = machine.attempted(
        records, f"time {', '.join(runs)}", lambda: interleaved_seconds(runs, machine.timer(), rounds=ROUNDS)
    )
    if wrong:
        records.write("error", problem=f"timing: {wrong}", **problem)
        return
    work = {"nbytes": case.nbytes, "flops": case.flops}
    for name, run in runs.items():
        figures: dict[str, Any] = {"us": [1e6 * x for x in seconds[name]], "host_us": 1e6 * machine.host_seconds(run)}
        records.write("timed", form=name, **figures, **work, **problem)
    for name, run in runs.items() if graphs else ():
        replay, wrong = machine.attempted(records, f"capture {name}", lambda run=run: machine.captured(run))  # type: ignore[misc]
        if wrong is None:
            times, wrong = machine.attempted(
                records,
                f"replay {name}",
                lambda replay=replay: interleaved_seconds({"": replay}, machine.timer(), rounds=ROUNDS)[""],  # type: ignore[misc]
            )
        found = {"problem": wrong} if wrong else {"us": [1e6 * x for x in times]}
        records.write("replayed", form=name, **found, **work, **problem)


def wrong_of(results: Results, expected: Results, baseline: Results) -> str | None:
    """What the tolerance rule of `vit_kernels.testing` finds wrong: more than twice PyTorch's error."""
    try:
        for actual, exact, same_precision in zip(results, expected, baseline, strict=True):
            assert_close_to_reference(actual, exact, same_precision)
    except AssertionError as error:
        return f"wrong: {error}"
    return None


def errors(results: Results, expected: Results) -> list[dict[str, float]]:
    """The RMS and the largest difference from the reference, over the reference's RMS, of each result."""
    return [error(actual, exact) for actual, exact in zip(results, expected, strict=True)]


def error(actual: Tensor, exact: Tensor) -> dict[str, float]:
    """As `errors`, of one result."""
    difference, scale = actual.double() - exact, exact.square().mean().sqrt()
    return {
        "rms": (difference.square().mean().sqrt() / scale).item(),
        "maximum": (difference.abs().max() / scale).item(),
    }


def same_bits(first: Results, second: Results) -> bool:
    """Whether two calls gave the same bits."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return all(
        torch.equal(*(x.contiguous().view(integers[x.element_size()]) for x in pair))
        for pair in zip(first, second, strict=True)
    )
