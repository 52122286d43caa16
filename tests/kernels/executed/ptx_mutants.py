"""Compiled kernels with one barrier, wait or fence fewer, and whether executing them tells.

A site is a line of the PTX; as PTX changes with every compiler, it is named by its kind, the text of the source's line
that it came from, and which of those it is.
"""

import collections
import functools
import itertools
import linecache
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from vit_kernels._triton import (
    layer_norm_pixel_shuffle,
    linear_gelu,
    pixel_shuffle,
    rotary_2d,
    varlen_attention,
    varlen_attention_backward,
)
from vit_kernels.testing import seeded_tensor
from vit_kernels.testing.ptx import HazardFound, PtxError, executed_ptx
from vit_kernels.testing.ptx.parsing import parse

DELETED = (
    "bar.sync",
    "bar.warp.sync",
    "cp.async.wait_group",
    "fence.proxy.async",
    "wgmma.fence",
    "wgmma.wait_group",
)


SOURCES = tuple(Path(str(module.__file__)).parent for module in (varlen_attention, triton.language))


class Site(NamedTuple):
    """An instruction of a kernel's PTX: its kind, source line, which of those it is, and the line of the text."""

    kind: str
    where: str
    number: int
    line: int

    @property
    def name(self) -> str:
        """As surviving_mutants.toml has it."""
        file, _, row = self.where.partition(":")
        folder = next((folder for folder in SOURCES if (folder / file).exists()), None)
        text = linecache.getline(str(folder / file), int(row)).strip() if folder else ""
        return f"{self.kind} of {file}: {text} (number {self.number})"


def sites_of(ptx: str) -> list[Site]:
    """What can be deleted."""
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    found = []
    for instruction in parse(ptx).instructions:
        for kind in (kind for kind in DELETED if instruction.opcode.startswith(kind)):
            where = instruction.where.partition(" in ")[0]
            seen[kind, where] += 1
            found.append(Site(kind, where, seen[kind, where], instruction.line))
    return found


def mutated(ptx: str, site: Site) -> str:
    """The text without the instruction."""
    lines = ptx.split("\n")
    lines[site.line - 1] = ""
    return "\n".join(lines)


# So many sequences that the search takes two steps; more blocks of keys than a pipeline holds and a rest, a few rows
# alone, a block of keys without a rest, queries without a key and keys without a query.
LENGTHS = (*[0] * 127, 200, 17, 64, 40, 0)
LENGTHS_K = (*[0] * 127, 200, 17, 64, 0, 40)
TOKENS = sum(LENGTHS)


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, cu_seqlens, cu_seqlens_k."""
    q, k, v = seeded_tensor((TOKENS, 3, 1, 88), dtype, 0).unbind(1)
    starts = (torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32) for lengths in (LENGTHS, LENGTHS_K))
    return q, k, v, *starts  # type: ignore[return-value]


def _attention(dtype: torch.dtype) -> list[Tensor]:
    return [varlen_attention.launch(*_inputs(dtype), 0.1)]


def _gradients(dtype: torch.dtype) -> list[Tensor]:
    q, k, v, cu_seqlens, cu_seqlens_k = _inputs(dtype)
    grad, out = (seeded_tensor((TOKENS, 1, 88), dtype, seed) for seed in (1, 2))
    # Large enough that every log-sum-exp is computed again.
    lse = torch.full((1, TOKENS), 5000.0)
    grads = varlen_attention_backward.launch(grad, None, q, k, v, out, lse, cu_seqlens, cu_seqlens_k, 0.1)
    return list(grads)


def _product(dtype: torch.dtype) -> list[Tensor]:
    x, weight, bias = (seeded_tensor(shape, dtype, 0) for shape in ((140, 320), (136, 320), (136,)))
    return [linear_gelu.launch(x, weight, bias)]


def _norm() -> list[Tensor]:
    x, weight, bias = (seeded_tensor(shape, torch.bfloat16, 0) for shape in ((1, 16, 1280), (1280,), (1280,)))
    return [layer_norm_pixel_shuffle.launch(x, weight, bias, 4, 4, 2, 1e-5)]


def _rotation(interleaved: bool) -> list[Tensor]:
    q, k = (seeded_tensor((9, 3, 88), torch.bfloat16, seed) for seed in (0, 1))
    cos, sin = (seeded_tensor((9, 44), torch.float32, seed) for seed in (2, 3))
    return list(rotary_2d.launch(q, k, cos, sin, interleaved))


def _shuffle() -> list[Tensor]:
    return [pixel_shuffle.launch(seeded_tensor((1, 16, 520), torch.bfloat16, 0), 4, 4, 2)]


CASES: dict[str, tuple[Sequence[str], Callable[[], list[Tensor]]]] = {
    "attention": (["varlen_attention_kernel"], functools.partial(_attention, torch.bfloat16)),
    "attention in float32": (["varlen_attention_kernel"], functools.partial(_attention, torch.float32)),
    "gradients": (
        ["exact_lse_kernel", "grad_q_kernel", "grad_kv_kernel"],
        functools.partial(_gradients, torch.bfloat16),
    ),
    "product": (["linear_gelu_kernel"], functools.partial(_product, torch.bfloat16)),
    "norm": (["layer_norm_pixel_shuffle_kernel"], _norm),
    "rotation of halves": (["rotary_2d_kernel"], functools.partial(_rotation, False)),
    "rotation of pairs": (["rotary_2d_kernel"], functools.partial(_rotation, True)),
    "shuffle": (["pixel_shuffle_kernel"], _shuffle),
}
"""Case -> the kernels that it launches, and the launch."""


def texts(target: str, launch: Callable[[], list[Tensor]]) -> tuple[dict[str, str], list[Tensor]]:
    """The PTX of each kernel that a case launches, and what it computes."""
    found: dict[str, str] = {}

    def note(ptx: str) -> str:
        return found.setdefault(parse(ptx).name, ptx)

    with executed_ptx(target, edit=note):
        return found, launch()


def outcome(target: str, launch: Callable[[], list[Tensor]], ptx: str, site: Site, expected: list[Tensor]) -> str:
    """What tells that a kernel was changed: the hazard that was found, "wrong", or "" where nothing does."""

    def edit(text: str) -> str:
        return mutated(ptx, site) if text == ptx else text

    try:
        with executed_ptx(target, edit=edit):
            actual = launch()
    except HazardFound as error:
        return str(error.finding.hazard)
    except PtxError as error:
        return str(error)
    same = all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(actual, expected, strict=True))
    return "" if same else "wrong"


def outcomes(target: str, case: str, every: int = 1, first: int = 0) -> Iterator[tuple[str, Site, str]]:
    """(kernel, site, what tells) of each site of a case, or of every so many from the first on."""
    names, launch = CASES[case]
    found, expected = texts(target, launch)
    sites = [(name, site) for name in names for site in sites_of(found[name])]
    for name, site in sites[first::every]:
        yield name, site, outcome(target, launch, found[name], site, expected)
