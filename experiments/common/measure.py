"""Time and memory of calls that are compared with each other."""

from __future__ import annotations

import contextlib
import mmap
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

Call = Callable[[], Tensor]

MIN_ROUNDS, MAX_ROUNDS, ROUND_SECONDS = 2, 20, 45.0
"""Without a number of rounds, another one starts while they took less than ROUND_SECONDS together."""

_SAMPLING_SECONDS = 0.02
_STATM = Path("/proc/self/statm")


@dataclass
class Peak:
    """The most memory seen, in bytes; None where the system does not tell."""

    nbytes: int | None = None

    def include(self, nbytes: int | None) -> None:
        """Take another sample into account."""
        if nbytes is not None:
            self.nbytes = max(self.nbytes or 0, nbytes)


@dataclass
class Measurement:
    """The calls of one contender."""

    seconds: list[float] = field(default_factory=list)
    peak: Peak = field(default_factory=Peak)


def timed(call: Call, device: torch.device) -> tuple[Tensor, float]:
    """The call's result and its seconds, all work on the device included."""
    _synchronise(device)
    start = time.perf_counter()
    result = call()
    _synchronise(device)
    return result, time.perf_counter() - start


def interleaved(calls: Mapping[str, Call], device: torch.device, *, rounds: int | None) -> dict[str, Measurement]:
    """Time the calls in turn, round after round, so that a machine that slows down slows all of them down.

    Each round starts with another call. With `rounds` None there are MIN_ROUNDS to MAX_ROUNDS of them, as many as
    fit in about ROUND_SECONDS.
    """
    measurements = {name: Measurement() for name in calls}
    names = list(calls)
    if not names:
        return measurements
    start = time.perf_counter()
    with tqdm(total=rounds and rounds * len(names), desc="timing", unit="call", mininterval=1) as progress:
        for done in range(rounds or MAX_ROUNDS):
            if rounds is None and done >= MIN_ROUNDS and time.perf_counter() - start > ROUND_SECONDS:
                break
            for name in names[done % len(names) :] + names[: done % len(names)]:
                progress.set_postfix_str(f"round {done + 1}, {name}")
                with peak_memory(device) as peak:
                    _, seconds = timed(calls[name], device)
                measurements[name].seconds.append(seconds)
                measurements[name].peak.include(peak.nbytes)
                progress.update()
    return measurements


def summary(samples: list[float]) -> dict[str, float | list[float]]:
    """Median, extremes and the samples themselves."""
    return {"median": statistics.median(samples), "low": min(samples), "high": max(samples), "samples": samples}


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """The most memory held in the block: allocated on a GPU, resident in the whole process on a CPU (Linux only)."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.include(torch.cuda.max_memory_allocated(device))
        return
    finished = threading.Event()
    sampler = threading.Thread(target=_sample, args=(peak, finished), daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        finished.set()
        sampler.join()


def _sample(peak: Peak, finished: threading.Event) -> None:
    peak.include(_resident_bytes())
    while not finished.wait(_SAMPLING_SECONDS):
        peak.include(_resident_bytes())


def _resident_bytes() -> int | None:
    if not _STATM.exists():
        return None
    return int(_STATM.read_text().split()[1]) * mmap.PAGESIZE


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
