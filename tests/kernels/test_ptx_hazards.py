"""Each hazard in a few instructions, and the same program without it.

Lines that begin with - are only in the racy program, those with + only in the right one. Two warps, unless said.
"""

import re
from typing import Any, NamedTuple

import pytest
import torch
from vit_kernels.testing.ptx import Hazard
from vit_kernels.testing.ptx.global_memory import UNWRITTEN

from tests.kernels.ptx_programs import hazard_of, run


class Race(NamedTuple):
    """A program of both kinds, and how it is launched."""

    name: str
    hazard: Hazard
    body: str
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed

    def racy(self) -> str:
        return re.sub(r"(?m)^\s*-", "", re.sub(r"(?m)^\s*\+.*$", "", self.body))

    def right(self) -> str:
        return re.sub(r"(?m)^\s*\+", "", re.sub(r"(?m)^\s*-.*$", "", self.body))


def descriptor(start: int) -> str:
    """Of rows of 32 bytes, 8 of them 256 bytes from the next 8, swizzled so."""
    return hex((1024 + start) >> 4 | 1 << 16 | 256 >> 4 << 32 | 3 << 62)


ZEROS = """
    mov.b32 %r20, 0;
    shl.b32 %r21, %r0, 5;
    add.s32 %r21, %r21, %r2;
    st.shared.v4.b32 [%r21], {%r20, %r20, %r20, %r20};
    st.shared.v4.b32 [%r21+16], {%r20, %r20, %r20, %r20};
    mov.b32 %r10, 0;
    mov.b32 %r11, 0;
    mov.b32 %r12, 0;
    mov.b32 %r13, 0;
"""
PRODUCT = f"""
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r10, %r11, %r12, %r13}}, {descriptor(0)}, {descriptor(2048)}, 1, 1, 1, 0, 0;
"""  # noqa: E501
GROUP_OF_WARPS = {"warps": 4, "shared_bytes": 4096}

