"""The device that a case runs on: a GPU, or in a rehearsal the CPU with Triton's interpreter in its place."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from vit_kernels import force_impl

from experiments.common.environment import environment
from experiments.common.measure import Run, Timer, timer_for
from experiments.gpu.records import Records

REHEARSAL = "VIT_KERNELS_REHEARSAL"
"""Where it is 1, tiny shapes are run in the interpreter; nothing that is timed so means anything."""

_HOST_CALLS = 20


class DeviceLostError(RuntimeError):
    """An error of CUDA after which no further call of this process can succeed."""


def rehearsing() -> bool:
    """Whether the CPU stands in for the GPU."""
    return os.environ.get(REHEARSAL) == "1"


def device() -> torch.device:
    """Where tensors are made."""
    return torch.device("cpu" if rehearsing() else "cuda")


def dtype() -> torch.dtype:
    """Of inputs and weights."""
    return torch.float32 if rehearsing() else torch.bfloat16


def import_compiler() -> None:
    """What takes seconds: before a case's turn. Where it fails, the case says so itself."""
    with contextlib.suppress(Exception):
        for name in ("torch._dynamo", "torch._inductor.compile_fx"):
            importlib.import_module(name)


def describe(records: Records) -> None:
    """Write what the report is run on."""
    found = environment()
    records.write("environment", environment=found, rehearsal=rehearsing(), cuda_built=torch.version.cuda)
    if rehearsing() or not found["devices"]:
        return
    free, total = torch.cuda.mem_get_info()
    x = torch.ones(1024, device="cuda")
    records.write("device answers", free_bytes=free, total_bytes=total, sum=x.sum().item(), state=_state())
    records.write("ceilings", **_ceilings())


def _state() -> str | None:
    """Driver, clocks, power and temperature, as the vendor's tool says; only read."""
    asked = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip()[:500] or None


def _ceilings() -> dict[str, float]:
    """What a large copy and a large product reach here: nothing else is faster."""
    from experiments.kernels.microbenchmarks.comparison import COPY, MATMUL, ceilings

    copied, multiplied, runs = ceilings(device(), dtype())
    seconds = {name: timer()(run) for name, run in runs.items()}
    return {"GB/s": copied / seconds[COPY] / 1e9, "TFLOP/s": multiplied / seconds[MATMUL] / 1e12}


@contextlib.contextmanager
def launching() -> Iterator[None]:
    """Our ops launch their kernels within it: of themselves on a GPU, in a rehearsal through the interpreter."""
    if not rehearsing():
        yield
        return
    from vit_kernels.testing import corrected_interpreter

    with corrected_interpreter(), force_impl("triton"):
        yield


def described(error: BaseException) -> str:
    """The error's type and the first line of its message that says something."""
    lines = (line.strip() for line in str(error).splitlines())
    return f"{type(error).__name__}: {next(filter(None, lines), 'no message')}"[:400]


def lost() -> str | None:
    """The error after which the GPU answers this process no more, or None."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return described(error)
    return None


def attempted(records: Records, what: str, call: Callable[[], Any]) -> tuple[Any, str | None]:
    """The result of a call, or what was wrong.

    Raises:
        DeviceLostError: nothing after it could succeed.
    """
    records.doing(what)
    try:
        result = call()
        synchronize()
        return result, None
    except Exception as error:
        if problem := lost():
            raise DeviceLostError(f"{what}: {problem}") from error
        return None, described(error)


def synchronize() -> None:
    """Wait for the device."""
    if not rehearsing():
        torch.cuda.synchronize()


def timer() -> Timer:
    """Seconds of one short run on the device, from a cold L2 cache; in a rehearsal of a single call."""
    return _one_call if rehearsing() else timer_for(device())


def _one_call(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def host_seconds(run: Run) -> float:
    """What a call keeps the host busy, which a GPU's time hides or not."""
    calls = 1 if rehearsing() else _HOST_CALLS
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    seconds = (time.perf_counter() - start) / calls
    synchronize()
    return seconds


def captured(run: Run) -> Run:
    """A run as a CUDA graph, whose replay takes next to no time of the host."""
    if rehearsing():
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # A capture that fails leaves its stream the current one: the outer block puts it back.
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return graph.replay


def kernels_of(run: Run) -> list[tuple[str, float]]:
    """Name and microseconds of every kernel, copy and fill that a run starts on the device, as the profiler saw them.

    After every timing: what the profiler hooks into launches stays there.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not rehearsing():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    run()
    synchronize()
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        run()
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return traced_kernels(json.loads(path.read_text(encoding="utf-8", errors="replace")))


def traced_kernels(trace: dict[str, Any]) -> list[tuple[str, float]]:
    """What ran on the device according to a trace in Chrome's format, in order."""
    categories = ("kernel", "gpu_memcpy", "gpu_memset")
    events = [event for event in trace["traceEvents"] if event.get("cat") in categories and event.get("ph") == "X"]
    return [(str(event["name"]), float(event["dur"])) for event in sorted(events, key=lambda event: event["ts"])]


def write_kernels(records: Records, run: Run, **fields: Any) -> None:
    """Write how many kernels a run starts, how long they take together, and the names of those that take most."""
    found, problem = attempted(records, f"profile {fields}", lambda: kernels_of(run))
    if problem:
        records.write("kernels", problem=problem, **fields)
        return
    seconds: Counter[str] = Counter()
    for name, microseconds in found:
        seconds[name[:160]] += microseconds
    records.write(
        "kernels",
        launches=len(found),
        us=sum(microseconds for _, microseconds in found),
        names=dict(seconds.most_common(8)),
        **fields,
    )
