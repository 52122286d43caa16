"""A process that compiles kernels, for the tests in kernels/executed: TRITON_INTERPRET is read once, at import."""

import os
import subprocess
import sys


def assert_tests_pass(*arguments: str) -> None:
    """Run tests of kernels/executed, chosen by arguments of pytest."""
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-q", "tests/kernels/executed", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
