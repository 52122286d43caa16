"""What the compilers make of the kernels for five GPUs that are not present: nothing here is run or timed."""

import itertools
import json
import os
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from experiments.kernels.__main__ import COMMITTED, make_rows
from experiments.kernels.check import read_report, regressions
from experiments.kernels.compile import Case, cases_of
from experiments.kernels.registry import DTYPES, HEAD_DIMS, OURS
from tests.workers import cores

pytestmark = pytest.mark.costly

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")

SCRIPT = """
    import json
    import re
    import sys

    import torch
    from vit_kernels._triton import (
        layer_norm_pixel_shuffle, linear_gelu, pixel_shuffle, rotary_2d, scaled_linear, varlen_attention
    )
    from vit_kernels._triton.configurations import linear_candidates, scaled_linear_candidates
    from vit_kernels.inspection import TARGETS, compile_launch

    def meta(*shape, dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def attention(target, head_dim, dtype, first=0):
        packed = meta(1154 * 48 * head_dim + first, dtype=dtype)[first:]
        q, k, v = packed.view(1154, 3, 16, head_dim).unbind(1)
        cu_seqlens = meta(3, dtype=torch.int32)
        return compile_launch(target, varlen_attention.launch, q, k, v, cu_seqlens, cu_seqlens, 0.1)

    def rotary(target, head_dim, interleaved):
        q, k, _ = meta(1154, 48, head_dim, dtype=torch.bfloat16).split(16, dim=1)
        cos = meta(577, head_dim // 2, dtype=torch.float32)
        return compile_launch(target, rotary_2d.launch_in_place, q, k, cos, cos, interleaved)

    def rotary_backward(target):
        q, k = meta(2, 1154, 16, 88, dtype=torch.bfloat16)
        cos = meta(577, 44, dtype=torch.float32)
        return compile_launch(target, rotary_2d.launch, q, k, cos, cos, True, inverse=True)

    def shuffle(target):
        x = meta(2, 577, 1408, dtype=torch.bfloat16)[:, :-1]
        return compile_launch(target, pixel_shuffle.launch, x, 24, 24, 2)

    def shuffle_backward(target):
        grad = meta(2, 144, 5632, dtype=torch.bfloat16)
        return compile_launch(target, pixel_shuffle.launch_backward, grad, 24, 24, 2)

    def norm_and_shuffle(target, dtype):
        x, weight = meta(2, 577, 1408, dtype=dtype)[:, :-1], meta(1408, dtype=dtype)
        return compile_launch(target, layer_norm_pixel_shuffle.launch, x, weight, weight, 24, 24, 2, 1e-5)

    def gelus(target, dtype):
        x, weight, bias = (meta(*shape, dtype=dtype) for shape in ((1154, 1408), (5632, 1408), (5632,)))
        kept = linear_candidates(dtype, target)
        for number, configuration in enumerate(kept if dtype == torch.bfloat16 else kept[:1]):
            report = compile_launch(target, linear_gelu.launch, x, weight, bias, configuration=configuration)
            yield f"linear_gelu {str(dtype)[6:]} {number}", report

    def scaled(target, dtype):
        x, weight = meta(1154, 1408, dtype=dtype), meta(5632, 1408, dtype=dtype)
        x_scale, weight_scale, bias = (meta(n, dtype=torch.float32) for n in (1154, 5632, 5632))
        # As fc1: with e4m3 the GELU's result is stored in e4m3.
        out = (None, torch.bfloat16) if dtype == torch.int8 else (x_scale, dtype)
        rest = x_scale, weight_scale, bias, out[0], "gelu", out[1]
        for number, configuration in enumerate(scaled_linear_candidates(dtype, target)):
            report = compile_launch(target, scaled_linear.launch, x, weight, *rest, configuration=configuration)
            yield f"scaled_linear {str(dtype)[6:]} {number}", report

    for target in TARGETS:
        head_dims = (64, 72, 80, 88, 96, 128)
        reports = {f"attention {dim} bfloat16": attention(target, dim, torch.bfloat16) for dim in head_dims}
        reports["attention from an odd address"] = attention(target, 88, torch.bfloat16, first=1)
        reports["attention 24 float32"] = attention(target, 24, torch.float32)
        reports |= {f"rotary interleaved {dim}": rotary(target, dim, True) for dim in (64, 72, 80, 88, 128)}
        reports |= {f"rotary halves {dim}": rotary(target, dim, False) for dim in (80, 88)}
        reports["rotary backward"] = rotary_backward(target)
        reports["pixel_shuffle"] = shuffle(target)
        reports["pixel_shuffle backward"] = shuffle_backward(target)
        reports["layer_norm_pixel_shuffle bfloat16"] = norm_and_shuffle(target, torch.bfloat16)
        reports["layer_norm_pixel_shuffle float32"] = norm_and_shuffle(target, torch.float32)
        for dtype in (torch.bfloat16, torch.float32):
            reports |= gelus(target, dtype)
        for dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz):
            reports |= scaled(target, dtype)
        for name, (report,) in reports.items():
            loop = report.main_loop
            print(json.dumps({
                "target": target,
                "kernel": name,
                "spills": report.spill_store_bytes + report.spill_load_bytes,
                "ctas_per_sm": report.ctas_per_sm,
                "warps": report.ctas_per_sm * report.num_warps,
                "shared_bytes": report.shared_bytes,
                "precision": sorted(set(re.findall(r"inputPrecision = (\\w+)", report.asm["ttir"]))),
                "matrix": sorted(report.instructions.matrix),
                "loop_matrix": sorted(loop.matrix) if loop else [],
                "loop_loads": sorted({*loop.global_loads, *loop.async_copies}) if loop else [],
                "loads": sorted({*report.instructions.global_loads, *report.instructions.async_copies}),
                "stores": sorted(report.instructions.global_stores),
            }))
"""


