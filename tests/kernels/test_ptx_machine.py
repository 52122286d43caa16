"""How threads run, meet and read each other's registers, what is parsed, and what is counted."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vit_kernels.testing.ptx import HazardFound, PtxError, UnknownInstruction, executed_ptx, program
from vit_kernels.testing.ptx.counts import sectors_of, wavefronts_of
from vit_kernels.testing.ptx.parsing import parse, split_operands

from tests.kernels.ptx_programs import assemble, run


def results(body: str, warps: int = 1, **options: object) -> list[int]:
    """What a program leaves in %r9 of each thread, as unsigned numbers."""
    out = torch.zeros(32 * warps, dtype=torch.int32)
    run(f"{body}\nst.global.b32 [%rd40], %r9;", out, warps=warps, **options)  # type: ignore[arg-type]
    return [int(x) % 2**32 for x in out]


def test_threads_that_loop_differently_meet_again() -> None:
    body = """
        mov.b32 %r9, 0;
        mov.b32 %r4, 0;
    loop:
        setp.ge.u32 %p1, %r4, %r0;
        @%p1 bra done;
        add.s32 %r9, %r9, %r4;
        add.s32 %r4, %r4, 1;
        bra loop;
    done:
        shfl.sync.bfly.b32 %r5, %r9, 1, 31, -1;
        add.s32 %r9, %r9, %r5;
    """
    sums = [n * (n - 1) // 2 for n in range(64)]
    assert results(body, warps=2) == [sums[n] + sums[n ^ 1] for n in range(64)]


def test_both_ways_of_a_branch_and_a_branch_within_it() -> None:
    body = """
        setp.lt.u32 %p1, %r0, 10;
        setp.lt.u32 %p2, %r0, 5;
        mov.b32 %r9, 3;
        @!%p1 bra high;
        mov.b32 %r9, 1;
        @%p2 bra done;
        mov.b32 %r9, 2;
        bra.uni done;
    high:
        add.s32 %r9, %r9, 4;
    done:
        bar.sync 0;
    """
    assert results(body) == [1] * 5 + [2] * 5 + [7] * 22


def test_threads_that_return_write_nothing_more() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    run("setp.ge.u32 %p1, %r0, 7;\n@%p1 ret;\nst.global.b32 [%rd40], %r2;", out)
    assert (out != 0).tolist() == [thread < 7 for thread in range(32)]


def test_a_guarded_instruction_keeps_the_other_lanes() -> None:
    body = "mov.b32 %r9, 5;\nsetp.eq.b32 %p1, %r0, 3;\n@%p1 mov.b32 %r9, 6;\n@!%p1 add.s32 %r9, %r9, 10;"
    assert results(body) == [6 if thread == 3 else 15 for thread in range(32)]


def test_a_block_that_does_not_end() -> None:
    with mock.patch.object(program, "MOST_STEPS", 100), pytest.raises(PtxError, match="a block does not end"):
        run("loop:\nbra loop;")


def test_special_registers() -> None:
    for name, expected in (
        ("%ctaid.x", [1] * 32), ("%ctaid.y", [2] * 32), ("%nctaid.x", [2] * 32), ("%nctaid.y", [3] * 32),
        ("%ntid.x", [32] * 32), ("%tid.y", [0] * 32), ("%laneid", list(range(32))),
    ):  # fmt: skip
        # The last block writes; the others leave.
        body = """
            mov.u32 %r4, %ctaid.x;
            mov.u32 %r5, %ctaid.y;
            mad.lo.s32 %r4, %r5, 2, %r4;
            setp.ne.b32 %p1, %r4, 5;
            @%p1 ret;
        """
        assert results(f"{body}\nmov.u32 %r9, {name};", grid=(2, 3, 1)) == expected


def test_registers_of_a_nested_scope_are_its_own() -> None:
    body = """
        mov.b32 %r4, 1;
        { .reg .b32 %r4; .reg .pred p; mov.b32 %r4, 7; setp.eq.b32 p, %r4, 7; @p mov.b32 %r9, %r4; }
        { .reg .b32 a, b; mov.b32 a, 20; add.s32 b, a, %r4; add.s32 %r9, %r9, b; }
    """
    assert results(body) == [28] * 32


def test_vectors_of_registers() -> None:
    body = """
        mov.b32 {%h1, %h2}, 0x00030002;
        mov.b32 %r9, {%h2, %h1};
        mov.b64 %rd1, {%r9, %r9};
        mov.b64 {_, %r9}, %rd1;
    """
    assert results(body) == [0x00020003] * 32


def test_negative_and_float_constants() -> None:
    assert results("mov.b32 %r9, -2;") == [2**32 - 2] * 32
    assert results("mov.f32 %r9, 0f3F800000;") == [0x3F800000] * 32
    assert results("mov.b64 %rd1, 0d3FF0000000000000;\nmov.b64 {_, %r9}, %rd1;") == [0x3FF00000] * 32


def test_narrow_loads_are_extended_as_their_type_says() -> None:
    x = torch.tensor([-2, 3] * 16, dtype=torch.int8)
    for kind, low in (("s8", 2**32 - 2), ("u8", 254), ("b8", 254)):
        out = torch.zeros(32, dtype=torch.int32)
        body = f"cvt.u64.u32 %rd1, %r0;\nadd.s64 %rd1, %rd1, %rd50;\nld.global.{kind} %r4, [%rd1];"
        run(f"{body}\nst.global.b32 [%rd41], %r4;", x, out)
        assert [int(n) % 2**32 for n in out] == [low, 3] * 16


@pytest.mark.parametrize("mode", ["bfly", "up", "down", "idx"])
@given(b=st.integers(0, 31), clamp=st.integers(0, 31), segments=st.sampled_from([1, 2, 4]))
def test_shuffles(mode: str, b: int, clamp: int, segments: int) -> None:
    mask = 31 & ~(32 // segments - 1)
    got = results(f"shfl.sync.{mode}.b32 %r9, %r0, {b}, {mask << 8 | clamp}, -1;")
    for lane in range(32):
        lowest = lane & mask
        limit = lowest | clamp & ~mask
        other = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": lowest | b & ~mask}[mode]
        valid = other >= limit if mode == "up" else other <= limit
        assert got[lane] == (other if valid else lane), lane


@pytest.mark.parametrize(
    ("operation", "expected"),
    [("add.s32", sum(range(32))), ("min.u32", 0), ("max.s32", 31), ("and.b32", 0), ("or.b32", 31), ("xor.b32", 0)],
)
def test_reductions(operation: str, expected: int) -> None:
    first = results(f"redux.sync.{operation} %r9, %r0, -1;", warps=2)[:32]
    assert first == [expected] * 32


def test_shuffles_of_some_lanes_only_are_refused() -> None:
    with pytest.raises(UnknownInstruction):
        run("shfl.sync.bfly.b32 %r4, %r0, 1, 31, 0xffff;")


def test_operands_are_split_at_the_outer_commas() -> None:
    assert split_operands("{%r1, %r2}, [ %rd1 + 0 ], 0x10, %r3") == ("{%r1, %r2}", "[ %rd1 + 0 ]", "0x10", "%r3")


def test_lines_of_the_source_with_their_callers() -> None:
    text = """
    .loc 1 12 3                              // kernel.py:12:3
    add.s32 %r4, %r0, %r0;
    .loc 2 7 9                               // helper.py:7:9 @[ middle.py:3:1 @[ kernel.py:20:5 ] ]
    add.s32 %r4, %r0, %r0;
    .loc 3 4 0
    add.s32 %r4, %r0, %r0;
    """
    wheres = [i.where for i in parse(assemble(text, 0)).instructions if i.opcode == "add.s32"][-3:]
    assert wheres == ["kernel.py:12", "helper.py:7 in middle.py:3 in kernel.py:20", "file 3:4"]


def test_a_text_without_a_kernel() -> None:
    with pytest.raises(ValueError, match=r"expected a text with an .entry"):
        parse(".version 8.7")


def test_a_finding_names_line_instruction_and_where_the_tensors_are() -> None:
    body = """
    .loc 1 12 3                              // kernel.py:12:3
    ld.global.b32 %r4, [%rd40+4];
    """
    with pytest.raises(HazardFound, match=r"kernel.py:12: ld.global.b32 %r4, \[%rd40\+4\]: 1 lanes, .* 0 bytes from"):
        run(body, torch.zeros(32, dtype=torch.int32))


def test_interpreted_kernels_are_refused() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is not set"), executed_ptx("sm_80"):
        pass


def test_instructions_are_counted_once_a_warp_that_runs_them() -> None:
    body = "setp.lt.u32 %p1, %r0, 40;\n@%p1 bra low;\nor.b32 %r4, %r0, 1;\nlow:\nxor.b32 %r4, %r0, 1;"
    report = run(body, warps=3, grid=(2, 1, 1))
    # Threads 40 to 95, of two of three warps, do not branch. Then all meet again.
    assert report.opcodes["or.b32"] == 2 * 2
    assert report.opcodes["xor.b32"] == 2 * 3
    assert report.launches[0].reached == report.launches[0].instructions


def naive_sectors(addresses: list[int], size: int) -> tuple[int, int, int]:
    bytes_ = {address + i for address in addresses for i in range(size)}
    return 1, len({byte // 32 for byte in bytes_}), len(bytes_)


def naive_wavefronts(addresses: list[int], size: int) -> tuple[int, int]:
    lanes = min(32, 128 // size)
    requests = [addresses[i : i + lanes] for i in range(0, 32, lanes)]
    total = 0
    for request in requests:
        words = {(address + i) // 4 for address in request for i in range(0, size, min(size, 4))}
        total += max(sum(word % 32 == bank for word in words) for bank in range(32))
    return len(requests), total


@given(data=st.data(), size=st.sampled_from([1, 2, 4, 8, 16]))
def test_sectors_and_wavefronts(data: st.DataObject, size: int) -> None:
    addresses = [size * data.draw(st.integers(0, 200)) for _ in range(32)]
    lanes, at = np.arange(32), np.array(addresses)
    assert sectors_of(at, lanes // 32, size) == naive_sectors(addresses, size)
    assert wavefronts_of(at, lanes, size) == naive_wavefronts(addresses, size)


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 1), (2, 2), (32, 32), (33, 1), (0, 1)])
def test_bank_conflicts_of_a_stride(stride: int, wavefronts: int) -> None:
    body = f"mul.lo.s32 %r4, %r1, {stride};\nadd.s32 %r4, %r4, %r2;\nst.shared.b32 [%r4], %r2;"
    report = run(body, shared_bytes=4 * 32 * 33)
    assert report.wavefronts["", "st.shared.b32"].wavefronts == wavefronts
    assert report.wavefronts["", "st.shared.b32"].requests == 1
