"""Reading the products that a kernel's source asks for, before any target has its say."""

import math
import re
from dataclasses import dataclass

_DOT = re.compile(r"tt\.dot .*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x\w+>")
_LOOP = re.compile(r"\bscf\.(for|while)\b")


@dataclass
class _Region:
    """What stands between two braces of MLIR, read so far; `holds_loop`: a loop with dots is inside."""

    is_loop: bool = False
    flops: int = 0
    holds_loop: bool = False


def dot_loops(ttir: str) -> tuple[int, ...]:
    """FLOPs of one trip through each innermost loop with `tt.dot`, most first, from Triton's first stage as text.

    2 * M * N * K a dot; three times that where it is made of three products of tf32.
    """
    found: list[int] = []
    regions = [_Region()]
    for line in ttir.splitlines():
        if line.lstrip().startswith("}"):
            region = regions.pop()
            if region.is_loop and region.flops and not region.holds_loop:
                found.append(region.flops)
            regions[-1].holds_loop |= region.holds_loop or (region.is_loop and region.flops > 0)
            # A branch's dots belong to the loop around it.
            regions[-1].flops += region.flops
        if dot := _DOT.search(line):
            regions[-1].flops += 2 * math.prod(map(int, dot.groups())) * (3 if "tf32x3" in line else 1)
        if line.rstrip().endswith("{"):
            regions.append(_Region(is_loop=bool(_LOOP.search(line))))
    return tuple(sorted(found, reverse=True))
