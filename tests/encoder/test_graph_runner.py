"""An encoder behind captured graphs gives every image what it gives it alone, whatever shares the batch."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from vit_encoder import CompilationConfig, Llama4VisionConfig, Llama4VisionModel, whole_graph
from vit_encoder.cuda_graphs import EncoderGraphRunner, plan_replays
from vit_encoder.llama4 import initialise_, reference_forward
from vit_kernels import force_impl
from vit_kernels.testing import assert_close_to_reference, seeded_tensor

from tests.gpu import BACKEND, DEVICE, launching

__all__ = ["launching"]

CONFIG = dataclasses.replace(Llama4VisionConfig.tiny(), num_hidden_layers=1, image_size=56)
BUDGETS = (2, 3, 5)


class Scaled(nn.Module):
    """Features of a tile: three times its pixels. Keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_channels=3, image_size=2)
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.seen: list[Tensor] = []

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[tiles, 3, 2, 2] -> [tiles, 12]."""
        self.seen.append(pixel_values.clone())
        return self.scale * pixel_values.flatten(1)


def batch_of(tile_counts: list[int], seed: int = 0, size: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Images with so many tiles each."""
    return [seeded_tensor((count, 3, size, size), dtype, seed=seed + i) for i, count in enumerate(tile_counts)]


def encoder(compilation_config: CompilationConfig | None = None) -> Llama4VisionModel:
    """One narrow layer with scaled weights."""
    model = Llama4VisionModel(CONFIG, compilation_config=compilation_config)
    initialise_(model)
    return model.eval()


@given(
    st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=9), min_size=1, max_size=3),
    st.sets(st.integers(1, 6), min_size=1, max_size=3).map(sorted),
)
def test_each_image_gets_its_own_features(calls: list[list[int]], budgets: list[int]) -> None:
    runner = EncoderGraphRunner(Scaled(), budgets=budgets)
    for seed, tile_counts in enumerate(calls):
        images = batch_of(tile_counts, 100 * seed)
        for image, features in zip(images, runner(images), strict=True):
            assert torch.equal(features, 3 * image.flatten(1))


@given(st.lists(st.integers(1, 8), min_size=1, max_size=9))
def test_graphs_run_their_own_sizes_and_the_model_only_what_is_beyond(tile_counts: list[int]) -> None:
    model = Scaled()
    runner = EncoderGraphRunner(model, budgets=BUDGETS)
    model.seen.clear()
    runner(batch_of(tile_counts))
    plan = plan_replays(tile_counts, BUDGETS)
    beyond = [sum(tile_counts[index] for index in plan.beyond)] if plan.beyond else []
    assert [len(seen) for seen in model.seen] == [replay.budget for replay in plan.replays] + beyond


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_padding_is_zeros_whatever_an_earlier_batch_left(tile_counts: list[int]) -> None:
    model = Scaled()
    runner = EncoderGraphRunner(model, budgets=BUDGETS)
    runner([torch.full((5, 3, 2, 2), torch.nan)])
    model.seen.clear()
    runner(batch_of(tile_counts))
    for seen, replay in zip(model.seen, plan_replays(tile_counts, BUDGETS).replays, strict=True):
        used = sum(tile_counts[index] for index in replay.images)
        assert not seen[used:].any()


def test_a_later_call_does_not_change_what_an_earlier_one_returned() -> None:
    class Static(Scaled):
        """Writes every output to the same memory, as a replayed graph does."""

        out = torch.empty(5, 12)

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.out[: len(pixel_values)].copy_(super().forward(pixel_values))

    runner = EncoderGraphRunner(Static(), budgets=BUDGETS)
    images = batch_of([5, 4, 2])
    first = runner(images)
    runner(batch_of([5, 5, 5], seed=50))
    for image, features in zip(images, first, strict=True):
        assert torch.equal(features, 3 * image.flatten(1))


@settings(max_examples=5)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4))
def test_the_encoder_is_as_exact_as_without_padding(tile_counts: list[int]) -> None:
    model = encoder()
    runner = EncoderGraphRunner(model, budgets=BUDGETS)
    images = batch_of(tile_counts, size=CONFIG.image_size)
    for image, features in zip(images, runner(images), strict=True):
        with torch.no_grad():
            alone = model(image)
        assert_close_to_reference(features, reference_forward(model, image), alone)


