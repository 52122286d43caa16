"""What a checkpoint says about preparing images: found where transformers finds it, followed as there, or refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from vit_encoder import (
    Llama4ImageSettings,
    Llama4VisionConfig,
    Llama4VisionModel,
    Qwen2_5_VLImageSettings,
    Qwen2_5_VLVisionConfig,
    Qwen2_5_VLVisionModel,
    encode_images,
    tile_image,
)
from vit_encoder.checkpoints import to_hf_tensors
from vit_encoder.initialise import initialise_
from vit_encoder.llama4.checkpoint import vision_tensors
from vit_encoder.llama4.images import best_canvas
from vit_encoder.qwen2_5_vl import PatchSettings, patch_image
from vit_encoder.qwen2_5_vl import checkpoint as qwen_checkpoint
from vit_encoder.qwen2_5_vl import encode_images as encode_qwen_images

from experiments.common.peers import allow_torchvision_beside_cpu_torch

QWEN = dataclasses.replace(Qwen2_5_VLVisionConfig.tiny(), depth=2)
LLAMA4 = dataclasses.replace(Llama4VisionConfig.tiny(), num_hidden_layers=1)
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PUBLISHED_QWEN = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
"""preprocessor_config.json of the published Qwen2.5-VL 3B to 72B, their only such file."""
PUBLISHED_LLAMA4 = {
    "crop_size": None,
    "data_format": "channels_first",
    "default_to_square": True,
    "device": None,
    "do_center_crop": None,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Llama4ImageProcessorFast",
    "image_std": [0.5, 0.5, 0.5],
    "input_data_format": None,
    "max_patches": 16,
    "processor_class": "Llama4Processor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "resize_to_max_canvas": False,
    "return_tensors": None,
    "size": {"height": 336, "width": 336},
}
IMAGE, VIDEO, BOTH = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def checkpoint(folder: Path, **files: dict[str, Any]) -> Path:
    """A folder with these files, `.json` left out, and a config.json."""
    stub: dict[str, Any] = {} if (folder / "config.json").exists() else {"config": {}}
    for name, content in (stub | files).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def transformers_processors() -> tuple[Any, Any, Any]:
    allow_torchvision_beside_cpu_torch()
    from transformers import Llama4ImageProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    return Llama4ImageProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor


class TestWhereSettingsAreFound:
    @pytest.mark.parametrize(
        "files",
        [
            {"preprocessor_config": PUBLISHED_QWEN},
            {"preprocessor_config": PUBLISHED_QWEN | {"size": {"min_pixels": 3136, "max_pixels": 12845056}}},
            {"preprocessor_config": {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}},
            {"preprocessor_config": {"size": {"min_pixels": 3136, "max_pixels": 12845056}}},
            {"preprocessor_config": {"max_pixels": 12845056, "min_pixels": None, "size": None}},
            {"processor_config": {"image_processor": PUBLISHED_QWEN, "processor_class": "Qwen2_5_VLProcessor"}},
            {"processor_config": {"image_processor": PUBLISHED_QWEN}, "preprocessor_config": {"max_pixels": 3136}},
            {"processor_config": {"processor_class": "it"}, "preprocessor_config": PUBLISHED_QWEN},
        ],
        ids=str,
    )
    def test_a_full_hd_image_has_the_published_number_of_features(self, files: Any, tmp_path: Path) -> None:
        found = Qwen2_5_VLImageSettings.from_hf(checkpoint(tmp_path, **files))
        grid = patch_image(np.zeros((1080, 1920, 3), np.uint8), QWEN, settings=found).grid_thw
        assert grid.tolist() == [[1, 78, 138]]
        assert int(grid.prod()) // QWEN.merge_unit == 2691

    def test_llama_4_s_published_file_has_the_defaults(self, tmp_path: Path) -> None:
        said = PUBLISHED_LLAMA4 | {"max_patches": 5}
        for path in (checkpoint(tmp_path, preprocessor_config=said), tmp_path / "config.json"):
            assert Llama4ImageSettings.from_hf(path) == Llama4ImageSettings(max_tiles=5)
        folder = checkpoint(tmp_path, preprocessor_config=PUBLISHED_LLAMA4)
        for source in (folder, str(folder), folder / IMAGE, PUBLISHED_LLAMA4, {"image_processor": PUBLISHED_LLAMA4}):
            assert Llama4ImageSettings.from_hf(source) == Llama4ImageSettings()

    def test_a_checkpoint_that_says_nothing_has_the_defaults(self, tmp_path: Path) -> None:
        checkpoint(tmp_path)
        assert Qwen2_5_VLImageSettings.from_hf(tmp_path) == Qwen2_5_VLImageSettings()
        assert Llama4ImageSettings.from_hf(tmp_path, image_size=112) == Llama4ImageSettings(image_size=112)

    def test_the_defaults_are_those_of_transformers(self) -> None:
        llama4, image, video = (processor() for processor in transformers_processors())
        assert Llama4ImageSettings.from_hf(llama4) == Llama4ImageSettings()
        found = Qwen2_5_VLImageSettings.from_hf({"image_processor": image.to_dict(), "video_processor": video})
        sizes: dict[str, Any] = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
        defaults = Qwen2_5_VLImageSettings()
        assert found.image == dataclasses.replace(defaults.image, **sizes)
        assert found.video == dataclasses.replace(defaults.video, **sizes)
        assert Qwen2_5_VLImageSettings.from_hf(video).image == defaults.image
        assert Qwen2_5_VLImageSettings.from_hf(video).video == found.video

    def test_what_transformers_writes_is_read(self, tmp_path: Path) -> None:
        llama4, image, video = transformers_processors()
        llama4(size={"height": 56, "width": 56}, max_patches=5, image_std=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
        expected = Llama4ImageSettings(image_size=56, max_tiles=5, image_std=(0.1, 0.2, 0.3))
        assert Llama4ImageSettings.from_hf(tmp_path) == expected
        image(size={"shortest_edge": 1000, "longest_edge": 2000}).save_pretrained(tmp_path)
        video(min_pixels=3000, max_pixels=4000).save_pretrained(tmp_path)
        found = Qwen2_5_VLImageSettings.from_hf(tmp_path)
        assert (found.image.min_pixels, found.image.max_pixels) == (1000, 2000)
        assert (found.video.min_pixels, found.video.max_pixels) == (3000, 4000)

    bounds = st.fixed_dictionaries(
        {},
        optional={
            "min_pixels": st.integers(1, 50) | st.none(),
            "max_pixels": st.integers(50, 99) | st.none(),
            "size": st.fixed_dictionaries({"shortest_edge": st.integers(1, 50), "longest_edge": st.integers(50, 99)}),
        },
    )

    @given(
        image=bounds,
        video=st.none() | bounds,
        nested_image=st.none() | bounds,
        nested_video=st.none() | bounds,
    )
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_the_order_is_that_of_transformers(
        self, tmp_path_factory: pytest.TempPathFactory, image: Any, video: Any, nested_image: Any, nested_video: Any
    ) -> None:
        small = {"min_pixels": 1, "max_pixels": 99}  # no default of images crosses a drawn bound
        folder = checkpoint(tmp_path_factory.mktemp("order"), preprocessor_config=small | image)
        if video is not None:
            checkpoint(folder, video_preprocessor_config=small | video)
        nested = {"image_processor": nested_image, "video_processor": nested_video}
        whole = {key: small | value for key, value in nested.items() if value is not None}
        checkpoint(folder, processor_config=whole)
        found = Qwen2_5_VLImageSettings.from_hf(folder)
        _, theirs_image, theirs_video = transformers_processors()
        for ours, theirs in ((found.image, theirs_image), (found.video, theirs_video)):
            size = theirs.from_pretrained(folder).size
            assert (ours.min_pixels, ours.max_pixels) == (size["shortest_edge"], size["longest_edge"])

    @pytest.mark.parametrize("name", [IMAGE, VIDEO, BOTH])
    def test_a_link_whose_file_is_gone_does_not_mean_the_defaults(self, name: str, tmp_path: Path) -> None:
        checkpoint(tmp_path)
        (tmp_path / name).symlink_to("../blobs/0123")
        with pytest.raises(FileNotFoundError, match=rf"{name} is not a file: it is a symbolic link to \.\./blobs/0123"):
            Qwen2_5_VLImageSettings.from_hf(tmp_path)

    def test_a_folder_that_is_no_checkpoint_is_refused(self, tmp_path: Path) -> None:
        for read in (Qwen2_5_VLImageSettings.from_hf, Llama4ImageSettings.from_hf):
            with pytest.raises(FileNotFoundError, match=r"holds neither config\.json nor preprocessor_config\.json: "):
                read(tmp_path)
            with pytest.raises(FileNotFoundError, match=r"hf download Qwen/Qwen2\.5-VL-7B-Instruct --local-dir FOLDER"):
                read("Qwen/Qwen2.5-VL-7B-Instruct")
            with pytest.raises(TypeError, match="processor must be a configuration object or a mapping, got int"):
                read(3)  # type: ignore[arg-type]


class TestWhatIsFollowed:
    means = st.tuples(*[st.floats(0, 1, width=32)] * 3).map(list)
    deviations = st.tuples(*[st.floats(0.125, 1, width=32)] * 3).map(list)

    @given(
        size=st.tuples(st.integers(10, 200), st.integers(10, 200)),
        mean=means,
        std=deviations,
        rescale=st.sampled_from([1 / 255, 1 / 127.5, 0.01]),
        frames=st.integers(0, 3),
    )
    def test_patches_are_those_of_transformers(
        self, size: tuple[int, int], mean: list[float], std: list[float], rescale: float, frames: int
    ) -> None:
        _, image_processor, video_processor = transformers_processors()
        bounds = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 20}
        given = {"size": bounds, "image_mean": mean, "image_std": std, "rescale_factor": rescale}
        video = [pixels(*size, seed) for seed in range(max(frames, 1))]
        tensors = [torch.from_numpy(frame).permute(2, 0, 1) for frame in video]
        if frames:
            theirs = video_processor(**given)
            expected = theirs(videos=[torch.stack(tensors)], return_tensors="pt", cap_pixels_per_frame=False)
        else:
            theirs = image_processor(**given)
            expected = theirs(tensors[0], return_tensors="pt")
        source = {"video_processor" if frames else "image_processor": theirs}
        ours = patch_image(video if frames else video[0], QWEN, settings=Qwen2_5_VLImageSettings.from_hf(source))
        kind = "video" if frames else "image"
        assert torch.equal(ours.grid_thw, expected[f"{kind}_grid_thw"])
        assert torch.equal(ours.pixel_values, expected["pixel_values" + "_videos" * bool(frames)])

    @given(
        height=st.integers(1, 2**31),
        width=st.integers(1, 2**31),
        max_tiles=st.integers(1, 40),
    )
    @example(height=15, width=20, max_tiles=16)
    def test_the_largest_canvas_is_that_of_transformers(self, height: int, width: int, max_tiles: int) -> None:
        transformers_processors()
        from transformers.image_utils import SizeDict
        from transformers.models.llama4 import image_processing_llama4 as theirs

        resolutions = torch.tensor(theirs.find_supported_resolutions(max_tiles, SizeDict(height=336, width=336)))
        expected = theirs.get_best_fit((height, width), resolutions, resize_to_max_canvas=True) // 336
        ours = best_canvas(height, width, max_tiles=max_tiles, resize_to_max_canvas=True)
        assert list(ours) == expected.tolist()

    @given(
        size=st.tuples(st.integers(1, 120), st.integers(1, 120)),
        max_tiles=st.integers(1, 16),
        to_max=st.booleans(),
        mean=means,
        std=deviations,
        seed=st.integers(0, 2**32 - 1),
    )
    @settings(max_examples=2 * settings().max_examples)
    @example(size=(20, 50), max_tiles=9, to_max=True, mean=[0.5] * 3, std=[0.5] * 3, seed=0)
    # One pixel narrower, and one wider, than with a scale in float64.
    @example(size=(3, 27), max_tiles=16, to_max=True, mean=[0.5] * 3, std=[0.5] * 3, seed=0)
    @example(size=(5, 45), max_tiles=16, to_max=True, mean=[0.5] * 3, std=[0.5] * 3, seed=0)
    def test_tiles_are_those_of_transformers(
        self,
        size: tuple[int, int],
        max_tiles: int,
        to_max: bool,
        mean: list[float],
        std: list[float],
        seed: int,
    ) -> None:
        llama4, _, _ = transformers_processors()
        theirs = llama4(
            size={"height": 28, "width": 28},
            max_patches=max_tiles,
            resize_to_max_canvas=to_max,
            image_mean=mean,
            image_std=std,
        )
        # Of floats, since transformers normalises 8 bits in bfloat16.
        image = torch.from_numpy(np.random.default_rng(seed).random((3, *size), dtype=np.float32))
        expected = theirs(image, do_rescale=False, return_tensors="pt")
        ours = tile_image(image, settings=Llama4ImageSettings.from_hf(theirs))
        assert ours.aspect_ratio == tuple(expected["aspect_ratios"][0].tolist())
        assert torch.equal(ours.pixel_values, expected["pixel_values"])

    @given(mean=means, std=deviations, rescale=st.sampled_from([1 / 255, 1 / 127.5, 0.01]))
    def test_8_bits_are_normalised_in_float32(self, mean: Any, std: Any, rescale: float) -> None:
        levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
        settings = Llama4ImageSettings(image_size=16, image_mean=mean, image_std=std, rescale_factor=rescale)
        exact = (np.arange(256.0).reshape(1, 16, 16) * rescale - np.reshape(mean, (3, 1, 1))) / np.reshape(
            std, (3, 1, 1)
        )
        # The mean in levels and the deviation in levels are rounded, then the difference and the quotient: one eps is
        # half an ulp twice, of terms that may cancel.
        bound = 2 * torch.finfo(torch.float32).eps * (255 * rescale + 1) / min(std)
        for image in (levels, levels / np.float32(255)):
            ours = tile_image(image, settings=settings).pixel_values[0].double().numpy()
            assert np.abs(ours - exact).max() <= bound

    def test_arguments_win_over_the_settings(self) -> None:
        image, settings = pixels(56, 112), Llama4ImageSettings(image_size=28, max_tiles=2)
        assert tile_image(image, settings=settings).aspect_ratio == (1, 2)
        assert tile_image(image, settings=settings, max_tiles=8).aspect_ratio == (2, 4)
        assert tile_image(image, settings=settings, image_size=112).aspect_ratio == (1, 1)
        bounds = Qwen2_5_VLImageSettings(image=PatchSettings(min_pixels=28**2, max_pixels=28**2 * 2))
        assert patch_image(image, QWEN, settings=bounds).grid_thw.tolist() == [[1, 2, 4]]
        assert patch_image(image, QWEN, settings=bounds, max_pixels=10**6).grid_thw.tolist() == [[1, 4, 8]]

    @pytest.mark.parametrize("kind", ["tuple", "list", "array", "tensor"])
    def test_frames_take_the_bounds_of_videos(self, kind: str) -> None:
        frames = np.zeros((2, 720, 1280, 3), np.uint8)
        video: Any = {
            "tuple": tuple(frames),
            "list": list(frames),
            "array": frames,
            "tensor": torch.from_numpy(frames).permute(0, 3, 1, 2),
        }[kind]
        assert patch_image(video, QWEN).grid_thw.tolist() == [[1, 40, 72]]
        published = Qwen2_5_VLImageSettings.from_hf(PUBLISHED_QWEN)
        assert patch_image(video, QWEN, settings=published).grid_thw.tolist() == [[1, 52, 92]]

    def test_no_frames_and_frames_of_another_form_are_named(self) -> None:
        with pytest.raises(ValueError, match="image: got no frames"):
            patch_image(np.zeros((0, 30, 30, 3), np.uint8), QWEN)
        with pytest.raises(ValueError, match=r"got a uint8 array of shape \(3, 30, 30\)"):
            patch_image(np.zeros((2, 3, 30, 30), np.uint8), QWEN)

    def test_numpy_s_numbers_are_numbers(self) -> None:
        numbers: Any = {
            "image_size": np.int64(28),
            "max_tiles": np.int32(4),
            "image_mean": np.full(3, 0.25, np.float32),
        }
        settings = Llama4ImageSettings(**numbers, rescale_factor=np.float32(0.5))  # type: ignore[arg-type]
        assert settings == Llama4ImageSettings(image_size=28, max_tiles=4, image_mean=(0.25,) * 3, rescale_factor=0.5)
        assert type(settings.image_size) is int
        assert patch_image(pixels(60, 60), QWEN, max_pixels=np.int64(3136)).grid_thw.tolist() == [[1, 4, 4]]  # type: ignore[arg-type]


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"resample": 0}, "resample: got 0, expected "),
            ({"resample": "lanczos"}, "resample: got 'lanczos', expected "),
            ({"resample": None}, "resample: got None, expected "),
            ({"do_resize": False}, "do_resize: got False, expected True"),
            ({"do_rescale": None}, "do_rescale: got None, expected True"),
            ({"image_mean": None}, "image_mean: expected three numbers, got None"),
            ({"rescale_factor": None}, "rescale_factor: expected a positive finite number, got None"),
            ({"do_rescale": False}, "do_rescale: got False, expected True"),
            ({"do_normalize": False}, "do_normalize: got False, expected True"),
            ({"do_center_crop": True}, "do_center_crop: got True, expected False"),
            ({"do_pad": True}, "do_pad: got True, expected False"),
            ({"image_processor_type": "MllamaImageProcessor"}, "image_processor_type: got 'MllamaImageProcessor', "),
            ({"image_mean": 0.5}, "image_mean: expected three numbers, got 0.5"),
            ({"image_mean": [0.5]}, r"image_mean: expected three numbers, got \[0.5\]"),
            ({"image_mean": ["0", 0, 0]}, "image_mean: expected a finite number, got '0'"),
            ({"image_std": [0.5, 0, 0.5]}, "image_std: expected a positive finite number, got 0"),
            ({"image_std": [0.5, float("nan"), 0.5]}, "image_std: expected a positive finite number, got nan"),
            ({"rescale_factor": 0}, "rescale_factor: expected a positive finite number, got 0"),
            ({"size": "large"}, "size: "),
            ({"size": {"shortest_edge": 336}}, "size: got {'shortest_edge': 336}, expected "),
        ],
    )
    @pytest.mark.parametrize("read", [Llama4ImageSettings.from_hf, Qwen2_5_VLImageSettings.from_hf])
    def test_by_both(self, read: Callable[[Any], Any], changes: Any, says: str, tmp_path: Path) -> None:
        checkpoint(tmp_path, preprocessor_config=changes)
        with pytest.raises((TypeError, ValueError), match=says) as caught:
            read(tmp_path)
        assert "size: " in str(caught.value) or str(tmp_path / IMAGE) in str(caught.value)

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"max_patches": 0}, "max_tiles: expected an int of at least 1, got 0"),
            ({"max_patches": 2.0}, "max_tiles: expected an int, got 2.0"),
            ({"max_patches": 1025}, "max_tiles: expected at most 1024, got 1025"),
            ({"resize_to_max_canvas": "yes"}, "resize_to_max_canvas: expected a bool, got 'yes'"),
            (
                {"size": {"height": 336, "width": 224}},
                r"size must be one number or the same one twice, got \[336, 224\]",
            ),
            ({"image_processor_type": "Qwen2VLImageProcessor"}, "expected 'Llama4ImageProcessor' or "),
        ],
    )
    def test_by_llama_4(self, changes: Any, says: str, tmp_path: Path) -> None:
        with pytest.raises((TypeError, ValueError), match=rf"preprocessor_config\.json: .*{says}"):
            Llama4ImageSettings.from_hf(checkpoint(tmp_path, preprocessor_config=changes))

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"min_pixels": 0}, "min_pixels: expected an int of at least 1, got 0"),
            ({"max_pixels": "many"}, "max_pixels: expected an int, got 'many'"),
            ({"size": {"height": 336, "width": 336}}, "size: got .*, expected shortest_edge and longest_edge"),
            ({"cap_pixels_per_frame": True}, "cap_pixels_per_frame: got True, expected False"),
            ({"video_processor_type": "Qwen3VLVideoProcessor"}, "video_processor_type: got 'Qwen3VLVideoProcessor'"),
        ],
    )
    def test_by_qwen2_5_vl(self, changes: Any, says: str, tmp_path: Path) -> None:
        folder = checkpoint(tmp_path, preprocessor_config=PUBLISHED_QWEN, video_preprocessor_config=changes)
        with pytest.raises((TypeError, ValueError), match=rf"video_preprocessor_config\.json: .*{says}"):
            Qwen2_5_VLImageSettings.from_hf(folder)

    @pytest.mark.parametrize("name", ["patch_size", "temporal_patch_size", "merge_size"])
    def test_patches_of_another_size_than_the_encoder_s(self, name: str) -> None:
        settings = Qwen2_5_VLImageSettings.from_hf(PUBLISHED_QWEN | {name: 4})
        with pytest.raises(ValueError, match=rf"settings: got \w*{name} 4, expected the encoder's, "):
            patch_image(pixels(30, 30), QWEN, settings=settings)

    def test_crossed_bounds(self) -> None:
        # Of images: those of videos may be crossed by a file that means images.
        settings = Qwen2_5_VLImageSettings.from_hf({"max_pixels": 6272})
        assert patch_image(pixels(300, 300), QWEN, settings=settings).grid_thw.tolist() == [[1, 4, 4]]
        with pytest.raises(ValueError, match="min_pixels: expected at most max_pixels = 6272, got 100352"):
            patch_image([pixels(300, 300)], QWEN, settings=settings)

    def test_settings_of_the_other_encoder(self) -> None:
        with pytest.raises(
            TypeError, match="settings: got Qwen2_5_VLImageSettings, expected Llama4ImageSettings or None"
        ):
            tile_image(pixels(30, 30), settings=Qwen2_5_VLImageSettings())  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="settings: got Llama4ImageSettings, expected Qwen2_5_VLImageSettings or"):
            patch_image(pixels(30, 30), QWEN, settings=Llama4ImageSettings())  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="video: got dict, expected PatchSettings"):
            Qwen2_5_VLImageSettings(video={})  # type: ignore[arg-type]


class TestModels:
    @pytest.fixture
    def llama4(self, tmp_path: Path) -> Path:
        model = initialise_(Llama4VisionModel(LLAMA4))
        tensors = to_hf_tensors(dict(model.named_parameters()), vision_tensors(LLAMA4))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        return checkpoint(tmp_path, config=dataclasses.asdict(LLAMA4))

    @pytest.fixture
    def qwen(self, tmp_path: Path) -> Path:
        model = initialise_(Qwen2_5_VLVisionModel(QWEN))
        tensors = to_hf_tensors(dict(model.named_parameters()), qwen_checkpoint.vision_tensors(QWEN))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        return checkpoint(tmp_path, config={"vision_config": dataclasses.asdict(QWEN)})

    @torch.no_grad()
    def test_llama_4_prepares_images_as_its_checkpoint_says(self, llama4: Path) -> None:
        image = pixels(224, 224)
        (features,) = encode_images(Llama4VisionModel.from_pretrained(llama4), [image])
        assert len(features) == 5 * LLAMA4.output_tokens_per_tile
        said = {"max_patches": 3, "size": {"height": 112, "width": 112}, "image_mean": [0.1, 0.2, 0.3]}
        checkpoint(llama4, preprocessor_config=said)
        model = Llama4VisionModel.from_pretrained(llama4)
        (features,) = encode_images(model, [image])
        expected = Llama4ImageSettings(image_size=112, max_tiles=3, image_mean=(0.1, 0.2, 0.3))
        assert model.image_settings == expected
        assert torch.equal(features, model(tile_image(image, settings=expected).pixel_values).flatten(0, 1))
        (whole,) = encode_images(model, [image], settings=Llama4ImageSettings(image_size=112))
        assert len(whole) == 5 * LLAMA4.output_tokens_per_tile
        with pytest.raises(
            ValueError, match=r"settings: got image_size 336, expected 112 as model\.config\.image_size"
        ):
            encode_images(model, [image], settings=Llama4ImageSettings())

    def test_a_setting_that_cannot_be_followed_can_be_replaced(self, llama4: Path) -> None:
        checkpoint(llama4, preprocessor_config={"do_pad": True})
        with pytest.raises(ValueError, match="do_pad: got True, expected False"):
            Llama4VisionModel.from_pretrained(llama4)
        own = Llama4ImageSettings(image_size=112)
        assert Llama4VisionModel.from_pretrained(llama4, image_settings=own).image_settings is own

    @torch.no_grad()
    def test_qwen2_5_vl_prepares_images_and_videos_as_its_checkpoint_says(self, qwen: Path) -> None:
        inputs: list[Any] = [pixels(70, 100), [pixels(60, 60), pixels(60, 60, 1)]]
        checkpoint(
            qwen,
            preprocessor_config={"max_pixels": 28 * 28 * 4},
            video_preprocessor_config={"min_pixels": 28 * 28 * 9, "max_pixels": 28 * 28 * 9, "image_mean": [0.1, 0, 0]},
        )
        model = Qwen2_5_VLVisionModel.from_pretrained(qwen)
        features = encode_qwen_images(model, inputs)
        assert [tuple(each.shape) for each in features] == [(2, QWEN.out_hidden_size), (9, QWEN.out_hidden_size)]
        patched = [patch_image(image, QWEN, settings=model.image_settings) for image in inputs]
        for each, image in zip(features, patched, strict=True):
            torch.testing.assert_close(each, model(image.pixel_values, image.grid_thw))
            torch.testing.assert_close(each, encode_qwen_images(model, [image])[0])
        larger = Qwen2_5_VLImageSettings(image=PatchSettings(min_pixels=28 * 28 * 16))
        assert len(encode_qwen_images(model, inputs[:1], settings=larger)[0]) == 20

    def test_each_encoder_has_its_own_way_in(self) -> None:
        model = Qwen2_5_VLVisionModel(QWEN)
        with pytest.raises(TypeError, match=r"got Qwen2_5_VLVisionModel; Qwen2\.5-VL has vit_encoder\.qwen2_5_vl\.enc"):
            encode_images(model, [pixels(30, 30)])
        others: list[Any] = [None, nn.Linear(2, 2), initialise_(Llama4VisionModel(LLAMA4))]
        for other in others:
            with pytest.raises(TypeError, match="model: expected a Qwen2_5_VLVisionModel, got "):
                encode_qwen_images(other, [pixels(30, 30)])
        with pytest.raises(ValueError, match=r"images\[1\]: image: expected an aspect ratio"):
            encode_qwen_images(model, [pixels(30, 30), pixels(1, 201)])
        with pytest.raises(TypeError, match="images: expected a sequence of images, got one ndarray"):
            encode_qwen_images(model, pixels(30, 30))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_pytorch_takes_by_default_changes_no_image(dtype: torch.dtype) -> None:
    images: list[Any] = [pixels(60, 90), pixels(60, 90) / 255, pixels(60, 90).astype(np.uint16) * 257]
    images.append(np.dstack([pixels(60, 90), pixels(60, 90)[..., :1]]))
    tiles = [tile_image(image, image_size=28).pixel_values for image in images]
    patches = [patch_image(image, QWEN) for image in images]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            for image, tile, patch in zip(images, tiles, patches, strict=True):
                again, patched = tile_image(image, image_size=28).pixel_values, patch_image(image, QWEN)
                for result in (again, patched.pixel_values, patched.grid_thw):
                    assert result.device.type == "cpu"
                torch.testing.assert_close(again, tile, rtol=0, atol=0)
                torch.testing.assert_close(patched.pixel_values, patch.pixel_values, rtol=0, atol=0)
                assert torch.equal(patched.grid_thw, patch.grid_thw)
    finally:
        torch.set_default_dtype(before)
