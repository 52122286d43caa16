"""What the compilers make of the kernels for five GPUs that are not there: nothing here is run or timed."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")

SCRIPT = """
    import json
    import re
    import sys

    import torch
    from vit_kernels._triton import pixel_shuffle, rotary_2d, varlen_attention
    from vit_kernels.inspection import TARGETS, compile_launch

    def meta(*shape, dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def attention(target, head_dim, dtype):
        q, k, v = meta(1154, 3, 2, head_dim, dtype=dtype).unbind(1)
        cu_seqlens = meta(3, dtype=torch.int32)
        return compile_launch(target, varlen_attention.launch, q, k, v, cu_seqlens, cu_seqlens, 0.1)

    def rotary(target, interleaved):
        q, k, _ = meta(1154, 3, 2, 88, dtype=torch.bfloat16).unbind(1)
        cos = meta(577, 44, dtype=torch.float32)
        return compile_launch(target, rotary_2d.launch, q, k, cos, cos, interleaved)

    def shuffle(target):
        x = meta(2, 577, 1408, dtype=torch.bfloat16)[:, :-1]
        return compile_launch(target, pixel_shuffle.launch, x, 24, 24, 2)

    for target in TARGETS:
        reports = {f"attention {dim} bfloat16": attention(target, dim, torch.bfloat16) for dim in (64, 72, 80, 88, 128)}
        reports["attention 24 float32"] = attention(target, 24, torch.float32)
        reports["rotary interleaved"] = rotary(target, True)
        reports["rotary halves"] = rotary(target, False)
        reports["pixel_shuffle"] = shuffle(target)
        for name, (report,) in reports.items():
            loop = report.main_loop
            print(json.dumps({
                "target": target,
                "kernel": name,
                "spills": report.spill_store_bytes + report.spill_load_bytes,
                "ctas_per_sm": report.ctas_per_sm,
                "precision": sorted(set(re.findall(r"inputPrecision = (\\w+)", report.asm["ttir"]))),
                "matrix": sorted(report.instructions.matrix),
                "loop_matrix": sorted(loop.matrix) if loop else [],
                "loop_loads": sorted({*loop.global_loads, *loop.async_copies}) if loop else [],
                "loads": sorted({*report.instructions.global_loads, *report.instructions.async_copies}),
                "stores": sorted(report.instructions.global_stores),
            }))
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """One report for each target and kernel, from a process that compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script: Path = tmp_path_factory.mktemp("script") / "compile_kernels.py"
    script.write_text(textwrap.dedent(SCRIPT))
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=900, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return {(line["target"], line["kernel"]): line for line in lines}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head_dim", [64, 72, 80, 88, 128])
def test_attention_in_bf16(reports: dict[tuple[str, str], dict[str, Any]], target: str, head_dim: int) -> None:
    report = reports[target, f"attention {head_dim} bfloat16"]
    kind = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC"}.get(target, "v_mfma")
    assert report["spills"] == 0
    assert report["ctas_per_sm"] >= 1
    assert report["loop_matrix"]
    assert all(opcode.startswith(kind) for opcode in report["loop_matrix"])
    # gfx942 and gfx950 read the narrow second block of 72 and 80 columns 8 bytes at a time.
    assert report["loop_loads"] == ([8, 16] if head_dim in (72, 80) and kind == "v_mfma" else [16])
    assert max(report["stores"]) == (8 if target == "gfx942" else 16)


@pytest.mark.parametrize("target", TARGETS)
def test_products_of_float32_are_not_plain_tf32(reports: dict[tuple[str, str], dict[str, Any]], target: str) -> None:
    report = reports[target, "attention 24 float32"]
    # The printer leaves out ieee, the dialect's default.
    assert report["precision"] == (["tf32x3"] if target.startswith("sm") else [])
    assert not any("xf32" in opcode for opcode in report["matrix"])
    assert report["ctas_per_sm"] >= 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", ["rotary interleaved", "rotary halves", "pixel_shuffle"])
def test_passes_that_only_move_bytes(reports: dict[tuple[str, str], dict[str, Any]], target: str, kernel: str) -> None:
    report = reports[target, kernel]
    assert report["spills"] == 0
    assert report["matrix"] == []
    # Half a head of 88 is 88 bytes: pairs in halves cannot be 16-byte aligned.
    widest = 8 if kernel == "rotary halves" else 16
    assert max(report["loads"]) >= widest
    assert max(report["stores"]) >= widest
