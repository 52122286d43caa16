"""vit_kernels.inspection: kernels compiled for every target in one process without the interpreter, and read right.

Run as a script, this file compiles the kernels below and pickles the reports.
"""

# Triton kernels are not typed Python.
# mypy: allow-untyped-defs

import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from vit_kernels.inspection import TARGETS, InstructionCounts, KernelReport, amd, compile_launch, nvidia
from vit_kernels.inspection.dots import dot_loops
from vit_kernels.inspection.instructions import (
    Resources,
    count,
    longest_loop,
    matrix_flops,
    matrix_loops,
    natural_loops,
)

M, N, K = 128, 64, 64
HEADS, HEAD_DIM = 16, 88


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    accumulator = tl.zeros((M, N), tl.float32)
    for first in range(0, depth, K):
        a = tl.load(a_ptr + m[:, None] * depth + (first + k)[None, :])
        b = tl.load(b_ptr + (first + k)[:, None] * N + n[None, :])
        accumulator = tl.dot(a, b, accumulator)
    tl.store(c_ptr + m[:, None] * N + n[None, :], accumulator.to(tl.bfloat16))


@triton.jit
def copy_heads_kernel(x_ptr, out_ptr, stride, STRIDE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Heads lie STRIDE apart when it is not 0, else `stride`."""
    d = tl.arange(0, BLOCK)[None, :]
    offsets = tl.arange(0, HEADS)[:, None] * (STRIDE if STRIDE else stride) + d
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=d < 88), mask=d < 88)


@triton.autotune([triton.Config({"BLOCK": 256}, num_warps=2), triton.Config({"BLOCK": 512}, num_warps=4)], key=["n"])
@triton.jit
def tuned_kernel(x_ptr, n, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + lane, 1.0, mask=lane < n)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_matmul(a: torch.Tensor, b: torch.Tensor, **options: int) -> torch.Tensor:
    c = a.new_empty(a.shape[0], b.shape[1])
    matmul_kernel[(1,)](a, b, c, a.shape[1], M=M, N=N, K=K, **options)
    return c


def launch_copy_heads(x: torch.Tensor, *, stride_is_constant: bool) -> None:
    stride = x.stride(0)
    copy_heads_kernel[(1,)](x, torch.empty_like(x), stride, stride if stride_is_constant else 0, HEADS, BLOCK=128)


def launch_tuned(n: int) -> None:
    tuned_kernel[lambda configuration: (triton.cdiv(n, configuration["BLOCK"]),)](meta(n), n)


# Options that leave a lane fewer registers than the accumulators of `launch_matmul` take.
FEW_REGISTERS = {"sm_90": {"maxnreg": 64}, "gfx942": {"waves_per_eu": 8}}


def compile_everything() -> dict[str, list[KernelReport]]:
    reports = {}
    factors = meta(M, 4 * K), meta(4 * K, N)
    heads = meta(HEADS, HEAD_DIM)
    for target in TARGETS:
        reports[f"matmul {target}"] = compile_launch(target, launch_matmul, *factors)
        reports[f"constant stride {target}"] = compile_launch(target, launch_copy_heads, heads, stride_is_constant=True)
    for target, options in FEW_REGISTERS.items():
        reports[f"spilling {target}"] = compile_launch(target, launch_matmul, *factors, **options)
        reports[f"given stride {target}"] = compile_launch(target, launch_copy_heads, heads, stride_is_constant=False)
        unaligned = meta(HEADS * HEAD_DIM + 1)[1:].view(HEADS, HEAD_DIM)
        reports[f"unaligned {target}"] = compile_launch(target, launch_copy_heads, unaligned, stride_is_constant=True)
    reports["tuned sm_80"] = compile_launch("sm_80", launch_tuned, 4096)
    return reports


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[KernelReport]]:
    folder = tmp_path_factory.mktemp("inspection")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Pinned, because triton 3.9 warns that its default is going to change.
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-W", "error", __file__, str(folder / "reports")]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr
    return pickle.loads((folder / "reports").read_bytes())


# Opcode, the m * n * k that it multiplies, and how many warps share it.
MATRIX_INSTRUCTIONS = {
    "sm_80": ("HMMA.16816.F32.BF16", 16 * 8 * 16, 1),
    "sm_90": ("HGMMA.64x64x16.F32.BF16", 64 * 64 * 16, 4),
    "sm_100": ("UTCHMMA.128x64x16", 128 * 64 * 16, 4),
    "gfx942": ("v_mfma_f32_32x32x8_bf16", 32 * 32 * 8, 1),
    "gfx950": ("v_mfma_f32_32x32x16_bf16", 32 * 32 * 16, 1),
}


@pytest.mark.parametrize("target", TARGETS)
def test_the_main_loop_multiplies_one_tile(target: str, reports: dict[str, list[KernelReport]]) -> None:
    (report,) = reports[f"matmul {target}"]
    opcode, multiplies, sharing = MATRIX_INSTRUCTIONS[target]
    assert report.main_loop is not None
    assert report.main_loop.matrix == {opcode: M * N * K * sharing // (multiplies * report.num_warps)}
    assert report.instructions.matrix.keys() == {opcode}
    assert report.main_loop.total < report.instructions.total
    assert (report.name, report.target) == ("matmul_kernel", target)
    assert report.constants == {"M": M, "N": N, "K": K}
    assert "tt.dot" in report.asm["ttir"]
    # The shape of tcgen05's is added by the reader.
    assert opcode.replace(".128x64x16", " ") in report.asm["amdgcn" if target.startswith("gfx") else "sass"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_matrix_instructions_of_a_loop_make_the_flops_of_its_dot(
    target: str, reports: dict[str, list[KernelReport]]
) -> None:
    (report,) = reports[f"matmul {target}"]
    (loop,) = report.matrix_loops
    assert loop == report.main_loop
    assert report.dot_loops == (2 * M * N * K,)
    assert loop.matrix_flops(report.num_warps) == 2 * M * N * K


@pytest.mark.parametrize("target", TARGETS)
def test_the_main_loop_copies_two_tiles(target: str, reports: dict[str, list[KernelReport]]) -> None:
    (report,) = reports[f"matmul {target}"]
    assert report.main_loop is not None
    lanes = report.num_warps * TARGETS[target].warp_size
    # Through registers or not, as target and version have it.
    copies = report.main_loop.global_loads + report.main_loop.async_copies
    assert sum(lane_bytes * times for lane_bytes, times in copies.items()) == (M + N) * K * 2 // lanes
    assert copies.keys() == {16}


@pytest.mark.parametrize("target", TARGETS)
def test_the_resources_of_a_matrix_product_are_plausible(target: str, reports: dict[str, list[KernelReport]]) -> None:
    (report,) = reports[f"matmul {target}"]
    assert (report.spill_store_bytes, report.spill_load_bytes, report.stack_bytes) == (0, 0, 0)
    # The accumulators of a lane, except where they are in tensor memory.
    in_registers = M * N // (report.num_warps * TARGETS[target].warp_size) if target != "sm_100" else 0
    assert in_registers < report.registers <= 255
    assert report.shared_bytes >= (M + N) * K * 2
    assert report.tensor_memory_columns == (N if target == "sm_100" else 0)
    assert report.ctas_per_sm >= 1


@pytest.mark.parametrize("target", TARGETS)
def test_wide_loads_and_stores_are_seen(target: str, reports: dict[str, list[KernelReport]]) -> None:
    (report,) = reports[f"constant stride {target}"]
    for widths in (report.instructions.global_loads, report.instructions.global_stores):
        lanes = report.num_warps * TARGETS[target].warp_size
        assert widths == {16: max(1, HEADS * 128 * 2 // (16 * lanes))}
    assert report.instructions.matrix == {}
    assert report.main_loop is None


@pytest.mark.parametrize("target", FEW_REGISTERS)
@pytest.mark.parametrize("case", ["given stride", "unaligned"])
def test_narrow_loads_are_seen(case: str, target: str, reports: dict[str, list[KernelReport]]) -> None:
    (report,) = reports[f"{case} {target}"]
    assert report.instructions.global_loads.keys() == {2}


@pytest.mark.parametrize("target", FEW_REGISTERS)
def test_spills_are_seen(target: str, reports: dict[str, list[KernelReport]]) -> None:
    (spilling,), (free,) = reports[f"spilling {target}"], reports[f"matmul {target}"]
    assert spilling.registers <= 64 < free.registers
    assert spilling.spill_store_bytes >= 4
    assert spilling.spill_load_bytes >= 4
    assert spilling.stack_bytes >= 4
    assert spilling.instructions.local_loads
    assert spilling.instructions.local_stores


def test_every_configuration_of_an_autotuned_kernel_is_compiled(reports: dict[str, list[KernelReport]]) -> None:
    found = [(report.constants["BLOCK"], report.num_warps) for report in reports["tuned sm_80"]]
    assert found == [(256, 2), (512, 4)]


@pytest.mark.parametrize("target", ["gfx942", "gfx950"])
def test_occupancy_by_registers_is_llvms(target: str, reports: dict[str, list[KernelReport]]) -> None:
    for case in ("matmul", "constant stride"):
        (report,) = reports[f"{case} {target}"]
        waves_per_simd = re.search(r"; Occupancy: (\d+)", report.asm["amdgcn"])
        assert waves_per_simd
        # A block of four waves puts one on each SIMD.
        blocks = TARGETS[target].blocks_per_multiprocessor(registers=report.registers, shared_bytes=0, num_warps=4)
        assert blocks == int(waves_per_simd.group(1))


@pytest.mark.parametrize(
    ("target", "registers", "shared_bytes", "num_warps", "columns", "blocks"),
    [
        ("sm_80", 255, 0, 4, 0, 2),
        ("sm_80", 255, 0, 8, 0, 1),
        ("sm_80", 255, 0, 16, 0, 0),
        ("sm_80", 160, 0, 4, 0, 3),
        ("sm_80", 73, 0, 4, 0, 6),
        ("sm_80", 16, 0, 1, 0, 32),
        ("sm_80", 32, 0, 4, 0, 16),
        ("sm_80", 32, 80 * 1024, 4, 0, 2),
        ("sm_80", 32, 81 * 1024, 4, 0, 2),
        ("sm_80", 32, 81 * 1024 + 1, 4, 0, 1),
        ("sm_80", 32, 164 * 1024, 4, 0, 0),
        ("sm_90", 32, 227 * 1024, 4, 0, 1),
        ("sm_100", 32, 1024, 4, 256, 2),
        ("gfx942", 128, 0, 4, 0, 4),
        ("gfx942", 64, 0, 4, 0, 8),
        ("gfx942", 64, 32 * 1024, 4, 0, 2),
        ("gfx942", 64, 32 * 1024 + 1, 4, 0, 1),
        ("gfx950", 64, 40 * 1024, 4, 0, 4),
        ("gfx950", 64, 50 * 1024, 4, 0, 3),
        ("gfx950", 64, 53 * 1024, 4, 0, 2),
        ("gfx942", 8, 0, 1, 0, 16),
    ],
)
def test_occupancy(target: str, registers: int, shared_bytes: int, num_warps: int, columns: int, blocks: int) -> None:
    found = TARGETS[target].blocks_per_multiprocessor(
        registers=registers, shared_bytes=shared_bytes, num_warps=num_warps, tensor_memory_columns=columns
    )
    assert found == blocks


# A loop at .L_x_1 whose wait at .L_x_9 was moved out of line, and in which a branch over part of it meets again at
# .L_x_3 through BSYNC, past an exit; then a shorter loop without matrix instructions, and the trap after every kernel.
SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
        /*0010*/              @!P0 LDG.E.U16 R2, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR4][R4.64] ;
        /*0030*/              @!P4 BRA `(.L_x_9) ;
.L_x_2:
        /*0040*/                   BSSY B0, `(.L_x_3) ;
        /*0050*/               @P1 BRA `(.L_x_8) ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/                   BSYNC B0 ;
        /*0080*/                   EXIT ;
.L_x_8:
        /*0090*/               @P5 EXIT ;
        /*00a0*/                   LDL.64 R6, [R1] ;
        /*00b0*/                   BSYNC B0 ;
.L_x_3:
        /*00c0*/                   BRA.U UP0, `(.L_x_1) ;
.L_x_4:
        /*00d0*/                   STG.E.64 desc[UR4][R4.64], R6 ;
        /*00e0*/               @P2 BRA `(.L_x_4) ;
        /*00f0*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0100*/                   EXIT ;
.L_x_9:
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [R3], R5 ;
        /*0120*/              @!P4 BRA `(.L_x_9) ;
        /*0130*/                   BRA `(.L_x_2) ;
.L_x_7:
        /*0140*/                   BRA `(.L_x_7);
"""


def test_loops_of_sass_follow_the_flow_of_control() -> None:
    instructions = nvidia.parse({"sass": SASS})
    assert len(instructions) == 21
    loops = sorted(natural_loops(instructions), key=min)
    assert loops == [{*range(2, 8), *range(9, 13), 17, 18, 19}, {13, 14}, {17, 18}]
    assert matrix_loops(instructions, nvidia.kind_of) == [[instructions[i] for i in sorted(loops[0])]]


TWO_LOOPS = """
.L_x_1:
        /*0000*/                   HMMA.1688.F32.TF32 R4, R8, R12, R4 ;
        /*0010*/                   NOP ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/               @P0 BRA `(.L_x_2) ;
        /*0050*/                   EXIT ;
"""


def test_the_loop_with_most_matrix_work_comes_first() -> None:
    instructions = nvidia.parse({"sass": TWO_LOOPS})
    assert matrix_loops(instructions, nvidia.kind_of) == [instructions[3:5], instructions[0:3]]
    assert longest_loop(instructions) == instructions[0:3]


def test_instructions_of_sass_are_classified() -> None:
    counts = count(nvidia.parse({"sass": SASS}), nvidia.kind_of)
    assert counts == InstructionCounts(
        opcodes=counts.opcodes,
        matrix=Counter({"HMMA.16816.F32.BF16": 1}),
        global_loads=Counter({2: 1}),
        global_stores=Counter({8: 1}),
        async_copies=Counter({16: 1}),
        bulk_copies=1,
        local_loads=Counter({8: 1}),
    )
    assert counts.opcodes["BRA"] == 6
    assert counts.total == 21


@pytest.mark.parametrize(
    ("opcode", "flops"),
    [
        ("HMMA.16816.F32.BF16", 8 * 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 8 * 2 * 16 * 8 * 8),
        ("QMMA.16832.F32.E4M3.E4M3", 8 * 2 * 16 * 8 * 32),
        ("HGMMA.64x96x16.F32.BF16", 2 * 2 * 64 * 96 * 16),
        ("UTCHMMA.128x64x16", 2 * 128 * 64 * 16),
        ("v_mfma_f32_16x16x16_bf16", 8 * 2 * 16 * 16 * 16),
        ("v_mfma_f32_16x16x4_4b_f32", 8 * 2 * 4 * 16 * 16 * 4),
    ],
)
def test_the_flops_of_a_matrix_instruction(opcode: str, flops: int) -> None:
    assert matrix_flops(opcode, num_warps=8) == flops


def test_a_matrix_instruction_without_a_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="opcode: got 'UTCHMMA', expected a matrix instruction with its shape"):
        matrix_flops("UTCHMMA", num_warps=4)


