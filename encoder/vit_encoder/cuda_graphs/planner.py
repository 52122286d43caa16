"""Which images of a batch share a replay of which CUDA graph. Pure Python: it never sees a tensor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

LLAMA4_BUDGETS = (3, 7, 10, 13, 15, 17)
"""Tiles of the graphs to capture for Llama 4, whose images are 1 to 17 tiles.

As many graphs as the powers of two need to hold one image of any size (1 to 32), in the memory of 17 tiles instead
of 32. Of all sets of six budgets up to 17, those within 1 % of the least padding of batches of one, two and three
images of uniformly drawn sizes were compared on batches of real photographs, and the best one taken. Budgets beyond
one image would save replays but little time: by the roofline of an H100 (predicted, not measured) a replay of 17
tiles takes 17 ms of matrix products, and reading the weights once more 0.5 ms.
"""


QWEN2_5_VL_BUDGETS = (384, 1024, 1728, 2944, 4032, 5120)
"""Patches of the graphs to capture for Qwen2.5-VL: 5120 is the largest image of transformers' processor.

As many graphs as the powers of two from 256, vLLM's smallest budget, need to hold it. `python -m
experiments.graph_budgets` chose them on batches of 1 to 8 images from vLLM's benchmark and from a made-up mix of usual
resolutions, and reports the padding. Published checkpoints allow images of 65536 patches: those beyond 5120 go through
the model.
"""
QWEN3_VL_BUDGETS = (256, 1280, 1984, 3520, 4160, 5120)
"""Patches of the graphs to capture for Qwen3-VL, chosen likewise, with the image bounds of its checkpoints."""


@dataclass(frozen=True)
class Replay:
    """One replay of the graph of `budget`: the indices of its images, which follow each other in it."""

    budget: int
    images: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """How a batch runs.

    Attributes:
        replays: which images share a graph.
        beyond: indices of the images larger than the largest budget, which no graph takes.
    """

    replays: tuple[Replay, ...]
    beyond: tuple[int, ...]

    @property
    def replayed(self) -> int:
        """The budgets of all replays together: what the graphs compute, padding included."""
        return sum(replay.budget for replay in self.replays)


def plan_replays(sizes: Sequence[int], budgets: Sequence[int] = LLAMA4_BUDGETS) -> Plan:
    """Pack whole images into budgets with little padding, and with few replays where the padding is equal.

    Greedy: the budget that some of the remaining images fill best is replayed with them, the largest of equally full
    ones first. The sums that images can make are the set bits of an integer (subset sums, Bellman 1957).

    Args:
        sizes: of each image, at least 1: tiles, or patches.
        budgets: of each captured graph, increasing, in the same unit.

    Returns:
        A plan that holds every image exactly once.

    Raises:
        TypeError: a size or a budget that is no int.
        ValueError: a size below 1, no budget, or budgets that do not increase from at least 1.
    """
    check_budgets(budgets)
    for index, size in enumerate(sizes):
        _check_int(f"sizes[{index}]", size)
        if size < 1:
            raise ValueError(f"sizes[{index}]: got {size}, expected at least 1")
    beyond = tuple(index for index, size in enumerate(sizes) if size > budgets[-1])
    # Largest first, so that the ones that are hard to place are taken while there are others to fill up with.
    remaining = sorted(set(range(len(sizes))).difference(beyond), key=lambda index: -sizes[index])
    replays = []
    while remaining:
        replay = _fullest_replay(remaining, sizes, budgets)
        replays.append(replay)
        remaining = [index for index in remaining if index not in replay.images]
    return Plan(tuple(replays), beyond)


def check_budgets(budgets: Sequence[int]) -> None:
    """Raise what `plan_replays` says of budgets."""
    for budget in budgets:
        _check_int("budgets", budget)
    if not budgets or budgets[0] < 1 or any(a >= b for a, b in itertools.pairwise(budgets)):
        raise ValueError(f"budgets: got {tuple(budgets)}, expected at least one, increasing from at least 1")


def _check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected an int")


def _fullest_replay(remaining: Sequence[int], sizes: Sequence[int], budgets: Sequence[int]) -> Replay:
    """The replay with the least share of padding, of those the largest one."""
    within = (1 << (budgets[-1] + 1)) - 1
    sums = [1]  # after each image: bit s is set where some of the images so far have the size s together
    for index in remaining:
        sums.append((sums[-1] | sums[-1] << sizes[index]) & within)
    fills = [(budget, (sums[-1] & ((1 << (budget + 1)) - 1)).bit_length() - 1) for budget in budgets]
    budget, filled = max((fill for fill in fills if fill[1]), key=lambda fill: (fill[1] / fill[0], fill[0]))
    images = []
    for position in range(len(remaining) - 1, -1, -1):
        # Without this image the sum could not be made: it is part of it.
        if not sums[position] >> filled & 1:
            images.append(remaining[position])
            filled -= sizes[remaining[position]]
    return Replay(budget, tuple(images))
