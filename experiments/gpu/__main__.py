"""Everything that a GPU can tell about this project: one command, no network, killed whenever it must be.

Each case is a process. What it finds is one JSON line at once, and the summary is written anew after each case, so
whatever ends the command, what was found stays. It needs PyTorch, Triton and the packages that the project depends on;
what else is missing, such as transformers, pytest or matplotlib, costs the case that wants it.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.gpu import summary
from experiments.gpu.child import Child
from experiments.gpu.plan import FIRST, PREDICTIONS, STAGES, Case, Stage
from experiments.gpu.records import Records, latest, of_kind, read

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ROOT / "experiments/results/local"
RESULTS, SUMMARY, REST = "results.jsonl", "summary.md", "rest.tar.gz"
SECONDS = 560.0
LAST_SECONDS = 20.0
"""Kept for the predictions and the last summary."""

PATIENCE = 5
"""How many times its seconds a case has in a rehearsal, beside whatever else a machine does."""

NO_GPU = 3

EPILOG = """examples:
  ./scripts/gpu_report.sh --out /tmp/report
  ./scripts/gpu_report.sh --resume /tmp/report
      what the last call did not get to, then what failed in it
  ./scripts/gpu_report.sh --only attention --only encoders

The folder holds results.jsonl, summary.md, predictions.png and rest.tar.gz: logs, and tuned/NAME.json. To launch the
kernels as tuned here, unpack it and export VIT_KERNELS_TUNED=FOLDER/tuned.

exit status:
  0  every case ended well, and nothing that it judged was wrong
  1  a case failed, found something wrong or had no time; the summary says which
  2  bad arguments, or the folder cannot be written
  3  there is no GPU
"""


def main(arguments: list[str] | None = None) -> int:
    """Make the report, and return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        report = Report(_folder(options), rehearsal=options.rehearse, seconds=options.seconds)
    except (OSError, tarfile.TarError) as error:
        parser.error(str(error))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    stages = [stage for stage in STAGES if not options.only or stage.name in options.only]
    try:
        return report.run(stages, again=bool(options.only))
    except Stopped as stopped:
        say(f"stopped by {stopped}")
        return 1
    finally:
        report.close()


class Stopped(BaseException):
    """A signal asked for the end."""


def _stop(number: int, frame: Any) -> None:
    raise Stopped(signal.Signals(number).name)


def say(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)


