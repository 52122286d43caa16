"""The vision encoders that commands know by name: their sizes, weights, images, batches and peers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from vit_encoder import (
    Llama4ImageSettings,
    Llama4VisionConfig,
    Llama4VisionModel,
    Qwen2_5_VLImageSettings,
    Qwen2_5_VLVisionConfig,
    Qwen2_5_VLVisionModel,
    Qwen3VLImageSettings,
    Qwen3VLVisionConfig,
    Qwen3VLVisionModel,
    TiledImage,
    llama4,
    qwen2_5_vl,
    qwen3_vl,
    tile_image,
)
from vit_encoder.images import ImageInput

from experiments.common import cli
from experiments.common.peers import (
    side_by_side,
    transformers_qwen2_5_vl,
    transformers_qwen3_vl,
    transformers_vision_model,
)
from experiments.common.weights import SEED, VisionEncoder, random_encoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Prepared:
    """An image as an encoder takes it.

    Attributes:
        pixel_values: float32 [tiles, 3, image_size, image_size] or [patches, patch_dim].
        high, wide: its canvas in tiles, or its grid in patches.
    """

    pixel_values: Tensor
    high: int
    wide: int


@dataclass(frozen=True, kw_only=True)
class _Encoder:
    """What commands need to know of an encoder, whatever its images are cut into.

    Attributes:
        title: its name in texts.
        package: of vit_encoder, with the functions `encode_images` and `reference_forward`.
        model, config, settings: the classes of the encoder, its sizes and its images' settings.
        configs: published sizes by name; the first is the default of `--config`.
        features: returns the width of the features.
        peer: makes transformers' encoder on the same weights, or None where that is not installed.
        peer_features: takes the features out of what the peer returns.
        kept: fields of the sizes that change the graph, beside the number of layers.
        depth: the sizes' name for the number of layers.
    """

    title: str
    package: ModuleType
    model: type[VisionEncoder]
    config: Any
    settings: Any
    configs: Mapping[str, Callable[[], Any]]
    features: Callable[[Any], int]
    peer: Callable[[Any], nn.Module | None]
    peer_features: Callable[[Any], Tensor]
    kept: tuple[str, ...] = ()
    depth = "depth"

    def config_of(self, folder: Path | None, name: str) -> Any:
        """Return the sizes of a checkpoint, or without one those of a name."""
        return self.config.from_hf(folder) if folder else self.configs[name]()

    def make(
        self, folder: Path | None, config: Any, *, layers: int | None = None, dtype: torch.dtype, device: torch.device
    ) -> VisionEncoder:
        """Make the encoder with the weights of a checkpoint, or with random ones, cut off after `layers` layers.

        Raises:
            ValueError: the checkpoint has fewer layers; and what `from_pretrained` raises.
        """
        if folder is None:
            config = replace(config, **{self.depth: layers or getattr(config, self.depth)})
            return random_encoder(config, dtype=dtype, device=device)
        model = self.model.from_pretrained(folder, dtype=dtype, device=device)
        if layers is not None:
            if layers > (has := getattr(model.config, self.depth)):
                raise ValueError(f"layers: got {layers}, expected at most the {has} of the checkpoint")
            encoder: Any = getattr(model, "encoder", model)
            encoder.keep_layers(layers)
        return model

    def narrow(self, config: Any) -> Any:
        """Return sizes of the tiny encoder as deep as `config`: the graph depends on the depth and not on the width."""
        return replace(self.config.tiny(), **{name: getattr(config, name) for name in (self.depth, *self.kept)})

    def peer_call(self, model: VisionEncoder, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor] | None:
        """Return a call of transformers' encoder with our weights and inputs; None where it is not installed."""
        peer = self.peer(model)
        # transformers wants all of them on one device.
        on_device = [x.to(inputs[0].device) for x in inputs]
        return None if peer is None else lambda: self.peer_features(peer(*on_device))


