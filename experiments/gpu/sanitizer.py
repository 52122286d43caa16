"""compute-sanitizer over each op on tiny shapes: memcheck (memory that is not ours) and racecheck (shared memory)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.gpu import machine
from experiments.gpu.records import Records
from experiments.gpu.tiny import OPS

TOOLS = ("memcheck", "racecheck")
USUAL_PLACE = Path("/usr/local/cuda/bin/compute-sanitizer")
FOUND = 66
"""Exit status that says that the tool found something."""

AT_ONCE = 4
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: .*")


def run(records: Records) -> None:
    """Run every op plainly, which compiles it, and then under each tool."""
    found = shutil.which("compute-sanitizer") or (str(USUAL_PLACE) if USUAL_PLACE.exists() else None)
    if found is None:
        records.write("absent", form="compute-sanitizer", problem="not installed")
        return
    with ThreadPoolExecutor(1 if machine.rehearsing() else AT_ONCE) as pool:
        right = dict(zip(OPS, pool.map(lambda op: _plain(records, op), OPS), strict=True))
        pairs = [(tool, op) for tool in TOOLS for op in OPS if right[op]]
        for _ in pool.map(lambda pair: _checked(records, found, *pair), pairs):
            pass


def _plain(records: Records, op: str) -> bool:
    status, printed = _run(_command(op))
    if status:
        records.write("sanitized", tool="none", op=op, problem=f"exit status {status}: {_last(printed)}")
    return status == 0


def _checked(records: Records, sanitizer: str, tool: str, op: str) -> None:
    options = ["--tool", tool, "--target-processes", "application-only"]
    options += ["--error-exitcode", str(FOUND), "--print-limit", "20"]
    if tool == "memcheck":
        # PyTorch probes for what the driver lacks: errors of such calls are not the kernels'.
        options += ["--report-api-errors", "no"]
    status, printed = _run([sanitizer, *options, *_command(op)])
    print(f"== {tool} {op}: exit status {status}\n{printed}", flush=True)
    summaries = SUMMARY.findall(printed)
    problem = None
    if status == FOUND:
        errors = [line.removeprefix("=========").strip() for line in printed.splitlines() if line.startswith("====")]
        problem = "found: " + "; ".join(line for line in errors if line)[:400]
    elif status or not summaries:
        problem = f"could not run, exit status {status}: {_last(printed)}"
    records.write("sanitized", tool=tool, op=op, problem=problem, summary=summaries[-1] if summaries else None)


def _command(op: str) -> list[str]:
    return [sys.executable, "-m", "experiments.gpu.tiny", op]


def _run(command: list[str]) -> tuple[int, str]:
    # A block of memory for each tensor, so that what lies beyond one is nobody's.
    variables = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return done.returncode, done.stdout


def _last(printed: str) -> str:
    return next((line.strip() for line in reversed(printed.splitlines()) if line.strip()), "nothing printed")[:300]
