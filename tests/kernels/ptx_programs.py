"""Short PTX programs for the tests of vit_kernels.testing.ptx."""

import textwrap
from typing import Any

import numpy as np
import torch
from vit_kernels.testing.ptx import Hazard, HazardFound, Report
from vit_kernels.testing.ptx.global_memory import GlobalMemory
from vit_kernels.testing.ptx.program import Grid, Program

HEADER = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
{parameters}
)
{{
    .reg .pred %p<8>;
    .reg .b16 %h<32>;
    .reg .b32 %r<200>;
    .reg .b64 %rd<64>;
{prologue}
{body}
    ret;
}}
"""


def assemble(body: str, parameters: int) -> str:
    """A kernel of some instructions, with the registers that `run` describes."""
    prologue = [f"    ld.param.b64 %rd{50 + i}, [p{i}];" for i in range(parameters)]
    prologue += ["    mov.u32 %r0, %tid.x;", "    shl.b32 %r1, %r0, 2;", "    mov.b32 %r2, global_smem;"]
    prologue += ["    add.s32 %r3, %r2, %r1;", "    cvt.u64.u32 %rd0, %r1;"]
    prologue += [f"    add.s64 %rd{40 + i}, %rd{50 + i}, %rd0;" for i in range(parameters)]
    return HEADER.format(
        parameters=",\n".join(f"    .param .u64 .ptr .global .align 1 p{i}" for i in range(parameters)),
        prologue="\n".join(prologue),
        body=textwrap.dedent(body),
    )


def run(
    body: str,
    *tensors: torch.Tensor,
    warps: int = 1,
    shared_bytes: int = 0,
    grid: Grid = (1, 1, 1),
    strict: bool = True,
) -> Report:
    """Run a kernel of some instructions.

    Before them, %r0 is the thread and %r1 four times that; %r2 is where shared memory begins and %r3 that plus %r1;
    %rd50 + i is the address of tensor i, and %rd40 + i that plus %r1.
    """
    program = Program(assemble(body, len(tensors)), 32 * warps, shared_bytes)
    report = Report(strict=strict)
    memory = GlobalMemory(tensors, program.narrowest_global)
    program.launch(grid, [tensor.data_ptr() for tensor in tensors], memory, report)
    return report


def hazard_of(body: str, *tensors: torch.Tensor, **options: Any) -> Hazard | None:
    """What the first finding is, None without one."""
    try:
        run(body, *tensors, **options)
    except HazardFound as error:
        return error.finding.hazard
    return None


def from_numpy(values: np.ndarray[Any, Any]) -> torch.Tensor:
    """The bits of an array as a tensor of integers, in memory that torch aligned."""
    signed = np.ascontiguousarray(values).view(f"i{values.dtype.itemsize}")
    return torch.from_numpy(signed.copy()).clone()
