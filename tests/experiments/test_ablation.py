"""experiments.launches.ablation: what each kernel saves in launches and bytes, and what it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TILES = 16
ACTIVATION = TILES * 577 * 1408 * 2


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The report's forms by op."""
    out = tmp_path_factory.mktemp("ablation")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "experiments.launches.ablation", "--tiles", str(TILES), "--out", str(out)]
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return {row["op"]: row["forms"] for row in json.loads((out / "ablation_ledger.json").read_text())["rows"]}


def moved(forms: dict[str, Any]) -> dict[str, tuple[int, float]]:
    """Launches, and bytes in activations of the whole batch, by form; weights, tables and boundaries rounded away."""
    return {form: (kernels["launches"], round(kernels["bytes"] / ACTIVATION, 1)) for form, kernels in forms.items()}


def test_what_each_kernel_is_worth_in_launches_and_bytes(ablation: dict[str, dict[str, Any]]) -> None:
    one_pass_over_q_and_k = {"Inductor alone": (1, 4.0), "Triton opaque": (1, 4.0), "Triton fused": (1, 4.0)}
    rotary = moved(ablation["rotary of q and k, from the packed qkv"])
    assert rotary.pop("eager")[1] > 40
    assert rotary == one_pass_over_q_and_k
    formula = moved(ablation["attention, by the formula"])
    assert formula["Triton opaque"] == moved(ablation["attention, a flash library's"])["eager"] == (1, 4.0)
    assert min(formula["eager"], formula["Inductor alone"]) > (5, 40.0)
    assert set(moved(ablation["pixel shuffle, class token dropped"]).values()) == {(1, 2.0)}
    assert moved(ablation["class token dropped, layer norm, pixel shuffle"]) == {
        "eager": (2, 4.0),
        "Inductor alone": (1, 2.0),
        "Triton opaque": (2, 4.0),
        "Triton fused": (1, 2.0),
    }


def test_the_epilogue_saves_a_launch_and_the_widest_activation_twice(ablation: dict[str, dict[str, Any]]) -> None:
    forms = ablation["linear + GELU"]
    weights = 2 * (4 * 1408 * 1408 + 4 * 1408)
    assert (forms["Triton fused"]["launches"], forms["Triton fused"]["bytes"]) == (1, 5 * ACTIVATION + weights)
    for form in ("eager", "Inductor alone"):
        assert (forms[form]["launches"], forms[form]["bytes"]) == (2, 13 * ACTIVATION + weights)


def test_the_shuffle_alone_moves_3_2_mb_a_tile(ablation: dict[str, dict[str, Any]]) -> None:
    forms = ablation["pixel shuffle, class token dropped"]
    assert {kernels["bytes"] for kernels in forms.values()} == {TILES * 2 * 576 * 1408 * 2}