def test_an_image_of_nan_stays_alone_with_it() -> None:
    model = encoder()
    runner = EncoderGraphRunner(model, budgets=(9,))
    clean, poisoned = batch_of([2, 3], size=CONFIG.image_size)
    expected = runner([clean])[0]
    features = runner([torch.full_like(poisoned, torch.nan), clean])
    assert features[0].isnan().all()
    torch.testing.assert_close(features[1], expected)
    torch.testing.assert_close(runner([clean])[0], expected)


@pytest.mark.usefixtures("fresh_dynamo")
def test_all_budgets_and_what_is_beyond_are_one_compiled_graph() -> None:
    model = encoder(CompilationConfig(compile_mm_encoder=True, backend="aot_eager"))
    images = batch_of([1, 5, 7, 2], size=CONFIG.image_size)
    with whole_graph():
        runner = EncoderGraphRunner(model, budgets=BUDGETS)
        runner(images)
        with torch.inference_mode():
            features = runner(images)
    assert not any(of_image.requires_grad for of_image in features)


def test_pixels_are_cast_to_the_dtype_of_the_weights() -> None:
    runner = EncoderGraphRunner(Scaled().to(torch.float64), budgets=BUDGETS)
    images = batch_of([2, 6], dtype=torch.bfloat16)
    for image, features in zip(images, runner(images), strict=True):
        assert features.dtype == torch.float64
        assert torch.equal(features, 3 * image.double().flatten(1))


def test_other_weights_after_the_capture_are_refused() -> None:
    model = Scaled()
    runner = EncoderGraphRunner(model, budgets=BUDGETS)
    images = batch_of([2])
    with torch.no_grad():
        model.scale.fill_(5.0)
    assert torch.equal(runner(images)[0], 5 * images[0].flatten(1))
    model.to(torch.float64)
    with pytest.raises(RuntimeError, match="model: its weights were moved, cast or replaced after the capture"):
        runner(images)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "images: got none"),
        (torch.zeros(1, 3, 2, 2), TypeError, "images: got Tensor, expected a sequence"),
        ([torch.zeros(1, 3, 2, 2, dtype=torch.uint8)], TypeError, r"images\[0\]: got torch.uint8"),
        ([torch.zeros(1, 3, 2, 2), "x"], TypeError, r"images\[1\]: got str"),
        (
            [torch.zeros(1, 3, 2, 3)],
            ValueError,
            r"images\[0\]: got shape \(1, 3, 2, 3\), expected \[tiles, \*\(3, 2, 2",
        ),
        ([torch.zeros(0, 3, 2, 2)], ValueError, r"images\[0\]: got shape \(0, 3, 2, 2\)"),
        ([torch.zeros(3, 2, 2)], ValueError, r"images\[0\]: got shape \(3, 2, 2\)"),
    ],
)
def test_bad_images(images: list[Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EncoderGraphRunner(Scaled(), budgets=BUDGETS)(images)


def test_a_bad_model_or_budget() -> None:
    with pytest.raises(TypeError, match="model: got Linear, expected a module with parameters and a config"):
        EncoderGraphRunner(nn.Linear(2, 2))
    unknown = Scaled()
    unknown.config = SimpleNamespace(image_size=2)
    with pytest.raises(TypeError, match="model: got Scaled, expected a config with num_channels and image_size, or"):
        EncoderGraphRunner(unknown)
    with pytest.raises(ValueError, match=r"budgets: got \(\)"):
        EncoderGraphRunner(Scaled(), budgets=())


@pytest.mark.cuda
@pytest.mark.usefixtures("fresh_dynamo", "launching")
@pytest.mark.parametrize("compile_mm_encoder", [False, True])
def test_captured_graphs_give_what_the_model_gives(compile_mm_encoder: bool) -> None:
    config = CompilationConfig(compile_mm_encoder=compile_mm_encoder, backend=BACKEND)
    model = encoder(config).to(DEVICE, torch.bfloat16)
    runner = EncoderGraphRunner(model, budgets=BUDGETS)
    for seed, tile_counts in enumerate(([1, 5, 2], [7, 3], [2, 2, 2, 2], [1])):
        images = batch_of(tile_counts, 100 * seed, CONFIG.image_size, torch.bfloat16)
        runner._inputs.static(BUDGETS[-1])[0].fill_(torch.nan)
        for image, features in zip(images, runner(images), strict=True):
            with torch.no_grad(), force_impl("eager"):
                on_pytorch = model.forward(image.to(DEVICE))
            assert_close_to_reference(features, reference_forward(model, image.to(DEVICE)), on_pytorch)
