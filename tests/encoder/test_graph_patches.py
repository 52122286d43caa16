"""Qwen2.5-VL behind captured graphs: padding of patches is inert, and every image gets its own features."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vit_encoder import CompilationConfig, Qwen2_5_VLVisionConfig, whole_graph
from vit_encoder.cuda_graphs import QWEN2_5_VL_BUDGETS, EncoderGraphRunner, plan_replays
from vit_encoder.cuda_graphs.patches import LAYOUTS, PatchInputs
from vit_encoder.qwen2_5_vl import PatchedImage, VisionMetadata, reference_forward, vision_metadata
from vit_kernels import force_impl
from vit_kernels.testing import assert_close_to_reference, corrected_interpreter, nan_filled_empty

from tests.encoder.qwen2_5_vl_batches import encoder, grids, patches

CONFIG = dataclasses.replace(Qwen2_5_VLVisionConfig.tiny(), depth=2, patch_size=4, window_size=32)
BUDGETS = (64, 128, 320)
GRIDS = ([1, 8, 8], [2, 6, 10], [1, 2, 2], [1, 18, 10], [1, 12, 12])


def images_of(sizes: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[PatchedImage]:
    """Images and videos of these sizes."""
    return [
        PatchedImage(patches(CONFIG, torch.tensor([size]), seed + i, dtype), torch.tensor([size]))
        for i, size in enumerate(sizes)
    ]


def inputs(largest: int = BUDGETS[-1]) -> PatchInputs:
    """Of an encoder, with memory."""
    made = PatchInputs(encoder(CONFIG), LAYOUTS[Qwen2_5_VLVisionConfig])
    made.allocate(largest)
    return made


def static_of(made: PatchInputs, budget: int) -> dict[str, Tensor]:
    """The inputs of a graph by their names."""
    return dict(zip(("pixel_values", *VisionMetadata._fields), made.static(budget), strict=True))


@settings(max_examples=10)
@given(grids(max_images=5), st.integers(0, 100))
def test_every_image_is_as_exact_as_alone(grid_thw: Tensor, seed: int) -> None:
    model = encoder(CONFIG)
    images = images_of(grid_thw.tolist(), seed)
    for image, features in zip(images, EncoderGraphRunner(model, budgets=BUDGETS)(images), strict=True):
        with torch.no_grad():
            alone = model(image.pixel_values, image.grid_thw)
        expected = reference_forward(model, image.pixel_values, image.grid_thw)
        assert_close_to_reference(features, expected, alone)


def test_the_kernels_leave_padding_alone() -> None:
    model = encoder(CONFIG)
    images = images_of([[1, 8, 8], [2, 2, 6], [1, 4, 4]])
    with corrected_interpreter(), force_impl("triton"), nan_filled_empty(), torch.no_grad():
        features = EncoderGraphRunner(model, budgets=(256,))(images)
        alone = [model(image.pixel_values, image.grid_thw) for image in images]
    for image, padded, unpadded in zip(images, features, alone, strict=True):
        expected = reference_forward(model, image.pixel_values, image.grid_thw)
        assert_close_to_reference(padded, expected, unpadded)


@given(grids(max_images=6).filter(lambda grid_thw: len(grid_thw) > 1))
def test_images_whose_sizes_fit_fit_in_every_input(grid_thw: Tensor) -> None:
    made = inputs()
    images = [
        PatchedImage(torch.ones(math.prod(size), CONFIG.patch_dim), torch.tensor([size])) for size in grid_thw.tolist()
    ]
    for replay in plan_replays([made.size(image) for image in images], BUDGETS).replays:
        made.fill(replay.budget, [images[index] for index in replay.images])
        grid = torch.cat([images[index].grid_thw for index in replay.images])
        static = static_of(made, replay.budget)
        expected = vision_metadata(grid, CONFIG)
        for name, tensor in expected._asdict().items():
            assert torch.equal(static[name][: len(tensor)], tensor), name
        assert len(static["pixel_values"]) == replay.budget


@given(st.lists(st.sampled_from(GRIDS), min_size=1, max_size=2), st.sampled_from([None, torch.nan]))
def test_padding_is_inert_whatever_an_earlier_batch_left(sizes: list[list[int]], before: float | None) -> None:
    made = inputs(largest := 512)
    for tensor in made.static(largest) if before is not None else ():
        tensor.fill_(torch.nan if tensor.is_floating_point() else -7)
    used = sum(map(math.prod, sizes))
    made.fill(largest, images_of(sizes))
    static = static_of(made, largest)
    for name in ("pixel_values", "cos", "sin"):
        assert not static[name][used:].any(), name
    for name in ("window_index", "reverse_index"):
        assert torch.equal(static[name].sort().values, torch.arange(largest // 4)), name
        assert torch.equal(static[name][used // 4 :], torch.arange(used // 4, largest // 4)), name
    for name in ("cu_seqlens", "cu_window_seqlens"):
        assert static[name].max() == used
        assert bool((static[name].diff() >= 0).all()), name


def test_before_any_batch_nothing_is_in_a_sequence() -> None:
    static = static_of(inputs(), 128)
    assert not static["cu_seqlens"].any()
    assert not static["cu_window_seqlens"].any()
    assert {name: len(tensor) for name, tensor in static.items()} == {
        **{"pixel_values": 128, "window_index": 32, "reverse_index": 32, "cu_seqlens": 128 // 64 + 1},
        **{"cu_window_seqlens": 128 // 32 + 1, "cos": 128, "sin": 128},
    }


def test_an_image_takes_as_much_as_its_sequences_have_room_for() -> None:
    made = inputs()
    whole, ragged, video, tiny = images_of([[1, 16, 16], [1, 10, 10], [4, 4, 4], [1, 2, 2]])
    assert made.size(whole) == 256  # 4 windows of 64 patches
    assert made.size(ragged) == 4 * 32  # 4 windows in 100 patches
    assert made.size(video) == 4 * 64  # 4 frames in 64 patches
    assert made.size(tiny) == 64


@given(st.lists(st.sampled_from(GRIDS), min_size=1, max_size=6))
def test_graphs_run_their_budgets_and_the_model_what_is_beyond(sizes: list[list[int]]) -> None:
    model = encoder(CONFIG)
    runner = EncoderGraphRunner(model, budgets=(64, 128))
    seen: list[int] = []
    handle = model.encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    images = images_of(sizes)
    runner(images)
    handle.remove()
    plan = plan_replays([runner._inputs.size(image) for image in images], (64, 128))
    beyond = [sum(len(images[index].pixel_values) for index in plan.beyond)] if plan.beyond else []
    assert seen == [replay.budget for replay in plan.replays] + beyond


def test_an_image_of_nan_stays_alone_with_it() -> None:
    runner = EncoderGraphRunner(encoder(CONFIG), budgets=BUDGETS)
    clean, poisoned = images_of([[1, 8, 8], [1, 8, 8]])
    (expected,) = runner([clean])
    nan = PatchedImage(torch.full_like(poisoned.pixel_values, torch.nan), poisoned.grid_thw)
    features = runner([nan, clean])
    assert features[0].isnan().all()
    torch.testing.assert_close(features[1], expected)
    torch.testing.assert_close(runner([clean])[0], expected, rtol=0, atol=0)


def test_a_later_call_does_not_change_what_an_earlier_one_returned() -> None:
    runner = EncoderGraphRunner(encoder(CONFIG), budgets=BUDGETS)
    first = runner(images_of([[1, 8, 8]]))[0]
    kept = first.clone()
    runner(images_of([[1, 8, 8]], seed=9))
    assert torch.equal(first, kept)


@pytest.mark.usefixtures("fresh_dynamo")
def test_all_budgets_and_what_is_beyond_are_one_compiled_graph() -> None:
    model = encoder(CONFIG, compilation_config=CompilationConfig(compile_mm_encoder=True, backend="aot_eager"))
    images = images_of([*GRIDS, [1, 20, 20]])
    with whole_graph():
        runner = EncoderGraphRunner(model, budgets=BUDGETS)
        runner(images)
        with torch.inference_mode():
            runner(images[::-1])


def test_pixels_are_cast_to_the_dtype_of_the_weights() -> None:
    model = encoder(CONFIG, dtype=torch.bfloat16)
    (features,) = EncoderGraphRunner(model, budgets=BUDGETS)(images_of([[1, 8, 8]]))
    assert features.dtype == torch.bfloat16
    assert features.shape == (16, CONFIG.out_hidden_size)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(64, 96), TypeError, r"images\[0\]: got Tensor, expected a PatchedImage"),
        (PatchedImage(torch.zeros(64, 96).int(), torch.tensor([[1, 8, 8]])), TypeError, "got torch.int32, expected a"),
        (PatchedImage(torch.zeros(64, 96), torch.tensor([1, 8, 8])), ValueError, r"grid_thw: got torch.int64 \(3,\)"),
        (PatchedImage(torch.zeros(64, 96), torch.tensor([[1.0, 8, 8]])), ValueError, "got torch.float32"),
        (PatchedImage(torch.zeros(60, 96), torch.tensor([[1, 8, 8]])), ValueError, r"got shape \(60, 96\), expected"),
        (PatchedImage(torch.zeros(64, 95), torch.tensor([[1, 8, 8]])), ValueError, r"expected \(64, 96\) for grid_thw"),
    ],
)
def test_bad_images(image: Any, error: type[Exception], message: str) -> None:
    assert CONFIG.patch_dim == 96
    with pytest.raises(error, match=message):
        EncoderGraphRunner(encoder(CONFIG), budgets=BUDGETS)([image])


def test_budgets_are_whole_units() -> None:
    with pytest.raises(ValueError, match="budgets: got 66, expected multiples of the 4 patches of a unit"):
        EncoderGraphRunner(encoder(CONFIG), budgets=(64, 66))
    assert all(budget % 4 == 0 for budget in QWEN2_5_VL_BUDGETS)


def test_a_layout_names_what_the_encoder_takes() -> None:
    layout = LAYOUTS[Qwen2_5_VLVisionConfig]
    assert {*layout.sequences, *layout.orders} <= {*VisionMetadata._fields}
    boundaries = {name for name in VisionMetadata._fields if name.startswith("cu_")}
    assert set(layout.sequences) == boundaries


@pytest.mark.cuda
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compile_mm_encoder", [False, True])
def test_captured_graphs_give_what_the_model_gives(compile_mm_encoder: bool) -> None:
    model = encoder(CONFIG, compilation_config=CompilationConfig(compile_mm_encoder=compile_mm_encoder))
    model.to("cuda", torch.bfloat16)
    runner = EncoderGraphRunner(model, budgets=BUDGETS)
    for seed, sizes in enumerate(([GRIDS[0], GRIDS[1]], [*GRIDS, [1, 20, 20]], [GRIDS[2]])):
        images = images_of(sizes, 100 * seed, torch.bfloat16)
        for tensor in runner._inputs.static(BUDGETS[-1]):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        for image, features in zip(images, runner(images), strict=True):
            pixels = image.pixel_values.cuda()
            with torch.no_grad():
                alone = model(pixels, image.grid_thw)
            assert_close_to_reference(features, reference_forward(model, pixels, image.grid_thw), alone)