@pytest.fixture(scope="module")
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both the committed figures and the reports below are judged by what is compiled into it, each kernel once."""
    return tmp_path_factory.mktemp("triton")


def worse_than_committed(cases: list[Case], triton_cache: Path) -> list[str]:
    """Figures of these cases, made now, that are worse than in the committed report."""
    committed = read_report(COMMITTED)
    if committed.triton != (here := metadata.version("triton")):
        pytest.skip(f"the committed figures are of triton {committed.triton}, this is {here}")
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(triton_cache)):
        return regressions(committed.rows, make_rows(cases, jobs=cores()))


# First, because it compiles on every core.
def test_no_figure_of_a_default_configuration_got_worse(triton_cache: Path) -> None:
    attention = cases_of(OURS[0], ["bfloat16"], HEAD_DIMS, TARGETS, defaults_only=True)
    exact = cases_of(OURS[0], ["float32"], [88], TARGETS, defaults_only=True)
    others = [cases_of(kernel, ["bfloat16"], [88], TARGETS, defaults_only=True) for kernel in OURS[1:]]
    assert worse_than_committed([*attention, *exact, *itertools.chain(*others)], triton_cache) == []


@pytest.mark.thorough
def test_no_figure_of_any_configuration_got_worse(triton_cache: Path) -> None:
    everything = [case for kernel in OURS for case in cases_of(kernel, DTYPES, HEAD_DIMS, TARGETS, defaults_only=False)]
    assert worse_than_committed(everything, triton_cache) == []


@pytest.fixture(scope="module")
def reports(triton_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """One report for each target and kernel, from a process that compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(triton_cache)
    script: Path = tmp_path_factory.mktemp("script") / "compile_kernels.py"
    script.write_text(textwrap.dedent(SCRIPT))
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=900, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {(line["target"], line["kernel"]): line for line in lines}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head_dim", [64, 72, 80, 88, 96, 128])
def test_attention_in_bf16(reports: dict[tuple[str, str], dict[str, Any]], target: str, head_dim: int) -> None:
    report = reports[target, f"attention {head_dim} bfloat16"]
    kind = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC"}.get(target, "v_mfma")
    assert report["spills"] == 0
    assert report["ctas_per_sm"] >= 1
    assert report["loop_matrix"]
    assert all(opcode.startswith(kind) for opcode in report["loop_matrix"])
    assert report["loop_loads"] == [16]
    assert max(report["stores"]) == (8 if target == "gfx942" else 16)


@pytest.mark.parametrize("target", TARGETS)
def test_views_that_are_not_aligned_are_read_element_by_element(
    reports: dict[tuple[str, str], dict[str, Any]], target: str
) -> None:
    assert reports[target, "attention from an odd address"]["loop_loads"] == [2]


