"""The padding of captured graphs: counted right by hand, and what is committed is what the budgets give."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from vit_encoder.cuda_graphs import LLAMA4_BUDGETS, QWEN2_5_VL_BUDGETS, QWEN3_VL_BUDGETS

from experiments.common import cli
from experiments.graph_budgets.__main__ import markdown
from experiments.graph_budgets.encoders import ENCODERS
from experiments.graph_budgets.mixes import MIXES
from experiments.graph_budgets.padding import (
    Padding,
    draw,
    neighbours,
    packed_by_plan,
    packed_smallest_first,
    padding,
    powers_of_two,
    search,
)


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads((cli.COMMITTED / "graph_budgets.json").read_text(encoding="utf-8"))


def test_padding_by_hand() -> None:
    # 3 + 4 in 8, 9 is beyond; then 5 alone, which takes the room of 6 for its sequences.
    batches = [[(3, 3), (9, 9), (4, 4)], [(6, 5)]]
    assert padding(batches, (4, 8), packed_smallest_first) == Padding(fraction=1 - 12 / 16, replays=1.0, beyond=0.25)
    assert padding(batches, (3, 4, 8), packed_by_plan) == Padding(round(1 - 12 / 15, 4), replays=1.5, beyond=0.25)


def test_smallest_first_fills_the_largest_budget_before_it_begins_another() -> None:
    assert packed_smallest_first([5, 1, 2, 9], (4, 8)) == [8]
    assert packed_smallest_first([5, 4, 2], (4, 8)) == [8, 8]
    assert packed_smallest_first([8, 3], (4, 8)) == [4, 8]
    assert packed_smallest_first([9], (4, 8)) == []


def test_powers_of_two_end_in_the_largest() -> None:
    assert powers_of_two(256, 5120) == (256, 512, 1024, 2048, 4096, 5120)
    assert powers_of_two(1, 16) == (1, 2, 4, 8, 16)
    assert powers_of_two(1, 17) == (1, 2, 4, 8, 16, 17)


def test_the_search_keeps_the_largest_budget_and_finds_a_mix_of_one_size() -> None:
    batches = draw({(96, 96): 1.0}, batches=3, seed=0)
    assert [len(batch) for batch in batches[::3]] == [1, 2, 3, 4, 5, 6, 7, 8]
    found = search(batches, (64, 512), (-32, 32))
    assert found == (96, 512)
    assert {budgets[-1] for budgets in neighbours((64, 512), (-32, 32))} == {512}
    assert list(neighbours((32, 64), (-32, 32))) == []


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.name)
def test_a_mix_is_a_distribution_of_images_that_its_encoders_take(mix: Any) -> None:
    assert math.isclose(sum(mix.sizes.values()), 1)
    for encoder in ENCODERS:
        images = encoder.images(mix)
        assert math.isclose(sum(images.values()), 1)
        assert all(0 < useful <= taken for taken, useful in images)
        # Qwen3-VL's checkpoints allow images that no graph takes.
        assert encoder.name == "Qwen3-VL" or all(taken <= encoder.budgets[-1] for taken, _ in images)


def test_what_an_image_takes() -> None:
    llama4, qwen, qwen3 = ENCODERS
    assert (qwen3.taken(256, 256), qwen3.taken(1280, 720)) == ((16 * 16, 16 * 16), (80 * 44, 80 * 44))
    assert (llama4.taken(336, 336), llama4.taken(1280, 720)) == ((1, 1), (13, 13))
    assert (qwen.taken(256, 256), qwen.taken(1280, 720)) == ((18 * 18, 18 * 18), (92 * 52, 92 * 52))


def test_ours_pad_less_than_powers_of_two(committed: dict[str, Any]) -> None:
    for mix in MIXES:
        for encoder in ENCODERS:
            batches = draw(encoder.images(mix), batches=30, seed=2)
            doubled = powers_of_two(encoder.smallest, encoder.budgets[-1])
            assert len(doubled) == len(encoder.budgets)
            ours = padding(batches, encoder.budgets, packed_by_plan).fraction
            for packed in (packed_by_plan, packed_smallest_first):
                assert ours < padding(batches, doubled, packed).fraction, (mix.name, encoder.name)


def test_what_is_committed_is_what_the_budgets_give(committed: dict[str, Any]) -> None:
    budgets = {row["encoder"]: tuple(row["budgets"]) for row in committed["rows"] if row["which"] == "ours"}
    of_patches = {"Qwen2.5-VL": QWEN2_5_VL_BUDGETS, "Qwen3-VL": QWEN3_VL_BUDGETS}
    assert budgets == {"Llama 4": LLAMA4_BUDGETS, **of_patches}
    assert committed["searched"] == {name: [*found] for name, found in of_patches.items()}
    assert (cli.COMMITTED / "graph_budgets.md").read_text(encoding="utf-8") == markdown(committed)
    assert committed["mixes"] == {mix.name: mix.source for mix in MIXES}
    by_mix = {mix.name: mix for mix in MIXES}
    for row in committed["rows"]:
        if row["which"] != "ours":
            continue
        (encoder,) = (encoder for encoder in ENCODERS if encoder.name == row["encoder"])
        batches = draw(encoder.images(by_mix[row["mix"]]), batches=200, seed=1)[:200]
        assert padding(batches, encoder.budgets, packed_by_plan).fraction == row["single"]["fraction"]
