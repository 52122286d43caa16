"""Every test that needs a GPU, spread over processes; one whose GPU is lost is replaced, and what is left goes on."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.gpu import machine
from experiments.gpu.records import Records, of_kind, read

ROOT = Path(__file__).resolve().parents[2]
MARK = "mark.cuda"
RESULTS, SHARD, SHARDS, ENDED = (
    f"VIT_KERNELS_GPU_{name}" for name in ("TEST_RESULTS", "TEST_SHARD", "TEST_SHARDS", "TESTS_ENDED")
)
"""Variables that tell `pytest_findings` its part."""

MOST_SHARDS = 8
# In a rehearsal the interpreter runs them: these are quick, and go through everything else.
REHEARSED = "test_pixel_shuffle"


def run(records: Records) -> None:
    """Run them; each one's outcome is written when it is known."""
    if missing := [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]:
        records.write("absent", form="tests", problem=f"{', '.join(missing)}: not installed")
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shards = 1 if machine.rehearsing() else max(1, min(MOST_SHARDS, cores // 2))
    began = len(read(records.path))
    with ThreadPoolExecutor(shards) as pool:
        for problem in pool.map(lambda shard: _until_done(records, shard, shards, began), range(shards)):
            if problem:
                records.write("error", problem=problem)
    outcomes = [record["outcome"] for record in of_kind(read(records.path)[began:], "test")]
    if not outcomes:
        raise RuntimeError("no test ran: the log says why")


def files() -> list[str]:
    """Those with such a test, relative to the project."""
    return sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if MARK in path.read_text(encoding="utf-8")
    )


def _until_done(records: Records, shard: int, shards: int, began: int) -> str | None:
    """Run a shard's tests, in a new process after each that died; what went wrong outside of the tests, or None."""
    ended = 0
    while True:
        status = subprocess.run(
            _command(), env=_variables(records, shard, shards, began), cwd=ROOT, check=False
        ).returncode
        mine = [record for record in of_kind(read(records.path)[began:], "begun", "test") if record["shard"] == shard]
        tests = {record["test"] for record in of_kind(mine, "test")}
        for record in of_kind(mine, "begun"):
            if (name := record["test"]) not in tests:
                problem = f"the process ended with status {status} in this test"
                records.write("test", test=name, outcome="died", problem=problem, shard=shard)
                tests.add(name)
        # 1: tests failed, which they say themselves; 5: the shard has none.
        if status in (0, 1, 5):
            return None
        if len(tests) == ended:
            return f"pytest of shard {shard}: exit status {status}"
        ended = len(tests)


def _command() -> list[str]:
    options = ["-q", "-m", "cuda", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "experiments.gpu.pytest_findings"]
    options.append("--continue-on-collection-errors")
    if machine.rehearsing():
        options += ["-k", REHEARSED]
    # Without the options of the project's own runs: pytest-benchmark need not be here, and a warning of a version that
    # nobody saw is no error of a kernel.
    return [sys.executable, "-m", "pytest", "-o", "addopts=", "-o", "filterwarnings=default", *options, *files()]


def _variables(records: Records, shard: int, shards: int, began: int) -> dict[str, str]:
    ended = [record["test"] for record in of_kind(read(records.path)[began:], "test")]
    own = {RESULTS: str(records.path), SHARD: str(shard), SHARDS: str(shards), ENDED: "\n".join(ended)}
    return {**os.environ, **own, "TRITON_INTERPRET": "1" if machine.rehearsing() else "0"}
