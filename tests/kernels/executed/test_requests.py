"""What compiled kernels ask of memory, counted: whole sectors, no bank conflicts, asynchronous copies.

Counters against arithmetic; bounds for the layouts that users have.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from vit_kernels._triton import linear_gelu, varlen_attention
from vit_kernels.testing import seeded_tensor
from vit_kernels.testing.ptx import executed_ptx

from experiments.kernels import requests
from experiments.kernels.registry import HEAD_DIMS

TARGETS = ("sm_80", "sm_90")


@pytest.mark.parametrize("target", TARGETS)
def test_counters_of_a_product_are_arithmetic(target: str) -> None:
    """One block of 128 x 128, 512 deep: what it must read, and the matrix instructions that it must issue."""
    x, weight, bias = (seeded_tensor(shape, torch.bfloat16, 0) for shape in ((128, 512), (128, 512), (128,)))
    with executed_ptx(target) as report:
        linear_gelu.launch(x, weight, bias)
    copies = [counts for (_, opcode), counts in report.sectors.items() if opcode.startswith("cp.async")]
    assert sum(counts.bytes for counts in copies) == 2 * 128 * 512 * 2
    assert sum(counts.sectors for counts in copies) == 2 * 128 * 512 * 2 // 32
    matrix = {name: n for name, n in report.opcodes.items() if "mma" in name and "m16n8k16" in name}
    matrix |= {name: n for name, n in report.opcodes.items() if name.startswith("wgmma.mma_async")}
    (name,) = matrix
    if target == "sm_80":
        assert matrix[name] * 16 * 8 * 16 == 128 * 128 * 512
    else:
        # Four warps issue one of 64 x n x 16.
        n = int(re.search(r"m64n(\d+)k16", name)[1])  # type: ignore[index]
        assert matrix[name] // 4 * 64 * n * 16 == 128 * 128 * 512


@pytest.mark.parametrize("target", TARGETS)
def test_attention_reads_keys_and_values_once_a_block(target: str) -> None:
    q, k, v = seeded_tensor((128, 3, 1, 64), torch.bfloat16, 0).unbind(1)
    cu_seqlens = torch.tensor([0, 128], dtype=torch.int32)
    with executed_ptx(target) as report:
        varlen_attention.launch(q, k, v, cu_seqlens, cu_seqlens, 0.1)
    copied = sum(counts.bytes for (_, opcode), counts in report.sectors.items() if opcode.startswith("cp.async"))
    # Two blocks of 64 queries, each of which reads all keys and values.
    assert copied == 2 * 2 * 128 * 64 * 2


def bound(case: requests.Case) -> float:
    """On the sectors that a kernel touches over those that it needs."""
    # Of one head, the tables in float32 are half of what is read: 16 bytes of each 32, and the others right after.
    one_head = case.layout is not None and case.layout.heads == 1
    return 1.5 if case.op == "rotary_2d halves" and one_head and case.head_dim in (80, 96, 128) else 1.3


def assert_few_requests(case: requests.Case) -> None:
    for row in requests.measure(case):
        # It reads a number a row, and next to nothing else, where no log-sum-exp is large.
        if row.kernel == "exact_lse":
            continue
        assert row.sectors <= bound(case), row
        assert row.wavefronts in (None, 1.0), row
        assert row.copies or not ("attention" in case.op or case.op == "linear_gelu"), row


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", requests.LAYOUTS[:2], ids=lambda layout: layout.name)
@pytest.mark.parametrize("op", ["varlen_attention", "rotary_2d halves"])
def test_requests_at_head_dim_88(op: str, layout: requests.Layout, target: str) -> None:
    assert_few_requests(requests.Case(op, layout, "bfloat16", 88, target))


@pytest.mark.thorough
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("op", requests.OPS)
def test_requests_of_every_op(op: str, head_dim: int, dtype: str, target: str) -> None:
    for case in requests.cases([op], [dtype], [head_dim], [target]):
        assert_few_requests(case)


def test_the_command_writes_what_it_counted(tmp_path: Path) -> None:
    options = ["--op", "pixel_shuffle", "--dtype", "bfloat16", "--head-dim", "64", "--target", "sm_80"]
    assert requests.main([*options, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "kernel_requests.json").read_text())["rows"]
    assert [row["kernel"] for row in rows] == ["pixel_shuffle"] * 2
    assert all(row["sectors"] == 1.0 and row["wavefronts"] is None for row in rows)
