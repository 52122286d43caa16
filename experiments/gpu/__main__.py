"""Everything that a GPU can tell about this project, in under 8 minutes and in one folder.

Correctness of the kernels, tuning, microbenchmarks and the main job, one after the other; a stage that fails or runs
out of time is reported and the next one runs. Where there is no GPU, it says so and runs what a CPU can.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from experiments.common import cli
from experiments.common.environment import environment
from experiments.gpu.summary import Outcome, summary_text

GRACE_SECONDS = 10.0
"""What a stage has for its last words (pytest-benchmark writes its results then) before it is killed."""

TUNING_TAIL_SECONDS = 30.0
"""Before the stage's end, no further case of the tuning is begun."""

EXAMPLES = """  ./scripts/gpu_report.sh
  ./scripts/gpu_report.sh --out /tmp/report

The folder holds summary.md, environment.json, each stage's log, tuned/NAME.json, microbenchmarks.json, and the main
job's JSON and figure. To launch the kernels as tuned here: export VIT_KERNELS_TUNED=FOLDER/tuned
"""
STATUSES = {
    0: "every stage that this machine can run succeeded",
    1: "a stage failed or ran out of time; the summary says which",
    2: "bad arguments, or the folder cannot be written",
}


@dataclass(frozen=True)
class Stage:
    """A process of the report.

    Attributes:
        seconds: its share of the time; what earlier stages left is added.
        command: makes the arguments after `python` from the seconds that the stage has.
    """

    name: str
    seconds: float
    command: Callable[[float], list[str]]
    variables: dict[str, str] = field(default_factory=dict)


def main(arguments: list[str] | None = None) -> int:
    """Make the report, and return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    load, around = os.getloadavg()[0], environment()
    on_gpu = bool(around["devices"])
    device = around["devices"][0]["name"] if on_gpu else around["cpu"]["model"]
    folder = (options.out or cli.LOCAL / _folder_name(device, around["date"])).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FileExistsError(f"--out: got {folder}, which has files in it, expected a new or an empty folder")
        cli.write_json(folder / "environment.json", around)
    except OSError as error:
        parser.error(str(error))
    # A shell that starts this in the background has interrupts ignored, which its stages would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _say(f"device: {device}" if on_gpu else f"no GPU here: only what a CPU can do is run (on {device})")
    outcomes = run_stages(gpu_stages(folder) if on_gpu else cpu_stages(folder), folder)
    summary = folder / "summary.md"
    summary.write_text(summary_text(folder, around, device, load, outcomes), encoding="utf-8")
    for outcome in outcomes:
        _say(f"{outcome.name}: {outcome.problem or 'ok'}, {outcome.seconds:.0f} s")
    _say(f"wrote {summary}")
    return int(any(outcome.problem for outcome in outcomes))


def gpu_stages(folder: Path) -> list[Stage]:
    """All four, 455 s in all."""
    tuned = folder / "tuned"

    def tune(seconds: float) -> list[str]:
        budget = max(0.0, seconds - TUNING_TAIL_SECONDS)
        return ["-m", "experiments.kernels.tune", "--out", str(tuned), "--seconds", f"{budget:.0f}"]

    compiled = {"TRITON_INTERPRET": "0"}
    as_tuned = compiled | {"VIT_KERNELS_TUNED": str(tuned)}
    return [
        Stage("correctness", 130, lambda seconds: ["-m", "pytest", "tests", "-m", "cuda"], compiled),
        Stage("tuning", 105, tune, compiled),
        # The other head dimensions would not fit into the time.
        Stage("microbenchmarks", 120, _microbenchmarks(folder, "-k", "not attention or 88 or 80"), as_tuned),
        Stage("main job", 100, _main_job(folder, "--device", "cuda", "--repeats", "10"), as_tuned),
    ]


def cpu_stages(folder: Path) -> list[Stage]:
    """The eager forms, and the main job with 2 layers."""
    return [
        Stage("microbenchmarks", 240, _microbenchmarks(folder)),
        Stage("main job", 300, _main_job(folder, "--layers", "2", "--repeats", "3", "--tile-counts", "1", "3")),
    ]


def _microbenchmarks(folder: Path, *options: str) -> Callable[[float], list[str]]:
    results = f"--benchmark-json={folder / 'microbenchmarks.json'}"
    return lambda seconds: ["-m", "pytest", "experiments/kernels/microbenchmarks", "-v", results, *options]


def _main_job(folder: Path, *options: str) -> Callable[[float], list[str]]:
    return lambda seconds: ["-m", "experiments.encode", "--out", str(folder), *options]


def run_stages(stages: list[Stage], folder: Path) -> list[Outcome]:
    """Run them in order; each must end when its share and those before it are used up."""
    start, end, outcomes = time.monotonic(), 0.0, []
    for stage in stages:
        end += stage.seconds
        left = start + end - time.monotonic()
        _say(f"== {stage.name}, at most {left:.0f} s")
        outcomes.append(run_stage(stage, left, folder / f"{stage.name.replace(' ', '_')}.log"))
    return outcomes


def run_stage(stage: Stage, seconds: float, log: Path) -> Outcome:
    """Run one, its output shown and in the log; interrupt it after `seconds`, and kill it if that is ignored."""
    start = time.monotonic()
    command = [sys.executable, *stage.command(seconds)]
    variables = os.environ | {"PYTHONUNBUFFERED": "1"} | stage.variables
    pipe = subprocess.PIPE
    # A session of its own, so that what the stage starts ends with it.
    with subprocess.Popen(
        command,
        cwd=cli.ROOT,
        env=variables,
        stdout=pipe,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_heed_interrupts,
    ) as process:
        timers = [
            threading.Timer(max(0.0, delay), _send, (process, number))
            for delay, number in ((seconds, signal.SIGINT), (seconds + GRACE_SECONDS, signal.SIGKILL))
        ]
        try:
            for timer in timers:
                timer.start()
            printed = _copy_output(process, log)
            status = process.wait()
        finally:
            for timer in timers:
                timer.cancel()
            if process.poll() is None:
                _send(process, signal.SIGKILL)
    taken = time.monotonic() - start
    problem = f"exit status {status}" if status else None
    if taken >= seconds:
        problem = f"stopped after {seconds:.0f} s"
    return Outcome(stage.name, problem, taken, _last_line(printed))


def _heed_interrupts() -> None:
    # A shell's background job ignores them, and so would what it starts.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To everything that the stage started, even where the stage itself has ended already."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _copy_output(process: subprocess.Popen[bytes], log: Path) -> bytes:
    """To standard error and the log, as it comes; and its end."""
    assert process.stdout is not None
    descriptor, end = process.stdout.fileno(), b""
    with log.open("wb") as file:
        while chunk := os.read(descriptor, 65536):
            sys.stderr.write(chunk.decode(errors="replace"))
            sys.stderr.flush()
            file.write(chunk)
            end = (end + chunk)[-4096:]
    return end


def _last_line(printed: bytes) -> str:
    lines = [line.strip() for line in re.split(r"[\r\n]+", printed.decode(errors="replace"))]
    return next((line.strip("= ") for line in reversed(lines) if line), "")


def _folder_name(device: str, date: str) -> str:
    """Device and UTC time, so that every report has a folder of its own."""
    moment = datetime.datetime.fromisoformat(date)
    return f"{re.sub(r'[^A-Za-z0-9]+', '_', device)}-{moment:%Y%m%dT%H%M%SZ}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("./scripts/gpu_report.sh", __doc__, examples=EXAMPLES, statuses=STATUSES)
    default = "experiments/results/local/DEVICE-TIME of the project"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"a new or an empty folder (default: {default})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