TENSOR_MEMORY = """
        /*0000*/                   UMOV UR5, 0x10200490 ;
        /*0010*/                   UTCHMMA gdesc[UR6], gdesc[UR8], tmem[UR14], tmem[UR4], idesc[UR5], !UPT ;
        /*0020*/                   UMOV UR5, 0x4080910 ;
        /*0030*/                   UTCHMMA tmem[UR6], gdesc[UR8], tmem[UR14], tmem[UR4], idesc[UR5], UPT ;
        /*0040*/                   UTCQMMA gdesc[UR6], gdesc[UR8], tmem[UR14], tmem[UR4], idesc[UR5], UPT ;
        /*0050*/                   UTCHMMA gdesc[UR6], gdesc[UR8], tmem[UR14], tmem[UR4], idesc[UR9], UPT ;
        /*0060*/                   EXIT ;
"""


def test_shapes_of_tcgen05_are_read_from_their_descriptors() -> None:
    opcodes = [instruction.opcode for instruction in nvidia.parse({"sass": TENSOR_MEMORY})]
    assert opcodes[1::2] == ["UTCHMMA.256x128x16", "UTCHMMA.64x32x8", "UTCHMMA"]
    assert opcodes[4] == "UTCQMMA.64x32x32"


NESTED_DOTS = """
module attributes {"ttg.num-warps" = 4 : i32} {
  tt.func public @kernel(%q: !tt.ptr<bf16> loc("q"(#loc))) attributes {noinline = false} {
    scf.for %i = %a to %b step %c : i32 {
      %x = tt.dot %l, %m, %n : tensor<64x32xbf16> * tensor<32x16xbf16> -> tensor<64x16xf32> loc(#loc2)
      scf.if %any {
      %y = scf.for %j = %a to %b step %c iter_args(%z = %x) -> (tensor<64x16xf32>) : i32 {
        %max = "tt.reduce"(%z) <{axis = 1 : i32}> ({
        ^bb0(%p: f32, %q: f32):
          tt.reduce.return %p : f32
        }) : (tensor<64x16xf32>) -> tensor<64xf32>
        scf.if %condition {
          %d = tt.dot %l, %m, %z, inputPrecision = tf32x3 : tensor<8x4xf32> * tensor<4x2xf32> -> tensor<8x2xf32>
        } else {
          %e = tt.dot %l, %m, %z, inputPrecision = tf32 : tensor<8x4xf32> * tensor<4x2xf32> -> tensor<8x2xf32>
        }
      } loc(#loc3)
      }
    }
    %w = scf.while (%k = %a) : (i32) -> i32 {
      %f = tt.dot %l, %m, %n : tensor<128x64xbf16> * tensor<64x32xbf16> -> tensor<128x32xf32>
    }
    %g = tt.dot %l, %m, %n : tensor<256x64xbf16> * tensor<64x32xbf16> -> tensor<256x32xf32>
    scf.for %i = %a to %b step %c : i32 {
    }
  }
}
"""


