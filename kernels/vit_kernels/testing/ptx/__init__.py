"""The compiled code of Triton kernels, executed on a CPU: right, within bounds and free of races, without a GPU.

    with executed_ptx("sm_90") as report:
        kernel[grid](x, out, ...)      # any Triton launch, on CPU tensors
    report.opcodes, report.sectors, report.wavefronts

The process must compile kernels, not interpret them (TRITON_INTERPRET unset). The first thing that a GPU would leave
undefined raises `HazardFound`, with the line of the kernel's source; `Hazard` lists what is looked for.

How it works, a file a step:

    launch          the JIT compiles for the target, as on that GPU; its PTX, arguments and grid come here
    parsing         text -> instructions with their source lines
    program         each instruction is decoded to a step, a function of the machine, by the first part of its opcode:
      control         bra, ret, bar.sync, bar.warp.sync, fence.proxy.async
      arithmetic      the table: a row an opcode, a function of lanes
      warp            shfl, redux
      loads           ld, st, cp.async, ldmatrix, stmatrix
      mma, wgmma      matrix products, and how their operands lie across registers and shared memory
                    then runs each block of the grid
    machine         a block: registers [threads] of every thread, which of them run, and where the others wait
    in_flight       its cp.async and wgmma that it has not waited for
    shared_memory   its shared memory, and who wrote and read a byte since when
    global_memory   the tensors of the launch, likewise
    formats, counts, findings, report    number formats; sectors and wavefronts; hazards; what comes out

All threads of a block run as lanes of numpy arrays. Where they go different ways, those that are furthest behind go
first, until they meet again. Blocks run one after the other.

What it does not show: how the hardware rounds (`ex2.approx` and its kind, the order of sums within a matrix product;
here they are computed in double precision), what ptxas makes of the PTX, and how long anything takes. Not executed:
tcgen05, mbarrier and TMA (so no sm_100), atomics, and instructions that no kernel here compiled to: a kernel that has
one is refused before it runs.
"""

from vit_kernels.testing.ptx.findings import Finding, Hazard, HazardFound, PtxError, UnknownInstruction
from vit_kernels.testing.ptx.launch import executed_ptx
from vit_kernels.testing.ptx.report import Report

__all__ = ["Finding", "Hazard", "HazardFound", "PtxError", "Report", "UnknownInstruction", "executed_ptx"]
