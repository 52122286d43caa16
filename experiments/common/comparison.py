"""Compare several forms of one encoder on the same input: with an fp64 reference first; what is right is then timed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm
from vit_kernels.testing import assert_close_to_reference

from experiments.common.measure import Call, Measurement, interleaved, timed

ALLOWED_EPS = 32
"""The largest relative RMS error that a form may have, in units of the dtype's eps.

A residual network that does not amplify its roundings stays within a few eps at any depth: with this project's random
weights 4 to 9 eps were measured at 2 to 34 layers, in float32 and in bfloat16.
"""


@dataclass(frozen=True)
class Error:
    """The error of some features, relative to the RMS of the reference's features."""

    rms: float
    maximum: float


@dataclass
class Row:
    """The results of one form of the encoder; `problem` says why it is not timed."""

    name: str
    first_call_seconds: float | None = None
    features: Tensor | None = None
    error: Error | None = None
    problem: str | None = None
    timing: Measurement = field(default_factory=Measurement)


def compare(
    calls: Mapping[str, Call],
    expected: Tensor,
    *,
    baseline: str,
    device: torch.device,
    rounds: int | None,
    known_problems: Mapping[str, str] = {},
) -> list[Row]:
    """Call each form once, judge its features, and time those that are right in interleaved rounds.

    Every form must be within ALLOWED_EPS of the reference, and within the tolerance rule of `vit_kernels.testing` (at
    most twice the error of PyTorch in the same precision) of what the baseline makes.

    Args:
        calls: the call of each form by its name, which returns features.
        expected: the reference's features, float64.
        baseline: the name of the form whose error the others may have twice.
        device: the device that the calls run on.
        rounds: as for `interleaved`.
        known_problems: what an earlier check found wrong with a form, by its name; such a form is not timed.
    """
    rows = _first_calls(calls, device)
    for row in rows.values():
        if row.features is not None:
            row.error = relative_error(row.features, expected)
            row.problem = _judge(row.error, row.features, rows[baseline].features, expected)
        row.problem = row.problem or known_problems.get(row.name)
    right = {name: calls[name] for name, row in rows.items() if row.problem is None}
    for name, measurement in interleaved(right, device, rounds=rounds).items():
        rows[name].timing = measurement
    return list(rows.values())


def relative_error(actual: Tensor, expected: Tensor) -> Error:
    """Return the RMS and the maximum of the difference, both divided by the RMS of `expected`."""
    error = (actual.double() - expected).abs()
    scale = expected.square().mean().sqrt()
    return Error((error.square().mean().sqrt() / scale).item(), (error.max() / scale).item())


def _first_calls(calls: Mapping[str, Call], device: torch.device) -> dict[str, Row]:
    rows = {name: Row(name) for name in calls}
    with tqdm(rows.values(), desc="first calls", unit="call", mininterval=1) as progress:
        for row in progress:
            progress.set_postfix_str(row.name)
            # A compiler or an allocator that fails, or a graph that is not whole, costs one row and not the others.
            try:
                row.features, row.first_call_seconds = timed(calls[row.name], device)
            except (RuntimeError, AssertionError) as error:
                row.problem = f"{type(error).__name__}: {first_line(error)}"
    return rows


def first_line(error: Exception) -> str:
    """Return the first line of an error's message that is not blank."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _judge(error: Error, features: Tensor, baseline: Tensor | None, expected: Tensor) -> str | None:
    limit = ALLOWED_EPS * torch.finfo(features.dtype).eps
    if not (math.isfinite(error.maximum) and error.rms <= limit):
        return f"RMS error {error.rms:.2g} of the features, expected at most {ALLOWED_EPS} eps = {limit:.2g}"
    if baseline is None:
        return "nothing to compare with: the baseline failed"
    try:
        assert_close_to_reference(features, expected, baseline)
    except AssertionError as difference:
        return first_line(difference)
    return None