RACES = (
    Race(
        "read without a barrier",
        Hazard.SHARED_READ_WITHOUT_BARRIER,
        """
        st.shared.b32 [%r3], %r0;
        + bar.sync 0;
        - bar.warp.sync -1;
        xor.b32 %r4, %r3, 128;
        ld.shared.b32 %r5, [%r4];
        """,
    ),
    Race(
        "read of another lane",
        Hazard.SHARED_READ_WITHOUT_WARP_BARRIER,
        """
        st.shared.b32 [%r3], %r0;
        + bar.warp.sync -1;
        xor.b32 %r4, %r3, 4;
        ld.shared.b32 %r5, [%r4];
        """,
    ),
    Race(
        "read by ldmatrix without a barrier",
        Hazard.SHARED_READ_WITHOUT_BARRIER,
        """
        st.shared.b32 [%r3], %r0;
        + bar.sync 0;
        - bar.warp.sync -1;
        and.b32 %r4, %r0, 7;
        shl.b32 %r4, %r4, 4;
        add.s32 %r4, %r4, %r2;
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r4];
        """,
    ),
    Race(
        "write of what another warp reads",
        Hazard.SHARED_WRITE_AFTER_READ,
        """
        st.shared.b32 [%r3], %r0;
        bar.sync 0;
        xor.b32 %r4, %r3, 128;
        ld.shared.b32 %r5, [%r4];
        + bar.sync 0;
        st.shared.b32 [%r3], %r5;
        """,
    ),
    Race(
        "two values in one place at once",
        Hazard.SHARED_TWO_THREADS_WRITE,
        """
        - st.shared.b32 [%r2], %r0;
        + st.shared.b32 [%r2], %r2;
        """,
    ),
    Race(
        "two warps write one after the other",
        Hazard.SHARED_TWO_THREADS_WRITE,
        """
        setp.lt.u32 %p1, %r0, 32;
        and.b32 %r4, %r1, 127;
        add.s32 %r4, %r4, %r2;
        @%p1 st.shared.b32 [%r4], %r0;
        + bar.sync 0;
        @!%p1 st.shared.b32 [%r4], %r0;
        """,
    ),
    Race(
        "read of what nothing wrote",
        Hazard.SHARED_UNINITIALISED,
        """
        + st.shared.b32 [%r3], %r0;
        ld.shared.b32 %r4, [%r3];
        """,
    ),
    Race(
        "past the end",
        Hazard.SHARED_BOUNDS,
        """
        - st.shared.b32 [%r3+260], %r0;
        + st.shared.b32 [%r3+256], %r0;
        """,
        {"shared_bytes": 512},
    ),
    Race(
        "not aligned",
        Hazard.SHARED_ALIGNMENT,
        """
        - st.shared.b32 [%r3+2], %r0;
        + st.shared.b32 [%r3+4], %r0;
        """,
    ),
    Race(
        "copy not waited for",
        Hazard.COPY_READ_IN_FLIGHT,
        """
        cp.async.ca.shared.global [%r3], [%rd40], 4;
        cp.async.commit_group;
        + cp.async.wait_group 0;
        ld.shared.b32 %r4, [%r3];
        - cp.async.wait_group 0;
        """,
    ),
    Race(
        "wait that leaves the copy in flight",
        Hazard.COPY_READ_IN_FLIGHT,
        """
        cp.async.ca.shared.global [%r3], [%rd40], 4;
        cp.async.commit_group;
        - cp.async.wait_group 1;
        + cp.async.wait_group 0;
        ld.shared.b32 %r4, [%r3];
        - cp.async.wait_group 0;
        """,
    ),
    Race(
        "copy of another warp, waited for by that one only",
        Hazard.SHARED_READ_WITHOUT_BARRIER,
        """
        cp.async.ca.shared.global [%r3], [%rd40], 4;
        cp.async.wait_all;
        + bar.sync 0;
        xor.b32 %r4, %r3, 128;
        ld.shared.b32 %r4, [%r4];
        """,
    ),
    Race(
        "write where a copy arrives",
        Hazard.COPY_WRITE_IN_FLIGHT,
        """
        cp.async.ca.shared.global [%r3], [%rd40], 4;
        + cp.async.wait_all;
        st.shared.b32 [%r3], %r0;
        - cp.async.wait_all;
        """,
    ),
    Race(
        "copy to what another warp reads",
        Hazard.SHARED_WRITE_AFTER_READ,
        """
        st.shared.b32 [%r3], %r0;
        bar.sync 0;
        xor.b32 %r4, %r3, 128;
        ld.shared.b32 %r5, [%r4];
        + bar.sync 0;
        cp.async.ca.shared.global [%r3], [%rd40], 4;
        cp.async.wait_all;
        """,
    ),
    Race(
        "copy in flight at the exit",
        Hazard.COPY_AT_EXIT,
        """
        cp.async.ca.shared.global [%r3], [%rd40], 4;
        + cp.async.wait_all;
        """,
    ),
    Race(
        "outside of every tensor",
        Hazard.GLOBAL_BOUNDS,
        """
        - ld.global.b32 %r4, [%rd40+4];
        + ld.global.b32 %r4, [%rd40];
        """,
    ),
    Race(
        "global access not aligned",
        Hazard.GLOBAL_ALIGNMENT,
        """
        - ld.global.b32 %r4, [%rd50+2];
        + ld.global.b32 %r4, [%rd50+4];
        """,
    ),
    Race(
        "two blocks write one byte",
        Hazard.GLOBAL_TWO_BLOCKS_WRITE,
        """
        mov.u32 %r4, %ctaid.x;
        setp.eq.b32 %p1, %r4, 1;
        + @%p1 bra end;
        st.global.b32 [%rd40], %r0;
        end:
        """,
        {"grid": (2, 1, 1)},
    ),
    Race(
        "a block reads what an earlier one wrote",
        Hazard.GLOBAL_READ_OF_ANOTHER_BLOCK,
        """
        mov.u32 %r4, %ctaid.x;
        setp.eq.b32 %p1, %r4, 0;
        @%p1 st.global.b32 [%rd40], %r0;
        - @!%p1 ld.global.b32 %r5, [%rd40];
        + @%p1 ld.global.b32 %r5, [%rd40];
        """,
        {"grid": (2, 1, 1)},
    ),
    Race(
        "a block reads what a later one writes",
        Hazard.GLOBAL_READ_OF_ANOTHER_BLOCK,
        """
        mov.u32 %r4, %ctaid.x;
        setp.eq.b32 %p1, %r4, 0;
        @%p1 ld.global.b32 %r5, [%rd40];
        - @!%p1 st.global.b32 [%rd40], %r0;
        + @%p1 st.global.b32 [%rd40], %r0;
        """,
        {"grid": (2, 1, 1)},
    ),
    Race(
        "global read of another thread's write",
        Hazard.GLOBAL_READ_WITHOUT_BARRIER,
        """
        st.global.b32 [%rd40], %r0;
        + bar.sync 0;
        - bar.warp.sync -1;
        xor.b32 %r4, %r1, 128;
        cvt.u64.u32 %rd1, %r4;
        add.s64 %rd1, %rd1, %rd50;
        ld.global.b32 %r5, [%rd1];
        """,
    ),
    Race(
        "two threads write two values to global memory",
        Hazard.GLOBAL_TWO_THREADS_WRITE,
        """
        - st.global.b32 [%rd50], %r0;
        + st.global.b32 [%rd50], %r2;
        """,
    ),
    Race(
        "a barrier for some",
        Hazard.DIVERGENCE,
        """
        setp.lt.u32 %p1, %r0, 32;
        @%p1 bra end;
        - bar.sync 0;
        add.s32 %r4, %r0, 1;
        end:
        + bar.sync 0;
        """,
    ),
    Race(
        "a shuffle of part of a warp",
        Hazard.DIVERGENCE,
        """
        - setp.lt.u32 %p1, %r0, 16;
        + setp.lt.u32 %p1, %r0, 32;
        @%p1 bra end;
        shfl.sync.bfly.b32 %r4, %r0, 1, 31, -1;
        end:
        """,
    ),
    Race(
        "wgmma of what the generic proxy wrote",
        Hazard.WGMMA_UNFENCED_WRITE,
        f"""
        {ZEROS}
        + fence.proxy.async.shared::cta;
        bar.sync 0;
        wgmma.fence.sync.aligned;
        {PRODUCT}
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        """,
        GROUP_OF_WARPS,
    ),
    Race(
        "wgmma of what other warps wrote",
        Hazard.SHARED_READ_WITHOUT_BARRIER,
        f"""
        {ZEROS}
        fence.proxy.async.shared::cta;
        + bar.sync 0;
        wgmma.fence.sync.aligned;
        {PRODUCT}
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        """,
        GROUP_OF_WARPS,
    ),
    Race(
        "wgmma of registers that were just set",
        Hazard.WGMMA_WITHOUT_FENCE,
        f"""
        {ZEROS}
        fence.proxy.async.shared::cta;
        bar.sync 0;
        + wgmma.fence.sync.aligned;
        {PRODUCT}
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        """,
        GROUP_OF_WARPS,
    ),
    Race(
        "sums read before the wait",
        Hazard.WGMMA_REGISTER_IN_FLIGHT,
        f"""
        {ZEROS}
        fence.proxy.async.shared::cta;
        bar.sync 0;
        wgmma.fence.sync.aligned;
        {PRODUCT}
        wgmma.commit_group.sync.aligned;
        + wgmma.wait_group.sync.aligned 0;
        - wgmma.wait_group.sync.aligned 1;
        add.f32 %r14, %r10, %r10;
        - wgmma.wait_group.sync.aligned 0;
        """,
        GROUP_OF_WARPS,
    ),
    Race(
        "write of what a wgmma reads",
        Hazard.WGMMA_WRITE_IN_FLIGHT,
        f"""
        {ZEROS}
        fence.proxy.async.shared::cta;
        bar.sync 0;
        wgmma.fence.sync.aligned;
        {PRODUCT}
        wgmma.commit_group.sync.aligned;
        + wgmma.wait_group.sync.aligned 0;
        + bar.sync 0;
        st.shared.b32 [%r3], %r0;
        - wgmma.wait_group.sync.aligned 0;
        """,
        GROUP_OF_WARPS,
    ),
    Race(
        "write of what the wgmma of other warps may still read",
        Hazard.SHARED_WRITE_AFTER_READ,
        f"""
        {ZEROS}
        fence.proxy.async.shared::cta;
        bar.sync 0;
        wgmma.fence.sync.aligned;
        {PRODUCT}
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        + bar.sync 0;
        st.shared.b32 [%r3], %r0;
        """,
        GROUP_OF_WARPS,
    ),
    Race(
        "wgmma in flight at the exit",
        Hazard.WGMMA_AT_EXIT,
        f"""
        {ZEROS}
        fence.proxy.async.shared::cta;
        bar.sync 0;
        wgmma.fence.sync.aligned;
        {PRODUCT}
        wgmma.commit_group.sync.aligned;
        + wgmma.wait_group.sync.aligned 0;
        """,
        GROUP_OF_WARPS,
    ),
)