def test_dots_are_counted_by_innermost_loop() -> None:
    assert dot_loops(NESTED_DOTS) == (2 * 128 * 64 * 32, (3 + 1) * 2 * 8 * 4 * 2)


AMDGCN = """
kernel:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_cbranch_execz .LBB0_4
.LBB0_2:                                ; =>This Loop Header: Depth=1
	global_load_dwordx3 v[0:2], v3, s[2:3]
	buffer_load_dwordx4 v4, s[12:15], 0 offen lds
	global_load_lds_dwordx4 v4, s[12:15]
.LBB0_3:                                ;   Parent Loop BB0_2 Depth=1
	v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
	buffer_load_short_d16_hi v4, v5, s[12:15], 0 offen
	s_cbranch_scc1 .LBB0_3
; %bb.5:
	scratch_store_dwordx2 off, v[0:1], off offset:16 ; 8-byte Folded Spill
	scratch_load_dword v0, off, off
	s_branch .LBB0_2
.LBB0_4:
	buffer_store_byte v0, v1, s[0:3], 0 offen
	s_endpgm
	.long	12
"""


def test_amd_assembly_is_read() -> None:
    instructions = amd.parse({"amdgcn": AMDGCN})
    loops = sorted(natural_loops(instructions), key=min)
    assert loops == [{*range(2, 11)}, {5, 6, 7}]
    assert matrix_loops(instructions, amd.kind_of) == [instructions[5:8]]
    counts = count(instructions, amd.kind_of)
    assert counts == InstructionCounts(
        opcodes=counts.opcodes,
        matrix=Counter({"v_mfma_f32_32x32x8_bf16": 1}),
        global_loads=Counter({12: 1, 2: 1}),
        global_stores=Counter({1: 1}),
        async_copies=Counter({16: 2}),
        local_loads=Counter({4: 1}),
        local_stores=Counter({8: 1}),
    )
    assert counts.total == 13


