"""Attention at one head_dim, on the lengths that encoders have and on those that others measured."""

from __future__ import annotations

from experiments.gpu import machine
from experiments.gpu.contest import hold
from experiments.gpu.records import Records
from experiments.kernels.microbenchmarks.cases import OURS, Setting, contenders
from experiments.kernels.microbenchmarks.cases import attention as attention_op

PROBLEMS = {
    "Llama 4, 16 tiles": (16, 577),
    "16 x 576, as measured elsewhere": (16, 576),
    "Qwen2.5-VL, windows": (144, 64),
    "Qwen2.5-VL, a frame of 56 x 72": (1, 4032),
}
WITH = {
    88: ("Llama 4, 16 tiles",),
    80: tuple(PROBLEMS),
    72: ("Llama 4, 16 tiles", "16 x 576, as measured elsewhere"),
    64: ("Llama 4, 16 tiles", "16 x 576, as measured elsewhere"),
}


def attention(records: Records, head_dim: int, tuned: bool) -> None:
    """Every problem of a head_dim in turn; where ours is tuned, beside PyTorch's choice alone."""
    setting = Setting(machine.device(), small=machine.rehearsing())
    for place, name in enumerate(WITH[head_dim]):
        count, length = (2, 5) if machine.rehearsing() else PROBLEMS[name]
        records.doing(f"inputs and fp64 reference of {name}")
        case = attention_op(setting, head_dim, count, length).forward()
        names = (OURS, "sdpa") if tuned else contenders("varlen_attention")
        # The same kernels run in every problem of a head_dim.
        hold(records, case, names, graphs=True, trace_peers=place == 0, workload=name, head_dim=head_dim)
