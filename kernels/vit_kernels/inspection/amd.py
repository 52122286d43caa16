"""Reading what LLVM made for AMD: assembly and its metadata."""

import re
from typing import Any

from vit_kernels.inspection.instructions import Instruction, Kind, Resources, count

_LABEL = re.compile(r"^(\.LBB\w+):")
_INSTRUCTION = re.compile(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)\s*([^;]*)")
_MEMORY = re.compile(r"(global|buffer|flat|scratch)_(load|store)_(lds_)?(\w+)")
_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2}
_WIDTHS |= {"ubyte": 1, "sbyte": 1, "byte": 1}


def texts(kernel: Any) -> dict[str, str]:
    """The compiler's stages and the assembly."""
    return {name: kernel.asm[name] for name in ("ttir", "ttgir", "llir", "amdgcn")}


def parse(asm: dict[str, str]) -> list[Instruction]:
    """The instructions of LLVM's text."""
    instructions: list[Instruction] = []
    labels: list[str] = []
    for line in asm["amdgcn"].splitlines():
        if label := _LABEL.match(line):
            labels.append(label.group(1))
        elif found := _INSTRUCTION.match(line):
            opcode, operands = found.group(1), found.group(2).strip()
            branches = opcode.startswith(("s_branch", "s_cbranch"))
            instructions.append(
                Instruction(
                    opcode,
                    operands,
                    labels=tuple(labels),
                    targets=(operands,) if branches else (),
                    falls_through=opcode not in ("s_branch", "s_endpgm", "s_setpc_b64"),
                )
            )
            labels = []
    return instructions


def kind_of(instruction: Instruction) -> Kind | None:
    """Classify an instruction."""
    if re.match(r"v_(s?mfma|wmma|smfmac)", instruction.opcode):
        return Kind("matrix")
    memory = _MEMORY.match(instruction.opcode)
    if not memory:
        return None
    space, direction, to_lds, width = memory.groups()
    lane_bytes = _WIDTHS.get(width.partition("_")[0], 0)
    if to_lds or re.search(r"\blds$", instruction.operands):
        return Kind("async_copies", lane_bytes)
    return Kind(f"{'local' if space == 'scratch' else 'global'}_{direction}s", lane_bytes)


def resources(kernel: Any, asm: dict[str, str]) -> Resources:
    """What LLVM says of a compiled kernel, and the accesses to scratch memory in it."""
    counts = count(parse(asm), kind_of)
    return Resources(
        registers=_metadata(asm["amdgcn"], "vgpr_count"),
        stack_bytes=_metadata(asm["amdgcn"], "private_segment_fixed_size"),
        spill_store_bytes=sum(lane_bytes * times for lane_bytes, times in counts.local_stores.items()),
        spill_load_bytes=sum(lane_bytes * times for lane_bytes, times in counts.local_loads.items()),
    )


def _metadata(assembly: str, key: str) -> int:
    found = re.search(rf"^\s+(?:- )?\.{key}:\s+(\d+)", assembly, re.MULTILINE)
    if not found:
        raise RuntimeError(f"amdgcn: expected .{key} in the metadata, found none")
    return int(found.group(1))
