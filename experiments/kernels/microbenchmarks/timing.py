"""Seconds of short calls that are compared with each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Run = Callable[[], object]
Timer = Callable[[Run], float]

_CPU_CALLS = 3
_CUDA_WARM_UP_MS, _CUDA_MS = 3, 15


def timer_for(device: torch.device) -> Timer:
    """Return what gives the seconds of one run, as a median of several.

    On a GPU: Triton's do_bench, between events on the stream, with the L2 cache overwritten before each run, so that
    every run reads from HBM. On a CPU: the clock around the call; nothing is flushed.
    """
    return _cuda_seconds if device.type == "cuda" else _cpu_seconds


def _cuda_seconds(run: Run) -> float:
    from triton.testing import do_bench

    milliseconds: float = do_bench(run, warmup=_CUDA_WARM_UP_MS, rep=_CUDA_MS, return_mode="median")
    return milliseconds / 1e3


def _cpu_seconds(run: Run) -> float:
    samples = []
    for _ in range(_CPU_CALLS):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def interleaved_seconds(runs: Mapping[str, Run], timer: Timer, *, rounds: int) -> dict[str, list[float]]:
    """Time the runs in turn, round after round, each round beginning with another one.

    A machine that slows down, by heat or by other work, then slows all of them down.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for done in range(rounds if names else 0):
        first = done % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(timer(runs[name]))
    return seconds