TWO_ENTRIES = """
        /*0000*/               @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0010*/               @P1 BRA `(.L_x_2) ;
        /*0020*/                   EXIT ;
.L_x_2:
        /*0030*/               @P2 BRA `(.L_x_1) ;
        /*0040*/                   EXIT ;
"""


def test_a_cycle_with_two_entries_is_no_natural_loop() -> None:
    assert natural_loops(nvidia.parse({"sass": TWO_ENTRIES})) == []


def test_code_without_a_loop_has_no_main_loop() -> None:
    instructions = nvidia.parse({"sass": "        /*0000*/                   EXIT ;"})
    assert longest_loop(instructions) is None


def test_a_log_of_ptxas_without_figures_is_refused() -> None:
    with pytest.raises(RuntimeError, match="expected lines on registers and spills, got 'nothing'"):
        nvidia.parse_ptxas_log("nothing")


def test_resources_are_read_without_ptxas_where_there_is_no_stack() -> None:
    line = " Function kernel:\n  REG:{} STACK:{} SHARED:1024 LOCAL:{} CONSTANT[0]:624 TEXTURE:0\n"
    free = line.format(40, 0, 0)
    assert nvidia.parse_resource_usage(free + line.format(72, 0, 0)) == Resources(72, 0, 0, 0)
    assert nvidia.parse_resource_usage(free + line.format(72, 8, 0)) is None
    assert nvidia.parse_resource_usage(free + line.format(72, 0, 8)) is None
    assert nvidia.parse_resource_usage("nothing") is None


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="target: got 'sm_70', expected one of sm_80, sm_90, sm_100, gfx942, gfx950"):
        compile_launch("sm_70", launch_tuned, 4)


def test_an_interpreted_process_is_refused() -> None:
    with pytest.raises(RuntimeError, match="run it in a process where TRITON_INTERPRET is not set"):
        compile_launch("sm_80", launch_tuned, 4)


def check_that_nothing_stays_behind() -> None:
    before = (driver._active, JITFunction.run, type(tuned_kernel).run)
    with pytest.raises(ValueError, match="launch: it launched no kernel"):
        compile_launch("sm_80", lambda: None)
    assert (driver._active, JITFunction.run, type(tuned_kernel).run) == before


if __name__ == "__main__":
    everything = compile_everything()
    check_that_nothing_stays_behind()
    Path(sys.argv[1]).write_bytes(pickle.dumps(everything))
