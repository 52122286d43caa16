"""Any other op, or a backward: a case of the microbenchmarks."""

from __future__ import annotations

from experiments.gpu import machine
from experiments.gpu.contest import hold
from experiments.gpu.records import Records
from experiments.kernels.microbenchmarks.cases import Setting, attention, case_builders, contenders


def operator(records: Records, name: str) -> None:
    """Hold the contest of one case."""
    setting = Setting(machine.device(), small=machine.rehearsing())
    records.doing("inputs and fp64 reference")
    op, _, head_dim = name.partition("-")
    if op == "varlen_attention_backward":
        # Tiles for every head_dim, of which the kernel report has predictions.
        case = attention(setting, int(head_dim), setting.tiles, setting.positions).backward()
    else:
        case = case_builders(setting)[name]()
    hold(records, case, contenders(name), graphs="backward" not in name, op=op, head_dim=int(head_dim or 0) or None)
