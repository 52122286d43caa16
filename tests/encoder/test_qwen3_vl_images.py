"""Patches of images and videos: those of transformers' processors, into encoders that agree on them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from vit_encoder import Qwen2_5_VLImageSettings, Qwen3VLImageSettings, Qwen3VLVisionConfig, Qwen3VLVisionModel
from vit_encoder.qwen3_vl import PatchedImage, PatchSettings, encode_images, patch_image, reference_forward
from vit_encoder.qwen_images import resized_clip

from experiments.common.peers import allow_torchvision_beside_cpu_torch
from tests.encoder.qwen2_5_vl_batches import relative_error
from tests.encoder.qwen3_vl_batches import encoder, peer_of
from tests.encoder.test_qwen2_5_vl_images import pixels

CONFIG = dataclasses.replace(Qwen3VLVisionConfig.tiny(), depth=2)
UNIT = 32
PUBLISHED_IMAGE = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
PUBLISHED_VIDEO = PUBLISHED_IMAGE | {
    "size": {"longest_edge": 25165824, "shortest_edge": 4096},
    "video_processor_type": "Qwen3VLVideoProcessor",
}
del PUBLISHED_VIDEO["image_processor_type"]


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """Height and width: of any shape, and of the most extreme one, 1:200."""
    side = st.integers(1, 70) | st.integers(1, 10).map(lambda n: UNIT * n) | st.integers(1, 400)
    short, long = sorted((draw(side), draw(side)))
    if draw(st.booleans()):
        short = draw(st.integers(1, 4))
        long = 200 * short
    long = min(long, 200 * short)
    return (short, long) if draw(st.booleans()) else (long, short)


def processors(**size: int) -> tuple[Any, Any]:
    """transformers' own, of images and of videos."""
    allow_torchvision_beside_cpu_torch()
    from transformers import Qwen2VLImageProcessor, Qwen3VLVideoProcessor

    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    bounds = {"size": size} if size else {}
    return Qwen2VLImageProcessor(patch_size=16, **half, **bounds), Qwen3VLVideoProcessor(**bounds)


def folder_with(folder: Path, **files: dict[str, Any]) -> Path:
    """A checkpoint's folder with these files."""
    stub: dict[str, Any] = {"config": {}}
    for name, content in (stub | files).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@settings(max_examples=4 * settings().max_examples)
@given(
    st.integers(1, 40), st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 60), st.integers(1, 4),
    st.integers(1, 10**7), st.integers(1, 10**7),
)  # fmt: skip
@example(5, 100, 100, 32, 2, 1, 4 * 96 * 96)
@example(3, 31, 200 * 31, 32, 2, 1, 10**7)
@example(7, 1, 190, 32, 2, 1, 10**7)
@example(2, 17, 43, 32, 2, 1, 10**7)
@example(1, 100, 100, 32, 2, 1, 10**7)
def test_the_size_of_a_clip_is_that_of_transformers(
    frames: int, height: int, width: int, factor: int, temporal_factor: int, one: int, other: int
) -> None:
    allow_torchvision_beside_cpu_torch()
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    given = {"factor": factor, "temporal_factor": temporal_factor}
    given |= {"min_pixels": min(one, other), "max_pixels": max(one, other)}
    try:
        expected = smart_resize(frames, height, width, **given)
    except ValueError:
        with pytest.raises(ValueError, match="image: expected "):
            resized_clip(frames, height, width, **given)
        return
    assert resized_clip(frames, height, width, **given) == expected


@given(sizes(), st.sampled_from([UNIT**2, 64 * 64]), st.sampled_from([40 * UNIT**2, 300 * UNIT**2]))
def test_the_patches_are_those_of_transformers(size: tuple[int, int], min_pixels: int, max_pixels: int) -> None:
    image = pixels(*size)
    transform, _ = processors(shortest_edge=min_pixels, longest_edge=max_pixels)
    expected = transform(Image.fromarray(image), return_tensors="pt")
    ours = patch_image(image, CONFIG, min_pixels=min_pixels, max_pixels=max_pixels)
    assert torch.equal(ours.grid_thw, expected["image_grid_thw"])
    assert torch.equal(ours.pixel_values, expected["pixel_values"])


@given(sizes(), st.integers(2, 7), st.sampled_from([UNIT**2, 30 * UNIT**2]), st.sampled_from([40, 300]))
@example((70, 100), 5, UNIT**2, 40)
def test_the_patches_of_a_video_are_those_of_transformers(
    size: tuple[int, int], frames: int, min_pixels: int, max_units: int
) -> None:
    video = [pixels(*size, seed) for seed in range(frames)]
    tensors = torch.stack([torch.from_numpy(frame).permute(2, 0, 1) for frame in video])
    max_pixels = max_units * UNIT**2
    _, transform = processors(shortest_edge=min_pixels, longest_edge=max_pixels)
    try:
        expected = transform(videos=[tensors], return_tensors="pt", do_sample_frames=False, cap_pixels_per_frame=False)
    except ValueError:  # scaled up to 32 pixels, a side is rounded down and the ratio grows
        with pytest.raises(ValueError, match="aspect ratio"):
            patch_image(video, CONFIG, min_pixels=min_pixels, max_pixels=max_pixels)
        return
    ours = patch_image(video, CONFIG, min_pixels=min_pixels, max_pixels=max_pixels)
    assert torch.equal(ours.grid_thw, expected["video_grid_thw"])
    assert torch.equal(ours.pixel_values, expected["pixel_values_videos"])


