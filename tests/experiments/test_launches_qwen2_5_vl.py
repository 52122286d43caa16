"""A layer of Qwen2.5-VL's encoder as generated: its launches and bytes, beside transformers' own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOKENS = 72 * 56
ACTIVATION = TOKENS * 1280 * 2
KINDS = ["windows", "full"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A row for each encoder and kind of attention, static shapes, from a process of its own."""
    out = tmp_path_factory.mktemp("report")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "experiments.launches.qwen2_5_vl", "--encoders", "ours", "transformers"]
    finished = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads((out / "graph_ledger_qwen2_5_vl.json").read_text())["rows"]
    assert {row["patches"] for row in found} == {TOKENS}
    return {row["encoder"]: row for row in found}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_takes_nine_launches(rows: dict[str, dict[str, Any]], kind: str) -> None:
    layer = rows[f"ours, {kind}"]["layer"]
    assert (layer["launches"], layer["gemm"], layer["opaque"]) == (9, 4, 2)
    assert layer["bytes"] <= 0.46e9
    assert rows[f"ours, {kind}"]["cudagraphs_refused"] is None


@pytest.mark.parametrize("kind", KINDS)
def test_that_is_fewer_and_less_than_transformers(rows: dict[str, dict[str, Any]], kind: str) -> None:
    ours, theirs = (rows[f"{name}, {kind}"]["layer"] for name in ("ours", "transformers"))
    assert ours["launches"] < theirs["launches"] == 10
    assert ours["bytes"] <= 0.95 * theirs["bytes"]
    assert ours["flops"] == theirs["flops"]


def test_the_kinds_differ_in_the_work_of_attention_alone(rows: dict[str, dict[str, Any]]) -> None:
    windows, full = (rows[f"ours, {kind}"]["layer"] for kind in KINDS)
    assert full["flops"] - windows["flops"] == 4 * TOKENS * (TOKENS - 64) * 1280
    assert full["launches"] == windows["launches"]


def test_the_window_order_costs_no_launch_at_the_start_and_one_at_the_end(rows: dict[str, dict[str, Any]]) -> None:
    rest = rows["ours, windows"]["rest"]
    assert (rest["launches"], rest["gemm"]) == (6, 3)
    first, *_, last = [kernel for kernel in rest["kernels"] if kernel["kind"] == "triton"]
    # The embedded patches are gathered by the first norm, which also writes them down.
    assert first["written_bytes"] <= 2 * ACTIVATION
    assert "index_select" in last["kernel"]
    assert last["written_bytes"] == TOKENS // 4 * 3584 * 2
