"""Packing images into the budgets of captured graphs: nothing lost, nothing too full, half of the usual padding."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vit_encoder.cuda_graphs import LLAMA4_BUDGETS, Plan, Replay, plan_replays
from vit_encoder.llama4.images import best_canvas

POWERS_OF_TWO = (1, 2, 4, 8, 16, 32)
"""As many graphs as LLAMA4_BUDGETS has: the smallest set of powers of two that holds an image of 17 tiles."""

PHOTOGRAPHS = (
    *((336, 336), (512, 600), (640, 480), (800, 600), (1024, 1024)),
    *((1280, 720), (1080, 1920), (1920, 1080), (2480, 3508), (4000, 3000)),
)
"""The issue's mix, (width, height)."""

budgets_drawn = st.sets(st.integers(1, 64), min_size=1, max_size=8).map(lambda drawn: tuple(sorted(drawn)))
sizes_drawn = st.lists(st.integers(1, 70), max_size=24)


def tiles(width: int, height: int) -> int:
    """Tiles of a photograph, the global one included."""
    high, wide = best_canvas(height, width)
    return high * wide + (high * wide > 1)


@given(sizes_drawn, budgets_drawn)
def test_every_image_is_there_exactly_once(sizes: list[int], budgets: tuple[int, ...]) -> None:
    plan = plan_replays(sizes, budgets)
    placed = [index for replay in plan.replays for index in replay.images] + list(plan.beyond)
    assert sorted(placed) == list(range(len(sizes)))


@given(sizes_drawn, budgets_drawn)
def test_no_budget_is_exceeded_and_none_is_larger_than_needed(sizes: list[int], budgets: tuple[int, ...]) -> None:
    for replay in plan_replays(sizes, budgets).replays:
        used = sum(sizes[index] for index in replay.images)
        assert replay.images
        assert replay.budget == min(budget for budget in budgets if budget >= used)


@given(sizes_drawn, budgets_drawn)
def test_only_what_no_budget_holds_is_left_to_the_model(sizes: list[int], budgets: tuple[int, ...]) -> None:
    plan = plan_replays(sizes, budgets)
    assert list(plan.beyond) == [index for index, count in enumerate(sizes) if count > budgets[-1]]


@given(sizes_drawn, budgets_drawn)
def test_what_is_replayed_is_that_of_the_graphs(sizes: list[int], budgets: tuple[int, ...]) -> None:
    plan = plan_replays(sizes, budgets)
    assert plan.replayed == sum(replay.budget for replay in plan.replays)