@pytest.mark.parametrize("target", TARGETS)
def test_products_of_float32_are_not_plain_tf32(reports: dict[tuple[str, str], dict[str, Any]], target: str) -> None:
    report = reports[target, "attention 24 float32"]
    # The printer leaves out ieee, the dialect's default.
    assert report["precision"] == (["tf32x3"] if target.startswith("sm") else [])
    assert not any("xf32" in opcode for opcode in report["matrix"])
    assert report["ctas_per_sm"] >= 1


ONE_ACCESS_WIDTH = [
    *(f"rotary interleaved {head_dim}" for head_dim in (64, 72, 80, 88, 128)),
    "rotary backward",
    "pixel_shuffle",
    "pixel_shuffle backward",
    "layer_norm_pixel_shuffle bfloat16",
    "layer_norm_pixel_shuffle float32",
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", ONE_ACCESS_WIDTH)
def test_passes_that_only_move_bytes_move_16_at_a_time(
    reports: dict[tuple[str, str], dict[str, Any]], target: str, kernel: str
) -> None:
    report = reports[target, kernel]
    assert report["spills"] == 0
    assert report["matrix"] == []
    assert report["loads"] == [16]
    assert report["stores"] == [16]
    # Enough loads in flight to keep the memory busy; a rotation needs nothing of another thread.
    assert report["warps"] >= 20
    assert report["shared_bytes"] <= (0 if "rotary" in kernel else 64)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_linear_gelu_is_clean(reports: dict[tuple[str, str], dict[str, Any]], target: str, dtype: str) -> None:
    kept = [
        report for (on, name), report in reports.items() if on == target and name.startswith(f"linear_gelu {dtype}")
    ]
    assert len(kept) >= (3 if dtype == "bfloat16" else 1)
    for report in kept:
        assert report["spills"] == 0
        assert report["loop_loads"] == [16]
        assert set(report["stores"]) <= ({8, 16} if target.startswith("gfx") else {16})
        assert report["ctas_per_sm"] >= 2
    # The default multiplies in the target's widest instruction.
    (instruction,) = {name.partition(".")[0] for name in kept[0]["loop_matrix"]}
    expected = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(target, "v_mfma")
    assert instruction.startswith(expected)
    assert kept[0]["precision"] == (["tf32x3"] if dtype == "float32" and target.startswith("sm") else [])


# On sm_100 Triton multiplies int8 by the instruction of sm_80.
EIGHT_BIT_PRODUCTS = {
    "sm_80": {"int8": "IMMA"},
    "sm_90": {"int8": "IGMMA", "float8_e4m3fn": "QGMMA"},
    "sm_100": {"int8": "IMMA", "float8_e4m3fn": "UTCQMMA"},
    "gfx942": {"int8": "v_mfma_i32_32x32x16_i8", "float8_e4m3fnuz": "v_mfma_f32_32x32x16_fp8_fp8"},
    "gfx950": {"int8": "v_mfma_i32_32x32x32_i8", "float8_e4m3fn": "v_mfma_f32_32x32x64_f8f6f4"},
}


@pytest.mark.parametrize("target", TARGETS)
def test_scaled_linear_multiplies_8_bits(reports: dict[tuple[str, str], dict[str, Any]], target: str) -> None:
    kept = {name: report for (on, name), report in reports.items() if on == target and name.startswith("scaled_linear")}
    assert {name.split()[1] for name in kept} == EIGHT_BIT_PRODUCTS[target].keys()
    for name, report in kept.items():
        expected = EIGHT_BIT_PRODUCTS[target][name.split()[1]]
        assert report["loop_matrix"]
        assert all(opcode.startswith(expected) for opcode in report["loop_matrix"])
        assert report["spills"] == 0
        assert report["loop_loads"] == [16]
        assert report["ctas_per_sm"] >= 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head_dim", [80, 88])
def test_rotary_of_halves(reports: dict[tuple[str, str], dict[str, Any]], target: str, head_dim: int) -> None:
    report = reports[target, f"rotary halves {head_dim}"]
    assert report["spills"] == 0
    assert report["matrix"] == []
    # Half a head of 88 is 88 bytes: its second half cannot be 16-byte aligned. A wavefront of 64 takes half a token.
    widest = 16 if head_dim == 80 and target.startswith("sm") else 8
    assert report["loads"] == sorted({widest, 16})
    assert report["stores"] == [widest]
