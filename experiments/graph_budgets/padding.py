"""Batches drawn from a mix, packed into budgets: what of the work is padding."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vit_encoder.cuda_graphs import plan_replays

BATCHES = 200
LARGEST_BATCH = 8
Image = tuple[int, int]
"""What an image takes of a budget, and what of that is useful: tiles or patches."""


@dataclass(frozen=True)
class Padding:
    """Over all batches.

    Attributes:
        fraction: padding over what the graphs compute.
        replays: of a batch, on average.
        beyond: share of the images that no graph takes; they are in neither of the others.
    """

    fraction: float
    replays: float
    beyond: float


def draw(sizes: dict[Image, float], batches: int, seed: int) -> list[list[Image]]:
    """So many batches of one image, then of two, and so on to LARGEST_BATCH."""
    generator = random.Random(seed)
    return [
        generator.choices(list(sizes), list(sizes.values()), k=count)
        for count in range(1, LARGEST_BATCH + 1)
        for _ in range(batches)
    ]


def packed_by_plan(sizes: Sequence[int], budgets: Sequence[int]) -> list[int]:
    """The budgets that `plan_replays` replays."""
    return [replay.budget for replay in plan_replays(sizes, budgets).replays]


def packed_smallest_first(sizes: Sequence[int], budgets: Sequence[int]) -> list[int]:
    """Those where images are added smallest first until the largest budget is full, as vLLM packs them."""
    groups: list[int] = []
    for size in sorted(size for size in sizes if size <= budgets[-1]):
        if not groups or groups[-1] + size > budgets[-1]:
            groups.append(0)
        groups[-1] += size
    return [min(budget for budget in budgets if budget >= group) for group in groups]


def padding(
    batches: Sequence[Sequence[Image]],
    budgets: Sequence[int],
    packed: Callable[[Sequence[int], Sequence[int]], list[int]],
) -> Padding:
    """Of batches packed into budgets; at least one image must fit."""
    useful = computed = replays = images = beyond = 0
    for batch in batches:
        replayed = packed([size for size, _ in batch], budgets)
        within = [taken for size, taken in batch if size <= budgets[-1]]
        useful, computed, replays = useful + sum(within), computed + sum(replayed), replays + len(replayed)
        images, beyond = images + len(batch), beyond + len(batch) - len(within)
    return Padding(round(1 - useful / computed, 4), round(replays / len(batches), 2), round(beyond / images, 3))


def powers_of_two(smallest: int, largest: int) -> tuple[int, ...]:
    """smallest, twice that, and so on, and the largest."""
    doubled = [smallest * 2**i for i in range(math.ceil(math.log2(largest / smallest)))]
    return (*doubled, largest)


def neighbours(budgets: Sequence[int], steps: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Sets that differ in one budget, by a step; the largest stays."""
    for position in range(len(budgets) - 1):
        for step in steps:
            changed = sorted({*budgets[:position], budgets[position] + step, *budgets[position + 1 :]})
            if len(changed) == len(budgets) and changed[0] > 0 and changed[-1] == budgets[-1]:
                yield tuple(changed)


def search(batches: Sequence[Sequence[Image]], start: Sequence[int], steps: Sequence[int]) -> tuple[int, ...]:
    """The budgets with the least padding that single steps reach from `start`, the best step first."""
    best, least = tuple(start), padding(batches, start, packed_by_plan).fraction
    while True:
        found = [(padding(batches, budgets, packed_by_plan).fraction, budgets) for budgets in neighbours(best, steps)]
        fraction, budgets = min(found)
        if fraction >= least:
            return best
        best, least = budgets, fraction