@given(st.lists(st.integers(1, 17), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_the_order_of_the_images_changes_no_padding(sizes: list[int], random: object) -> None:
    shuffled = list(sizes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert plan_replays(shuffled).replayed == plan_replays(sizes).replayed


@given(st.lists(st.integers(1, 17), min_size=1, max_size=12))
def test_with_a_graph_for_every_size_nothing_is_padded(sizes: list[int]) -> None:
    assert plan_replays(sizes, range(1, 18)).replayed == sum(sizes)


def test_a_full_budget_wins_over_one_image_a_replay() -> None:
    plan = plan_replays([1, 16, 5, 12])
    assert set(plan.replays) == {Replay(17, (0, 1)), Replay(17, (2, 3))}


def test_no_image_is_no_replay() -> None:
    assert plan_replays([]) == Plan((), ())


@pytest.mark.parametrize(
    ("sizes", "budgets", "error", "message"),
    [
        ([1, 0], (4,), ValueError, r"sizes\[1\]: got 0, expected at least 1"),
        ([1, -3], (4,), ValueError, r"sizes\[1\]: got -3"),
        ([1.0], (4,), TypeError, r"sizes\[0\]: got 1.0 \(float\), expected an int"),
        ([True], (4,), TypeError, r"sizes\[0\]: got True \(bool\)"),
        ([1], (), ValueError, r"budgets: got \(\), expected at least one"),
        ([1], (0, 4), ValueError, r"budgets: got \(0, 4\)"),
        ([1], (4, 4), ValueError, r"budgets: got \(4, 4\), expected at least one, increasing"),
        ([1], (8, 4), ValueError, r"budgets: got \(8, 4\)"),
        ([1], (4.0,), TypeError, r"budgets: got 4.0 \(float\), expected an int"),
    ],
)
def test_bad_arguments(sizes: list[int], budgets: tuple[int, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan_replays(sizes, budgets)


# The padding fraction: padding tiles / tiles computed, both summed over a distribution of batches.


@functools.cache
def fewest_tiles(tile_counts: tuple[int, ...], budgets: tuple[int, ...]) -> int:
    """Tiles that the best possible packing replays; every group that the first image can be in is tried."""
    if not tile_counts:
        return 0
    first, *rest = tile_counts
    best = math.inf
    for others in range(len(rest) + 1):
        for chosen in itertools.combinations(range(len(rest)), others):
            used = first + sum(rest[index] for index in chosen)
            if used <= budgets[-1]:
                left = tuple(count for index, count in enumerate(rest) if index not in chosen)
                budget = min(budget for budget in budgets if budget >= used)
                best = min(best, budget + fewest_tiles(left, budgets))
    return int(best)


def smallest_first(tile_counts: Sequence[int], budgets: tuple[int, ...]) -> int:
    """Tiles replayed when images are added smallest first until the largest budget is full, as vLLM packs them."""
    groups = [0]
    for count in sorted(tile_counts):
        if groups[-1] + count > budgets[-1]:
            groups.append(0)
        groups[-1] += count
    return sum(min(budget for budget in budgets if budget >= used) for used in groups)


def ours(tile_counts: Sequence[int], budgets: tuple[int, ...]) -> int:
    return plan_replays(tile_counts, budgets).replayed


def batches(sizes: Sequence[int], images: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every batch of so many images drawn uniformly from `sizes`, with replacement, and its probability."""
    weights = Counter(sizes)
    for batch in itertools.combinations_with_replacement(sorted(weights), images):
        probability = float(math.factorial(images))
        for size, times in Counter(batch).items():
            probability *= (weights[size] / len(sizes)) ** times / math.factorial(times)
        yield batch, probability


def padding_fraction(
    sizes: Sequence[int],
    images: Sequence[int],
    replayed: Callable[[tuple[int, ...], tuple[int, ...]], int],
    budgets: tuple[int, ...],
) -> float:
    """Expected padding tiles over expected tiles computed, each number of images equally likely; exact, no sampling."""
    padding = computed = 0.0
    for count in images:
        for batch, probability in batches(sizes, count):
            tiles_replayed = replayed(batch, budgets)
            padding += probability * (tiles_replayed - sum(batch))
            computed += probability * tiles_replayed
    return padding / computed


def test_the_probabilities_of_all_batches_sum_to_one() -> None:
    mix = [tiles(*size) for size in PHOTOGRAPHS]
    assert sorted(mix) == [1, 5, 5, 7, 13, 13, 16, 16, 16, 17]
    for images in range(1, 9):
        assert math.isclose(sum(probability for _, probability in batches(mix, images)), 1)


def test_as_many_graphs_as_the_powers_of_two_in_less_memory() -> None:
    assert len(LLAMA4_BUDGETS) == len(POWERS_OF_TWO)
    assert LLAMA4_BUDGETS[-1] < POWERS_OF_TWO[-1]


def test_single_images_take_half_the_padding_of_powers_of_two() -> None:
    sizes = range(1, 18)
    theirs = padding_fraction(sizes, [1], fewest_tiles, POWERS_OF_TWO)
    assert math.isclose(theirs, 50 / 203)
    assert padding_fraction(sizes, [1], ours, LLAMA4_BUDGETS) == pytest.approx(17 / 170)
    assert padding_fraction(sizes, [1], ours, LLAMA4_BUDGETS) <= theirs / 2


def test_photographs_take_half_the_padding_of_powers_of_two_packed_in_the_best_way() -> None:
    mix = [tiles(*size) for size in PHOTOGRAPHS]
    pooled = padding_fraction(mix, range(1, 9), ours, LLAMA4_BUDGETS)
    assert pooled == pytest.approx(0.0371, abs=5e-5)
    assert pooled <= padding_fraction(mix, range(1, 9), fewest_tiles, POWERS_OF_TWO) / 2
    for images in range(1, 9):
        theirs = padding_fraction(mix, [images], fewest_tiles, POWERS_OF_TWO)
        assert padding_fraction(mix, [images], ours, LLAMA4_BUDGETS) <= theirs / 2, images


def test_photographs_take_a_fifth_of_the_padding_of_powers_of_two_packed_smallest_first() -> None:
    mix = [tiles(*size) for size in PHOTOGRAPHS]
    theirs = padding_fraction(mix, range(1, 9), smallest_first, POWERS_OF_TWO)
    assert padding_fraction(mix, range(1, 9), ours, LLAMA4_BUDGETS) <= theirs / 5


def test_packing_is_close_to_the_best_possible() -> None:
    mix = [tiles(*size) for size in PHOTOGRAPHS]
    best = padding_fraction(mix, range(1, 9), fewest_tiles, LLAMA4_BUDGETS)
    assert padding_fraction(mix, range(1, 9), ours, LLAMA4_BUDGETS) <= best + 0.005


def test_no_neighbouring_set_of_budgets_pads_uniform_images_much_less() -> None:
    def padding(budgets: tuple[int, ...]) -> float:
        return padding_fraction(range(1, 18), [1, 2, 3], ours, budgets)

    chosen = padding(LLAMA4_BUDGETS)
    for position, step in itertools.product(range(len(LLAMA4_BUDGETS) - 1), (-1, 1)):
        neighbour = list(LLAMA4_BUDGETS)
        neighbour[position] += step
        assert chosen <= 1.01 * padding(tuple(neighbour)), neighbour
