"""tile_image against transformers' image processor, its own promises, and input that must be refused."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from vit_encoder.llama4.images import ImageInput, TiledImage, best_canvas, tile_image

from experiments.common.peers import allow_torchvision_beside_cpu_torch


@pytest.fixture(scope="module")
def processors() -> Callable[[int, int], Any]:
    """Builds transformers' image processor for a tile size and a tile count."""
    allow_torchvision_beside_cpu_torch()
    allow_torchvision_beside_cpu_torch()
    from transformers import Llama4ImageProcessor

    def processor(image_size: int, max_tiles: int) -> Any:
        size = {"height": image_size, "width": image_size}
        return Llama4ImageProcessor(size=size, max_patches=max_tiles, resize_to_max_canvas=False)

    return processor


@pytest.fixture(scope="module")
def transformers_canvas() -> Callable[[int, int, int, int], tuple[int, int]]:
    """The canvas that transformers chooses, in tiles."""
    allow_torchvision_beside_cpu_torch()
    from transformers.image_utils import SizeDict
    from transformers.models.llama4 import image_processing_llama4

    def canvas(height: int, width: int, image_size: int, max_tiles: int) -> tuple[int, int]:
        size = SizeDict(height=image_size, width=image_size)
        resolutions = torch.tensor(image_processing_llama4.find_supported_resolutions(max_tiles, size))
        high, wide = (image_processing_llama4.get_best_fit((height, width), resolutions) // image_size).tolist()
        return high, wide

    return canvas


# Without AVX2, torchvision resizes uint8 images in float32 and rounds once instead of twice.
RESIZE_ROUNDING = 1 if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else 0


def levels(pixel_values: Tensor) -> Tensor:
    """The uint8 pixels that were normalised."""
    return ((pixel_values.double() * 0.5 + 0.5) * 255).round().to(torch.uint8)


def in_transformers_precision(processor: Any, pixels: Tensor) -> Tensor:
    """uint8 pixels, normalised in bf16 as transformers does it."""
    return processor.rescale_and_normalize(pixels, True, 1 / 255, True, [0.5] * 3, [0.5] * 3)


def assert_matches(processor: Any, image: Any, reference: Any = None, *, off_by: int = RESIZE_ROUNDING) -> None:
    """The same canvas, and before the normalisation every pixel within `off_by` levels of transformers'.

    transformers' bf16 values are one to one with the 256 levels (a test of its own), so they can be read back exactly.
    """
    expected = processor(image if reference is None else reference, return_tensors="pt")
    ours = tile_image(image, image_size=processor.size["height"], max_tiles=processor.max_patches)
    assert ours.aspect_ratio == tuple(expected["aspect_ratios"][0].tolist())
    table = in_transformers_precision(processor, torch.arange(256, dtype=torch.uint8).expand(3, 1, 256))[0, 0]
    theirs = torch.searchsorted(table, expected["pixel_values"])
    assert theirs.shape == ours.pixel_values.shape
    assert (levels(ours.pixel_values).long() - theirs).abs().max() <= off_by


def random_pixels(height: int, width: int, *channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)


seeds = st.integers(0, 2**32 - 1)


@st.composite
def image_sizes(draw: st.DrawFn, image_size: int, most: int) -> int:
    """A side of an image: anything, one pixel, or next to a multiple of the tile's side."""
    near_multiple = st.builds(lambda n, d: max(1, n * image_size + d), st.integers(1, 17), st.integers(-1, 1))
    return draw(st.one_of(st.just(1), near_multiple, st.integers(1, most)))


class TestCanvas:
    def test_equals_transformers_on_a_grid(
        self, transformers_canvas: Callable[[int, int, int, int], tuple[int, int]]
    ) -> None:
        around_multiples = {336 * n + d for n in range(1, 18) for d in (-1, 0, 1)}
        sides = sorted(around_multiples | set(range(1, 6000, 149)) | {1, 2, 3, 20, 3000})
        wrong = [
            size
            for size in itertools.product(sides, sides)
            if best_canvas(*size) != transformers_canvas(*size, 336, 16)
        ]
        assert wrong == []

    @given(data=st.data(), image_size=st.integers(1, 500), max_tiles=st.integers(1, 40))
    def test_equals_transformers_on_any_size(
        self,
        transformers_canvas: Callable[[int, int, int, int], tuple[int, int]],
        data: st.DataObject,
        image_size: int,
        max_tiles: int,
    ) -> None:
        height, width = (data.draw(image_sizes(image_size, 2**31)) for _ in range(2))
        canvas = best_canvas(height, width, image_size=image_size, max_tiles=max_tiles)
        assert canvas == transformers_canvas(height, width, image_size, max_tiles)

    @given(
        scale=st.integers(2**20, 2**29),
        ratio=st.tuples(st.integers(1, 16), st.integers(1, 16)),
        nudge=st.tuples(st.integers(-2, 2), st.integers(-2, 2)),
    )
    @settings(max_examples=200)
    @example(scale=2**24 + 1, ratio=(1, 1), nudge=(0, 1))
    def test_equals_transformers_where_float32_decides(
        self,
        transformers_canvas: Callable[[int, int, int, int], tuple[int, int]],
        scale: int,
        ratio: tuple[int, int],
        nudge: tuple[int, int],
    ) -> None:
        height, width = (scale * part + off for part, off in zip(ratio, nudge, strict=True))
        assert best_canvas(height, width) == transformers_canvas(height, width, 336, 16)

    def test_every_canvas_fits_its_own_size(self) -> None:
        canvases = [(high, wide) for high in range(1, 17) for wide in range(1, 17) if high * wide <= 16]
        assert len(canvases) == 50
        assert [best_canvas(336 * high, 336 * wide) for high, wide in canvases] == canvases

    @pytest.mark.parametrize("name", ["height", "width", "image_size", "max_tiles"])
    @pytest.mark.parametrize(
        ("value", "error"), [(0, ValueError), (-3, ValueError), (1.5, TypeError), (True, TypeError)]
    )
    def test_refuses_what_is_not_a_positive_int(self, name: str, value: Any, error: type[Exception]) -> None:
        sizes = {"height": 10, "width": 10, "image_size": 14, "max_tiles": 4}
        with pytest.raises(error, match=f"{name}: expected an int.*{value}"):
            best_canvas(**(sizes | {name: value}))


class TestPixels:
    def test_bf16_normalisation_is_one_to_one(self, processors: Callable[[int, int], Any]) -> None:
        levels_of_a_channel = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
        normalised = in_transformers_precision(processors(14, 4), levels_of_a_channel)[0, 0]
        assert (normalised.diff() > 0).all()

    @given(data=st.data(), image_size=st.sampled_from([7, 14, 28]), max_tiles=st.integers(1, 16), seed=seeds)
    @settings(max_examples=150)
    def test_equal_transformers_on_any_size(
        self,
        processors: Callable[[int, int], Any],
        data: st.DataObject,
        image_size: int,
        max_tiles: int,
        seed: int,
    ) -> None:
        height, width = (data.draw(image_sizes(image_size, 25 * image_size)) for _ in range(2))
        image = Image.fromarray(random_pixels(height, width, 3, seed=seed))
        assert_matches(processors(image_size, max_tiles), image)

    @pytest.mark.parametrize(
        "size",
        [
            (1, 1),
            (1, 5000),
            (5000, 1),
            (3000, 20),
            (20, 3000),
            (336, 336),
            (335, 337),
            (672, 1344),
            (1345, 1344),
            (999, 1333),
            (200, 2),
            (2100, 1100),
            (336, 5377),
            (15, 20),  # one pixel narrower if the scale were float32,
            (650, 3900),  # and one pixel higher if this one were float64
        ],
    )
    def test_equal_transformers_at_full_size(
        self, processors: Callable[[int, int], Any], size: tuple[int, int]
    ) -> None:
        assert_matches(processors(336, 16), Image.fromarray(random_pixels(*size, 3)))

    @given(size=st.tuples(st.integers(1, 120), st.integers(1, 120)), seed=seeds)
    def test_of_floats_equal_transformers_without_rescale(
        self, processors: Callable[[int, int], Any], size: tuple[int, int], seed: int
    ) -> None:
        image = torch.from_numpy(np.random.default_rng(seed).random((3, *size), dtype=np.float32))
        expected = processors(14, 16)(image, do_rescale=False, return_tensors="pt")
        ours = tile_image(image, image_size=14)
        assert ours.aspect_ratio == tuple(expected["aspect_ratios"][0].tolist())
        assert torch.equal(ours.pixel_values, expected["pixel_values"])

    def test_are_normalised_in_fp32(self) -> None:
        every_level = np.arange(256, dtype=np.uint8).reshape(16, 16)
        ours = tile_image(every_level, image_size=16).pixel_values
        exact = torch.arange(256, dtype=torch.float64).reshape(16, 16) / 127.5 - 1
        assert ours.dtype == torch.float32
        assert (ours - exact).abs().max() <= torch.finfo(torch.float32).eps
        assert (ours.min(), ours.max()) == (-1, 1)

    @given(size=st.tuples(st.integers(1, 400), st.integers(1, 400)), max_tiles=st.integers(1, 20))
    def test_shape_and_padding(self, size: tuple[int, int], max_tiles: int) -> None:
        tiled = tile_image(np.full(size, 255, np.uint8), image_size=14, max_tiles=max_tiles)
        (high, wide), tiles = tiled.aspect_ratio, len(tiled.pixel_values)
        assert tiled.pixel_values.shape == (tiles, 3, 14, 14)
        assert high * wide <= max_tiles
        assert tiles == high * wide + (high * wide > 1)
        grid = tiled.pixel_values[: high * wide].unflatten(0, (high, wide))
        canvas = grid.permute(2, 0, 3, 1, 4).reshape(3, 14 * high, 14 * wide)
        rows, columns = (canvas[0, :, 0] == 1).sum(), (canvas[0, 0] == 1).sum()
        assert rows == min(max(size[0], 14), 14 * high) or columns == min(max(size[1], 14), 14 * wide)
        assert (canvas[:, :rows, :columns] == 1).all()
        assert (canvas[:, rows:] == -1).all()
        assert (canvas[:, :, columns:] == -1).all()

    def test_tiles_are_row_major_with_the_global_tile_last(self) -> None:
        blocks = np.arange(6, dtype=np.uint8).reshape(2, 3).repeat(14, 0).repeat(14, 1)
        tiled = tile_image(blocks, image_size=14)
        assert tiled.aspect_ratio == (2, 3)
        assert [tile.unique().tolist() for tile in levels(tiled.pixel_values[:-1])] == [[n] for n in range(6)]
        corners = levels(tiled.pixel_values[-1])[0][[0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.tolist() == [0, 2, 3, 5]

    def test_one_tile_has_no_global_tile(self) -> None:
        assert tile_image(random_pixels(14, 14), image_size=14).pixel_values.shape == (1, 3, 14, 14)


# Modes that transformers reads as it should. The four others have tests of their own.
MODES = ["1", "L", "P", "PA", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I"]


def pil_image(mode: str, height: int, width: int, seed: int = 0) -> Image.Image:
    if mode in ("P", "PA"):
        indexed = Image.fromarray(random_pixels(height, width, 3, seed=seed)).quantize(16)
        return indexed if mode == "P" else indexed.convert("PA")
    if mode in ("1", "I"):
        return Image.fromarray(random_pixels(height, width, seed=seed)).convert(mode)
    channels = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, (width, height), random_pixels(height, width, channels, seed=seed).tobytes())


class TestKinds:
    @pytest.mark.parametrize("mode", MODES)
    @given(size=st.tuples(st.integers(1, 90), st.integers(1, 90)), seed=seeds)
    def test_pil_modes_equal_transformers(
        self, processors: Callable[[int, int], Any], mode: str, size: tuple[int, int], seed: int
    ) -> None:
        assert_matches(processors(14, 9), pil_image(mode, *size, seed))

    @pytest.mark.parametrize(
        ("mode", "transparency"),
        [("1", 0), ("L", 7), ("RGB", (1, 2, 3)), ("P", 3), ("P", bytes(range(0, 256, 16)))],
    )
    def test_a_transparent_colour_equals_transformers(
        self, processors: Callable[[int, int], Any], mode: str, transparency: Any
    ) -> None:
        image = pil_image(mode, 40, 60)
        if mode == "RGB":
            image.paste((1, 2, 3), (5, 5, 30, 30))
        stored = io.BytesIO()
        image.save(stored, "PNG", transparency=transparency)
        transparent, opaque = Image.open(stored), tile_image(image, image_size=14).pixel_values
        assert_matches(processors(14, 9), transparent)
        assert not torch.equal(tile_image(transparent, image_size=14).pixel_values, opaque)

    @pytest.mark.parametrize(("premultiplied", "straight"), [("RGBa", "RGBA"), ("La", "LA")])
    def test_premultiplied_alpha_is_undone(self, premultiplied: str, straight: str) -> None:
        image = pil_image(straight, 30, 40).convert(premultiplied)
        ours, expected = (tile_image(i, image_size=14).pixel_values for i in (image, image.convert(straight)))
        assert torch.equal(ours, expected)

    def test_mode_f_is_0_to_255(self, processors: Callable[[int, int], Any]) -> None:
        # transformers truncates to uint8 before it resizes, and its resize rounds.
        image = Image.fromarray(random_pixels(50, 70).astype(np.float32))
        assert image.mode == "F"
        assert_matches(processors(14, 9), image, off_by=1)

    @pytest.mark.parametrize("mode", ["I", "F"])
    @pytest.mark.parametrize("value", [-1, 256])
    def test_modes_i_and_f_out_of_range_are_refused(self, mode: str, value: int) -> None:
        image = Image.new(mode, (4, 3), value)
        with pytest.raises(ValueError, match=f"from 0 to 255, got a PIL image of mode {mode} with values from {value}"):
            tile_image(image)

    def test_a_lab_image_has_no_alpha(self) -> None:
        # transformers takes LAB's A for alpha.
        image = pil_image("LAB", 20, 30)
        assert torch.equal(tile_image(image).pixel_values, tile_image(image.convert("RGB")).pixel_values)

    @given(size=st.tuples(st.integers(1, 60), st.integers(1, 60)), seed=seeds)
    def test_sixteen_bits_are_scaled_not_clipped(self, size: tuple[int, int], seed: int) -> None:
        grey = np.random.default_rng(seed).integers(0, 65536, size, dtype=np.uint16)
        expected = tile_image(grey / np.float32(65535), image_size=14).pixel_values
        pgm = b"P5 %d %d 65535\n" % size[::-1] + grey.astype(">u2").tobytes()
        png = io.BytesIO()
        Image.fromarray(grey).save(png, "PNG")
        same_pixels: list[ImageInput] = [
            grey,
            grey.astype(">u2"),
            torch.from_numpy(grey),
            Image.fromarray(grey),
            Image.frombytes("I;16B", size[::-1], grey.astype(">u2").tobytes()),
            Image.open(io.BytesIO(pgm)),
            Image.open(png),
        ]
        for image in same_pixels:
            assert torch.equal(tile_image(image, image_size=14).pixel_values, expected)

    def test_sixteen_bits_agree_with_eight(self) -> None:
        grey = random_pixels(50, 70)
        eight, sixteen = (tile_image(image, image_size=14).pixel_values for image in (grey, grey * np.uint16(257)))
        # The resize of eight bits rounds its two passes to whole levels.
        assert (eight - sixteen).abs().max() <= 1.01 / 127.5

    def test_the_transparent_level_of_a_16_bit_png_is_white(self) -> None:
        grey = np.array([[0, 1000], [1000, 65535]], np.uint16)
        stored = io.BytesIO()
        Image.fromarray(grey).save(stored, "PNG", transparency=1000)
        expected = tile_image(np.array([[0, 65535], [65535, 65535]], np.uint16), image_size=14)
        assert torch.equal(tile_image(Image.open(stored), image_size=14).pixel_values, expected.pixel_values)

    @given(size=st.tuples(st.integers(1, 60), st.integers(1, 60)), seed=seeds)
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_every_way_in_gives_the_same_pixels(self, tmp_path: Path, size: tuple[int, int], seed: int) -> None:
        pixels = random_pixels(*size, 3, seed=seed)
        path = tmp_path / "image.png"
        Image.fromarray(pixels).save(path)
        read_only = pixels.copy()
        read_only.flags.writeable = False
        expected = tile_image(Image.fromarray(pixels), image_size=14)
        same_image: list[ImageInput] = [
            path,
            str(path),
            pixels,
            read_only,
            np.asfortranarray(pixels),
            pixels[::-1, ::-1].copy()[::-1, ::-1],
            torch.from_numpy(pixels).permute(2, 0, 1),
            torch.from_numpy(pixels).permute(2, 0, 1).contiguous(),
        ]
        for image in same_image:
            tiled = tile_image(image, image_size=14)
            assert tiled.aspect_ratio == expected.aspect_ratio
            assert torch.equal(tiled.pixel_values, expected.pixel_values)

    def test_grey_arrays_are_repeated_over_the_channels(self) -> None:
        grey = random_pixels(20, 30)
        expected = tile_image(np.stack([grey] * 3, axis=-1)).pixel_values
        tensor = torch.from_numpy(grey)
        for image in (grey, grey[..., None], tensor, tensor[None], Image.fromarray(grey)):
            assert torch.equal(tile_image(image).pixel_values, expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_float_dtypes_are_read_in_float32(self, dtype: torch.dtype) -> None:
        image = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = tile_image(image.float(), image_size=14).pixel_values
        assert torch.equal(tile_image(image, image_size=14).pixel_values, expected)
        if dtype is not torch.bfloat16:
            assert torch.equal(tile_image(image.permute(1, 2, 0).numpy(), image_size=14).pixel_values, expected)

    def test_alpha_in_arrays_is_blended_as_pil_blends_it(self) -> None:
        value, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
        every_pair = np.stack([value, value[:, ::-1], 255 - value, alpha], axis=-1)
        expected = tile_image(Image.fromarray(every_pair), image_size=256).pixel_values
        assert torch.equal(tile_image(every_pair, image_size=256).pixel_values, expected)
        as_floats = tile_image(every_pair / 255, image_size=256).pixel_values
        assert (as_floats - expected).abs().max() <= 0.5001 / 127.5

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_is_applied(
        self, processors: Callable[[int, int], Any], tmp_path: Path, orientation: int
    ) -> None:
        from transformers.image_utils import load_image

        upright = {
            1: lambda a: a,
            2: np.fliplr,
            3: lambda a: np.rot90(a, 2),
            4: np.flipud,
            5: lambda a: a.swapaxes(0, 1),
            6: lambda a: np.rot90(a, -1),
            7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
            8: lambda a: np.rot90(a, 1),
        }
        stored, path = random_pixels(30, 50, 3), tmp_path / "photo.png"
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(stored).save(path, exif=exif)
        expected = tile_image(upright[orientation](stored), image_size=14)
        with Image.open(path) as opened:
            ours = [tile_image(path, image_size=14), tile_image(opened, image_size=14)]
            assert opened.size == (50, 30)
        for tiled in ours:
            assert tiled.aspect_ratio == expected.aspect_ratio
            assert torch.equal(tiled.pixel_values, expected.pixel_values)
        assert_matches(processors(14, 9), path, load_image(str(path)))

    def test_the_input_is_left_alone(self) -> None:
        pixels = random_pixels(20, 30, 4)
        array, tensor, image = pixels.copy(), torch.from_numpy(pixels.copy()), Image.fromarray(pixels)
        tiles = [tile_image(each, image_size=30).pixel_values for each in (array, tensor.permute(2, 0, 1), image)]
        for pixel_values in tiles:
            pixel_values.zero_()
        assert np.array_equal(array, pixels)
        assert np.array_equal(tensor.numpy(), pixels)
        assert np.array_equal(np.array(image), pixels)


def float_image(value: float) -> np.ndarray:
    image = np.full((4, 5, 3), 0.5)
    image[2, 3, 1] = value
    return image


class TestRefused:
    @pytest.mark.parametrize(
        ("image", "error", "says"),
        [
            (float_image(np.nan), ValueError, r"image: expected floats in \[0, 1\], got a float64 array.* nan to nan"),
            (float_image(np.inf), ValueError, r"floats in \[0, 1\].*to inf"),
            (float_image(-np.inf), ValueError, r"floats in \[0, 1\].*from -inf"),
            (float_image(1e300), ValueError, r"floats in \[0, 1\].*to inf"),
            (float_image(1.001), ValueError, r"floats in \[0, 1\].*to 1\.00"),
            (float_image(-0.001), ValueError, r"floats in \[0, 1\].*from -0\.001"),
            (torch.full((3, 4, 5), torch.nan), ValueError, r"floats in \[0, 1\], got a torch.float32 tensor.*nan"),
            (Image.new("F", (4, 5), float("nan")), ValueError, "from 0 to 255, got a PIL image of mode F.* nan"),
            (np.zeros(5, np.uint8), ValueError, r"image: expected.*got a uint8 array of shape \(5,\)"),
            (np.zeros((1, 4, 5, 3), np.uint8), ValueError, r"got a uint8 array of shape \(1, 4, 5, 3\)"),
            (np.zeros((3, 40, 50), np.uint8), ValueError, r"\[height, width, 1, 3 or 4 .*got.*\(3, 40, 50\)"),
            (np.zeros((4, 5, 2), np.uint8), ValueError, r"got a uint8 array of shape \(4, 5, 2\)"),
            (np.zeros((0, 5, 3), np.uint8), ValueError, r"shape \(0, 5, 3\)"),
            (np.zeros((4, 0), np.uint8), ValueError, r"shape \(4, 0\)"),
            (torch.zeros(40, 50, 3), ValueError, r"\[1, 3 or 4 channels, .*tensor of shape \(40, 50, 3\)"),
            (torch.zeros(3, 0, 3), ValueError, r"tensor of shape \(3, 0, 3\)"),
            (torch.zeros(1, 3, 4, 5), ValueError, r"tensor of shape \(1, 3, 4, 5\)"),
            (Image.new("RGB", (0, 5)), ValueError, r"at least one pixel, got .*size \(0, 5\)"),
            (np.zeros((4, 5), np.int64), TypeError, "of uint8, uint16 or floats.*got a int64 array"),
            (np.zeros((4, 5), bool), TypeError, "got a bool array"),
            (np.zeros((4, 5), complex), TypeError, "got a complex128 array"),
            (np.full((4, 5), None), TypeError, "got a object array"),
            (torch.zeros(3, 4, 5, dtype=torch.int32), TypeError, "got a torch.int32 tensor"),
            (torch.zeros(3, 4, 5, device="meta"), TypeError, "got a torch.float32 tensor"),
            (torch.zeros(3, 4, 5).to_sparse(), TypeError, "got a torch.float32 tensor"),
            (None, TypeError, "image: expected a PIL image, a path, a numpy array or a tensor, got NoneType"),
            (b"image.png", TypeError, "got bytes"),
            ([[0, 1], [2, 3]], TypeError, "got list"),
        ],
    )
    def test_pixels(self, image: Any, error: type[Exception], says: str) -> None:
        with pytest.raises(error, match=says):
            tile_image(image)

    @pytest.mark.parametrize("name", ["image_size", "max_tiles"])
    @pytest.mark.parametrize(("value", "error"), [(0, ValueError), ("336", TypeError), (336.0, TypeError)])
    def test_sizes(self, name: str, value: Any, error: type[Exception]) -> None:
        with pytest.raises(error, match=f"{name}: expected an int.*{value}"):
            tile_image(random_pixels(5, 5), **{name: value})

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"image: expected the path.*none\.png.*does not exist"):
            tile_image(tmp_path / "none.png")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="not a regular file"):
            tile_image(tmp_path)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
    def test_a_pipe_does_not_block(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("blocked"))
        signal.alarm(10)
        try:
            with pytest.raises(OSError, match="not a regular file"):
                tile_image(tmp_path / "pipe")
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)

    @pytest.mark.parametrize("content", [b"", b"GIF", b"not an image", bytes(1000)])
    def test_a_file_that_is_no_image(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "image.png"
        path.write_bytes(content)
        with pytest.raises(OSError, match=r"expected a complete image, got the file .*image\.png.*cannot read"):
            tile_image(path)

    @pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"])
    @given(kept=st.floats(0, 0.9))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_a_truncated_file(self, tmp_path: Path, form: str, kept: float) -> None:
        stored, path = io.BytesIO(), tmp_path / "image"
        Image.fromarray(random_pixels(40, 50, 3)).save(stored, form)
        path.write_bytes(stored.getvalue()[: int(kept * len(stored.getvalue()))])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of what is missing before it fails
            with pytest.raises(OSError, match="expected a complete image, got the file"):
                tile_image(path)

    def test_a_truncated_pil_image(self, tmp_path: Path) -> None:
        stored = io.BytesIO()
        Image.fromarray(random_pixels(40, 50, 3)).save(stored, "PNG")
        cut = Image.open(io.BytesIO(stored.getvalue()[:2000]))
        with pytest.raises(OSError, match="expected a complete image, got a PIL image of mode RGB"):
            tile_image(cut)

    @pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "PPM"])
    @given(damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_a_damaged_file_tiles_or_is_refused(self, tmp_path: Path, form: str, damage: list[Any]) -> None:
        stored, path = io.BytesIO(), tmp_path / "image"
        Image.fromarray(random_pixels(12, 15, 3)).save(stored, form)
        content = bytearray(stored.getvalue())
        for place, byte in damage:
            content[int(place * len(content))] = byte
        path.write_bytes(content)
        with warnings.catch_warnings(), contextlib.suppress(ValueError, OSError):
            warnings.simplefilter("ignore")  # PIL warns of some of the damage
            assert torch.isfinite(tile_image(path, image_size=14).pixel_values).all()

    @pytest.mark.parametrize("pixels", [150, 250])
    @pytest.mark.parametrize("action", ["ignore", "error"])
    def test_a_decompression_bomb(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: int, action: Any
    ) -> None:
        # PIL warns of more pixels than its limit, and raises at more than twice as many.
        path = tmp_path / "bomb.png"
        Image.new("RGB", (pixels, 1)).save(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with warnings.catch_warnings():
            warnings.simplefilter(action, Image.DecompressionBombWarning)
            with pytest.raises(ValueError, match=r"image: .*bomb.*") as raised:
                tile_image(path)
        assert "bomb.png" in str(raised.value)
        assert str(pixels) in str(raised.value)

    def test_a_bomb_already_opened(self, monkeypatch: pytest.MonkeyPatch) -> None:
        image = Image.new("L", (101, 1))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(ValueError, match=r"at most 100 pixels \(PIL.Image.MAX_IMAGE_PIXELS"):
            tile_image(image)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        assert isinstance(tile_image(image), TiledImage)

    def test_a_postscript_program_is_not_run(self, tmp_path: Path) -> None:
        path = tmp_path / "loop.eps"
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n%%EOF\n")
        with pytest.raises(ValueError, match=r"got the file .*loop\.eps.* PostScript"):
            tile_image(path)
