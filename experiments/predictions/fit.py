"""Fitting positive parameters to measured times, and the errors of a prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
STEPS = 200
FLOOR = 0.02
"""An error below this weighs no more than this: 2 % is what measurements of one kernel differ by."""


@dataclass(frozen=True)
class Errors:
    """Of predictions, relative to the measured times.

    Attributes:
        count: rows.
        bias: median of predicted / measured - 1.
        median, ninetieth: percentiles of its absolute value.
    """

    count: int
    bias: float
    median: float
    ninetieth: float


def errors(predicted: Sequence[float], measured: Sequence[float]) -> Errors:
    """Errors of at least one prediction, rounded to a tenth of a percent."""
    relative = np.array(predicted) / np.array(measured) - 1
    away = np.abs(relative)
    median, ninetieth = np.median(away), np.quantile(away, 0.9)
    return Errors(len(relative), *(round(float(value), 3) for value in (np.median(relative), median, ninetieth)))


def fit(predict: Callable[[Floats], Floats], measured: Floats, start: Sequence[float]) -> list[float]:
    """The positive parameters whose predictions have the least sum of absolute log errors, near `start`.

    Levenberg's method on reweighted squares, so that a few odd measurements do not pull.

    Args:
        predict: seconds of every row by the parameters.
        measured: seconds of every row.
        start: parameters to begin with.

    Returns:
        The parameters, to four significant digits.
    """
    logs, damping = np.log(np.asarray(start, dtype=np.float64)), 1e-3
    target = np.log(measured)

    def residuals(at: Floats) -> Floats:
        return np.asarray(np.log(predict(np.exp(at))) - target)

    error = residuals(logs)
    for _ in range(STEPS):
        slopes = np.stack([(residuals(logs + shift) - error) / 1e-4 for shift in 1e-4 * np.eye(len(logs))], axis=1)
        weights = 1 / np.sqrt(np.maximum(np.abs(error), FLOOR))
        left, right = slopes * weights[:, None], error * weights
        step = np.linalg.solve(left.T @ left + damping * np.eye(len(logs)), -left.T @ right)
        moved = residuals(logs + step)
        if np.abs(moved).sum() < np.abs(error).sum():
            logs, error, damping = logs + step, moved, max(damping / 3, 1e-9)
        elif damping > 1e8:
            break
        else:
            damping *= 4
    return [float(f"{value:.4g}") for value in np.exp(logs)]
