"""What runs around a peer's suite: the swap to ours that PEERS_RUN names, and a file of the outcomes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experiments.common.peers import allow_torchvision_beside_cpu_torch
from tests.peers.installed import versions

torch.set_num_threads(1)
allow_torchvision_beside_cpu_torch()

_outcomes: dict[str, dict[str, str]] = {}
_RANK = ("passed", "skipped", "failed")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the worst of a test's set-up, call and tear-down, and the message that it ended with."""
    known = _outcomes.get(report.nodeid)
    if known is not None and _RANK.index(known["outcome"]) >= _RANK.index(report.outcome):
        return
    _outcomes[report.nodeid] = {"outcome": report.outcome, "message": _message(report)}


def _message(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[-1])
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr or "")[:2000]


def pytest_sessionfinish() -> None:
    """Write the outcomes; transformers runs some tests in a process of their own, which writes nothing."""
    if "PEERS_OUTCOMES" in os.environ and "_INSIDE_SUB_PROCESS" not in os.environ:
        written = {"versions": versions(), "outcomes": _outcomes}
        Path(os.environ["PEERS_OUTCOMES"]).write_text(json.dumps(written, indent=1), encoding="utf-8")


@pytest.fixture(scope="session", autouse=True)
def transformers_with_ours() -> Iterator[None]:
    """Put ours in the place of transformers' own for the whole session, where the run is one of these."""
    if os.environ.get("PEERS_RUN") not in ("vit_varlen", "applied"):
        yield
        return
    from tests.peers.transformers_swap import swapped

    with swapped(os.environ["PEERS_RUN"]):
        yield
