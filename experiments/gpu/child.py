"""The process of a case, seen from the report."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from experiments.gpu.plan import Case

ROOT = Path(__file__).resolve().parents[2]
GO = b"go\n"


class Child:
    """Starts a case's process, which imports what it needs and then waits for `begin`.

    Args:
        case: what it runs.
        results: the file that it appends to.
        log: gets what it prints.
        variables: of its environment, beside the report's own.
    """

    def __init__(self, case: Case, results: Path, log: Path, variables: dict[str, str]) -> None:
        self.case = case
        command = [sys.executable, "-m", "experiments.gpu.case", case.name, str(results)]
        with log.open("ab") as output:
            # A session of its own, so that what it starts ends with it.
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | variables,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def begin(self) -> None:
        """Let it use the GPU."""
        assert self.process.stdin is not None
        # One that died while it imported says so by its status.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(GO)
            self.process.stdin.flush()

    def wait(self, seconds: float) -> int | None:
        """Its exit status, or None where it still runs after so many seconds."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End it, and what it started. What it found is written already."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            # A process that hangs in the driver cannot be waited for.
            self.process.wait(10)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
