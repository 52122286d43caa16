"""executed_ptx as anyone would use it, on kernels that are none of this project's."""

import re
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from vit_kernels import force_impl, pixel_shuffle
from vit_kernels.testing import seeded_tensor
from vit_kernels.testing.ptx import Hazard, HazardFound, UnknownInstruction, executed_ptx

TARGETS = ("sm_80", "sm_90")


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, size, scale, BLOCK: tl.constexpr = 64):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x_ptr + i, i < size) + tl.load(y_ptr + i, i < size) * scale
    tl.store(out_ptr + i, total, i < size)


@triton.jit
def unmasked_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i))  # the line of the finding


@triton.jit
def same_output_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i) + tl.program_id(0))


@triton.jit
def atomic_kernel(out_ptr):  # type: ignore[no-untyped-def]
    tl.atomic_add(out_ptr, 1)


tuned_kernel = triton.autotune([triton.Config({"BLOCK": 32}), triton.Config({"BLOCK": 128})], key=["size"])(add_kernel)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_runs_a_kernel(target: str, dtype: torch.dtype) -> None:
    x, y = (torch.arange(200).remainder(n).to(dtype) for n in (17, 13))
    with executed_ptx(target) as report:
        out = torch.empty_like(x)
        add_kernel[lambda meta: (triton.cdiv(200, meta["BLOCK"]),)](x, y, out, 200, 2)
    assert torch.equal(out, x + 2 * y)
    assert report.launches[0].grid == (4, 1, 1)
    assert report.launches[0].name == "add_kernel"
    assert not report.findings


def test_runs_the_first_configuration_of_an_autotuned_kernel() -> None:
    x = seeded_tensor((100,), torch.float32, 0)
    with executed_ptx("sm_90") as report:
        out = torch.empty_like(x)
        tuned_kernel[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](x, x, out, 100, 0.5)
    torch.testing.assert_close(out, 1.5 * x)
    assert report.launches[0].grid == (4, 1, 1)


def line_of(kernel: Callable[..., None], text: str) -> str:
    first = kernel.starting_line_number  # type: ignore[attr-defined]
    lines = kernel.raw_src  # type: ignore[attr-defined]
    return f"test_launch.py:{first + next(i for i, line in enumerate(lines) if text in line)}"


def test_an_access_out_of_bounds_raises_with_the_line_of_the_source() -> None:
    x = seeded_tensor((64,), torch.float32, 0)
    with executed_ptx("sm_80"), pytest.raises(HazardFound) as raised:
        unmasked_kernel[(1,)](x[:63], torch.empty(64), BLOCK=64)
    assert raised.value.finding.hazard == Hazard.GLOBAL_BOUNDS
    assert raised.value.finding.where == line_of(unmasked_kernel, "the line of the finding")


def test_a_read_of_what_nothing_wrote_raises() -> None:
    with executed_ptx("sm_80"), pytest.raises(HazardFound, match=Hazard.GLOBAL_UNINITIALISED):
        unmasked_kernel[(1,)](torch.empty(64), torch.empty(64), BLOCK=64)


def test_two_blocks_that_write_one_byte_are_found_and_counted_when_not_strict() -> None:
    x = seeded_tensor((64,), torch.float32, 0)
    with executed_ptx("sm_80"), pytest.raises(HazardFound, match=Hazard.GLOBAL_TWO_BLOCKS_WRITE):
        same_output_kernel[(2,)](x, torch.empty(64), BLOCK=64)
    with executed_ptx("sm_80", strict=False) as report:
        same_output_kernel[(2,)](x, torch.empty(64), BLOCK=64)
    assert {finding.hazard for finding in report.findings} == {Hazard.GLOBAL_TWO_BLOCKS_WRITE}


def test_a_kernel_with_an_instruction_that_has_no_definition_does_not_run() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    with executed_ptx("sm_80"), pytest.raises(UnknownInstruction, match="atom"):
        atomic_kernel[(1,)](out)
    assert out.item() == 0


def test_other_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="target: got 'sm_100', expected one of sm_80, sm_90"), executed_ptx("sm_100"):
        pass


def test_what_it_changed_is_as_it_was() -> None:
    before = triton.runtime.jit.JITFunction.run, torch.empty
    with executed_ptx("sm_80"), force_impl("triton"):
        pixel_shuffle(torch.zeros(1, 4, 16), 2, 2)
    assert before == (triton.runtime.jit.JITFunction.run, torch.empty)
    with pytest.raises(RuntimeError, match="a CPU tensor needs"), force_impl("triton"):
        pixel_shuffle(torch.zeros(1, 4, 16), 2, 2)


def test_edited_code_is_what_runs() -> None:
    x = torch.ones(64)
    with executed_ptx("sm_80", edit=lambda ptx: re.sub(".*st.global.*", "", ptx)) as report:
        out = torch.zeros(64)
        add_kernel[(1,)](x, x, out, 64, 1.0)
    assert not out.any()
    assert not any(opcode.startswith("st.") for opcode in report.opcodes)


def test_sectors_are_counted_by_line() -> None:
    x = torch.ones(256)
    with executed_ptx("sm_80") as report:
        unmasked_kernel[(1,)](x, torch.empty(256), BLOCK=256)
    ((load, store),) = [[report.sectors[key] for key in sorted(report.sectors)]]
    # 128 threads take 8 bytes each: 4 warps of 8 sectors.
    for counts in (load, store):
        assert (counts.requests, counts.sectors, counts.bytes, counts.ratio) == (4, 32, 1024, 1.0)
