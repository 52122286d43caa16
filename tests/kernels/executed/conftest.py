"""Tests that need a process that compiles kernels; tests/kernels/test_executed_*.py start one."""

import triton

collect_ignore_glob = ["test_*.py"] if triton.knobs.runtime.interpret else []