def memory(options: dict[str, Any]) -> torch.Tensor:
    """An int32 for each thread."""
    return torch.zeros(32 * options["warps"], dtype=torch.int32)


@pytest.mark.parametrize("race", RACES, ids=[race.name for race in RACES])
def test_the_race_is_found_and_its_twin_is_not(race: Race) -> None:
    options = {"warps": 2, "shared_bytes": 1024} | race.options
    assert hazard_of(race.right(), memory(options), **options) is None
    assert hazard_of(race.racy(), memory(options), **options) == race.hazard
    if not race.hazard.name.endswith(("BOUNDS", "ALIGNMENT", "DIVERGENCE")):
        report = run(race.racy(), memory(options), strict=False, **options)
        assert race.hazard in {finding.hazard for finding in report.findings}


def test_every_hazard_has_a_race() -> None:
    found = {race.hazard for race in RACES} | {Hazard.GLOBAL_UNINITIALISED}
    assert found == set(Hazard)


def test_global_memory_that_nothing_wrote() -> None:
    words = torch.full((64,), UNWRITTEN, dtype=torch.int16)
    read = "ld.global.b32 %r4, [%rd40];"
    assert hazard_of(read, words) == Hazard.GLOBAL_UNINITIALISED
    assert hazard_of("st.global.b32 [%rd40], %r0;" + read, words) is None
    # Half of an integer may happen to look like it.
    assert hazard_of(read, torch.full((32,), UNWRITTEN, dtype=torch.int32)) is None


def test_equal_values_of_two_warps_are_duplicates() -> None:
    report = run(
        "st.shared.b32 [%r2], %r2;\nst.global.b32 [%rd50], %r2;", memory({"warps": 2}), warps=2, shared_bytes=4
    )
    assert not report.findings
    assert report.duplicates == {("", "st.shared.b32"): 1, ("", "st.global.b32"): 1}


def test_a_view_is_only_its_elements() -> None:
    x = torch.zeros(64, dtype=torch.int32)
    read = """
        shl.b32 %r4, %r0, 3;
        cvt.u64.u32 %rd1, %r4;
        add.s64 %rd1, %rd1, %rd50;
        ld.global.b32 %r5, [%rd1];
    """
    assert hazard_of(read, x[::2]) is None
    assert hazard_of("ld.global.b32 %r4, [%rd40];", x[::2]) == Hazard.GLOBAL_BOUNDS
    assert hazard_of(read, x[2::2]) == Hazard.GLOBAL_BOUNDS
