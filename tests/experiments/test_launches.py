"""experiments.launches: a layer's launches and bytes as generated, and that the report counts what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.launches.launch import functions, triton_calls

ROOT = Path(__file__).parents[2]
TILES = 16
TOKENS = TILES * 577
ACTIVATION = TOKENS * 1408 * 2
WEIGHTS = 1408 * (3 * 1408 + 1408 + 2 * 5632) * 2


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A layer of each encoder, 16 tiles, static shapes, from a process of its own."""
    out = tmp_path_factory.mktemp("report")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "experiments.launches", "--tiles", str(TILES), "--shapes", "static"]
    command += ["--encoders", "ours", "ours, fused GELU", "transformers", "--out", str(out)]
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert (out / "graph_ledger.png").stat().st_size > 10_000
    rows = json.loads((out / "graph_ledger.json").read_text())["rows"]
    assert [(row["shapes"], row["tiles"]) for row in rows] == [("static", TILES)] * 3
    return {row["encoder"]: row["layer"] for row in rows}


def kernels(layer: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [kernel for kernel in layer["kernels"] if name in kernel["kernel"]]


def test_a_layer_takes_at_most_nine_launches_and_1_10_gb(layers: dict[str, dict[str, Any]]) -> None:
    assert layers["ours"]["launches"] <= 9
    assert layers["ours"]["bytes"] <= 1.10e9


def test_a_layer_takes_six_launches_and_a_quarter_of_the_bytes_less_than_transformers(
    layers: dict[str, dict[str, Any]],
) -> None:
    assert layers["ours"]["launches"] <= layers["transformers"]["launches"] - 6
    assert layers["ours"]["bytes"] <= 0.75 * layers["transformers"]["bytes"]
    assert layers["ours"]["gemm"] == 4
    assert layers["transformers"]["gemm"] == 6
    assert layers["transformers"]["launches"] == 16


def test_with_the_gelu_in_the_epilogue_eight_launches_and_0_90_gb(layers: dict[str, dict[str, Any]]) -> None:
    fused, layer = layers["ours, fused GELU"], layers["ours"]
    assert fused["launches"] == layer["launches"] - 1 <= 8
    assert fused["bytes"] == pytest.approx(layer["bytes"] - 8 * ACTIVATION)
    assert fused["bytes"] <= 0.90e9
    assert fused["flops"] == layer["flops"]
    (product,) = kernels(fused, "vit_kernels::linear_gelu")
    assert product["read_bytes"] == ACTIVATION + 2 * (4 * 1408 * 1408 + 4 * 1408)
    assert product["written_bytes"] == 4 * ACTIVATION


def test_both_encoders_do_the_same_products(layers: dict[str, dict[str, Any]]) -> None:
    expected = 2 * TOKENS * WEIGHTS // 2 + 4 * TOKENS * 577 * 1408
    assert layers["ours"]["flops"] == layers["transformers"]["flops"] == expected


def test_bytes_of_each_kind_of_kernel(layers: dict[str, dict[str, Any]]) -> None:
    layer = layers["ours"]
    (attention,) = kernels(layer, "vit_kernels::varlen_attention")
    assert attention["read_bytes"] == 3 * ACTIVATION + 4 * (TILES + 1)
    assert attention["written_bytes"] == ACTIVATION
    assert attention["exponentials"] == 16 * TOKENS * 577
    (rotary,) = kernels(layer, "vit_kernels::rotary_2d")
    assert rotary["read_bytes"] == 2 * ACTIVATION + 2 * 577 * 44 * 4
    assert rotary["written_bytes"] == 2 * ACTIVATION
    (gelu,) = kernels(layer, "gelu")
    assert gelu["read_bytes"] == gelu["written_bytes"] == 4 * ACTIVATION
    products = [kernel for kernel in layer["kernels"] if kernel["kind"] == "gemm"]
    biases = 2 * (3 * 1408 + 1408 + 5632 + 1408)
    assert sum(kernel["read_bytes"] for kernel in products) == 7 * ACTIVATION + WEIGHTS + biases
    assert sum(kernel["written_bytes"] for kernel in products) == 9 * ACTIVATION


def test_a_layer_is_the_sum_of_its_kernels(layers: dict[str, dict[str, Any]]) -> None:
    for layer in layers.values():
        counts = {
            kind: sum(k["count"] for k in layer["kernels"] if k["kind"] == kind)
            for kind in ("triton", "gemm", "opaque")
        }
        assert {kind: layer[kind] for kind in counts} == counts
        assert layer["launches"] == sum(counts.values())
        moved = sum(k["count"] * (k["read_bytes"] + k["written_bytes"]) for k in layer["kernels"])
        assert layer["bytes"] == pytest.approx(moved)


def test_predictions_are_intervals_of_the_roofline(layers: dict[str, dict[str, Any]]) -> None:
    (gelu,) = kernels(layers["ours"], "gelu")
    low, high = gelu["predicted_seconds"]["H100"]
    assert low == pytest.approx(8 * ACTIVATION / 3.35e12)
    assert low < high
    for layer in layers.values():
        for gpu, (low, high) in layer["predicted_seconds"].items():
            assert low == pytest.approx(sum(k["count"] * k["predicted_seconds"][gpu][0] for k in layer["kernels"]))
            assert low < high


def test_what_is_committed_has_every_case_and_says_where_it_comes_from() -> None:
    result = json.loads((ROOT / "experiments" / "results" / "graph_ledger.json").read_text())
    cases = {(row["encoder"], row["shapes"], row["tiles"]) for row in result["rows"]}
    encoders = ("ours", "ours, fused GELU", "ours, PyTorch ops", "transformers")
    assert cases == {(e, s, t) for e in encoders for s in ("static", "dynamic") for t in (1, 4, 16)}
    assert {"date", "packages"} <= result["environment"].keys()
    assert any("nothing was run" in note for note in result["notes"])
    assert all(row["cudagraphs_refused"] is None for row in result["rows"])


CODE = """
def repeated_subgraph0(args):
    triton_poi_fused_gelu_1.run(buf0, 5, stream=raw_stream0)
    return (buf0, )

class Runner:
    def call(self, args):
        # triton_poi_fused_add_2.run(buf1, 5, stream=raw_stream0)
        triton_red_fused_norm_0.run(arg0, buf0, 5, stream=raw_stream0)
        buf1 = repeated_subgraph0(repeated_subgraph0_args)

def benchmark_compiled_module(args, times=10, repeat=10):
    triton_red_fused_norm_0.run(arg0, buf0, 5, stream=raw_stream0)
"""


def test_kernels_are_read_off_the_function_that_runs_them() -> None:
    calls = {name: triton_calls(body) for name, body in functions(CODE).items()}
    assert calls == {"repeated_subgraph0": ["triton_poi_fused_gelu_1"], "call": ["triton_red_fused_norm_0"]}
