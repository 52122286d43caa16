"""A layer of Qwen3-VL's encoder as generated: its launches and bytes, beside transformers' own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.costly

ROOT = Path(__file__).parents[2]
TOKENS = 68 * 120
WIDTHS = {"heads of 72": 1152, "heads of 64": 1024}
Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """A row for each encoder and kind of layer, static shapes, from a process of its own."""
    out = tmp_path_factory.mktemp("report")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "experiments.launches.qwen3_vl", "--encoders", "ours", "transformers"]
    finished = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads((out / "graph_ledger_qwen3_vl.json").read_text())["rows"]
    assert {row["patches"] for row in found} == {TOKENS}
    return {row["encoder"]: row for row in found}


@pytest.mark.parametrize(("kind", "gigabytes"), [("heads of 72", 0.77), ("heads of 64", 0.70)])
def test_a_layer_takes_nine_launches(rows: Rows, kind: str, gigabytes: float) -> None:
    layer = rows[f"ours, {kind}"]["layer"]
    assert (layer["launches"], layer["gemm"], layer["opaque"]) == (9, 4, 2)
    assert layer["bytes"] <= gigabytes * 1e9
    assert rows[f"ours, {kind}"]["cudagraphs_refused"] is None


@pytest.mark.parametrize("kind", WIDTHS)
def test_that_is_no_more_and_moves_less_than_transformers(rows: Rows, kind: str) -> None:
    ours, theirs = (rows[f"{name}, {kind}"]["layer"] for name in ("ours", "transformers"))
    assert ours["launches"] <= theirs["launches"] == 9
    assert ours["bytes"] <= 0.97 * theirs["bytes"]
    assert ours["flops"] == theirs["flops"]


def test_a_deepstack_merger_is_four_launches_more(rows: Rows) -> None:
    plain, deepstack = (rows[f"ours, {kind}"]["layer"] for kind in ("heads of 72", "with deepstack"))
    assert (deepstack["launches"] - plain["launches"], deepstack["gemm"] - plain["gemm"]) == (4, 2)
    assert deepstack["flops"] == rows["transformers, with deepstack"]["layer"]["flops"]
    assert rows["ours, with deepstack"]["layer"]["bytes"] <= rows["transformers, with deepstack"]["layer"]["bytes"]


@pytest.mark.parametrize("kind", WIDTHS)
def test_the_position_embedding_is_part_of_the_first_norm(rows: Rows, kind: str) -> None:
    rest = rows[f"ours, {kind}"]["rest"]
    assert (rest["launches"], rest["gemm"]) == (5, 3)
    first, *_ = [kernel for kernel in rest["kernels"] if kernel["kind"] == "triton"]
    # It reads the embedded patches, the taps and their weights, and writes the hidden states and the norm of them.
    activation = TOKENS * WIDTHS[kind] * 2
    assert "index_select" in first["kernel"]
    assert first["read_bytes"] <= 1.05 * activation
    assert first["written_bytes"] == 2 * activation