@dataclass(frozen=True, kw_only=True)
class TileEncoder(_Encoder):
    """An encoder whose images are cut into tiles of one size: Llama 4's.

    Attributes:
        unit, plural, budget: what an image is cut into, and how many of them a batch has at most by default.
        part: what a time is given for, a tile or an image.
        limit: the option that bounds an image, in tiles or pixels, and on_cpu its default where a CPU takes seconds.
        swept, sizes: the name of the sizes of the main job's batches, and these.
    """

    unit, plural, budget = "tile", "tiles", 34
    part = "tile"
    limit, on_cpu = "max_tiles", 1
    depth = "num_hidden_layers"
    swept = "tile_counts"
    sizes: ClassVar[list[Any]] = [1, 17, 2, 5, 33]

    def settings_of(
        self, folder: Path | None, config: Any, limit: int | None, *, most: int | None = None
    ) -> tuple[Any, int]:
        """Return how images are prepared, as a checkpoint says or as published, and how large one may be.

        Args:
            folder: of the checkpoint; None for the published settings.
            config: the encoder's sizes.
            limit: the bound of an image; None takes that of the settings.
            most: the largest value that is taken from the settings.
        """
        size = {"image_size": config.image_size}
        settings = self.settings.from_hf(folder, **size) if folder else self.settings(**size)
        limit = limit or min(settings.max_tiles, most or settings.max_tiles)
        return replace(settings, max_tiles=limit), limit

    def prepare(self, image: ImageInput, config: Any, settings: Any) -> Prepared:
        """Cut an image; raises OSError, TypeError and ValueError as the package's own function does."""
        tiled = tile_image(image, settings=settings)
        return Prepared(tiled.pixel_values, *tiled.aspect_ratio)

    def inputs(self, prepared: Prepared, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """Return the arguments of the encoder, the pixels first."""
        return (prepared.pixel_values.to(device, dtype),)

    def units(self, high: int, wide: int) -> int:
        """Return the number of tiles or patches; a canvas of more than one tile has a global one too."""
        return high * wide + (high * wide > 1)

    def unit_shape(self, config: Any) -> tuple[int, ...]:
        """Return the shape of the pixels of one tile or patch."""
        return (config.num_channels, config.image_size, config.image_size)

    def tokens(self, units: int, config: Any) -> tuple[int, int]:
        """Return the number of tokens that so many tiles or patches make in the encoder, and of features."""
        return units * config.tokens_per_tile, units * config.output_tokens_per_tile

    def batch(self, size: Any, config: Any, generator: torch.Generator) -> tuple[str, tuple[Tensor, ...]]:
        """Return the name of a batch of one of `sizes`, and the encoder's arguments on the CPU, with random pixels."""
        return f"{size} tile(s)", (torch.randn(size, *self.unit_shape(config), generator=generator),)

    def encode(self, model: VisionEncoder, images: list[Prepared]) -> list[Tensor]:
        """Return the features [tokens, width] of each image, of all images in one call."""
        tiled = [TiledImage(image.pixel_values, (image.high, image.wide)) for image in images]
        features: list[Tensor] = self.package.encode_images(model, tiled)
        return features


@dataclass(frozen=True, kw_only=True)
class PatchEncoder(_Encoder):
    """An encoder whose images keep their aspect ratio and are cut into patches: Qwen's. It does what the other does."""

    unit, plural, budget = "patch", "patches", 16384
    part = "image"
    limit, on_cpu = "max_pixels", 28 * 28 * 256
    swept = "grids"
    # Each a batch: one unit, a mixture with a video, one whole window, as many windows as frames, 1:200, a video.
    sizes: ClassVar[list[Any]] = [
        [[1, 2, 2]],
        [[1, 18, 10], [2, 8, 8], [1, 2, 40]],
        [[1, 8, 8]],
        [[1, 2, 2]] * 9,
        [[1, 2, 400]],
        [[4, 6, 14]],
    ]

    def settings_of(
        self, folder: Path | None, config: Any, limit: int | None, *, most: int | None = None
    ) -> tuple[Any, int]:
        settings = self.settings.from_hf(folder) if folder else self.settings()
        image = settings.image
        limit = limit or min(image.max_pixels, most or image.max_pixels)
        low = min(image.min_pixels, limit)
        return replace(settings, image=replace(image, min_pixels=low, max_pixels=limit)), limit

    def prepare(self, image: ImageInput, config: Any, settings: Any) -> Prepared:
        patched = self.package.patch_image(image, config, settings=settings)
        return Prepared(patched.pixel_values, *patched.grid_thw[0, 1:].tolist())

    def inputs(self, prepared: Prepared, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        return prepared.pixel_values.to(device, dtype), torch.tensor([[1, prepared.high, prepared.wide]])

    def units(self, high: int, wide: int) -> int:
        return high * wide

    def unit_shape(self, config: Any) -> tuple[int, ...]:
        return (config.patch_dim,)

    def tokens(self, units: int, config: Any) -> tuple[int, int]:
        return units, units // config.merge_unit

    def batch(self, size: Any, config: Any, generator: torch.Generator) -> tuple[str, tuple[Tensor, ...]]:
        grid_thw = torch.tensor(size)
        patches = int(grid_thw.prod(dim=1).sum())
        return f"the grids {size}", (torch.randn(patches, config.patch_dim, generator=generator), grid_thw)

    def encode(self, model: VisionEncoder, images: list[Prepared]) -> list[Tensor]:
        grids = [torch.tensor([[1, image.high, image.wide]]) for image in images]
        pairs = zip(images, grids, strict=True)
        patched = [self.package.PatchedImage(image.pixel_values, grid_thw) for image, grid_thw in pairs]
        features: list[Tensor] = self.package.encode_images(model, patched)
        return features


Encoder: TypeAlias = TileEncoder | PatchEncoder

ENCODERS: dict[str, Encoder] = {
    "llama4": TileEncoder(
        title="Llama 4",
        package=llama4,
        model=Llama4VisionModel,
        config=Llama4VisionConfig,
        settings=Llama4ImageSettings,
        configs={"scout": Llama4VisionConfig.scout, "tiny": Llama4VisionConfig.tiny},
        features=lambda config: config.vision_output_dim,
        peer=transformers_vision_model,
        peer_features=lambda output: output.last_hidden_state,
    ),
    "qwen2_5_vl": PatchEncoder(
        title="Qwen2.5-VL",
        package=qwen2_5_vl,
        model=Qwen2_5_VLVisionModel,
        config=Qwen2_5_VLVisionConfig,
        settings=Qwen2_5_VLImageSettings,
        configs={
            "7b": Qwen2_5_VLVisionConfig.qwen2_5_vl_7b,
            "3b": Qwen2_5_VLVisionConfig.qwen2_5_vl_3b,
            "32b": Qwen2_5_VLVisionConfig.qwen2_5_vl_32b,
            "72b": Qwen2_5_VLVisionConfig.qwen2_5_vl_72b,
            "tiny": Qwen2_5_VLVisionConfig.tiny,
        },
        features=lambda config: config.out_hidden_size,
        peer=transformers_qwen2_5_vl,
        peer_features=lambda output: output.pooler_output,
        kept=("fullatt_block_indexes",),
    ),
    "qwen3_vl": PatchEncoder(
        title="Qwen3-VL",
        package=qwen3_vl,
        model=Qwen3VLVisionModel,
        config=Qwen3VLVisionConfig,
        settings=Qwen3VLImageSettings,
        configs={
            "8b": Qwen3VLVisionConfig.qwen3_vl_8b,
            "2b": Qwen3VLVisionConfig.qwen3_vl_2b,
            "4b": Qwen3VLVisionConfig.qwen3_vl_4b,
            "30b-a3b": Qwen3VLVisionConfig.qwen3_vl_30b_a3b,
            "32b": Qwen3VLVisionConfig.qwen3_vl_32b,
            "3.5-0.8b": Qwen3VLVisionConfig.qwen3_5_0_8b,
            "3.5-27b": Qwen3VLVisionConfig.qwen3_5_27b,
            "3.5-35b-a3b": Qwen3VLVisionConfig.qwen3_5_35b_a3b,
            "3.5-397b-a17b": Qwen3VLVisionConfig.qwen3_5_397b_a17b,
            "tiny": Qwen3VLVisionConfig.tiny,
        },
        features=lambda config: config.feature_width,
        peer=transformers_qwen3_vl,
        peer_features=side_by_side,
        kept=("deepstack_visual_indexes",),
    ),
}


def add_options(parser: argparse.ArgumentParser, *, lower_on_cpu: bool = False) -> None:
    """Add the options that say which encoder, with which weights, and how large an image may be, or on a CPU is."""
    parser.add_argument("--model", choices=ENCODERS, default="llama4", help="the encoder (default: %(default)s)")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint", type=Path, help=f"folder with config.json and safetensors (default: random, seed {SEED})"
    )
    names = dict.fromkeys(name for encoder in ENCODERS.values() for name in encoder.configs)
    first = ", ".join(f"{next(iter(encoder.configs))} for {name}" for name, encoder in ENCODERS.items())
    weights.add_argument("--config", choices=list(names), help=f"sizes of random weights (default: {first})")
    for option, what, published, on_cpu in (
        ("--max-tiles", "most tiles of a canvas, for Llama 4", "16", TileEncoder.on_cpu),
        ("--max-pixels", "most pixels of a resized image, for Qwen", "its published ones", PatchEncoder.on_cpu),
    ):
        lower = f"; on a CPU {on_cpu}" if lower_on_cpu else ""
        default = f"(default: the checkpoint's, without one {published}{lower})"
        parser.add_argument(option, type=cli.positive, help=f"{what} {default}")


def chosen(options: argparse.Namespace) -> Encoder:
    """Return the encoder that the options name, and fill in the default of --config.

    Raises:
        ValueError: sizes of another encoder, or a bound that only another one has.
    """
    encoder = ENCODERS[options.model]
    options.config = options.config or next(iter(encoder.configs))
    if options.config not in encoder.configs:
        raise ValueError(f"--config: got {options.config!r}, expected one of {', '.join(encoder.configs)}")
    for other in ("max_tiles", "max_pixels"):
        if other != encoder.limit and getattr(options, other) is not None:
            raise ValueError(f"--{other.replace('_', '-')}: not for --model {options.model}")
    return encoder
