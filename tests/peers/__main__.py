"""Peers' own suites on ours: `python -m tests.peers`, which scripts/test_peers.sh calls."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.peers.comparison import Comparison, Outcomes, compare, read_allowed
from tests.peers.distributions import DownloadError, source_distribution
from tests.peers.suites import PEERS, SUITES, Suite, lacking, selector
from tests.peers.table import record, write_results

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CACHE = ROOT / ".peers"
# What transformers' tests import beside what the project needs; none of it enters the project's environment.
PACKAGES = ("parameterized==0.9.0", "accelerate==1.15.0", "psutil==7.2.2", "peft==0.21.2")


class SuiteError(Exception):
    """A suite that could not be run at all, and why."""


def arguments(words: list[str]) -> argparse.Namespace:
    """Read the command line; bad arguments end the process with status 2."""
    parser = argparse.ArgumentParser(prog="test_peers.sh", description="Peers' own suites on ours.")
    for peer in PEERS:
        parser.add_argument(f"--{peer}", type=Path, metavar="FOLDER", help=f"a checkout of {peer}")
    parser.add_argument("--only", action="append", choices=SUITES, metavar="SUITE", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results", help="where peers.json and .md go")
    given = parser.parse_args(words)
    for peer in PEERS:
        folder = getattr(given, peer.replace("-", "_"))
        if folder is not None and not (folder / "tests").is_dir():
            parser.error(f"--{peer}: got {folder}, expected a checkout: a folder with tests in it")
    return given


def main(words: list[str]) -> int:
    """Run the suites asked for, write their results, and return the exit status."""
    given = arguments(words)
    CACHE.mkdir(exist_ok=True)
    folders, problems = _folders(given), []
    records: dict[str, dict[str, Any]] = {}
    for name in given.only or SUITES:
        suite = SUITES[name]
        try:
            folder = _folder(suite, folders)
            if lack := lacking(suite, folders):
                print(f"== {name}: not run, {suite.peer}'s source distribution has no {lack}; name a checkout")
                continue
            for run, result in _compared(name, suite, folders):
                title = name if len(suite.runs) == 1 else f"{name}, {run}"
                records[title] = _record(result, folder)
                problems += _problems(title, result[0])
        except (SuiteError, DownloadError) as error:
            problems.append(f"{name}: {error}")
            print(f"== {name}: {error}")
    write_results(records, given.out)
    for problem in problems:
        print(f"PROBLEM {problem}")
    print(f"== {'failed' if problems else 'passed'}; results in {given.out / 'peers.md'}")
    return 1 if problems else 0


def _folders(given: argparse.Namespace) -> dict[str, Path]:
    """The folders of the peers that the user named."""
    named = {peer: getattr(given, peer.replace("-", "_")) for peer in PEERS}
    return {peer: folder.resolve() for peer, folder in named.items() if folder is not None}


def _folder(suite: Suite, folders: dict[str, Path]) -> Path | None:
    if suite.peer and suite.peer not in folders:
        version = PEERS[suite.peer]
        if suite.peer == "transformers":
            version = importlib.metadata.version("transformers")
        print(f"== {suite.peer} {version}: its source distribution", flush=True)
        folders[suite.peer] = source_distribution(suite.peer, version, CACHE)
    return folders.get(suite.peer)


Result = tuple[Comparison, dict[str, str], float]
"""What came of a run, the versions of what ran, and the seconds that it took."""


def _compared(name: str, suite: Suite, folders: dict[str, Path]) -> Iterator[tuple[str, Result]]:
    allowed = read_allowed(HERE / "allowed.toml")
    stock: Outcomes | None = None
    for run in suite.runs:
        started = time.monotonic()
        ours, versions = _outcomes(name, suite, run, folders)
        if run == "stock":
            stock = ours
            continue
        concerns = selector(suite, run)
        before = ours if stock is None else {test: outcome for test, outcome in stock.items() if concerns(test)}
        title = name if len(suite.runs) == 1 else f"{name}, {run}"
        comparison = compare(before, ours, [entry for entry in allowed if entry.suite == title])
        yield run, (comparison, versions, time.monotonic() - started)


def _outcomes(name: str, suite: Suite, run: str, folders: dict[str, Path]) -> tuple[Outcomes, dict[str, str]]:
    """Run a suite once, in a process of its own."""
    out, log = CACHE / f"{name}-{run}.json", CACHE / f"{name}-{run}.log"
    out.unlink(missing_ok=True)
    print(f"== {name}, {run}: running, log in {log.relative_to(ROOT)}", flush=True)
    command = [
        _python(suite),
        "-m",
        *(["tests.peers.sweep"] if name == "sweep" else ["pytest", str(HERE / suite.file)]),
    ]
    if words := suite.selected.get(run):
        command += ["-k", " or ".join(words)]
    with log.open("w") as stream:
        code = subprocess.run(
            command, cwd=ROOT, env=_environment(suite, run, out, folders), stdout=stream, stderr=subprocess.STDOUT,
            check=False,
        ).returncode  # fmt: skip
    # pytest's 1: some tests failed, which the comparison judges.
    if code not in (0, 1) or not out.is_file():
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SuiteError(f"{run} could not be run (exit status {code}):\n{tail}")
    written = json.loads(out.read_text(encoding="utf-8"))
    print(f"   {len(written['outcomes'])} tests", flush=True)
    return written["outcomes"], written["versions"]


def _python(suite: Suite) -> str:
    if not suite.in_vllm:
        return sys.executable
    made = subprocess.run([str(ROOT / "scripts/test_vllm.sh"), "--set-up-only"], check=False)
    if made.returncode:
        raise SuiteError(f"vLLM's environment could not be made (exit status {made.returncode})")
    return str(ROOT / ".venv-vllm/bin/python")


def _environment(suite: Suite, run: str, out: Path, folders: dict[str, Path]) -> dict[str, str]:
    path = [ROOT / "kernels", ROOT / "encoder", ROOT]
    if suite.peer == "transformers":
        path.append(_packages())
    peers = {f"PEERS_{peer.upper().replace('-', '_')}": str(folder) for peer, folder in folders.items()}
    return os.environ | peers | {
        "PEERS_RUN": run,
        "PEERS_OUTCOMES": str(out),
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        # In the environment, so that it also holds in the processes that transformers starts for a test.
        "PYTEST_ADDOPTS": f"-c {shlex.quote(str(HERE / 'pytest.ini'))} --tb=short",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }  # fmt: skip


def _packages() -> Path:
    folder = CACHE / "packages"
    if not folder.is_dir():
        partial = CACHE / "packages.partial"
        shutil.rmtree(partial, ignore_errors=True)
        print(f"== installing {', '.join(PACKAGES)} into {folder.relative_to(ROOT)}", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--no-deps", "--target", str(partial)]
        if subprocess.run([*pip, *PACKAGES], check=False).returncode:
            raise SuiteError(f"pip could not install {', '.join(PACKAGES)}")
        partial.rename(folder)
    return folder


def _record(result: Result, folder: Path | None) -> dict[str, Any]:
    comparison, versions, seconds = result
    # A source distribution's folder says its version; a checkout's path is nobody's business.
    source = "installed" if folder is None else folder.name if folder.parent == CACHE else "a checkout"
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return record(comparison, source=source, versions=versions, date=date, seconds=seconds)


def _problems(title: str, comparison: Comparison) -> list[str]:
    print(
        f"   {title}: {len(comparison.agreed)} agreed, {sum(comparison.allowed.values())} allowed, "
        f"{len(comparison.failed)} failed, {sum(comparison.not_compared.values())} not compared",
        flush=True,
    )
    problems = [f"{title}: {test}: {message:.300}" for test, message in comparison.failed.items()]
    problems += [f"{title}: allowed.toml: no failure needs this any more: {reason}" for reason in comparison.stale]
    return problems if comparison.agreed else [*problems, f"{title}: no test agreed: nothing was compared"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
