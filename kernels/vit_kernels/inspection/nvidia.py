"""Reading what ptxas made: SASS and its resources."""

import contextlib
import io
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from triton import knobs
from triton.compiler.compiler import make_backend

from vit_kernels.inspection.instructions import Instruction, Kind, Resources

_MATRIX = re.compile(r"([HIDQBO]MMA|[HIQB]GMMA|UTC\w*MMA)\b")
_BULK = re.compile(r"(UTMALDG|UTMASTG|UTMAREDG|UBLKCP|UBLKRED)\b")
_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_MEMORY = {
    "LDG": "global_loads",
    "STG": "global_stores",
    "LDGSTS": "async_copies",
    "LDL": "local_loads",
    "STL": "local_stores",
}
_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_UNIFORM_CONSTANT = re.compile(r"(UR\d+), (0x[0-9a-f]+)$")
_INSTRUCTION_DESCRIPTOR = re.compile(r"idesc\[(UR\d+)\]")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


def texts(kernel: Any) -> dict[str, str]:
    """The compiler's stages, PTX, and the SASS of the Triton wheel's nvdisasm."""
    return {name: kernel.asm[name] for name in ("ttir", "ttgir", "llir", "ptx")} | {
        "sass": _on_cubin(kernel.asm["cubin"], "nvdisasm", "-c")
    }


def _on_cubin(cubin: bytes, tool: str, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [getattr(knobs.nvidia, tool).path, *options, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(asm: dict[str, str]) -> list[Instruction]:
    """The instructions of nvdisasm's text, the shapes of tcgen05's added to their opcodes."""
    instructions: list[Instruction] = []
    labels: list[str] = []
    reconvergence: dict[str, str] = {}
    constants: dict[str, int] = {}
    for line in asm["sass"].splitlines():
        if label := _LABEL.match(line):
            labels.append(label.group(1))
        elif found := _INSTRUCTION.match(line):
            predicate, opcode, operands = found.groups()
            if opcode == "UMOV" and (moved := _UNIFORM_CONSTANT.match(operands.strip())):
                constants[moved.group(1)] = int(moved.group(2), 16)
            opcode = _with_shape(opcode, operands, constants)
            instruction = _with_control_flow(opcode, operands, bool(predicate), reconvergence)
            instructions.append(instruction._replace(labels=tuple(labels)))
            labels = []
    return instructions


def _with_shape(opcode: str, operands: str, constants: dict[str, int]) -> str:
    """UTCHMMA as UTCHMMA.64x128x16: the shape of tcgen05.mma is in a descriptor, not in the name.

    ptxas puts the constant into its register shortly before. Bits: PTX ISA, "Instruction descriptor" of tcgen05.
    """
    descriptor = _INSTRUCTION_DESCRIPTOR.search(operands)
    if not descriptor or descriptor.group(1) not in constants:
        return opcode
    bits = constants[descriptor.group(1)]
    m, n, format_of_a = (bits >> 24 & 31) << 4, (bits >> 17 & 63) << 3, bits >> 7 & 7
    is_tf32 = opcode.startswith("UTCHMMA") and format_of_a == 2
    k = 32 if opcode.startswith("UTCQMMA") else 8 if is_tf32 else 16
    return f"{opcode}.{m}x{n}x{k}"


def _with_control_flow(opcode: str, operands: str, predicated: bool, reconvergence: dict[str, str]) -> Instruction:
    name = opcode.partition(".")[0]
    targets = tuple(_TARGET.findall(operands))
    if name == "BRA":
        conditional = predicated or not operands.startswith("`")
        return Instruction(opcode, operands, targets=targets, falls_through=conditional)
    if name == "BSSY":
        # Only names where BSYNC on the same barrier will go.
        reconvergence[operands.partition(",")[0].strip()] = targets[0] if targets else ""
        return Instruction(opcode, operands)
    if name == "BSYNC" and operands.strip() in reconvergence:
        return Instruction(opcode, operands, targets=(reconvergence[operands.strip()],), falls_through=False)
    return Instruction(opcode, operands, falls_through=predicated or name not in ("EXIT", "RET", "BRX", "JMP"))


def kind_of(instruction: Instruction) -> Kind | None:
    """Classify a SASS instruction."""
    name, *modifiers = instruction.opcode.split(".")
    if _MATRIX.match(name):
        return Kind("matrix")
    if _BULK.match(name):
        return Kind("bulk_copies")
    if name in _MEMORY:
        return Kind(_MEMORY[name], next((_WIDTHS[modifier] for modifier in modifiers if modifier in _WIDTHS), 4))
    return None


def resources(kernel: Any, asm: dict[str, str]) -> Resources:
    """What ptxas says of a compiled kernel, run once more with Triton's flags where there may be spills."""
    if without_stack := parse_resource_usage(_on_cubin(kernel.asm["cubin"], "cuobjdump", "-res-usage")):
        return without_stack
    backend = make_backend(kernel.metadata.target)
    with knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(asm["ptx"], {}, kernel.metadata, kernel.metadata.target.arch)
    return parse_ptxas_log(log.getvalue())


def parse_resource_usage(log: str) -> Resources | None:
    """The figures of `cuobjdump -res-usage`; None when there is a stack, as spills need, of which it says no more."""
    found = [tuple(map(int, figures)) for figures in re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", log)]
    if not found or any(stack or local for _, stack, local in found):
        return None
    return Resources(max(registers for registers, _, _ in found), 0, 0, 0)


def parse_ptxas_log(log: str) -> Resources:
    """The figures of `ptxas -v`, summed (registers: the most) when functions were not inlined."""
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.findall(r"Used (\d+) registers", log)
    if not spills or not registers:
        raise RuntimeError(f"ptxas -v: expected lines on registers and spills, got {log!r}")
    stack, stores, loads = (sum(map(int, column)) for column in zip(*spills, strict=True))
    return Resources(max(map(int, registers)), stack_bytes=stack, spill_store_bytes=stores, spill_load_bytes=loads)