class Report:
    """A report being made in a folder.

    Args:
        folder: of what stays: at most 8 files.
        rehearsal: the CPU stands in for the GPU.
        seconds: after which nothing runs any more.
    """

    def __init__(self, folder: Path, *, rehearsal: bool, seconds: float) -> None:
        self.folder = folder
        self.rehearsal = rehearsal
        self.end = time.monotonic() + seconds
        self.records = Records(folder / RESULTS)
        # Every log by itself would be more files than a folder may hold that is to be fetched.
        self.work = Path(tempfile.mkdtemp(prefix="gpu_report_"))
        if (rest := folder / REST).exists():
            _unpack(rest, self.work)
        self.children: list[Child] = []
        self.records.write("run", seconds=seconds, rehearsal=rehearsal, load=os.getloadavg()[0])

    def run(self, stages: Sequence[Stage], *, again: bool) -> int:
        """Run the cases, and return the exit status.

        Args:
            stages: whose cases are run.
            again: also those that ended well before.
        """
        order = self._order(stages, again)
        self._start(FIRST)
        self._run(FIRST, order[0][1] if order else None)
        if not self._has_gpu():
            self.write()
            said = (self.work / f"{FIRST.name}.log").read_text(encoding="utf-8", errors="replace").strip()
            say(f"no GPU here: PyTorch sees none, or it does not answer; nothing was measured\n{said[-2000:]}")
            return NO_GPU
        for place, (_, case) in enumerate(order):
            self._run(case, order[place + 1][1] if place + 1 < len(order) else None)
            self.write()
        return self._status(stages)

    def _order(self, stages: Sequence[Stage], again: bool) -> list[tuple[Stage, Case]]:
        """The cases to run: those that no call began, then those that did not end well, and what sums them up."""
        before = latest(read(self.records.path))
        pairs = [(stage, case) for stage in stages for case in stage.cases]
        last = [pair for pair in pairs if pair[0].name == PREDICTIONS]
        new = [pair for pair in pairs if pair not in last and pair[1].name not in before]
        old = [
            pair
            for pair in pairs
            if pair not in last
            and pair[1].name in before
            and (again or summary.status_of(before[pair[1].name]) != "ok")
        ]
        return new + old + last

    def _start(self, case: Case) -> Child:
        log = self.work / f"{case.name}.log"
        child = Child(case, self.records.path, log, self._variables(case))
        self.children.append(child)
        return child

    def _variables(self, case: Case) -> dict[str, str]:
        paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "encoder"), os.environ.get("PYTHONPATH", "")]
        tuned = case.tuned or case.function.startswith("tuning")
        # Inductor's own processes take longer to start than a graph of one op to compile.
        alone = {"TORCHINDUCTOR_COMPILE_THREADS": "1"} if case.function.startswith(("operators", "cuda_tests")) else {}
        return alone | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            # What an earlier report tuned is no default.
            "VIT_KERNELS_TUNED": str(self.work / ("tuned" if tuned else "untuned")),
            "TRITON_INTERPRET": "1" if self.rehearsal else "0",
            "VIT_KERNELS_REHEARSAL": "1" if self.rehearsal else "0",
        }

    def _run(self, case: Case, following: Case | None) -> None:
        """Run a case whose process may have been started already, and start that of the next one."""
        child = next((child for child in self.children if child.case is case), None) or self._start(case)
        left = self.end - time.monotonic() - (0 if case.name == PREDICTIONS else LAST_SECONDS)
        if left < case.least and case is not FIRST:
            say(f"{case.name}: no time left for it")
            self._stop_child(child)
        else:
            seconds = max(1.0, min(case.seconds * (PATIENCE if self.rehearsal else 1), left))
            say(f"{case.name}: at most {seconds:.0f} s")
            self.records.write("begin", case=case.name, limit=seconds)
            start = time.monotonic()
            child.begin()
            if following is not None:
                self._start(following)
            status = child.wait(seconds)
            taken = time.monotonic() - start
            self._stop_child(child)
            ended = self._ended(case, status, seconds)
            self.records.write("end", case=case.name, status=ended, seconds=round(taken, 1))
            say(f"{case.name}: {ended}, {taken:.0f} s")
            return
        if following is not None:
            self._start(following)

    def _ended(self, case: Case, status: int | None, seconds: float) -> str:
        if status is None:
            return f"stopped after {seconds:.0f} s"
        if status == 0:
            return "ok"
        if any(line.get("lost") for line in of_kind(latest(read(self.records.path)).get(case.name, ()), "error")):
            return "lost the GPU"
        return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"

    def _stop_child(self, child: Child) -> None:
        child.kill()
        self.children.remove(child)

    def _has_gpu(self) -> bool:
        lines = latest(read(self.records.path)).get(FIRST.name, [])
        return bool(of_kind(lines, "environment") if self.rehearsal else of_kind(lines, "device answers"))

    def _status(self, stages: Sequence[Stage]) -> int:
        found = latest(read(self.records.path))
        fine = all(
            summary.status_of(found.get(case.name, [])) == "ok" and not summary.wrong_of_ours(found[case.name])
            for stage in stages
            for case in stage.cases
        )
        return int(not fine)

    def write(self) -> None:
        """Write the summary and the tar anew, each in one step."""
        _replace(self.folder / SUMMARY, summary.summary_text(read(self.records.path)).encode())
        new = self.folder / f"{REST}.new"
        with tarfile.open(new, "w:gz") as tar:
            for path in sorted(self.work.rglob("*")):
                if path.is_file():
                    tar.add(path, str(path.relative_to(self.work)))
        new.replace(self.folder / REST)

    def close(self) -> None:
        """End what still runs, and leave the folder in order."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for child in list(self.children):
            self._stop_child(child)
        self.write()
        shutil.rmtree(self.work, ignore_errors=True)
        # Where only what is printed comes back, it comes back too.
        print((self.folder / SUMMARY).read_text(encoding="utf-8"), flush=True)
        say(f"wrote {self.folder / SUMMARY}")


def _replace(path: Path, content: bytes) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.replace(path)


def _unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            path = (folder / member.name).resolve()
            if (content := tar.extractfile(member)) is not None and path.is_relative_to(folder.resolve()):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())


def _folder(options: argparse.Namespace) -> Path:
    """The folder to write to, with what is to be resumed in it."""
    resumed: Path | None = options.resume
    if resumed is not None and not (resumed / RESULTS).exists():
        raise OSError(f"--resume: got {resumed}, expected a folder with {RESULTS}")
    folder: Path = options.out or resumed or LOCAL / f"gpu-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}"
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if resumed is None and any(folder.iterdir()):
        raise OSError(f"--out: got {folder}, which has files in it, expected a new or an empty folder, or --resume")
    if resumed is not None and folder != resumed.resolve():
        for path in resumed.iterdir():
            # Not its mode: what comes back from elsewhere may be read-only.
            shutil.copyfile(path, folder / path.name)
    return folder


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a positive number")
    return seconds


def _parser() -> argparse.ArgumentParser:
    # Not `cli.parser`: a machine without rich is to be measured as well.
    parser = argparse.ArgumentParser(
        prog="./scripts/gpu_report.sh",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = "experiments/results/local/gpu-TIME of the project"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"a new or an empty folder (default: {default})")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with a report; with --out in a copy of it")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", action="append", choices=names, help="only this stage; may be repeated")
    parser.add_argument("--seconds", type=_seconds, default=SECONDS, help="end after so long (default: %(default).0f)")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="tiny shapes on the CPU, to see that all runs; times mean nothing",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
