"""Measure the time and memory of calls that are compared with each other."""

from __future__ import annotations

import contextlib
import mmap
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

Call = Callable[[], Tensor]
Run = Callable[[], object]
Timer = Callable[[Run], float]
Contender = TypeVar("Contender")

MIN_ROUNDS, MAX_ROUNDS, ROUND_SECONDS = 2, 20, 45.0
"""Where no number of rounds is given, another one starts while they took less than ROUND_SECONDS together."""

_CPU_CALLS = 3
_CUDA_WARM_UP_MS, _CUDA_MS = 3, 15
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
    """The seconds of each call of one contender, and its peak memory."""

    seconds: list[float] = field(default_factory=list)
    peak: Peak = field(default_factory=Peak)


def timed(call: Call, device: torch.device) -> tuple[Tensor, float]:
    """Return the call's result and its seconds, which include all work on the device."""
    _synchronise(device)
    start = time.perf_counter()
    result = call()
    _synchronise(device)
    return result, time.perf_counter() - start


def in_turn(contenders: Sequence[Contender], rounds: int | None) -> Iterator[tuple[int, Contender]]:
    """Give every contender with the number of its round, from 0; each round begins with another contender.

    A machine that slows down, by heat or by other work, then slows all of them down. With `rounds` None there are
    MIN_ROUNDS to MAX_ROUNDS of them, as many as fit in about ROUND_SECONDS.
    """
    start = time.perf_counter()
    for done in range(rounds or MAX_ROUNDS):
        if rounds is None and done >= MIN_ROUNDS and time.perf_counter() - start > ROUND_SECONDS:
            return
        first = done % max(1, len(contenders))
        for contender in (*contenders[first:], *contenders[:first]):
            yield done, contender


def interleaved(calls: Mapping[str, Call], device: torch.device, *, rounds: int | None) -> dict[str, Measurement]:
    """Measure single calls `in_turn`, each long enough to be timed alone, such as one of a whole encoder."""
    measurements = {name: Measurement() for name in calls}
    with tqdm(total=rounds and rounds * len(calls), desc="timing", unit="call", mininterval=1) as progress:
        for done, name in in_turn(list(calls), rounds):
            progress.set_postfix_str(f"round {done + 1}, {name}")
            with peak_memory(device) as peak:
                _, seconds = timed(calls[name], device)
            measurements[name].seconds.append(seconds)
            measurements[name].peak.include(peak.nbytes)
            progress.update()
    return measurements


def interleaved_seconds(runs: Mapping[str, Run], timer: Timer, *, rounds: int) -> dict[str, list[float]]:
    """Measure short runs `in_turn`, such as of a kernel; a sample is what `timer` gives for one."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _, name in in_turn(list(runs), rounds):
        seconds[name].append(timer(runs[name]))
    return seconds


def timer_for(device: torch.device) -> Timer:
    """Return a function that gives the seconds of one run, as the median of several.

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


@dataclass(frozen=True)
class Spread:
    """Seconds of several calls: their median and extremes, and the samples themselves."""

    median: float
    low: float
    high: float
    samples: list[float]


def spread(samples: list[float]) -> Spread:
    """Return the spread of some samples."""
    return Spread(statistics.median(samples), min(samples), max(samples), samples)


@contextlib.contextmanager
def empty_caches() -> Iterator[None]:
    """Have what is called in the block compile, whatever was compiled before, in this process or on disk.

    Dynamo's graphs, Inductor's and Triton's files and the binaries of this project's kernels are forgotten.
    """
    from torch._inductor.utils import fresh_cache

    torch.compiler.reset()
    for name, module in list(sys.modules.items()):
        if name.startswith("vit_kernels._triton."):
            for kernel in vars(module).values():
                # Triton's own name, in every version from 3.6 to 3.9; an interpreted kernel has none.
                getattr(kernel, "device_caches", {}).clear()
    with fresh_cache():
        yield


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of the block: allocated on a GPU, resident in the whole process on a CPU (Linux only)."""
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
