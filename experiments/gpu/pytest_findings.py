"""A plugin of pytest: runs one shard of the tests, and writes what is tried and how it ended to the report."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from experiments.gpu import machine
from experiments.gpu.case import LOST
from experiments.gpu.cuda_tests import ENDED, RESULTS, SHARD, SHARDS
from experiments.gpu.records import Records

_RECORDS = Records(Path(os.environ[RESULTS]), case="tests", shard=int(os.environ[SHARD]))
_OUTCOMES: dict[str, tuple[str, str | None, float]] = {}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep this shard's tests that no process before has ended."""
    ended = set(os.environ[ENDED].split("\n"))
    shard, shards = int(os.environ[SHARD]), int(os.environ[SHARDS])
    mine = [item for place, item in enumerate(items) if place % shards == shard and item.nodeid not in ended]
    config.hook.pytest_deselected(items=[item for item in items if item not in mine])
    items[:] = mine


def pytest_runtest_logstart(nodeid: str) -> None:
    """What is tried."""
    _RECORDS.write("begun", test=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the worst of a test's three phases."""
    outcome, problem, seconds = _OUTCOMES.get(report.nodeid, ("passed", None, 0.0))
    if report.outcome != "passed" and outcome == "passed":
        outcome, problem = report.outcome, _said(report)
    _OUTCOMES[report.nodeid] = outcome, problem, seconds + report.duration


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Write the outcome; where the GPU no longer answers, end this process."""
    outcome, problem, seconds = _OUTCOMES.pop(nodeid)
    lost = machine.lost() if outcome == "failed" else None
    if lost:
        outcome, problem = "lost", f"{lost}; {problem}"
    _RECORDS.write("test", test=nodeid, outcome=outcome, problem=problem, seconds=round(seconds, 2))
    if lost:
        os._exit(LOST)


def _said(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])[:400]
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr)[:400]