def test_one_budget_is_for_the_whole_clip() -> None:
    frame = np.zeros((640, 640, 3), np.uint8)
    budget: dict[str, Any] = {"min_pixels": 1, "max_pixels": 8 * 640 * 640}
    assert patch_image([frame] * 8, CONFIG, **budget).grid_thw.tolist() == [[4, 40, 40]]
    assert patch_image([frame] * 32, CONFIG, **budget).grid_thw.tolist() == [[16, 20, 20]]
    of_each = Qwen3VLImageSettings(video=PatchSettings(max_pixels=640 * 640))
    assert patch_image([frame] * 32, CONFIG, settings=of_each).grid_thw.tolist() == [[16, 40, 40]]


def test_the_published_files_have_the_defaults(tmp_path: Path) -> None:
    found = Qwen3VLImageSettings.from_hf(
        folder_with(tmp_path, preprocessor_config=PUBLISHED_IMAGE, video_preprocessor_config=PUBLISHED_VIDEO)
    )
    said: dict[str, Any] = {"patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2}
    assert found.image == dataclasses.replace(Qwen3VLImageSettings().image, **said)
    assert found.video == dataclasses.replace(Qwen3VLImageSettings().video, **said)
    # Full HD: 34 x 60 features.
    grid = patch_image(np.zeros((1080, 1920, 3), np.uint8), Qwen3VLVisionConfig(), settings=found).grid_thw
    assert grid.tolist() == [[1, 68, 120]]


def test_a_checkpoint_that_says_nothing_has_the_defaults(tmp_path: Path) -> None:
    assert Qwen3VLImageSettings.from_hf(folder_with(tmp_path)) == Qwen3VLImageSettings()


OMNI = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3OmniMoeProcessor", "patch_size": 16}


def test_the_videos_of_an_omni_have_a_budget_for_each_frame(tmp_path: Path) -> None:
    said = OMNI | {"min_pixels": 3136, "max_pixels": 12845056}
    video = Qwen3VLImageSettings.from_hf(folder_with(tmp_path, preprocessor_config=said)).video
    assert (video.of_the_clip, video.min_pixels, video.max_pixels) == (False, 3136, 12845056)
    named = {"video_processor_type": "Qwen2VLVideoProcessor"}
    assert not Qwen3VLImageSettings.from_hf({"video_processor": named}).video.of_the_clip
    named = {"video_processor_type": "Qwen3VLVideoProcessor"}
    assert Qwen3VLImageSettings.from_hf({"video_processor": OMNI | named}).video.of_the_clip


bounds = st.fixed_dictionaries(
    {},
    optional={
        "min_pixels": st.integers(1, 50) | st.none(),
        "max_pixels": st.integers(50, 99) | st.none(),
        "size": st.fixed_dictionaries({"shortest_edge": st.integers(1, 50), "longest_edge": st.integers(50, 99)}),
        "image_mean": st.just([0.1, 0.2, 0.3]),
    },
)


@given(image=bounds, video=st.none() | bounds, nested=st.none() | bounds)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_files_leave_out_is_as_in_transformers(
    tmp_path_factory: pytest.TempPathFactory, image: Any, video: Any, nested: Any
) -> None:
    allow_torchvision_beside_cpu_torch()
    from transformers import Qwen2VLImageProcessor, Qwen3VLVideoProcessor

    small = {"min_pixels": 1, "max_pixels": 99}  # no default of images crosses a drawn bound
    files = {"preprocessor_config": small | image}
    files |= {} if video is None else {"video_preprocessor_config": video}
    files |= {} if nested is None else {"processor_config": {"video_processor": nested}}
    folder = folder_with(tmp_path_factory.mktemp("order"), **files)
    found = Qwen3VLImageSettings.from_hf(folder)
    for ours, processor in ((found.image, Qwen2VLImageProcessor), (found.video, Qwen3VLVideoProcessor)):
        theirs = processor.from_pretrained(folder)
        assert (ours.min_pixels, ours.max_pixels) == (theirs.size["shortest_edge"], theirs.size["longest_edge"])
        assert list(ours.image_mean) == list(theirs.image_mean)
        assert list(ours.image_std) == list(theirs.image_std)


def test_the_defaults_of_the_classes_are_those_of_transformers() -> None:
    image, video = processors()
    found = Qwen3VLImageSettings.from_hf({"image_processor": image.to_dict(), "video_processor": video})
    assert (found.image.min_pixels, found.image.max_pixels) == (3136, 1003520)
    assert (found.video.min_pixels, found.video.max_pixels) == (131072, 786432)
    assert found == Qwen3VLImageSettings.from_hf(
        {
            "image_processor": {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
            | {"temporal_patch_size": 2, "merge_size": 2},
            "video_processor": {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2},
        }
    )


def test_images_and_videos_go_through_both_encoders_in_one_batch() -> None:
    inputs: list[Any] = [pixels(30, 200), pixels(1, 1), [pixels(90, 61, seed) for seed in range(3)], pixels(150, 230)]
    patched = [patch_image(image, CONFIG, min_pixels=UNIT**2) for image in inputs]
    pixel_values, grid_thw = (
        torch.cat([getattr(image, name) for image in patched]) for name in ("pixel_values", "grid_thw")
    )
    assert grid_thw.tolist() == [[1, 2, 12], [1, 2, 2], [2, 6, 4], [1, 10, 14]]
    model = encoder(CONFIG)
    with torch.no_grad():
        expected = reference_forward(model, pixel_values, grid_thw)
        theirs = peer_of(model)(pixel_values, grid_thw).double()
        ours = model(pixel_values, grid_thw).double()
        each = encode_images(model, patched)
    assert relative_error(ours, expected) <= 1.5 * relative_error(theirs, expected)
    assert [tuple(features.shape) for features in each] == [(n, CONFIG.feature_width) for n in (6, 1, 12, 35)]
    assert torch.equal(torch.cat(each).double(), ours)


def test_encode_images_follows_the_settings_and_names_what_it_refuses() -> None:
    model = encoder(CONFIG)
    small = Qwen3VLImageSettings(image=PatchSettings(min_pixels=UNIT**2, max_pixels=4 * UNIT**2))
    with torch.no_grad():
        (features,) = encode_images(model, [pixels(100, 100)], settings=small)
        assert len(features) == 4
        (features,) = encode_images(model, [pixels(100, 100)])
    assert len(features) == 256**2 // UNIT**2
    with pytest.raises(ValueError, match=r"images\[1\]: image: expected a video of at least 2 frames, got 1"):
        encode_images(model, [pixels(40, 40), [pixels(40, 40)]])
    with pytest.raises(TypeError, match="model: expected a Qwen3VLVisionModel, got Linear"):
        encode_images(torch.nn.Linear(2, 2), [pixels(40, 40)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("image", "changes", "error", "says"),
    [
        ([], {}, ValueError, "image: got no frames"),
        ([pixels(30, 30), pixels(30, 31)], {}, ValueError, r"got frames of \[\(30, 30\), \(30, 31\)\], expected one"),
        (pixels(1, 201), {}, ValueError, "aspect ratio of at most 200, got 1 x 201"),
        ([pixels(9, 9)] * 2, {"min_pixels": 9, "max_pixels": 8}, ValueError, "min_pixels: expected at most max_pixels"),
        (pixels(9, 9), {"settings": Qwen2_5_VLImageSettings()}, TypeError, "settings: got Qwen2_5_VLImageSettings"),
    ],
)
def test_what_makes_no_patches_is_refused(image: Any, changes: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        patch_image(image, CONFIG, **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cap_pixels_per_frame": True}, "cap_pixels_per_frame: got True, expected False"),
        ({"video_processor_type": "Glm4vVideoProcessor"}, "video_processor_type: got 'Glm4vVideoProcessor'"),
        ({"resample": 2}, "resample: got 2, expected"),
        ({"size": {"height": 3}}, "size: got .*, expected shortest_edge and longest_edge"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(changes: Any, says: str, tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path, preprocessor_config=PUBLISHED_IMAGE, video_preprocessor_config=PUBLISHED_VIDEO | changes
    )
    with pytest.raises(ValueError, match=rf"video_preprocessor_config\.json: {says}"):
        Qwen3VLImageSettings.from_hf(folder)


def test_a_file_of_image_settings_of_videos_is_refused_for_images() -> None:
    with pytest.raises(ValueError, match="image_processor_type: got 'Qwen3VLVideoProcessor'"):
        Qwen3VLImageSettings.from_hf({"image_processor_type": "Qwen3VLVideoProcessor"})
    with pytest.raises(TypeError, match="of_the_clip: got int, expected a bool"):
        PatchSettings(of_the_clip=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="image: got bounds of the clip, expected those of a still image"):
        Qwen3VLImageSettings(image=Qwen3VLImageSettings().video)
    assert isinstance(patch_image(pixels(30, 30), CONFIG), PatchedImage)
    assert isinstance(Qwen3VLVisionModel(CONFIG).image_settings, Qwen3VLImageSettings)
