"""Compile kernels for GPUs that are not present and read what came out: registers, spills, instructions, occupancy.

Needs a process whose kernels are compiled, not interpreted (TRITON_INTERPRET unset), and no GPU: Triton's wheel brings
ptxas and nvdisasm.
"""

from vit_kernels.inspection.compiling import KernelReport, compile_launch
from vit_kernels.inspection.instructions import InstructionCounts
from vit_kernels.inspection.targets import TARGETS, Target

__all__ = ["TARGETS", "InstructionCounts", "KernelReport", "Target", "compile_launch"]
